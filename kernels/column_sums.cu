// column_sums: the column sums of what a mask keeps. Twin of src/functional/column_sums/cpu.rs.
//
//     forward   y[c] = sum over rows of (keep ? x * scale : 0)
//
// x [rows, cols]; y [cols]. Bytes moved an element: one read.
// A block sums 256 columns over its share of the rows, in a fixed order; a second kernel adds up the blocks'
// sums. So the result is the same at every run.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
#include "elem.cuh"
#include "philox.cuh"

// Block (32 lanes of 8 columns, TEAMS rows at a time), grid (column blocks, row chunks).
constexpr int LANES = 32;
constexpr int TEAMS = 8;

// sums [gridDim.y, cols]: the column sums of each chunk of rows.
template <bool VECTOR, typename T>
__device__ __forceinline__ void column_sums_of_block(const T* __restrict__ x, float* __restrict__ sums,
                                                     uint64_t rows, uint64_t cols, const MaskArgs& mask,
                                                     float (*partial)[LANES * WIDTH]) {
    const uint64_t col = (uint64_t(blockIdx.x) * LANES + threadIdx.x) * WIDTH;
    const int count = count_at(col, cols);
    float sum[WIDTH] = {};
    if (count > 0) {  // tail
        for (uint64_t row = uint64_t(blockIdx.y) * TEAMS + threadIdx.y; row < rows;
             row += uint64_t(gridDim.y) * TEAMS) {
            float v[WIDTH];
            load<VECTOR>(x + row * cols + col, count, v);
            const uint64_t mask_row = mask.rows.map(row);
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                sum[j] += keeps(mask, draws[j]) ? v[j] * mask.scale : 0.f;
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
__device__ __forceinline__ void column_sums_fwd(const T* __restrict__ x, float* __restrict__ sums, uint64_t rows,
                                                uint64_t cols, const MaskArgs& mask) {
    __shared__ float partial[TEAMS][LANES * WIDTH];
    if (rows_are_vectors(cols, x) && is_drawn_whole(mask)) {
        column_sums_of_block<true>(x, sums, rows, cols, mask, partial);
    } else {
        column_sums_of_block<false>(x, sums, rows, cols, mask, partial);
    }
}

template <typename T>
__device__ __forceinline__ void column_sums_fwd_total(const float* __restrict__ sums, T* __restrict__ y,
                                                      uint64_t chunks, uint64_t cols) {
    for (uint64_t col = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; col < cols;
         col += uint64_t(gridDim.x) * blockDim.x) {
        float total = 0.f;
        for (uint64_t chunk = 0; chunk < chunks; ++chunk) total += sums[chunk * cols + col];
        y[col] = narrow<T>(total);
    }
}

#define COLUMN_SUMS(SUFFIX, T)                                                                            \
    KERNEL(LANES * TEAMS) column_sums_fwd_##SUFFIX(const T* __restrict__ x, float* __restrict__ sums,     \
                                                   uint64_t rows, uint64_t cols, MaskArgs mask) {         \
        column_sums_fwd(x, sums, rows, cols, mask);                                                       \
    }                                                                                                     \
    KERNEL(256) column_sums_fwd_total_##SUFFIX(const float* __restrict__ sums, T* __restrict__ y,         \
                                               uint64_t chunks, uint64_t cols) {                          \
        column_sums_fwd_total(sums, y, chunks, cols);                                                     \
    }
FOR_EACH_DTYPE(COLUMN_SUMS)
