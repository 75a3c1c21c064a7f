// drop_path_kept: both ways between a batch and its kept samples. Twin of src/functional/drop_path_kept/cpu.rs.
//
//     y[n] = residual[n] + (places[n] is NOWHERE ? 0 : x[places[n]] * scale)
//
//     gather       places: the kept samples in their order        no residual, scale 1
//     its gradient places: each sample's place among the kept     no residual, scale 1
//     scatter      places: each sample's place among the kept     added to the residual
//     its gradient places: the kept samples in their order        no residual, the same scale
//
// x [.., size]; residual, y [samples, size]; places [samples] u32; residual may be null.
// Bytes moved an element: one write, one read of the residual, one of x where it comes from somewhere.
// Block (lanes of a team, teams), grid-stride over tiles of a sample; see for_each_tile.
#include "elem.cuh"

constexpr uint32_t NOWHERE = 0xffffffffu;

template <bool VECTOR, typename T>
__device__ __forceinline__ void drop_path_kept_tiles(const T* __restrict__ x, const uint32_t* __restrict__ places,
                                                     const T* __restrict__ residual, T* __restrict__ y,
                                                     uint64_t samples, uint64_t size, float scale) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(samples, size, [&](uint64_t sample, uint64_t first, uint64_t step) {
        const uint32_t place = places[sample];
        const bool keep = place != NOWHERE;
        const T* from = x + (keep ? place * size : 0);
        const uint64_t start = sample * size;
        Fetched<VECTOR, T> fetched_x[N], fetched_residual[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t at = first + i * step;
            if (at >= size) break;  // tail
            if (keep) fetched_x[i].fetch(from + at, count_at(at, size));
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
                const float branch = keep ? __fmul_rn(v[j], scale) : 0.f;
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
__device__ __forceinline__ void drop_path_kept_fwd(const T* __restrict__ x, const uint32_t* __restrict__ places,
                                                   const T* __restrict__ residual, T* __restrict__ y,
                                                   uint64_t samples, uint64_t size, float scale) {
    if (rows_are_vectors(size, x, residual, y)) {
        drop_path_kept_tiles<true>(x, places, residual, y, samples, size, scale);
    } else {
        drop_path_kept_tiles<false>(x, places, residual, y, samples, size, scale);
    }
}

#define DROP_PATH_KEPT(SUFFIX, T)                                                                            \
    KERNEL(256) drop_path_kept_fwd_##SUFFIX(const T* __restrict__ x, const uint32_t* __restrict__ places,    \
                                            const T* __restrict__ residual, T* __restrict__ y,               \
                                            uint64_t samples, uint64_t size, float scale) {                  \
        drop_path_kept_fwd(x, places, residual, y, samples, size, scale);                                    \
    }
FOR_EACH_DTYPE(DROP_PATH_KEPT)
