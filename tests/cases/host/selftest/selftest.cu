// Kernels with known faults, and their faultless twins: the prover must tell them apart.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#include "kernels/mma.cuh"

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

// ---- Tensor cores and asynchronous copies --------------------------------------------------------------

// Every lane writes the four registers that it gets from 32 rows of 8 elements.
template <bool TRANS>
__device__ void load_matrices(const uint16_t* rows, uint32_t* out, int first_row) {
    extern __shared__ __align__(16) uint16_t shared_rows[];
    for (int i = 0; i < 8; ++i) shared_rows[threadIdx.x * 8 + i] = rows[threadIdx.x * 8 + i];
    __syncwarp();
    uint32_t to[4];
    const uint16_t* row = shared_rows + (int(threadIdx.x) + first_row) * 8;
    TRANS ? ldmatrix_x4_trans(to, row) : ldmatrix_x4(to, row);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = to[i];
}
extern "C" __global__ void ldmatrix_u16(const uint16_t* rows, uint32_t* out, int first_row) { load_matrices<false>(rows, out, first_row); }
extern "C" __global__ void ldmatrix_trans_u16(const uint16_t* rows, uint32_t* out, int first_row) { load_matrices<true>(rows, out, first_row); }
extern "C" __global__ void ldmatrix_global_u16(const uint16_t* rows, uint32_t* out) {
    uint32_t to[4];
    ldmatrix_x4(to, rows + threadIdx.x * 8);
    out[threadIdx.x] = to[0];
}

// d [16, 8] = a [16, 16] b [16, 8] + c, fragments by the tables of the PTX ISA, element by element.
template <class T>
__device__ void multiply(const T* a, const T* b, const float* c, float* d, int lanes) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](T low, T high) {
        uint16_t halves[2];
        memcpy(&halves[0], &low, 2), memcpy(&halves[1], &high, 2);
        return halves[0] | uint32_t(halves[1]) << 16;
    };
    uint32_t a_pairs[4], b_pairs[2];
    for (int i = 0; i < 4; ++i) {
        const T* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
        a_pairs[i] = pair(at[0], at[1]);
    }
    for (int i = 0; i < 2; ++i) {
        const T* at = b + (2 * t + i * 8) * 8 + g;
        b_pairs[i] = pair(at[0], at[8]);
    }
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    if (int(threadIdx.x) < lanes) mma_m16n8k16(sums, a_pairs, b_pairs[0], b_pairs[1], T());
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}
extern "C" __global__ void mma_f16(const __half* a, const __half* b, const float* c, float* d, int lanes) { multiply(a, b, c, d, lanes); }
extern "C" __global__ void mma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, const float* c, float* d, int lanes) { multiply(a, b, c, d, lanes); }

// Two copies of 16 bytes a thread, each in a group of its own, read by the next thread. KEPT: groups that
// the wait leaves under way.
template <int KEPT, bool WAIT, bool BARRIER>
__device__ void copy(const uint32_t* x, uint32_t* y, int read, int shift) {
    extern __shared__ __align__(16) uint32_t copied[];
    const int t = threadIdx.x, threads = blockDim.x, next = (t + 1) % threads;
    for (int group = 0; group < 2; ++group) {
        cp_async_16(copied + (group * threads + t) * 4 + shift, x + (group * threads + t) * 4, t < read);
        cp_async_commit();
    }
    if (WAIT) cp_async_wait<KEPT>();
    if (BARRIER) __syncthreads();
    for (int group = 0; group < 2; ++group) {
        for (int i = 0; i < 4; ++i) y[(group * threads + t) * 4 + i] = copied[(group * threads + next) * 4 + i];
    }
}
extern "C" __global__ void copy_u32(const uint32_t* x, uint32_t* y, int read, int shift) { copy<0, true, true>(x, y, read, shift); }
extern "C" __global__ void copy_first_group_u32(const uint32_t* x, uint32_t* y, int read, int shift) { copy<1, true, true>(x, y, read, shift); }
extern "C" __global__ void copy_without_wait_u32(const uint32_t* x, uint32_t* y, int read, int shift) { copy<0, false, true>(x, y, read, shift); }
extern "C" __global__ void copy_without_barrier_u32(const uint32_t* x, uint32_t* y, int read, int shift) { copy<0, true, false>(x, y, read, shift); }

// The copy for the next round goes where others may still read.
template <bool BARRIER>
__device__ void copy_over(const uint32_t* x, uint32_t* y) {
    __shared__ __align__(16) uint32_t copied[64 * 4];
    const int t = threadIdx.x;
    uint32_t sum = 0;
    for (int round = 0; round < 2; ++round) {
        cp_async_16(copied + t * 4, x + (round * 64 + t) * 4, true);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += copied[(t + 1) % 64 * 4];
        if (BARRIER) __syncthreads();
    }
    y[t] = sum;
}
extern "C" __global__ void copy_over_u32(const uint32_t* x, uint32_t* y) { copy_over<true>(x, y); }
extern "C" __global__ void copy_over_without_barrier_u32(const uint32_t* x, uint32_t* y) { copy_over<false>(x, y); }

// What a table of addresses leads to.
struct Row {
    const float* x;
    float* y;
    uint64_t len;
};
extern "C" __global__ void double_rows_f32(const Row* rows) {
    const Row row = rows[blockIdx.x];
    if (threadIdx.x < row.len) row.y[threadIdx.x] = 2.f * row.x[threadIdx.x];
}
