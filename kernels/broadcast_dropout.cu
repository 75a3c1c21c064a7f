// broadcast_dropout: one decision for a group of elements. Twin of src/functional/broadcast_dropout/cpu.rs.
//
//     forward   y  = keep ? x * scale + shift : fill
//     backward  dx = keep ? dy * scale + -0   : 0        the forward kernel, applied to dy
//
// x, y [rows, cols]. Bytes moved an element: kept one read and one write, of groups that are dropped one write.
// What a group is, by mask_cols and repeat:
//     0, 1   each column of a row
//     0, n   each column of n rows, which have one row of the mask
//     else   each row: number r is at row map(r / mask_cols) and column r % mask_cols of the mask; r is the number of
//            the tensor's row, or of its word where there are ids [rows]
// Block: (lanes of a team, teams), grid-stride over tiles; see for_each_tile. The vectors that a thread holds lie side
// by side in a row or, where rows repeat a decision, one below the other: a draw serves all of them. All threads of a
// team draw the decision of their row, which costs less than passing it round.
// Vectors of 16 bytes where rows begin at such boundaries, else element by element.
#include "elem.cuh"
#include "philox.cuh"

enum Group { COLUMN, COLUMN_OF_ROWS, ROW };

template <bool VECTOR, Group GROUP, typename T>
__device__ __forceinline__ void broadcast_dropout_tiles(const T* __restrict__ x, const uint32_t* __restrict__ ids,
                                                        T* __restrict__ y, uint64_t rows, uint64_t cols,
                                                        uint64_t mask_cols, uint64_t repeat, float scale, float shift,
                                                        float fill, const MaskArgs& mask) {
    constexpr bool TALL = GROUP == COLUMN_OF_ROWS;
    constexpr int N = TALL && !VECTOR ? 2 : TILE_OF<VECTOR>;
    const uint64_t tall_a_repeat = TALL ? (repeat + N - 1) / N : 1;
    const uint64_t tall_rows = TALL ? rows / repeat * tall_a_repeat : rows;
    for_each_tile<TALL ? 1 : N>(tall_rows, cols, [&](uint64_t tall_row, uint64_t first, uint64_t step) {
        uint64_t row = tall_row, end = cols;
        if constexpr (TALL) {
            const uint64_t shared = tall_row / tall_a_repeat;
            row = shared * repeat + (tall_row - shared * tall_a_repeat) * N;
            end = (shared + 1) * repeat;
        }
        // Vector i begins at column `first` of row + i, which is below `end`, or at a column of `row` that is.
        const auto exists = [&](int i) { return TALL ? first < cols && row + i < end : first + i * step < end; };
        const auto col_of = [&](int i) { return TALL ? first : first + i * step; };
        const auto at = [&](int i) { return (TALL ? row + i : row) * cols + col_of(i); };

        uint64_t mask_row;
        bool keep_row = true;
        Draws draws = {};
        if constexpr (GROUP == ROW) {
            const uint64_t group = ids ? ids[row] : row;
            mask_row = mask.rows.map(group / mask_cols);
            keep_row = keeps(mask, draw_unaligned(mask, mask_row, group % mask_cols)[0]);
        } else {
            mask_row = mask.rows.map(row);
        }
        Fetched<VECTOR, T> fetched[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (exists(i) && keep_row) fetched[i].fetch(x + at(i), count_at(col_of(i), cols));  // tail
        }
        if constexpr (TALL) draws = draw_unaligned(mask, mask_row, first);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (!exists(i)) break;  // tail
            float v[WIDTH];
            if (keep_row) fetched[i].widen(v);
            if constexpr (GROUP == COLUMN) draws = draw_unaligned(mask, mask_row, col_of(i));
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const bool keep = GROUP == ROW ? keep_row : keeps(mask, draws[j]);
                v[j] = keep ? __fadd_rn(__fmul_rn(v[j], scale), shift) : fill;
            }
            store<VECTOR>(y + at(i), count_at(col_of(i), cols), v);
        }
    });
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void broadcast_dropout_groups(const T* __restrict__ x, const uint32_t* __restrict__ ids,
                                                         T* __restrict__ y, uint64_t rows, uint64_t cols,
                                                         uint64_t mask_cols, uint64_t repeat, float scale, float shift,
                                                         float fill, const MaskArgs& mask) {
    if (mask_cols) {
        broadcast_dropout_tiles<VECTOR, ROW>(x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill, mask);
    } else if (repeat > 1) {
        broadcast_dropout_tiles<VECTOR, COLUMN_OF_ROWS>(x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill,
                                                        mask);
    } else {
        broadcast_dropout_tiles<VECTOR, COLUMN>(x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill, mask);
    }
}

// Without a bound on registers ptxas takes 64 and spills; with 3 blocks of halves, 2 of f32, it does not.
#define BROADCAST_DROPOUT(SUFFIX, T)                                                                                   \
    KERNEL(256, sizeof(T) == 2 ? 3 : 2)                                                                                \
    broadcast_dropout_fwd_##SUFFIX(const T* __restrict__ x, const uint32_t* __restrict__ ids, T* __restrict__ y,       \
                                   uint64_t rows, uint64_t cols, uint64_t mask_cols, uint64_t repeat, float scale,     \
                                   float shift, float fill, MaskArgs mask) {                                           \
        if (rows_are_vectors(cols, x, y)) {                                                                            \
            broadcast_dropout_groups<true>(x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill, mask);        \
        } else {                                                                                                       \
            broadcast_dropout_groups<false>(x, ids, y, rows, cols, mask_cols, repeat, scale, shift, fill, mask);       \
        }                                                                                                              \
    }
FOR_EACH_DTYPE(BROADCAST_DROPOUT)
