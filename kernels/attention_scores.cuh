// What the tensor-core kernels of attention make of scores in registers: logits, what is hidden, what is dropped,
// gradients. attention_tiles.cuh says where a lane's scores are.
#pragma once

#include "attention_tiles.cuh"

// ---- Scores -----------------------------------------------------------------------------------------

// Of the column tile n in a tile of keys, the lane's first key.
__device__ __forceinline__ int key_of(int n) { return n / 4 * 32 + lane_id() % 4 * 8 + n % 4 * 2; }

// Backward multiplies probabilities by this, and what they are multiplied with by its inverse, since the small
// ones of long rows would be subnormal halves.
constexpr float RAISED = 4096.f;

// What backward knows of a query; it lies in shared memory, since registers are scarce.
struct RowStatistics {
    float reference;
    float normaliser;  // times RAISED
    float delta;       // divided by RAISED
};

// Rows that do not exist, and those that see nothing, have probabilities 0.
__device__ __forceinline__ RowStatistics row_statistics(const RowSoftmax* softmax, const float* delta, uint64_t row,
                                                        bool exists) {
    RowSoftmax of_row = {INFINITY, 0.f};
    if (exists) of_row = softmax[row];  // tail
    const bool sees = of_row.reference != INFINITY;
    return {of_row.reference, of_row.normaliser * RAISED, sees ? delta[row] / RAISED : 0.f};
}

// How scores become logits: by one product, the cheap way, or through all steps.
struct Scores {
    const AttentionArgs& args;
    const float* alibi_slopes;
    // Makes logits in base 2, together with the subtraction of the reference, so that no product is rounded alone.
    // A scale that is not positive, softcap and slopes turn scores into logits first.
    bool is_plain;
    float factor;

    __device__ __forceinline__ Scores(const AttentionArgs& args, const float* alibi_slopes)
        : args(args), alibi_slopes(alibi_slopes) {
        factor = float(args.scale * LOG2_E_F64);
        is_plain = args.softcap == 0. && !alibi_slopes && factor > 0.f;
        if (!is_plain) factor = LOG2_E;
    }

    __device__ __forceinline__ bool is_capped() const { return args.softcap != 0.; }

    // Computed where they are needed (see `opaque`): registers are scarce, and most attentions are plain.
    __device__ __forceinline__ Logits logits(uint32_t head) const { return Logits(args, alibi_slopes, opaque(head)); }
};

// Scores that are not plain become logits. `query` is the lane's first.
template <typename T, int M, int N>
__device__ __forceinline__ void make_logits(float (&s)[M][N][4], const Logits& logits, const AttentionArgs& args,
                                            uint32_t query, int key) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t own_key = query + 16 * m + 8 * h + args.keys - args.queries;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& x = s[m][n][2 * h + e];
                    x = logits.biased(logits.capped<T>(x), own_key, key + key_of(n) + e);
                }
            }
        }
    }
}

// Selects -inf for what a query does not see.
template <int M, int N>
__device__ __forceinline__ void hide(float (&s)[M][N][4], const AttentionArgs& args, uint32_t query, int key,
                                     uint32_t length) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int begin = args.visible_begin(query + 16 * m + 8 * h);
            const int end = args.visible_end(query + 16 * m + 8 * h, length);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int j = key + key_of(n) + e;
                    if (j < begin) s[m][n][2 * h + e] = -INFINITY;  // tail
                    if (j >= end) s[m][n][2 * h + e] = -INFINITY;   // tail
                }
            }
        }
    }
}

// ---- What is dropped --------------------------------------------------------------------------------

// The mask over the scores of one head. Tiles begin at keys that begin a Philox call, which in a mask that begins
// within one is `shift` keys earlier: so every lane draws whole calls, whatever the window.
struct HeadMask {
    const MaskArgs& drop;
    uint64_t first_mask_row;  // of query 0; the queries of a head have neighbouring rows
    uint32_t first_call;
    int shift;
    uint32_t threshold;  // in both halves

    __device__ __forceinline__ HeadMask(const MaskArgs& drop, const AttentionArgs& args, uint32_t batch, uint32_t head)
        : drop(drop),
          first_mask_row(drop.rows.map(args.first_row(batch, head))),
          first_call(uint32_t(drop.col_0 / WIDTH)),
          shift(shift_of(drop)),
          threshold(drop.threshold | drop.threshold << 16) {}

    __device__ static __forceinline__ int shift_of(const MaskArgs& drop) { return int(drop.col_0 % WIDTH); }

    // Of the 8 keys from `key` on.
    __device__ __forceinline__ Draws draw_keys(uint32_t query, int key) const {
        return philox(drop.key, first_mask_row + query, first_call + uint32_t(key + shift) / WIDTH);
    }

    // All ones in the halves of the word that are draws to keep, zeros in the others.
    __device__ __forceinline__ uint32_t keep_bits(uint32_t draws) const {
        // Of each half the highest bit of `less` says draw < threshold: it is decided by the highest bits of
        // both, or where they agree by the difference of the others, which borrows from no neighbour.
        constexpr uint32_t HIGHEST = 0x80008000u;
        const uint32_t difference = (draws | HIGHEST) - (threshold & ~HIGHEST);
        const uint32_t less = (~draws & threshold) | (~(draws ^ threshold) & ~difference);
        return spread_signs(less);
    }

    // One of them.
    __device__ __forceinline__ bool keeps(uint32_t draws, int half) const {
        return (half == 0 ? draws << 16 : draws) < (threshold & 0xffff0000u);
    }
};

// Of the draws of a lane, those of column tile n of the ones from `first` on, which is 0 or 2.
__device__ __forceinline__ uint32_t draws_of(const Draws& draws, int first, int n) {
    return first == 0 ? draws.word[n % 4] : draws.word[(n + 2) % 4];
}

// DropKey: selects -inf for the keys that are dropped, of the column tiles from `first` on. `query` is the lane's
// first.
template <int M, int N>
__device__ __forceinline__ void hide_dropped(float (&s)[M][N][4], const HeadMask& mask, uint32_t query, int key,
                                             int first) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Draws draws;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                if (n % 4 == 0) draws = mask.draw_keys(opaque(query + 16 * m + 8 * h), key + key_of(n));
                const uint32_t word = draws_of(draws, first, n);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    if (!mask.keeps(word, e)) s[m][n][2 * h + e] = -INFINITY;
                }
            }
        }
    }
}

// ---- Backward ---------------------------------------------------------------------------------------

// From logits and dP of 16 queries and the column tiles first .. first + N: RAISED times the probabilities that
// were kept, not yet scaled, and the gradient of the scores but for args.scale. `query` is the lane's first, and
// `rows` begins with it.
template <bool DROPS, bool CAPPED, typename T, int N>
__device__ __forceinline__ void differentiate(const float (&s)[N][4], const float (&dp)[N][4], float factor,
                                              const Logits& logits, const HeadMask& mask, const AttentionArgs& args,
                                              const RowStatistics* rows, uint32_t query, int key, int first,
                                              uint32_t (&kept)[N][2], uint32_t (&ds)[N][2]) {
    static_assert(N <= 4, "a lane draws once a row");
    const float dp_scale = (DROPS ? mask.drop.scale : 1.f) / RAISED;
    const int first_key = opaque(key + key_of(0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t row = query + 8 * h, own_key = row + args.keys - args.queries;
        const RowStatistics statistics = rows[8 * h];
        Draws draws;
        if (DROPS) draws = mask.draw_keys(opaque(row), first_key);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint32_t word = 0;
            if (DROPS) word = draws_of(draws, first, n);
            float y[2], dt[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float t = s[n][2 * h + e];
                const float p = exp2_approx(fmaf(t, factor, -statistics.reference)) * statistics.normaliser;
                const bool keep = !DROPS || mask.keeps(word, e);
                const float kept_dp = fmaf(dp[n][2 * h + e], dp_scale, -statistics.delta);
                y[e] = keep ? p : 0.f;
                dt[e] = p * (keep ? kept_dp : -statistics.delta);
                if (CAPPED) {
                    const float capped = -logits.biased(-t, own_key, key + key_of(first + n) + e);
                    dt[e] = p == 0.f ? 0.f : dt[e] * logits.slope_of_cap(capped);
                }
            }
            kept[n][h] = pack(y[0], y[1], T());
            ds[n][h] = pack(dt[0], dt[1], T());
        }
    }
}
