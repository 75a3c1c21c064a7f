// attention, f16 and bf16 on tensor cores: softmax(q k^T) v with dropout, never in memory as a whole.
#include "attention_tiles.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

// ---- Forward ----------------------------------------------------------------------------------------

// By head size: M x 16 queries a warp; keys of a tile; whether the queries stay in registers.
template <int D>
struct ForwardShape {
    static constexpr int M = D <= 128 ? 2 : 1;
    static constexpr int QUERIES = 16 * M * WARPS;
    static constexpr int KEYS = D <= 64 ? 64 : 32;
    static constexpr bool KEPT = D <= 64;
};

// Logits grow this much, in base 2, before sums are scaled down to the new maximum. Until then exponentials
// may reach 2^8, far from the largest half.
constexpr float MARGIN = 8.f;

template <int D, bool DROP, typename T>
__device__ __forceinline__ void attention_fwd(const T* q, const T* k, const T* v, const uint32_t* key_lengths,
                                              const float* alibi_slopes, T* o, float* lse,
                                              const AttentionArgs& args, const AttentionLayout& layout,
                                              const MaskArgs& drop, Bits* shared) {
    using Shape = ForwardShape<D>;
    constexpr int M = Shape::M, QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, N = KEYS / 8;
    const int warp_row = threadIdx.x / 32 * (16 * M), g = lane_id() / 4, t = lane_id() % 4;

    // The last queries first: under a causal limit they take longest.
    const uint32_t tiles = (args.queries + QUERIES - 1) / QUERIES;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * QUERIES;
    const uint32_t last_query = min(first_query + QUERIES, args.queries) - 1;
    const uint32_t head = blockIdx.x / tiles % args.heads, batch = blockIdx.x / tiles / args.heads;
    const uint32_t kv_head = head / (args.heads / args.kv_heads);
    const uint32_t query = first_query + warp_row + g;  // the lane's first

    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);
    const uint32_t all_begin = args.visible_begin(last_query), all_end = args.visible_end(first_query, length);

    const uint32_t head_size = args.head_size;
    const HeadRows q_rows = head_rows(q, layout.q, batch, head, head_size, 0, args.queries);
    const HeadRows k_rows = head_rows(k, layout.k, batch, kv_head, head_size, begin, end);
    const HeadRows v_rows = head_rows(v, layout.v, batch, kv_head, head_size, begin, end);
    Bits* const q_tile = shared;
    // Two stages, each of keys and values.
    const auto k_tile = [&](int stage) { return shared + (QUERIES + stage * 2 * KEYS) * D; };
    const auto v_tile = [&](int stage) { return shared + (QUERIES + stage * 2 * KEYS + KEYS) * D; };

    uint32_t key = begin / 32 * 32;
    if (key < end) {
        load_rows<D, QUERIES, THREADS>(q_tile, q_rows, first_query, head_size);
        load_rows<D, KEYS, THREADS>(k_tile(0), k_rows, key, head_size);
        load_rows<D, KEYS, THREADS>(v_tile(0), v_rows, key, head_size);
        cp_async_commit();
    }

    const Scores scores(args, alibi_slopes, head);
    const HeadMask mask(drop, args, batch, head);
    Fragments<D, M, Shape::KEPT> queries(q_tile, warp_row);
    float o_sums[M][D / 8][4] = {};
    float sums[M][2] = {};  // the lane's part
    // What exponentials are relative to: the largest logit so far, or one at most MARGIN below it.
    float reference[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) reference[m][0] = reference[m][1] = -INFINITY;

    for (int stage = 0; key < end; key += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (key + KEYS < end) {
            load_rows<D, KEYS, THREADS>(k_tile(stage ^ 1), k_rows, key + KEYS, head_size);
            load_rows<D, KEYS, THREADS>(v_tile(stage ^ 1), v_rows, key + KEYS, head_size);
            cp_async_commit();
        }
        if (key == begin / 32 * 32) queries.load();

        float s[M][N][4] = {};
        multiply_keys<0, T>(s, queries, k_tile(stage));
        if (!scores.is_plain) make_logits<T>(s, scores, args, query, key);
        if (key < all_begin || key + KEYS > all_end) hide(s, args, query, key, length);

        bool grew = false;
        float largest[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float x = -INFINITY;
#pragma unroll
                for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                largest[m][h] = x * scores.factor;
                grew = grew || largest[m][h] > reference[m][h] + MARGIN;
            }
        }
        if (__any_sync(ALL_LANES, grew)) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float x = largest[m][h];
                    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
                    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
                    if (!(x > reference[m][h] + MARGIN)) x = reference[m][h];
                    const float shrink = x == reference[m][h] ? 1.f : exp2_approx(reference[m][h] - x);
                    reference[m][h] = x;
                    sums[m][h] *= shrink;
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
                        o_sums[m][n][2 * h] *= shrink;
                        o_sums[m][n][2 * h + 1] *= shrink;
                    }
                }
            }
        }

        uint32_t p[M][N][2];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                // Without any visible key so far, 0 stands in: all exponentials are 0 then.
                const float base = reference[m][h] == -INFINITY ? 0.f : reference[m][h];
#pragma unroll
                for (int n = 0; n < N; n += 4) {
                    Draws draws;
                    if (DROP) draws = mask.draw_keys(query + 16 * m + 8 * h, key + key_of(n));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float low = exp2_approx(fmaf(s[m][n + i][2 * h], scores.factor, -base));
                        const float high = exp2_approx(fmaf(s[m][n + i][2 * h + 1], scores.factor, -base));
                        sums[m][h] += low + high;
                        p[m][n + i][h] = pack(low, high, T());
                        if (DROP) p[m][n + i][h] &= mask.keep_bits(draws.word[i]);
                    }
                }
            }
        }
        multiply_values<D, T>(o_sums, p, v_tile(stage));
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = sums[m][h];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            factor[m][h] = sum == 0.f ? 0.f : (DROP ? drop.scale : 1.f) / sum;
            const uint32_t row = query + 16 * m + 8 * h;
            if (t == 0 && row < args.queries) {  // tail
                lse[(uint64_t(batch) * args.heads + head) * args.queries + row] =
                    sum == 0.f ? INFINITY : reference[m][h] * LN_2 + logf(sum);
            }
        }
    }
    // Through the rows of q, which only this warp has read.
    put_rows<D, T>(q_tile, warp_row, 0, o_sums, factor);
    __syncwarp();
    const HeadRows o_rows = head_rows(o, layout.o, batch, head, head_size, 0, args.queries);
    store_rows<D, 16 * M>(q_tile, warp_row, o_rows, first_query + warp_row, head_size);
}

}  // namespace

#define ATTENTION_FWD(NAME, D, DROP, SUFFIX, T)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_d##D##_##SUFFIX(                         \
        const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                           \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes, T* __restrict__ o, \
        float* __restrict__ lse, AttentionArgs args, AttentionLayout layout, MaskArgs drop) {                \
        extern __shared__ __align__(128) Bits shared[];                                                      \
        attention_fwd<D, DROP>(q, k, v, key_lengths, alibi_slopes, o, lse, args, layout, drop, shared);      \
    }

#define FOR_EACH_HALF(KERNEL, NAME, D)                    \
    KERNEL(NAME, D, true, f16, __half)                    \
    KERNEL(NAME, D, true, bf16, __nv_bfloat16)            \
    KERNEL(NAME##_nodrop, D, false, f16, __half)          \
    KERNEL(NAME##_nodrop, D, false, bf16, __nv_bfloat16)
FOR_EACH_HALF(ATTENTION_FWD, attention_fwd, 32)
FOR_EACH_HALF(ATTENTION_FWD, attention_fwd, 64)
FOR_EACH_HALF(ATTENTION_FWD, attention_fwd, 96)
FOR_EACH_HALF(ATTENTION_FWD, attention_fwd, 128)
FOR_EACH_HALF(ATTENTION_FWD, attention_fwd, 256)
