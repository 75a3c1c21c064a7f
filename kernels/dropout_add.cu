// dropout_add: the dropout of a biased branch, added to its residual stream. Twin of
// src/functional/dropout_add/cpu.rs.
//
//     forward   y = residual + (keep ? (x + bias) * scale : 0)
//     backward  dx = dropout of dy: kernel dropout_fwd
//               dresidual = dy
//               dbias = column sums of the dropped dy: kernel column_sums_fwd
//
// x, residual, y [rows, cols]; bias [cols], may be null. Bytes moved an element: two reads, one write.
// Block (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
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
