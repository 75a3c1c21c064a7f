// dropout_add: the dropout of a biased branch, added to its residual stream. Twin of
// src/ops/dropout_add/cpu.rs.
//
//     forward   y = residual + (keep ? (x + bias) * scale : 0)
//     backward  dx = dropout of dy: kernel dropout_fwd
//               dresidual = dy
//               dbias[c] = sum over rows of (keep ? dy * scale : 0)
//
// x, residual, y, dy [rows, cols]; bias, dbias [cols], bias may be null.
// Bytes moved an element: forward two reads, one write; dbias one read.
// Forward: block (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// dbias: a block sums 256 columns over its share of the rows, in a fixed order; a second kernel adds up
// the blocks' sums. So the result is the same at every run.
#include "elem.cuh"
#include "philox.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void dropout_add_tiles(const T* __restrict__ x, const T* __restrict__ residual,
                                                  const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,
                                                  uint64_t cols, const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched_x[N], fetched_residual[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            fetched_x[i].fetch(x + start + col, count_at(col, cols));
            fetched_residual[i].fetch(residual + start + col, count_at(col, cols));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
            float v[WIDTH], r[WIDTH], b[WIDTH] = {};
            fetched_x[i].widen(v);
            fetched_residual[i].widen(r);
            if (bias) load<VECTOR>(bias + col, count_at(col, cols), b);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float branch = bias ? __fadd_rn(v[j], b[j]) : v[j];
                const float kept = __fadd_rn(r[j], __fmul_rn(branch, mask.scale));
                r[j] = keeps(mask, draws[j]) ? kept : r[j];
            }
            store<VECTOR>(y + start + col, count_at(col, cols), r);
        }
    });
}

template <typename T>
__device__ __forceinline__ void dropout_add_fwd(const T* __restrict__ x, const T* __restrict__ residual,
                                                const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,
                                                uint64_t cols, const MaskArgs& mask) {
    if (rows_are_vectors(cols, x, residual, bias, y) && is_drawn_whole(mask)) {
        dropout_add_tiles<true>(x, residual, bias, y, rows, cols, mask);
    } else {
        dropout_add_tiles<false>(x, residual, bias, y, rows, cols, mask);
    }
}

#define DROPOUT_ADD(SUFFIX, T)                                                                            \
    KERNEL(256) dropout_add_fwd_##SUFFIX(const T* __restrict__ x, const T* __restrict__ residual,         \
                                         const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,    \
                                         uint64_t cols, MaskArgs mask) {                                  \
        dropout_add_fwd(x, residual, bias, y, rows, cols, mask);                                          \
    }
FOR_EACH_DTYPE(DROPOUT_ADD)

// Block (32 lanes of 8 columns, TEAMS rows at a time), grid (column blocks, row chunks).
constexpr int LANES = 32;
constexpr int TEAMS = 8;

// sums [gridDim.y, cols]: the column sums of each chunk of rows.
template <bool VECTOR, typename T>
__device__ __forceinline__ void column_sums_of_block(const T* __restrict__ dy, float* __restrict__ sums,
                                                     uint64_t rows, uint64_t cols, const MaskArgs& mask,
                                                     float (*partial)[LANES * WIDTH]) {
    const uint64_t col = (uint64_t(blockIdx.x) * LANES + threadIdx.x) * WIDTH;
    const int count = count_at(col, cols);
    float sum[WIDTH] = {};
    if (count > 0) {  // tail
        for (uint64_t row = uint64_t(blockIdx.y) * TEAMS + threadIdx.y; row < rows;
             row += uint64_t(gridDim.y) * TEAMS) {
            float g[WIDTH];
            load<VECTOR>(dy + row * cols + col, count, g);
            const uint64_t mask_row = mask.rows.map(row);
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                sum[j] += keeps(mask, draws[j]) ? g[j] * mask.scale : 0.f;
            }
        }
    }
    // Transposed, so that neighbouring lanes write and read neighbouring words: no bank conflicts.
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) partial[threadIdx.y][j * LANES + threadIdx.x] = sum[j];
    __syncthreads();
    const int lane = threadIdx.x, j = threadIdx.y;  // TEAMS == WIDTH: one column a thread
    float total = 0.f;
#pragma unroll
    for (int team = 0; team < TEAMS; ++team) total += partial[team][j * LANES + lane];
    if (j < count) sums[uint64_t(blockIdx.y) * cols + col + j] = total;  // tail
}

template <typename T>
__device__ __forceinline__ void column_sums(const T* __restrict__ dy, float* __restrict__ sums, uint64_t rows,
                                            uint64_t cols, const MaskArgs& mask) {
    __shared__ float partial[TEAMS][LANES * WIDTH];
    if (rows_are_vectors(cols, dy) && is_drawn_whole(mask)) {
        column_sums_of_block<true>(dy, sums, rows, cols, mask, partial);
    } else {
        column_sums_of_block<false>(dy, sums, rows, cols, mask, partial);
    }
}

template <typename T>
__device__ __forceinline__ void column_sums_total(const float* __restrict__ sums, T* __restrict__ dbias,
                                                  uint64_t chunks, uint64_t cols) {
    for (uint64_t col = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; col < cols;
         col += uint64_t(gridDim.x) * blockDim.x) {
        float total = 0.f;
        for (uint64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * cols + col];
        dbias[col] = narrow<T>(total);
    }
}

#define DROPOUT_ADD_BIAS(SUFFIX, T)                                                                           \
    KERNEL(LANES * TEAMS) dropout_add_bwd_bias_##SUFFIX(const T* __restrict__ dy, float* __restrict__ sums,   \
                                                        uint64_t rows, uint64_t cols, MaskArgs mask) {        \
        column_sums(dy, sums, rows, cols, mask);                                                              \
    }                                                                                                         \
    KERNEL(256) dropout_add_bwd_bias_total_##SUFFIX(const float* __restrict__ sums, T* __restrict__ dbias,    \
                                                    uint64_t chunks, uint64_t cols) {                         \
        column_sums_total(sums, dbias, chunks, cols);                                                         \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_BIAS)
