// broadcast_dropout: one decision for a group of elements. Twin of src/functional/broadcast_dropout/cpu.rs.
//
//     forward   y  = keep ? x * scale + shift : fill
//     backward  dx = keep ? dy * scale + -0   : 0        the forward kernel, applied to dy
//
// x, y [rows, cols]. Bytes moved an element: kept one read and one write, of groups that are dropped one write.
// What a group is, by mask_cols:
//     0      each column of a row; rows of the mask that are shared come out of mask.rows, with strides of 0
//     else   each row: number r is at row map(r / mask_cols) and column r % mask_cols of the mask; r is the number of
//            the tensor's row, or of its word where there are ids [rows]
// Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile. All threads of a team draw the
// decision of their row, which costs less than passing it round.
// Vectors of 16 bytes where rows begin at such boundaries, else element by element.
#include "elem.cuh"
#include "philox.cuh"

template <bool VECTOR, bool BY_ROW, typename T>
__device__ __forceinline__ void broadcast_dropout_tiles(const T* __restrict__ x, const uint32_t* __restrict__ ids,
                                                        T* __restrict__ y, uint64_t rows, uint64_t cols,
                                                        uint64_t mask_cols, float scale, float shift, float fill,
                                                        const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const T* x_row = x + row * cols;
        T* y_row = y + row * cols;
        uint64_t mask_row;
        bool keep_row = true;
        if constexpr (BY_ROW) {
            const uint64_t group = ids ? ids[row] : row;
            mask_row = mask.rows.map(group / mask_cols);
            keep_row = keeps(mask, draw_unaligned(mask, mask_row, group % mask_cols)[0]);
        } else {
            mask_row = mask.rows.map(row);
        }
        Fetched<VECTOR, T> fetched[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col < cols && keep_row) fetched[i].fetch(x_row + col, count_at(col, cols));  // tail
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            float v[WIDTH];
            if (keep_row) fetched[i].widen(v);
            Draws draws = {};
            if constexpr (!BY_ROW) draws = draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const bool keep = BY_ROW ? keep_row : keeps(mask, draws[j]);
                v[j] = keep ? __fadd_rn(__fmul_rn(v[j], scale), shift) : fill;
            }
            store<VECTOR>(y_row + col, count_at(col, cols), v);
        }
    });
}

template <typename T>
__device__ __forceinline__ void broadcast_dropout_fwd(const T* __restrict__ x, const uint32_t* __restrict__ ids,
                                                      T* __restrict__ y, uint64_t rows, uint64_t cols,
                                                      uint64_t mask_cols, float scale, float shift, float fill,
                                                      const MaskArgs& mask) {
    const bool vector = rows_are_vectors(cols, x, y);
    if (mask_cols) {
        if (vector) {
            broadcast_dropout_tiles<true, true>(x, ids, y, rows, cols, mask_cols, scale, shift, fill, mask);
        } else {
            broadcast_dropout_tiles<false, true>(x, ids, y, rows, cols, mask_cols, scale, shift, fill, mask);
        }
    } else if (vector) {
        broadcast_dropout_tiles<true, false>(x, ids, y, rows, cols, mask_cols, scale, shift, fill, mask);
    } else {
        broadcast_dropout_tiles<false, false>(x, ids, y, rows, cols, mask_cols, scale, shift, fill, mask);
    }
}

// Without a bound on registers ptxas takes 64 and spills; with 3 blocks of halves, 2 of f32, it does not.
#define BROADCAST_DROPOUT(SUFFIX, T)                                                                             \
    KERNEL(256, sizeof(T) == 2 ? 3 : 2)                                                                          \
    broadcast_dropout_fwd_##SUFFIX(const T* __restrict__ x, const uint32_t* __restrict__ ids, T* __restrict__ y, \
                                   uint64_t rows, uint64_t cols, uint64_t mask_cols, float scale, float shift,   \
                                   float fill, MaskArgs mask) {                                                  \
        broadcast_dropout_fwd(x, ids, y, rows, cols, mask_cols, scale, shift, fill, mask);                       \
    }
FOR_EACH_DTYPE(BROADCAST_DROPOUT)
