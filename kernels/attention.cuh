// What every attention kernel is given, and which keys a query sees. Twin of src/ops/attention/config.rs.
#pragma once

#include "elem.cuh"
#include "philox.cuh"

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
};
static_assert(sizeof(AttentionArgs) == 48 && offsetof(AttentionArgs, softcap) == 8 &&
                  offsetof(AttentionArgs, batches) == 16 && offsetof(AttentionArgs, heads) == 20 &&
                  offsetof(AttentionArgs, kv_heads) == 24 && offsetof(AttentionArgs, queries) == 28 &&
                  offsetof(AttentionArgs, keys) == 32 && offsetof(AttentionArgs, head_size) == 36 &&
                  offsetof(AttentionArgs, left) == 40 && offsetof(AttentionArgs, right) == 44,
              "as src/ops/attention/config.rs lays it out");

// Strides, in elements, of a tensor [B, H, S, D]; those of the last dimension are neighbours.
struct HeadStrides {
    uint64_t batch;
    uint64_t head;
    uint64_t row;
};

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
              "as src/ops/attention/config.rs lays it out");
