// rope: rotary position embeddings. Twin of src/functional/rope/cpu.rs.
//
//     forward   y1 = x1 * cos - x2 * sin      y2 = x1 * sin + x2 * cos      for each pair of a row
//     backward  the same kernel with sin_sign = -1
//
// x [batches, heads, positions, 2 * half] with any strides but a dense last dimension; y the same,
// contiguous; cos, sin [positions, half] f32, for all batches or for each. The pairs of a row are
// (j, j + half), or interleaved (2j, 2j + 1).
// Bytes moved an element: one read, one write; a table entry serves all heads and is read once for each
// HEADS of them, mostly from L2.
// A team of blockDim.x threads takes one position of HEADS heads, a thread 8 angles at a time: it reads
// them once and has two vectors of each head in flight. threadIdx.y counts the teams of a block, the
// grid strides over (batch, group of heads, position), positions fastest, as y lies in memory.
// Vectors of 16 bytes where every row begins at such a boundary and half is a multiple of 8; else
// element by element.
#include <cstddef>

#include "elem.cuh"

// Where the rows lie, as src/functional/rope/args.rs fills it in.
struct RopeArgs {
    uint64_t batches;
    uint64_t heads;
    uint64_t positions;
    uint64_t half;
    uint64_t x_strides[3];  // batch, head, position, in elements
    uint64_t table_stride;  // from batch to batch, in elements
    float sin_sign;
    uint32_t interleaved;
};
static_assert(sizeof(RopeArgs) == 72 && offsetof(RopeArgs, half) == 24 && offsetof(RopeArgs, x_strides) == 32 &&
                  offsetof(RopeArgs, table_stride) == 56 && offsetof(RopeArgs, sin_sign) == 64 &&
                  offsetof(RopeArgs, interleaved) == 68,
              "as src/functional/rope/args.rs lays it out");

// Heads that a thread rotates together; `RopeArgs::launch` of src/functional/rope/args.rs knows it too.
constexpr int HEADS = 4;

// One pair by one angle; products and sums round one by one, as on the CPU.
__device__ __forceinline__ void rotate(float& x1, float& x2, float cos, float sin) {
    const float y1 = __fsub_rn(__fmul_rn(x1, cos), __fmul_rn(x2, sin));
    x2 = __fadd_rn(__fmul_rn(x1, sin), __fmul_rn(x2, cos));
    x1 = y1;
}

// The 8 pairs of two vectors.
template <bool INTERLEAVED>
__device__ __forceinline__ void rotate_vectors(float (&low)[WIDTH], float (&high)[WIDTH],
                                               const float (&cos)[WIDTH], const float (&sin)[WIDTH]) {
    constexpr int HALF = WIDTH / 2;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
        if (!INTERLEAVED) {
            rotate(low[j], high[j], cos[j], sin[j]);
        } else if (j < HALF) {
            rotate(low[2 * j], low[2 * j + 1], cos[j], sin[j]);
        } else {
            rotate(high[2 * (j - HALF)], high[2 * (j - HALF) + 1], cos[j], sin[j]);
        }
    }
}

template <bool VECTOR, bool INTERLEAVED, typename T>
__device__ __forceinline__ void rope_rows(const T* __restrict__ x, const float* __restrict__ cos,
                                          const float* __restrict__ sin, T* __restrict__ y, const RopeArgs& args) {
    // Element by element there is nothing to gain from more than one head in flight.
    constexpr int N = VECTOR ? HEADS : 1;
    const uint64_t groups = (args.heads + HEADS - 1) / HEADS;
    const uint64_t items = args.batches * groups * args.positions;
    const uint64_t head_size = 2 * args.half;
    for (uint64_t item = uint64_t(blockIdx.x) * blockDim.y + threadIdx.y; item < items;
         item += uint64_t(gridDim.x) * blockDim.y) {
        // A 64-bit division is several times slower than a 32-bit one, and seldom needed.
        const bool is_small = items >> 32 == 0;
        const uint64_t rest = is_small ? uint32_t(item) / uint32_t(args.positions) : item / args.positions;
        const uint64_t batch = is_small ? uint32_t(rest) / uint32_t(groups) : rest / groups;
        const uint64_t position = item - rest * args.positions;
        const uint64_t head = (rest - batch * groups) * HEADS;
        const int heads = int(min(args.heads - head, uint64_t(HEADS)));

        const uint64_t angles = batch * args.table_stride + position * args.half;
        const T* x_row = x + batch * args.x_strides[0] + head * args.x_strides[1] + position * args.x_strides[2];
        T* y_row = y + ((batch * args.heads + head) * args.positions + position) * head_size;
        for (uint64_t pair = threadIdx.x * WIDTH; pair < args.half; pair += blockDim.x * WIDTH) {
            const int count = count_at(pair, args.half);
            // The 8 pairs are two vectors: apart by half, or neighbours.
            const uint64_t first = INTERLEAVED ? 2 * pair : pair;
            const uint64_t second = INTERLEAVED ? first + WIDTH : args.half + pair;
            const int first_count = INTERLEAVED ? count_at(first, head_size) : count;
            const int second_count = INTERLEAVED ? count_at(second, head_size) : count;

            float c[WIDTH], s[WIDTH];
            load<VECTOR>(cos + angles + pair, count, c);
            load<VECTOR>(sin + angles + pair, count, s);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) s[j] *= args.sin_sign;
            for (int h = 0; h < heads; h += N) {
                Fetched<VECTOR, T> fetched[N][2];
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (h + i >= heads) break;  // tail
                    const T* from = x_row + (h + i) * args.x_strides[1];
                    fetched[i][0].fetch(from + first, first_count);
                    fetched[i][1].fetch(from + second, second_count);
                }
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    if (h + i >= heads) break;  // tail
                    float low[WIDTH], high[WIDTH];
                    fetched[i][0].widen(low);
                    fetched[i][1].widen(high);
                    rotate_vectors<INTERLEAVED>(low, high, c, s);
                    T* to = y_row + (h + i) * args.positions * head_size;
                    store<VECTOR>(to + first, first_count, low);
                    store<VECTOR>(to + second, second_count, high);
                }
            }
        }
    }
}

template <bool INTERLEAVED, typename T>
__device__ __forceinline__ void rope_in_style(const T* __restrict__ x, const float* __restrict__ cos,
                                              const float* __restrict__ sin, T* __restrict__ y,
                                              const RopeArgs& args) {
    const uint64_t strides = args.x_strides[0] | args.x_strides[1] | args.x_strides[2];
    if (rows_are_vectors(args.half | strides, x, cos, sin, y)) {
        rope_rows<true, INTERLEAVED>(x, cos, sin, y, args);
    } else {
        rope_rows<false, INTERLEAVED>(x, cos, sin, y, args);
    }
}

template <typename T>
__device__ __forceinline__ void rope_fwd(const T* __restrict__ x, const float* __restrict__ cos,
                                         const float* __restrict__ sin, T* __restrict__ y, const RopeArgs& args) {
    if (args.interleaved) {
        rope_in_style<true>(x, cos, sin, y, args);
    } else {
        rope_in_style<false>(x, cos, sin, y, args);
    }
}

#define ROPE(SUFFIX, T)                                                                               \
    KERNEL(256) rope_fwd_##SUFFIX(const T* __restrict__ x, const float* __restrict__ cos,             \
                                  const float* __restrict__ sin, T* __restrict__ y, RopeArgs args) {  \
        rope_fwd(x, cos, sin, y, args);                                                               \
    }
FOR_EACH_DTYPE(ROPE)
