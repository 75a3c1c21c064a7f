// attention_bwd_delta: what the gradients of attention scores have in common in a row, before the other
// backward kernels run. Twin of the first step of backward in src/functional/attention/cpu/.
//
//     delta[b, h, i] = sum of o do over D  =  sum over the keys of P dP
//
// o, do [B, H, Sq, D], strided but for D; delta [B, H, Sq], contiguous. Of a dropped key P dP is 0 on both
// sides, so the sum over D knows the mask without drawing it.
// Bytes moved a row: 2 D elements read, 4 bytes written.
// A team of blockDim.x <= 32 threads takes a row; threadIdx.y counts the teams of a block, the grid strides over
// the rows. Vectors of 16 bytes where D and all strides are multiples of 8 elements and both tensors
// begin at 16-byte boundaries, else element by element.
#include "attention.cuh"
#include "reduce.cuh"

template <bool VECTOR, typename T>
__device__ __forceinline__ void attention_bwd_delta_rows(const T* __restrict__ o, const T* __restrict__ dout,
                                                         float* __restrict__ delta, const AttentionArgs& args,
                                                         const HeadStrides& o_strides,
                                                         const HeadStrides& dout_strides, float* scratch) {
    const uint64_t rows = uint64_t(args.batches) * args.heads * args.queries;
    // Teams without a row of their own do the last row again, since reductions need all threads; what they
    // write is the same.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows; first += uint64_t(gridDim.x) * blockDim.y) {
        const uint64_t row = min(first + threadIdx.y, rows - 1);
        // A 64-bit division is several times slower than a 32-bit one, and seldom needed.
        const uint32_t heads_before = uint32_t(row >> 32 ? row / args.queries : uint32_t(row) / args.queries);
        const uint32_t query = uint32_t(row - uint64_t(heads_before) * args.queries);
        const uint32_t batch = heads_before / args.heads, head = heads_before % args.heads;
        const T* const o_row = o + batch * o_strides.batch + head * o_strides.head + query * o_strides.row;
        const T* const dout_row =
            dout + batch * dout_strides.batch + head * dout_strides.head + query * dout_strides.row;

        float sum = 0.f;
        for_each_vector<1>(args.head_size, [&](int, uint64_t col) {
            const int count = count_at(col, args.head_size);
            float of_o[WIDTH], of_dout[WIDTH];
            load<VECTOR>(o_row + col, count, of_o);
            load<VECTOR>(dout_row + col, count, of_dout);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum += of_o[j] * of_dout[j];
        });
        sum = team_reduce(sum, scratch, Sum());
        if (threadIdx.x == 0) delta[row] = sum;
    }
}

template <typename T>
__device__ __forceinline__ void attention_bwd_delta(const T* __restrict__ o, const T* __restrict__ dout,
                                                    float* __restrict__ delta, const AttentionArgs& args,
                                                    const HeadStrides& o_strides, const HeadStrides& dout_strides) {
    __shared__ float scratch[MAX_WARPS];
    if (args.head_size % WIDTH == 0 && rows_are_aligned(o, o_strides) && rows_are_aligned(dout, dout_strides)) {
        attention_bwd_delta_rows<true>(o, dout, delta, args, o_strides, dout_strides, scratch);
    } else {
        attention_bwd_delta_rows<false>(o, dout, delta, args, o_strides, dout_strides, scratch);
    }
}

#define ATTENTION_BWD_DELTA(SUFFIX, T)                                                                      \
    KERNEL(256) attention_bwd_delta_##SUFFIX(const T* __restrict__ o, const T* __restrict__ dout,           \
                                             float* __restrict__ delta, AttentionArgs args,                 \
                                             HeadStrides o_strides, HeadStrides dout_strides) {             \
        attention_bwd_delta(o, dout, delta, args, o_strides, dout_strides);                                 \
    }
FOR_EACH_DTYPE(ATTENTION_BWD_DELTA)
