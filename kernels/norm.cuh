// The norm of a row: what the norm alone and that of a residual stream share, so that they agree bit for bit.
//
//     n = (row - mean) * rstd * weight + bias        rstd = 1 / sqrt(variance + eps)
//
// RMSNorm: removes_mean is 0, and the mean is not taken. A team of blockDim.x threads (a power of two, 4 to 256)
// takes a row; threadIdx.y counts the teams of a block, the grid strides over the rows. A thread keeps TILE
// vectors of its row in registers; a row longer than 256 * TILE * 8 = 8192 columns is read again for each step
// instead, mostly from L2.
#pragma once

#include "elem.cuh"
#include "reduce.cuh"

// Threads of a block.
constexpr int THREADS = 256;

// The vectors of a row that a thread keeps, with zeros behind its end, and the statistics of the row.
template <bool VECTOR, bool RESIDENT, typename T>
struct Row {
    static constexpr int N = KEPT<RESIDENT>;
    const T* row;
    uint64_t cols;
    float mean;
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
        Fetched<VECTOR, T> fetched[N];
        auto fetch = [&](int i, uint64_t col) {
            if (col < cols) fetched[i].fetch(row + col, count_at(col, cols));  // tail
        };
        for_each_vector<N>(cols, fetch, [&](int i, uint64_t col) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[i][j] = 0.f;
            if (col < cols) fetched[i].widen(v[i]);  // tail
        });
    }

    // From v if it holds the row, else from memory. All threads of the block call it.
    __device__ __forceinline__ void take_statistics(float eps, uint32_t removes_mean, float* scratch) {
        mean = 0.f;
        if (removes_mean) {
            float thread_sum = 0.f;
            for_each_vector<N>(cols, [&](int i, uint64_t col) {
                if (!RESIDENT) load_vector_at(i, col);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) thread_sum += v[i][j];
            });
            mean = team_reduce(thread_sum, scratch, Sum()) / float(cols);
        }
        float thread_squares = 0.f;
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (!RESIDENT) load_vector_at(i, col);
            const int count = count_at(col, cols);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float centered = j < count ? v[i][j] - mean : 0.f;  // tail
                thread_squares += centered * centered;
            }
        });
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
            for (int j = 0; j < WIDTH; ++j) v[i][j] = (v[i][j] - mean) * rstd * w[j] + b[j];
            store<VECTOR>(n + col, count, v[i]);
        });
    }
};
