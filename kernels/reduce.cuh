// Reductions over a team: the blockDim.x threads that share a row.
//
// A team is a power of two: up to 32 threads it lies in one warp and needs shuffles only; above, the
// block is a single team (blockDim.y == 1) and its warps meet in shared memory.
#pragma once

#include <cstdint>

constexpr int MAX_WARPS = 8;

struct Max {
    // A NaN on either side is passed over.
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Sum {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// N numbers at once, so that they share the shuffles' latency and the barriers: merge(x, other) takes those of
// another thread in. Every thread of the team gets the result; all threads of the block call it. `scratch` is
// [N * MAX_WARPS] floats in shared memory, free for use again on return.
template <int N, typename Merge>
__device__ __forceinline__ void team_merge(float (&x)[N], float* scratch, Merge merge) {
    float other[N];
    const int lanes = min(int(blockDim.x), 32);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
        for (int n = 0; n < N; ++n) other[n] = __shfl_xor_sync(0xffffffffu, x[n], distance);
        merge(x, other);
    }
    if (blockDim.x <= 32) return;

    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        if (threadIdx.x % 32 == 0) scratch[n * MAX_WARPS + warp] = x[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = scratch[n * MAX_WARPS];
    for (int i = 1; i < warps; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) other[n] = scratch[n * MAX_WARPS + i];
        merge(x, other);
    }
    __syncthreads();
}

// One number; `scratch` is [MAX_WARPS] floats.
template <typename Op>
__device__ __forceinline__ float team_reduce(float x, float* scratch, Op op) {
    float one[1] = {x};
    team_merge(one, scratch, [&](float(&a)[1], const float(&b)[1]) { a[0] = op(a[0], b[0]); });
    return one[0];
}
