// Kernels with known faults, and their faultless twins: the prover must tell them apart.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Block reduction: every block sums its part of x -----------------------------------------------

template <bool BARRIER>
__device__ void block_sum(const float* x, float* sums) {
    __shared__ float partial[1024];
    const unsigned t = threadIdx.x;
    partial[t] = x[blockIdx.x * blockDim.x + t];
    for (unsigned stride = blockDim.x / 2; stride > 0; stride /= 2) {
        if (BARRIER) __syncthreads();
        if (t < stride) partial[t] += partial[t + stride];
    }
    if (t == 0) sums[blockIdx.x] = partial[0];
}
extern "C" __global__ void block_sum_f32(const float* x, float* sums) { block_sum<true>(x, sums); }
extern "C" __global__ void block_sum_without_barrier_f32(const float* x, float* sums) { block_sum<false>(x, sums); }

extern "C" __global__ __launch_bounds__(256) void block_sum_by_shuffles_f32(const float* __restrict__ x, float* __restrict__ sums) {
    extern __shared__ __align__(16) float warp_sums[];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = lane < blockDim.x / 32 ? warp_sums[lane] : 0.0f;
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(ALL_LANES, sum, distance);
        if (lane == 0) sums[blockIdx.x] = sum;
    }
}

// Two sums through the same scratch: a barrier has to keep the second from overtaking the first.
template <bool BARRIER>
__device__ void two_sums(const float* x, float* out) {
    __shared__ float scratch[8];
    float sum = x[threadIdx.x];
    for (int i = 0; i < 2; ++i) {
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
        __syncthreads();
        sum = 0.0f;
        for (int warp = 0; warp < 8; ++warp) sum += scratch[warp];
        if (BARRIER) __syncthreads();
    }
    out[threadIdx.x] = sum;
}
extern "C" __global__ void two_sums_f32(const float* x, float* out) { two_sums<true>(x, out); }
extern "C" __global__ void two_sums_without_barrier_f32(const float* x, float* out) { two_sums<false>(x, out); }

extern "C" __global__ void count_positive_f32(const float* x, unsigned* count, int n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned votes = __ballot_sync(ALL_LANES, i < unsigned(n) && x[i] > 0.0f);
    if (threadIdx.x % 32 == 0) atomicAdd(count, unsigned(__popc(votes)));
}

// ---- Warp collectives --------------------------------------------------------------------------------

// Each lane writes what every kind of shuffle brings it.
extern "C" __global__ void shuffles_i32(int* out) {
    const int lane = threadIdx.x;
    int* mine = out + lane * 8;
    mine[0] = __shfl_sync(ALL_LANES, lane, 5);
    mine[1] = __shfl_sync(ALL_LANES, lane, 3, 8);
    mine[2] = __shfl_up_sync(ALL_LANES, lane, 2);
    mine[3] = __shfl_up_sync(ALL_LANES, lane, 2, 8);
    mine[4] = __shfl_down_sync(ALL_LANES, lane, 3);
    mine[5] = __shfl_down_sync(ALL_LANES, lane, 3, 8);
    mine[6] = __shfl_xor_sync(ALL_LANES, lane, 9);
    mine[7] = __shfl_xor_sync(ALL_LANES, lane, 9, 8);
}

// Halves of a warp may go separate ways as long as each names only itself.
extern "C" __global__ void half_warps_i32(int* out) {
    const int lane = threadIdx.x;
    if (lane < 16) {
        out[lane] = __any_sync(0x0000ffff, lane == 3);
    } else {
        out[lane] = __all_sync(0xffff0000, lane != 3) + __shfl_sync(0xffff0000, lane, 20);
    }
}

extern "C" __global__ void shuffle_with_returned_lanes_i32(int* out) {
    if (threadIdx.x >= 20) return;
    out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, int(threadIdx.x), 1);
}
extern "C" __global__ void shuffle_from_outside_the_mask_i32(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffff, int(threadIdx.x), 16);
}
extern "C" __global__ void divergent_shuffles_i32(int* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_sync(ALL_LANES, int(threadIdx.x), 0);
    } else {
        out[threadIdx.x] = __shfl_sync(ALL_LANES, int(threadIdx.x), 0);
    }
}

// A warp hands values round through shared memory.
template <bool BARRIER>
__device__ void rotate(int* out) {
    __shared__ int slots[32];
    slots[threadIdx.x] = threadIdx.x;
    if (BARRIER) __syncwarp();
    out[threadIdx.x] = slots[(threadIdx.x + 1) % 32];
}
extern "C" __global__ void rotate_i32(int* out) { rotate<true>(out); }
extern "C" __global__ void rotate_without_barrier_i32(int* out) { rotate<false>(out); }

// ---- Barriers ----------------------------------------------------------------------------------------

extern "C" __global__ void returned_threads_leave_the_barrier_i32(int* out) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
extern "C" __global__ void barrier_in_one_branch_i32(int* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncwarp();
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}
extern "C" __global__ void barrier_against_collective_i32(int* out) {
    if (threadIdx.x == 7) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    out[threadIdx.x] = 1;
}

// ---- Memory ------------------------------------------------------------------------------------------

extern "C" __global__ void fill_f32(float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 1.0f;
}
extern "C" __global__ void copy_vectors_f32(const float* x, float* y) {
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(x) + threadIdx.x);
    __stcs(reinterpret_cast<uint4*>(y) + threadIdx.x, four);
}
extern "C" __global__ void read_before_f32(const float* x, float* y) { y[threadIdx.x] = x[int(threadIdx.x) - 4]; }
extern "C" __global__ void write_before_f32(float* y) { y[int(threadIdx.x) - 1] = 0.0f; }

template <class T>
__device__ void read_unset_shared(T* out) {
    __shared__ T slots[2][16];
    // Whatever an earlier block left must not be seen by a later one.
    out[blockIdx.x * 32 + threadIdx.x] = slots[threadIdx.x / 16][threadIdx.x % 16];
    slots[threadIdx.x / 16][threadIdx.x % 16] = T();
}
extern "C" __global__ void unset_shared_f32(float* out) { read_unset_shared(out); }
extern "C" __global__ void unset_shared_f16(__half* out) { read_unset_shared(out); }

extern "C" __global__ void static_shared_overrun_f32(float* out, int slot) {
    __shared__ float slots[32];
    float* through_a_pointer = slots;
    through_a_pointer[slot] = 1.0f;
    out[threadIdx.x] = slots[threadIdx.x];
}
extern "C" __global__ void dynamic_shared_overrun_f32(float* out) {
    extern __shared__ float slots[];
    slots[threadIdx.x] = 1.0f;
    out[threadIdx.x] = slots[threadIdx.x];
}

// ---- Arguments ---------------------------------------------------------------------------------------

struct Pair {
    uint64_t first;
    float second;
};
extern "C" __global__ void arguments_f32(const float* optional, float* out, Pair pair, int n) {
    for (int i = 0; i < n; ++i) out[i] = pair.second + float(pair.first) + (optional ? optional[i] : 0.0f);
}

// ---- Conversions -------------------------------------------------------------------------------------

template <class In, class Out, class Convert>
__device__ void convert_all(const In* x, Out* y, int n, Convert convert) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) y[i] = convert(x[i]);
}
extern "C" __global__ void f32_to_f16(const float* x, __half* y, int n) {
    convert_all(x, y, n, [](float v) { return __float2half_rn(v); });
}
extern "C" __global__ void f32_to_bf16(const float* x, __nv_bfloat16* y, int n) {
    convert_all(x, y, n, [](float v) { return __float2bfloat16_rn(v); });
}
extern "C" __global__ void f16_to_f32(const __half* x, float* y, int n) {
    convert_all(x, y, n, [](__half v) { return __half2float(v); });
}
extern "C" __global__ void bf16_to_f32(const __nv_bfloat16* x, float* y, int n) {
    convert_all(x, y, n, [](__nv_bfloat16 v) { return __bfloat162float(v); });
}
