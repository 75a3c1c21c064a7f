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

// Every thread of the team gets the result; all threads of the block call it. `scratch` is
// [MAX_WARPS] floats in shared memory, free for use again on return.
template <typename Op>
__device__ __forceinline__ float team_reduce(float x, float* scratch, Op op) {
    const int lanes = min(int(blockDim.x), 32);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    if (blockDim.x <= 32) return x;

    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = x;
    __syncthreads();
    x = scratch[0];
    for (int i = 1; i < warps; ++i) x = op(x, scratch[i]);
    __syncthreads();
    return x;
}
