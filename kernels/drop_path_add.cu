// drop_path_add: a residual branch that is dropped as a whole, sample by sample. Twin of
// src/functional/drop_path_add/cpu.rs.
//
//     forward   y[n] = residual[n] + (keep[n] ? x[n] * scale : 0)
//     backward  dx[n] = keep[n] ? dy[n] * scale : 0     the same kernel without a residual
//               dresidual = dy
//
// x, residual, y [samples, size]; the mask is [1, samples]; residual may be null.
// Bytes moved an element: kept two reads and one write, dropped one read and one write.
// Block (lanes of a team, teams), grid-stride over tiles of a sample; see for_each_tile. All threads of a
// team draw the same number, which costs less than passing it round.
#include "elem.cuh"
#include "philox.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void drop_path_add_tiles(const T* __restrict__ x, const T* __restrict__ residual,
                                                    T* __restrict__ y, uint64_t samples, uint64_t size,
                                                    const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(samples, size, [&](uint64_t sample, uint64_t first, uint64_t step) {
        const uint64_t start = sample * size;
        const bool keep = keeps(mask, draw_unaligned(mask, mask.rows.map(0), sample)[0]);
        Fetched<VECTOR, T> fetched_x[N], fetched_residual[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t at = first + i * step;
            if (at >= size) break;  // tail
            if (keep) fetched_x[i].fetch(x + start + at, count_at(at, size));
            if (residual) fetched_residual[i].fetch(residual + start + at, count_at(at, size));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t at = first + i * step;
            if (at >= size) break;  // tail
            float v[WIDTH], r[WIDTH];
            if (keep) fetched_x[i].widen(v);
            if (residual) fetched_residual[i].widen(r);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float branch = keep ? __fmul_rn(v[j], mask.scale) : 0.f;
                if (!residual) {
                    r[j] = branch;
                } else if (keep) {
                    r[j] = __fadd_rn(r[j], branch);
                }
            }
            store<VECTOR>(y + start + at, count_at(at, size), r);
        }
    });
}

template <typename T>
__device__ __forceinline__ void drop_path_add_fwd(const T* __restrict__ x, const T* __restrict__ residual,
                                                  T* __restrict__ y, uint64_t samples, uint64_t size,
                                                  const MaskArgs& mask) {
    if (rows_are_vectors(size, x, residual, y)) {
        drop_path_add_tiles<true>(x, residual, y, samples, size, mask);
    } else {
        drop_path_add_tiles<false>(x, residual, y, samples, size, mask);
    }
}

#define DROP_PATH_ADD(SUFFIX, T)                                                                           \
    KERNEL(256) drop_path_add_fwd_##SUFFIX(const T* __restrict__ x, const T* __restrict__ residual,        \
                                           T* __restrict__ y, uint64_t samples, uint64_t size,             \
                                           MaskArgs mask) {                                                \
        drop_path_add_fwd(x, residual, y, samples, size, mask);                                            \
    }
FOR_EACH_DTYPE(DROP_PATH_ADD)
