// dropout: zeroes elements at random and scales the others. Twin of src/functional/dropout/cpu.rs.
//
//     forward   y  = keep ? x * scale : 0
//     backward  dx = keep ? dy * scale : 0          the forward kernel, applied to dy
//
// x, y [rows, cols]. Bytes moved an element: one read, one write; no mask.
// Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
#include "elem.cuh"
#include "philox.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void dropout_tiles(const T* __restrict__ x, T* __restrict__ y, uint64_t rows,
                                              uint64_t cols, const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const T* x_row = x + row * cols;
        T* y_row = y + row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col < cols) fetched[i].fetch(x_row + col, count_at(col, cols));  // tail
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
            float v[WIDTH];
            fetched[i].widen(v);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                v[j] = keeps(mask, draws[j]) ? __fmul_rn(v[j], mask.scale) : 0.f;
            }
            store<VECTOR>(y_row + col, count_at(col, cols), v);
        }
    });
}

template <typename T>
__device__ __forceinline__ void dropout_fwd(const T* __restrict__ x, T* __restrict__ y, uint64_t rows,
                                            uint64_t cols, const MaskArgs& mask) {
    if (rows_are_vectors(cols, x, y) && is_drawn_whole(mask)) {
        dropout_tiles<true>(x, y, rows, cols, mask);
    } else {
        dropout_tiles<false>(x, y, rows, cols, mask);
    }
}

#define DROPOUT(SUFFIX, T)                                                                              \
    KERNEL(256) dropout_fwd_##SUFFIX(const T* __restrict__ x, T* __restrict__ y, uint64_t rows,         \
                                     uint64_t cols, MaskArgs mask) { dropout_fwd(x, y, rows, cols, mask); }
FOR_EACH_DTYPE(DROPOUT)
