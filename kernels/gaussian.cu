// gaussian: noise that is added or that multiplies, and samples of a distribution. Twin of
// src/functional/gaussian/cpu.rs.
//
//     forward   y = a + b * (z * scale)      z standard normal
//     backward  by the forward kernel: of the noise that multiplies (a = b = dy), of a deviation (b = dy alone)
//
// a, b, y [rows, cols]; a may be null and stands for 0 then, b for 1. Bytes moved an element: a read for each of a and
// b that is there (one if they are the same), one write; no noise.
// Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the noise at a multiple of 4 columns, else element by
// element.
#include "normal.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void gaussian_tiles(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                                               uint64_t rows, uint64_t cols, float scale, const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched_a[N], fetched_b[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            if (a) fetched_a[i].fetch(a + start + col, count_at(col, cols));
            if (b) fetched_b[i].fetch(b + start + col, count_at(col, cols));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            float z[WIDTH], v[WIDTH];
            normals<VECTOR>(mask, mask_row, col, z);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) z[j] = __fmul_rn(z[j], scale);
            if (b) {
                fetched_b[i].widen(v);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) z[j] = __fmul_rn(v[j], z[j]);
            }
            if (a) {
                fetched_a[i].widen(v);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) z[j] = __fadd_rn(v[j], z[j]);
            }
            store<VECTOR>(y + start + col, count_at(col, cols), z);
        }
    });
}

template <typename T>
__device__ __forceinline__ void gaussian_fwd(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y,
                                             uint64_t rows, uint64_t cols, float scale, const MaskArgs& mask) {
    if (rows_are_vectors(cols, a, b, y) && is_wide_drawn_whole(mask)) {
        gaussian_tiles<true>(a, b, y, rows, cols, scale, mask);
    } else {
        gaussian_tiles<false>(a, b, y, rows, cols, scale, mask);
    }
}

#define GAUSSIAN(SUFFIX, T)                                                                               \
    KERNEL(256) gaussian_fwd_##SUFFIX(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, \
                                      uint64_t rows, uint64_t cols, float scale, MaskArgs mask) {         \
        gaussian_fwd(a, b, y, rows, cols, scale, mask);                                                   \
    }
FOR_EACH_DTYPE(GAUSSIAN)
