// Element types, vectors of 8 elements, and the walk over a [rows, cols] tensor that the element-wise kernels
// share. Twin of src/cpu/element.rs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// A kernel for each dtype, from one template: FOR_EACH_DTYPE(X) expands X(suffix, type).
#define FOR_EACH_DTYPE(X) X(f32, float) X(f16, __half) X(bf16, __nv_bfloat16)

// Begins an entry point, with its launch bounds. Its body is a call of the template that chooses how to compute.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Halves round to 8 or 11 bits, so the fast exponential is exact enough for them.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
    return sizeof(T) == 2 ? __expf(x) : expf(x);
}

// Two halves in a 32-bit word, the lower one first.
__device__ __forceinline__ float2 unpack(uint32_t word, __half) {
    return {__half2float(__ushort_as_half(uint16_t(word))), __half2float(__ushort_as_half(uint16_t(word >> 16)))};
}
__device__ __forceinline__ float2 unpack(uint32_t word, __nv_bfloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

// 8 elements, the columns of one Philox call: one 16-byte access for halves, two for f32.
constexpr int WIDTH = 8;

// Arguments that choose an instance of a template.
using Yes = std::true_type;
using No = std::false_type;

// True for a tensor that is not there.
__device__ __forceinline__ bool is_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// True if each row of these tensors [.., cols] is made of whole vectors.
template <typename... Tensor>
__device__ __forceinline__ bool rows_are_vectors(uint64_t cols, const Tensor*... tensors) {
    return cols % WIDTH == 0 && (is_aligned(tensors) && ...);
}

// Up to 8 elements of a row as they come from memory. Widened only when they are needed, they occupy half
// the registers until then, so that several loads can be in flight.
// VECTOR: all 8, from a 16-byte boundary. Otherwise one by one, the first `count` of them.
template <bool VECTOR, typename T>
struct Fetched {
    float x[WIDTH];

    __device__ __forceinline__ void fetch(const T* from, int count) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) x[i] = i < count ? ::widen(from[i]) : 0.f;  // tail
    }
    __device__ __forceinline__ void widen(float (&to)[WIDTH]) const {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) to[i] = x[i];
    }
};

template <>
struct Fetched<true, float> {
    float4 low, high;

    __device__ __forceinline__ void fetch(const float* from, int) {
        low = reinterpret_cast<const float4*>(from)[0];
        high = reinterpret_cast<const float4*>(from)[1];
    }
    __device__ __forceinline__ void widen(float (&to)[WIDTH]) const {
        to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
        to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    }
};

template <typename Half>
struct Fetched<true, Half> {
    uint4 words;

    __device__ __forceinline__ void fetch(const Half* from, int) {
        words = *reinterpret_cast<const uint4*>(from);
    }
    __device__ __forceinline__ void widen(float (&to)[WIDTH]) const {
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = unpack(word[i], Half());
            to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
        }
    }
};

template <bool VECTOR, typename T>
__device__ __forceinline__ void load(const T* from, int count, float (&x)[WIDTH]) {
    Fetched<VECTOR, T> fetched;
    fetched.fetch(from, count);
    fetched.widen(x);
}

// __stwb is an ordinary store that the compiler does not split.
__device__ __forceinline__ void store_vector(float* to, const float (&x)[WIDTH]) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
    __stwb(reinterpret_cast<float4*>(to) + 1, make_float4(x[4], x[5], x[6], x[7]));
}

template <typename Half>
__device__ __forceinline__ void store_vector(Half* to, const float (&x)[WIDTH]) {
    __stwb(reinterpret_cast<uint4*>(to),
           make_uint4(pack(x[0], x[1], Half()), pack(x[2], x[3], Half()), pack(x[4], x[5], Half()),
                      pack(x[6], x[7], Half())));
}

// Stores up to 8 elements of a row, under the conditions of Fetched.
template <bool VECTOR, typename T>
__device__ __forceinline__ void store(T* to, int count, const float (&x)[WIDTH]) {
    if constexpr (VECTOR) {
        store_vector(to, x);
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            if (i < count) to[i] = narrow<T>(x[i]);  // tail
        }
    }
}

// A team of threads (threadIdx.x) shares a tile of N vectors a thread in one row; the teams of the grid
// (blockIdx.x, threadIdx.y) take tiles in turn. So a thread has N independent loads in flight, and the
// one division that finds a tile's row is spread over all its elements.
//
// Calls body(row, first, step): the thread's vectors of the row begin at the columns first,
// first + step, .. (N of them, those below cols exist).
template <int N, typename Body>
__device__ __forceinline__ void for_each_tile(uint64_t rows, uint64_t cols, Body body) {
    const uint64_t step = uint64_t(blockDim.x) * WIDTH;
    const uint64_t tiles_a_row = (cols + N * step - 1) / (N * step);
    const uint64_t tiles = rows * tiles_a_row;
    const uint64_t teams = uint64_t(gridDim.x) * blockDim.y;
    for (uint64_t tile = uint64_t(blockIdx.x) * blockDim.y + threadIdx.y; tile < tiles; tile += teams) {
        // A 64-bit division is several times slower than a 32-bit one, and seldom needed.
        const uint64_t row = tiles >> 32 ? tile / tiles_a_row : uint32_t(tile) / uint32_t(tiles_a_row);
        const uint64_t first = (tile - row * tiles_a_row) * N * step + threadIdx.x * WIDTH;
        body(row, first, step);
    }
}

// Vectors that a thread holds at a time. Element by element there is nothing to gain from more than one.
constexpr int TILE = 4;
template <bool VECTOR>
constexpr int TILE_OF = VECTOR ? TILE : 1;

// Vectors of its row that a thread keeps: all of them, or one at a time.
template <bool RESIDENT>
constexpr int KEPT = RESIDENT ? TILE : 1;

__device__ __forceinline__ bool fits_in_registers(uint64_t cols) {
    return cols <= uint64_t(blockDim.x) * TILE * WIDTH;
}

// The walk of a thread over the row that its team has taken: calls body(i, col) for its vectors, i < N, of
// each stretch of blockDim.x * N vectors.
template <int N, typename Body>
__device__ __forceinline__ void for_each_vector(uint64_t cols, Body body) {
    const uint64_t step = uint64_t(blockDim.x) * WIDTH;
    for (uint64_t start = threadIdx.x * WIDTH; start < cols; start += N * step) {
#pragma unroll
        for (int i = 0; i < N; ++i) body(i, start + i * step);
    }
}

// The same, with fetch(i, col) for all vectors of a stretch before body(i, col) for any, so that the loads
// are in flight together.
template <int N, typename Fetch, typename Body>
__device__ __forceinline__ void for_each_vector(uint64_t cols, Fetch fetch, Body body) {
    const uint64_t step = uint64_t(blockDim.x) * WIDTH;
    for (uint64_t start = threadIdx.x * WIDTH; start < cols; start += N * step) {
#pragma unroll
        for (int i = 0; i < N; ++i) fetch(i, start + i * step);
#pragma unroll
        for (int i = 0; i < N; ++i) body(i, start + i * step);
    }
}

// How many of the 8 columns from `col` on exist; 0 behind the end of the row.
__device__ __forceinline__ int count_at(uint64_t col, uint64_t cols) {
    return col < cols ? int(min(cols - col, uint64_t(WIDTH))) : 0;
}
