// What every attention kernel is given: which keys a query sees, what becomes of a score, what is dropped.
// Twin of src/functional/attention/args.rs.
//
// Scores become logits as on the CPU, and their exponentials are taken in base 2, where one is one instruction, of
// their distance from a reference: the product with log2(e) would round logits far from 0 one by one.
#pragma once

#include "elem.cuh"
#include "philox.cuh"

constexpr uint32_t ALL_LANES = 0xffffffffu;

// No limit on the keys that are seen to one side.
constexpr uint32_t UNBOUNDED = 0xffffffffu;

struct AttentionArgs {
    double scale;    // rounded to f32 once
    double softcap;  // 0 for none
    uint32_t batches;
    uint32_t heads;
    uint32_t kv_heads;  // divides heads; head h reads key and value head h / (heads / kv_heads)
    uint32_t queries;
    uint32_t keys;
    uint32_t head_size;
    // Keys that query i sees before and after its own, the key i + keys - queries.
    uint32_t left;
    uint32_t right;
    // 1: keys are dropped before the softmax, not weights behind it. The mask has a scale of 1 then, and what is
    // dropped has a weight of 0 when the dropout of weights comes to it, so that nothing else differs.
    uint32_t drop_key;
    uint32_t padding;

    // The first key that a query sees.
    __device__ __forceinline__ uint32_t visible_begin(uint32_t query) const {
        const int64_t begin = int64_t(query) + keys - queries - left;
        return left == UNBOUNDED || begin < 0 ? 0 : uint32_t(begin);
    }

    // The key behind the last one that a query sees, in a sample of `length` keys; 0 if there is none.
    __device__ __forceinline__ uint32_t visible_end(uint32_t query, uint32_t length) const {
        const int64_t end = int64_t(query) + keys - queries + right + 1;
        if (right == UNBOUNDED || end > length) return length;
        return end < 0 ? 0 : uint32_t(end);
    }

    // Both limits only grow with the query. So queries i .. j see nothing outside of visible_begin(i) ..
    // visible_end(j), and all of them see what lies in visible_begin(j) .. visible_end(i).

    // The first query that sees `key`, or would see it in a sample long enough; `queries` if there is none.
    __device__ __forceinline__ uint32_t seeing_begin(uint32_t key) const {
        const int64_t begin = int64_t(key) + queries - keys - right;
        if (right == UNBOUNDED || begin < 0) return 0;
        return begin > queries ? queries : uint32_t(begin);
    }

    // The query behind the last one that sees `key`, likewise; 0 if there is none.
    __device__ __forceinline__ uint32_t seeing_end(uint32_t key) const {
        const int64_t end = int64_t(key) + queries - keys + left + 1;
        if (left == UNBOUNDED || end > queries) return queries;
        return end < 0 ? 0 : uint32_t(end);
    }

    // Of a tensor [B, H, Sq], the row of the first query of a head.
    __device__ __forceinline__ uint64_t first_row(uint32_t batch, uint32_t head) const {
        return uint64_t(batch * heads + head) * queries;
    }

    // Keys of a sample that are no padding; `key_lengths` may be null.
    __device__ __forceinline__ uint32_t length(const uint32_t* key_lengths, uint32_t batch) const {
        return key_lengths ? min(key_lengths[batch], keys) : keys;
    }
};
static_assert(sizeof(AttentionArgs) == 56 && offsetof(AttentionArgs, softcap) == 8 &&
                  offsetof(AttentionArgs, batches) == 16 && offsetof(AttentionArgs, heads) == 20 &&
                  offsetof(AttentionArgs, kv_heads) == 24 && offsetof(AttentionArgs, queries) == 28 &&
                  offsetof(AttentionArgs, keys) == 32 && offsetof(AttentionArgs, head_size) == 36 &&
                  offsetof(AttentionArgs, left) == 40 && offsetof(AttentionArgs, right) == 44 &&
                  offsetof(AttentionArgs, drop_key) == 48,
              "as src/functional/attention/args.rs lays it out");

// Strides, in elements, of a tensor [B, H, S, D]; those of the last dimension are neighbours.
struct HeadStrides {
    uint64_t batch;
    uint64_t head;
    uint64_t row;
};

// True if every row begins at a 16-byte boundary.
template <typename T>
__device__ __forceinline__ bool rows_are_aligned(const T* tensor, const HeadStrides& strides) {
    return is_aligned(tensor) && (strides.batch | strides.head | strides.row) % (16 / sizeof(T)) == 0;
}

// The rows of one head of a tensor. Those outside of begin .. end count as zeros and are not read.
template <typename T>
struct HeadRows {
    T* start;
    int64_t stride;
    int begin;
    int end;
};

template <typename T>
__device__ __forceinline__ HeadRows<T> head_rows(T* tensor, const HeadStrides& strides, uint32_t batch,
                                                 uint32_t head, int begin, int end) {
    return {tensor + batch * strides.batch + head * strides.head, int64_t(strides.row), begin, end};
}

// Of q, k, v, o, or of their gradients.
struct AttentionLayout {
    HeadStrides q;
    HeadStrides k;
    HeadStrides v;
    HeadStrides o;
};
static_assert(sizeof(AttentionLayout) == 96 && offsetof(HeadStrides, head) == 8 &&
                  offsetof(HeadStrides, row) == 16 && offsetof(AttentionLayout, k) == 24 &&
                  offsetof(AttentionLayout, v) == 48 && offsetof(AttentionLayout, o) == 72,
              "as src/functional/attention/args.rs lays it out");

// What forward leaves of a query for backward: P = exp(logit - reference) * normaliser, where the kernels of halves
// have the reference in base 2. Both stay apart, since their common logarithm would leave the probabilities no
// digits where all logits of a row are far from 0. A query that sees no key has reference = inf, normaliser = 0.
struct __align__(8) RowSoftmax {
    float reference;
    float normaliser;

    // `sum` is that of exp(logit - reference).
    __device__ __forceinline__ static RowSoftmax of(float reference, float sum) {
        return sum == 0.f ? RowSoftmax{INFINITY, 0.f} : RowSoftmax{reference, 1.f / sum};
    }
};

static_assert(sizeof(RowSoftmax) == 8, "two f32 a row, as src/functional/attention/cuda.rs allocates them");

constexpr double LOG2_E_F64 = 1.44269504088896341;
constexpr float LOG2_E = float(LOG2_E_F64);

// Halves round to 8 or 11 bits: an absolute error of 2^-23 is enough for them, and half the instructions.
template <typename T>
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    return sizeof(T) == 2 ? 1.f - __fdividef(2.f, 1.f + __expf(2.f * x)) : tanhf(x);
}

// What becomes of the scores of one head.
struct Logits {
    float scale;    // makes logits of q·k; with a softcap, what its tanh is taken of
    float softcap;  // 0 for none
    float slope;    // 0 for none

    // `alibi_slopes` may be null.
    __device__ __forceinline__ Logits(const AttentionArgs& args, const float* alibi_slopes, uint32_t head)
        : scale(float(args.softcap == 0. ? args.scale : args.scale / args.softcap)),
          softcap(float(args.softcap)),
          slope(alibi_slopes ? alibi_slopes[head] : 0.f) {}

    // Steps 1 and 2: scale and softcap.
    template <typename T>
    __device__ __forceinline__ float capped(float dot) const {
        const float x = dot * scale;
        return softcap == 0.f ? x : softcap * hyperbolic_tangent<T>(x);
    }

    // Step 3: the penalty on the distance of a key from the one that is the query's own, which is
    // i + keys - queries. Fused, so that every pass gets the same bits.
    __device__ __forceinline__ float biased(float capped, uint32_t own_key, uint32_t key) const {
        return fmaf(-slope, fabsf(float(int(own_key - key))), capped);
    }

    // The slope of the softcap, where it gave `capped`.
    __device__ __forceinline__ float slope_of_cap(float capped) const {
        const float tanh = softcap == 0.f ? 0.f : capped / softcap;
        return 1.f - tanh * tanh;
    }
};

// The draws of the keys `key` .. `key` + 8, a multiple of 8; `mask_row` comes from drop.rows.map(row) of a row of
// [B, H, Sq].
__device__ __forceinline__ Draws draw_keys(const MaskArgs& drop, uint64_t mask_row, uint32_t key) {
    return draw_unaligned(drop, mask_row, key);  // one call wherever the window begins at a multiple of 8
}
