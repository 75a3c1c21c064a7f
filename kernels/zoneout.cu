// zoneout: an update of a state of which elements are left as they were. Twin of src/functional/zoneout/cpu.rs.
//
//     forward   y = keep ? new : old
//     backward  dnew = keep ? dy : 0          dold = keep ? 0 : dy
//
// fresh (new), old, y, dy, dnew, dold [rows, cols]. Bytes moved an element: two reads and one write forward, one read
// and two writes backward; no mask.
// Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
#include "elem.cuh"
#include "philox.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void zoneout_tiles(const T* __restrict__ fresh, const T* __restrict__ old,
                                              T* __restrict__ y, uint64_t rows, uint64_t cols,
                                              const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched_fresh[N], fetched_old[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            fetched_fresh[i].fetch(fresh + start + col, count_at(col, cols));
            fetched_old[i].fetch(old + start + col, count_at(col, cols));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
            float v[WIDTH], o[WIDTH];
            fetched_fresh[i].widen(v);
            fetched_old[i].widen(o);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] = keeps(mask, draws[j]) ? v[j] : o[j];
            store<VECTOR>(y + start + col, count_at(col, cols), v);
        }
    });
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void split_tiles(const T* __restrict__ dy, T* __restrict__ dnew, T* __restrict__ dold,
                                            uint64_t rows, uint64_t cols, const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col < cols) fetched[i].fetch(dy + start + col, count_at(col, cols));  // tail
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
            float v[WIDTH], o[WIDTH];
            fetched[i].widen(v);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const bool keep = keeps(mask, draws[j]);
                o[j] = keep ? 0.f : v[j];
                v[j] = keep ? v[j] : 0.f;
            }
            store<VECTOR>(dnew + start + col, count_at(col, cols), v);
            store<VECTOR>(dold + start + col, count_at(col, cols), o);
        }
    });
}

template <typename T>
__device__ __forceinline__ void zoneout_fwd(const T* __restrict__ fresh, const T* __restrict__ old,
                                            T* __restrict__ y, uint64_t rows, uint64_t cols, const MaskArgs& mask) {
    if (rows_are_vectors(cols, fresh, old, y) && is_drawn_whole(mask)) {
        zoneout_tiles<true>(fresh, old, y, rows, cols, mask);
    } else {
        zoneout_tiles<false>(fresh, old, y, rows, cols, mask);
    }
}

template <typename T>
__device__ __forceinline__ void zoneout_bwd(const T* __restrict__ dy, T* __restrict__ dnew, T* __restrict__ dold,
                                            uint64_t rows, uint64_t cols, const MaskArgs& mask) {
    if (rows_are_vectors(cols, dy, dnew, dold) && is_drawn_whole(mask)) {
        split_tiles<true>(dy, dnew, dold, rows, cols, mask);
    } else {
        split_tiles<false>(dy, dnew, dold, rows, cols, mask);
    }
}

// Without a bound on registers ptxas takes 64 and spills; with 3 blocks of halves, 2 of f32, it does not.
#define ZONEOUT(SUFFIX, T)                                                                                         \
    KERNEL(256, sizeof(T) == 2 ? 3 : 2)                                                                            \
    zoneout_fwd_##SUFFIX(const T* __restrict__ fresh, const T* __restrict__ old, T* __restrict__ y, uint64_t rows, \
                         uint64_t cols, MaskArgs mask) {                                                           \
        zoneout_fwd(fresh, old, y, rows, cols, mask);                                                              \
    }                                                                                                              \
    KERNEL(256)                                                                                                    \
    zoneout_bwd_##SUFFIX(const T* __restrict__ dy, T* __restrict__ dnew, T* __restrict__ dold, uint64_t rows,      \
                         uint64_t cols, MaskArgs mask) {                                                           \
        zoneout_bwd(dy, dnew, dold, rows, cols, mask);                                                             \
    }
FOR_EACH_DTYPE(ZONEOUT)
