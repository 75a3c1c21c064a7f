// The norm of a row: what the norm alone and that of a residual stream share, so that they agree bit for bit.
//
//     n = (row - mean) * rstd * weight + bias        rstd = 1 / sqrt(variance + eps)
//
// A mean is rounded, and what it was rounded by is left in every column, so it is removed in two parts: the mean,
// no further off than the range of the row, and the mean of what that leaves. Of a constant row nothing is left.
// RMSNorm: removes_mean is 0, and the mean is not taken. A team of blockDim.x threads (a power of two, 4 to 256)
// takes a row; threadIdx.y counts the teams of a block, the grid strides over the rows. A thread keeps TILE
// vectors of its row in registers; a row longer than 256 * TILE * 8 = 8192 columns is read again for each step
// instead, mostly from L2.
#pragma once

#include "elem.cuh"
#include "reduce.cuh"

// Threads of a block.
constexpr int THREADS = 256;

// Shared memory of the reductions.
constexpr int SCRATCH = 3 * MAX_WARPS;

// Of what a thread, then a team, has seen of a row.
struct Extent {
    // Sum, smallest, largest.
    float of[3] = {0.f, INFINITY, -INFINITY};

    __device__ __forceinline__ void add(float x) {
        of[0] += x;
        of[1] = fminf(of[1], x);
        of[2] = fmaxf(of[2], x);
    }

    // The mean of `cols` elements of the team's row, which no rounding moves out of their range.
    __device__ __forceinline__ float team_mean(uint64_t cols, float* scratch) {
        team_merge(of, scratch, [](float(&a)[3], const float(&b)[3]) {
            a[0] += b[0];
            a[1] = fminf(a[1], b[1]);
            a[2] = fmaxf(a[2], b[2]);
        });
        return fminf(fmaxf(of[0] / float(cols), of[1]), of[2]);
    }
};

// The vectors of a row that a thread keeps, with zeros behind its end, and the statistics of the row.
template <bool VECTOR, bool RESIDENT, typename T>
struct Row {
    static constexpr int N = KEPT<RESIDENT>;
    const T* row;
    uint64_t cols;
    float mean;
    float rest;  // of the mean, behind what it was rounded to
    float rstd;
    float v[N][WIDTH];

    __device__ __forceinline__ Row(const T* row, uint64_t cols) : row(row), cols(cols) {}

    __device__ __forceinline__ void load_vector_at(int i, uint64_t col) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) v[i][j] = 0.f;
        if (col < cols) load<VECTOR>(row + col, count_at(col, cols), v[i]);  // tail
    }

    // All of them, so that the loads are in flight together.
    __device__ __forceinline__ void load_vectors() {
        Fetched<VECTOR, T> fetched[N] = {};
        auto fetch = [&](int i, uint64_t col) {
            if (col < cols) fetched[i].fetch(row + col, count_at(col, cols));  // tail
        };
        for_each_vector<N>(cols, fetch, [&](int i, uint64_t) { fetched[i].widen(v[i]); });
    }

    __device__ __forceinline__ float centered(int i, int j) const { return (v[i][j] - mean) - rest; }

    // body(i, j) for the elements of the thread that exist, from v if it holds the row, else from memory.
    template <typename Body>
    __device__ __forceinline__ void for_each_element(Body body) {
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (!RESIDENT) load_vector_at(i, col);
            const int count = count_at(col, cols);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                if (j < count) body(i, j);  // tail
            }
        });
    }

    // All threads of the block call it.
    __device__ __forceinline__ void take_statistics(float eps, uint32_t removes_mean, float* scratch) {
        mean = rest = 0.f;
        if (removes_mean) {
            Extent extent;
            for_each_element([&](int i, int j) { extent.add(v[i][j]); });
            mean = extent.team_mean(cols, scratch);
            float thread_rest = 0.f;
            for_each_element([&](int i, int j) { thread_rest += v[i][j] - mean; });
            rest = team_reduce(thread_rest, scratch, Sum()) / float(cols);
        }
        float thread_squares = 0.f;
        for_each_element([&](int i, int j) { thread_squares += centered(i, j) * centered(i, j); });
        rstd = 1.f / sqrtf(team_reduce(thread_squares, scratch, Sum()) / float(cols) + eps);
    }

    // n = (row - mean) * rstd * weight + bias, as the same row of another tensor; bias may be null.
    __device__ __forceinline__ void store_norm(const T* weight, const T* bias, T* n) {
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            if (!RESIDENT) load_vector_at(i, col);
            const int count = count_at(col, cols);
            float w[WIDTH], b[WIDTH] = {};
            load<VECTOR>(weight + col, count, w);
            if (bias) load<VECTOR>(bias + col, count, b);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[i][j] = centered(i, j) * rstd * w[j] + b[j];
            store<VECTOR>(n + col, count, v[i]);
        });
    }
};
