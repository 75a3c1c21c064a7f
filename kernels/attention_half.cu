// attention of halves, f16 and bf16, on tensor cores (sm_80 and later): softmax(q k^T) v with dropout, never in
// memory as a whole. Twin of src/functional/attention/cpu/. After Dao, "FlashAttention-2", 2023, arXiv 2307.08691.
// One text, since the three kernels are read beside each other: they differ in what stays and what is walked over.
//
//     s = scale * q·k      s = softcap * tanh(s / softcap)      t = s - slope * |i + Sk - Sq - j|
//     P = softmax(t) over the visible keys        y = keep ? P * drop.scale : 0
//     DropKey: t = keep ? t : -inf                y = P
//     forward   o = y v, and what the softmax of a row is made with
//     backward  delta = sum of o do over D        dP = keep ? drop.scale * do·v : 0
//               dt = P (dP - delta)               ds = dt * (1 - (s / softcap)^2)
//               dq = scale * ds k                 dk = scale * ds^T q        dv = y^T do
//
// q, o, do, dq [B, H, Sq, D]; k, v, dk, dv [B, Hkv, Sk, D], strided but for D; softmax, delta [B, H, Sq], f32,
// contiguous. D is that of the instance or less. Query head h reads key and value head h / (H / Hkv).
// Products of halves are summed in f32; P, y and ds pass through the dtype on their way into a product. A query
// that sees no key gives zeros. Of a key that no query of a tile sees, nothing is read, so neither
// NaN nor inf; where only some see it, the others get 0 * v, as in the product of materialised probabilities.
// FLOPs: 4 Sq Sk D a head forward, 8 for dk and dv, 6 for dq, of tiles with a visible key only. Bytes are few:
// a tile of keys and values serves all queries of its block, and lies in L2.
//
// A block of 4 warps takes a tile of queries (dk and dv: of keys, for all heads that share them, so that sums need
// no atomics and results repeat bit for bit) and walks over the other side in tiles that cp.async loads while
// the one before is worked on. blockIdx.x = (batch * heads + head) * tiles + tile. Dropout costs no memory and no
// barrier: attention_tiles.cuh says how draws meet their scores. p = 0 has kernels of its own, without draws.
// 16-byte copies where D, all strides and all tensors are multiples of 16 bytes; else tiles are filled element by
// element, and everything else stays as it is.
#include "attention_scores.cuh"

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
    static constexpr bool RESIDENT = D <= 32;
};

// Logits grow this much, in base 2, before sums are scaled down to the new maximum. Until then exponentials
// may reach 2^8, far from the largest half.
constexpr float MARGIN = 8.f;

template <int D, bool DROPS, typename T>
__device__ __forceinline__ void attention_fwd(const T* q, const T* k, const T* v, const uint32_t* key_lengths,
                                              const float* alibi_slopes, T* o, RowSoftmax* softmax,
                                              const AttentionArgs& args, const AttentionLayout& layout,
                                              const MaskArgs& drop) {
    extern __shared__ __align__(128) Bits shared[];
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
    const int begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);
    const int all_begin = args.visible_begin(last_query), all_end = args.visible_end(first_query, length);

    const int head_size = args.head_size;
    const bool is_vector = head_size % WIDTH == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                           rows_are_aligned(v, layout.v) && rows_are_aligned(o, layout.o);
    const HeadRows<const T> q_rows = head_rows(q, layout.q, batch, head, 0, args.queries);
    const HeadRows<const T> k_rows = head_rows(k, layout.k, batch, kv_head, begin, end);
    const HeadRows<const T> v_rows = head_rows(v, layout.v, batch, kv_head, begin, end);
    Bits* const q_tile = shared;
    // Two stages, each of keys and values.
    const auto k_tile = [&](int stage) { return shared + (QUERIES + stage * 2 * KEYS) * D; };
    const auto v_tile = [&](int stage) { return shared + (QUERIES + stage * 2 * KEYS + KEYS) * D; };

    const int shift = DROPS ? HeadMask::shift_of(drop) : 0;
    const int first_key = (begin + shift) / 32 * 32 - shift;
    int key = first_key;
    if (key < end) {
        load_rows<D, QUERIES, THREADS>(q_tile, q_rows, first_query, head_size, is_vector);
        load_rows<D, KEYS, THREADS>(k_tile(0), k_rows, key, head_size, is_vector);
        load_rows<D, KEYS, THREADS>(v_tile(0), v_rows, key, head_size, is_vector);
        cp_async_commit();
    }

    const Scores scores(args, alibi_slopes);
    const HeadMask mask(drop, args, batch, head);
    Fragments<D, M, Shape::RESIDENT> queries(q_tile, lane_id(), warp_row);
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
            load_rows<D, KEYS, THREADS>(k_tile(stage ^ 1), k_rows, key + KEYS, head_size, is_vector);
            load_rows<D, KEYS, THREADS>(v_tile(stage ^ 1), v_rows, key + KEYS, head_size, is_vector);
            cp_async_commit();
        }
        if (key == first_key) queries.load();

        float s[M][N][4] = {};
        multiply_keys<T>(s, queries, k_tile(stage));
        if (!scores.is_plain) make_logits<T>(s, scores.logits(head), args, opaque(query), key);
        if (key < all_begin || key + KEYS > all_end) hide(s, args, opaque(query), key, length);
        if (DROPS && args.drop_key) hide_dropped(s, mask, query, key, 0);

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
                    if (DROPS) draws = mask.draw_keys(opaque(query + 16 * m + 8 * h), key + key_of(n));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float low = exp2_approx(fmaf(s[m][n + i][2 * h], scores.factor, -base));
                        const float high = exp2_approx(fmaf(s[m][n + i][2 * h + 1], scores.factor, -base));
                        sums[m][h] += low + high;
                        p[m][n + i][h] = pack(low, high, T());
                        if (DROPS) p[m][n + i][h] &= mask.keep_bits(draws.word[i]);
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
            factor[m][h] = sum == 0.f ? 0.f : (DROPS ? drop.scale : 1.f) / sum;
            const uint32_t row = query + 16 * m + 8 * h;
            if (t == 0 && row < args.queries) {  // tail
                softmax[args.first_row(batch, head) + row] = RowSoftmax::of(reference[m][h], sum);
            }
        }
    }
    // Through the rows of q, which only this warp has read.
    put_rows<D, T>(q_tile, warp_row, 0, o_sums, factor);
    __syncwarp();
    const HeadRows<T> o_rows = head_rows(o, layout.o, batch, head, 0, args.queries);
    store_rows<D, 16 * M, 32>(q_tile, warp_row, o_rows, first_query + warp_row, head_size, is_vector);
}

// ---- Backward: dq -----------------------------------------------------------------------------------

// As ForwardShape; STAGES: tiles of keys and values in shared memory.
template <int D>
struct QueryGradientShape {
    static constexpr int M = D <= 128 ? 2 : 1;
    static constexpr int QUERIES = 16 * M * WARPS;
    static constexpr int KEYS = 32;
    static constexpr int STAGES = D <= 128 ? 2 : 1;
};

template <int D, bool DROPS, typename T>
__device__ __forceinline__ void attention_bwd_dq(const T* q, const T* k, const T* v, const uint32_t* key_lengths,
                                                 const float* alibi_slopes, const T* dout, const RowSoftmax* softmax,
                                                 const float* delta, T* dq, const AttentionArgs& args,
                                                 const AttentionLayout& layout, const AttentionLayout& grads,
                                                 const MaskArgs& drop) {
    extern __shared__ __align__(128) Bits shared[];
    using Shape = QueryGradientShape<D>;
    constexpr int M = Shape::M, QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, N = KEYS / 8;
    static_assert(KEYS == 32, "a lane draws once a row");
    const int warp_row = threadIdx.x / 32 * (16 * M), g = lane_id() / 4;

    const uint32_t tiles = (args.queries + QUERIES - 1) / QUERIES;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * QUERIES;
    const uint32_t last_query = min(first_query + QUERIES, args.queries) - 1;
    const uint32_t head = blockIdx.x / tiles % args.heads, batch = blockIdx.x / tiles / args.heads;
    const uint32_t kv_head = head / (args.heads / args.kv_heads);
    const uint32_t query = first_query + warp_row + g;

    const uint32_t length = args.length(key_lengths, batch);
    const int begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);
    const int all_begin = args.visible_begin(last_query), all_end = args.visible_end(first_query, length);

    const int head_size = args.head_size;
    const bool is_vector = head_size % WIDTH == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                           rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) &&
                            rows_are_aligned(dq, grads.q);
    // Queries that see nothing count as zeros.
    const int seeing_begin = args.seeing_begin(0), seeing_end = length == 0 ? 0 : args.seeing_end(length - 1);
    const HeadRows<const T> q_rows = head_rows(q, layout.q, batch, head, seeing_begin, seeing_end);
    const HeadRows<const T> dout_rows = head_rows(dout, grads.o, batch, head, seeing_begin, seeing_end);
    const HeadRows<const T> k_rows = head_rows(k, layout.k, batch, kv_head, begin, end);
    const HeadRows<const T> v_rows = head_rows(v, layout.v, batch, kv_head, begin, end);
    Bits* const q_tile = shared;
    Bits* const dout_tile = shared + QUERIES * D;
    const auto k_tile = [&](int stage) { return shared + (2 * QUERIES + stage * 2 * KEYS) * D; };
    const auto v_tile = [&](int stage) { return shared + (2 * QUERIES + stage * 2 * KEYS + KEYS) * D; };
    RowStatistics* const rows = reinterpret_cast<RowStatistics*>(k_tile(Shape::STAGES));

    const int shift = DROPS ? HeadMask::shift_of(drop) : 0;
    const int first_key = (begin + shift) / 32 * 32 - shift;
    int key = first_key;
    if (key < end) {
        load_rows<D, QUERIES, THREADS>(q_tile, q_rows, first_query, head_size, is_vector);
        load_rows<D, QUERIES, THREADS>(dout_tile, dout_rows, first_query, head_size, is_vector);
        load_rows<D, KEYS, THREADS>(k_tile(0), k_rows, key, head_size, is_vector);
        load_rows<D, KEYS, THREADS>(v_tile(0), v_rows, key, head_size, is_vector);
        cp_async_commit();
    }

    const Scores scores(args, alibi_slopes);
    const HeadMask mask(drop, args, batch, head);
    Fragments<D, M, false> queries(q_tile, opaque(lane_id()), warp_row), douts(dout_tile, opaque(lane_id()), warp_row);
    if (threadIdx.x < QUERIES) {
        const uint32_t row = first_query + threadIdx.x;
        const uint64_t first_row = args.first_row(batch, head);
        rows[threadIdx.x] = row_statistics(softmax, delta, first_row + row, row < args.queries);
    }
    float dq_sums[M][D / 8][4] = {};

    for (int stage = 0; key < end; key += KEYS) {
        cp_async_wait<0>();
        __syncthreads();
        if (Shape::STAGES == 2 && key + KEYS < end) {
            load_rows<D, KEYS, THREADS>(k_tile(stage ^ 1), k_rows, key + KEYS, head_size, is_vector);
            load_rows<D, KEYS, THREADS>(v_tile(stage ^ 1), v_rows, key + KEYS, head_size, is_vector);
            cp_async_commit();
        }

        float s[M][N][4] = {}, dp[M][N][4] = {};
        multiply_keys<T>(s, queries, k_tile(stage));
        if (!scores.is_plain) make_logits<T>(s, scores.logits(head), args, opaque(query), key);
        if (key < all_begin || key + KEYS > all_end) hide(s, args, opaque(query), key, length);
        if (DROPS && args.drop_key) hide_dropped(s, mask, query, key, 0);
        multiply_keys<T>(dp, douts, v_tile(stage));

        uint32_t ds[M][N][2];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            uint32_t kept[N][2];
            const RowStatistics* statistics = rows + warp_row + 16 * m + g;
            const uint32_t row = query + 16 * m;
            if (!scores.is_capped()) {
                differentiate<DROPS, false, T>(s[m], dp[m], scores.factor, Logits(args, nullptr, 0), mask, args,
                                              statistics, row, key, 0, kept, ds[m]);
            } else {
                differentiate<DROPS, true, T>(s[m], dp[m], scores.factor, scores.logits(head), mask, args, statistics,
                                             row, key, 0, kept, ds[m]);
            }
        }
        multiply_values<D, T>(dq_sums, ds, k_tile(stage));

        if (Shape::STAGES == 2) {
            stage ^= 1;
        } else if (key + KEYS < end) {
            __syncthreads();
            load_rows<D, KEYS, THREADS>(k_tile(0), k_rows, key + KEYS, head_size, is_vector);
            load_rows<D, KEYS, THREADS>(v_tile(0), v_rows, key + KEYS, head_size, is_vector);
            cp_async_commit();
        }
    }

    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) factor[m][0] = factor[m][1] = float(args.scale);
    // Through the rows of q, which only this warp has read.
    put_rows<D, T>(q_tile, warp_row, 0, dq_sums, factor);
    __syncwarp();
    const HeadRows<T> dq_rows = head_rows(dq, grads.q, batch, head, 0, args.queries);
    store_rows<D, 16 * M, 32>(q_tile, warp_row, dq_rows, first_query + warp_row, head_size, is_vector);
}

// ---- Backward: dk and dv ----------------------------------------------------------------------------

// Scores are cut 2 x 2 among the warps, gradients by 32 keys and COLS columns.
template <int D>
struct KeyGradientShape {
    static constexpr int KEYS = D <= 128 ? 64 : 32;
    static constexpr int QUERIES = D <= 128 ? 64 : 32;
    static constexpr int COLS = D / (WARPS / (KEYS / 32));
    // Of the scores of a warp, 16 PART queries are differentiated at a time, as registers allow.
    static constexpr int PART = D == 128 ? 1 : QUERIES / 32;
};

template <int D, bool DROPS, typename T>
__device__ __forceinline__ void attention_bwd_dkdv(const T* q, const T* k, const T* v, const uint32_t* key_lengths,
                                                   const float* alibi_slopes, const T* dout, const RowSoftmax* softmax,
                                                   const float* delta, T* dk, T* dv, const AttentionArgs& args,
                                                   const AttentionLayout& layout, const AttentionLayout& grads,
                                                   const MaskArgs& drop) {
    extern __shared__ __align__(128) Bits shared[];
    using Shape = KeyGradientShape<D>;
    constexpr int KEYS = Shape::KEYS, QUERIES = Shape::QUERIES, COLS = Shape::COLS;
    constexpr int M = QUERIES / 32, N = KEYS / 16, PART = Shape::PART;
    const int warp = threadIdx.x / 32, g = lane_id() / 4;
    // Of the scores: queries warp_row .., of the block of keys from warp_key on the column tiles first ..
    const int warp_row = warp / 2 * (QUERIES / 2), warp_key = KEYS == 64 ? warp % 2 * 32 : 0;
    const int first = KEYS == 64 ? 0 : warp % 2 * 2;

    // One tile more where the mask might begin within a Philox call, so that its size depends on the shape alone.
    const uint32_t tiles = (args.keys + WIDTH - 1 + KEYS - 1) / KEYS;
    const int first_key = int(blockIdx.x % tiles * KEYS) - (DROPS ? HeadMask::shift_of(drop) : 0);
    const uint32_t kv_head = blockIdx.x / tiles % args.kv_heads, batch = blockIdx.x / tiles / args.kv_heads;
    const uint32_t group = args.heads / args.kv_heads;

    // The queries that see a key of the tile, in steps of QUERIES, for each head of the group.
    const int length = args.length(key_lengths, batch);
    const int last_key = min(first_key + KEYS, length) - 1;
    const uint32_t begin = args.seeing_begin(max(first_key, 0));
    const uint32_t end = last_key < max(first_key, 0) ? 0 : args.seeing_end(last_key);

    const int head_size = args.head_size;
    const bool is_vector = head_size % WIDTH == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                           rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) &&
                            rows_are_aligned(dk, grads.k) && rows_are_aligned(dv, grads.v);
    Bits* const k_tile = shared;
    Bits* const v_tile = k_tile + KEYS * D;
    Bits* const dout_tile = v_tile + KEYS * D;
    Bits* const q_tiles = dout_tile + QUERIES * D;  // two
    Bits* const kept_tile = q_tiles + 2 * QUERIES * D;
    Bits* const ds_tile = kept_tile + QUERIES * KEYS;
    RowStatistics* const rows = reinterpret_cast<RowStatistics*>(ds_tile + QUERIES * KEYS);

    uint32_t head = kv_head * group, first_query = begin;
    const uint32_t end_head = begin < end ? head + group : head;
    if (head < end_head) {
        // Keys that no query sees count as zeros.
        const int seen_begin = args.visible_begin(0), seen_end = args.visible_end(args.queries - 1, length);
        const HeadRows<const T> k_rows = head_rows(k, layout.k, batch, kv_head, seen_begin, seen_end);
        const HeadRows<const T> v_rows = head_rows(v, layout.v, batch, kv_head, seen_begin, seen_end);
        const HeadRows<const T> q_rows = head_rows(q, layout.q, batch, head, begin, end);
        load_rows<D, KEYS, THREADS>(k_tile, k_rows, first_key, head_size, is_vector);
        load_rows<D, KEYS, THREADS>(v_tile, v_rows, first_key, head_size, is_vector);
        load_rows<D, QUERIES, THREADS>(q_tiles, q_rows, first_query, head_size, is_vector);
        cp_async_commit();
    }

    // Of the gradients: 32 keys from x on, COLS columns from y on.
    const auto part_of_gradients = [](int warp) {
        return KEYS == 64 ? make_int2(warp / 2 * 32, warp % 2 * COLS) : make_int2(0, warp * COLS);
    };
    const auto advance = [&](uint32_t& head, uint32_t& first_query) {
        first_query += QUERIES;
        if (first_query >= end) ++head, first_query = begin;
    };
    const Scores scores(args, alibi_slopes);
    float dk_sums[2][COLS / 8][4] = {}, dv_sums[2][COLS / 8][4] = {};
    for (int stage = 0; head < end_head; stage ^= 1) {
        Bits* const q_tile = q_tiles + stage * (QUERIES * D);
        cp_async_wait<0>();
        __syncthreads();
        const HeadRows<const T> dout_rows = head_rows(dout, grads.o, batch, head, begin, end);
        load_rows<D, QUERIES, THREADS>(dout_tile, dout_rows, first_query, head_size, is_vector);
        cp_async_commit();
        uint32_t next_head = head, next_query = opaque(first_query);
        advance(next_head, next_query);
        if (next_head < end_head) {
            const HeadRows<const T> q_rows = head_rows(q, layout.q, batch, next_head, begin, end);
            load_rows<D, QUERIES, THREADS>(q_tiles + (stage ^ 1) * (QUERIES * D), q_rows, next_query, head_size,
                                           is_vector);
        }
        cp_async_commit();

        const uint32_t query = first_query + warp_row + g;
        const int key = first_key + warp_key;
        RowStatistics statistics;
        if (threadIdx.x < QUERIES) {
            const uint32_t row = first_query + threadIdx.x;
            const uint64_t first_row = args.first_row(batch, head);
            statistics = row_statistics(softmax, delta, first_row + row, row < end);
        }

        float s[M][N][4] = {};
        Fragments<D, M, false> queries(q_tile, lane_id(), warp_row);
        multiply_keys<T>(s, queries, k_tile + warp_key * D, first);
        if (!scores.is_plain) make_logits<T>(s, scores.logits(head), args, opaque(query), key + 2 * first);
        const uint32_t last_query = min(first_query + QUERIES, end) - 1;
        if (first_key < int(args.visible_begin(last_query)) ||
            first_key + KEYS > int(args.visible_end(first_query, length))) {
            hide(s, args, opaque(query), key + 2 * first, length);
        }

        if (threadIdx.x < QUERIES) rows[threadIdx.x] = statistics;
        cp_async_wait<1>();
        __syncthreads();
        const HeadMask mask(drop, args, batch, head);
        if (DROPS && args.drop_key) hide_dropped(s, mask, query, key, first);
#pragma unroll
        for (int part = 0; part < M; part += PART) {
            float dp[PART][N][4] = {};
            Fragments<D, PART, false> douts(dout_tile, lane_id(), warp_row + 16 * part);
            multiply_keys<T>(dp, douts, v_tile + warp_key * D, first);
#pragma unroll
            for (int m = part; m < part + PART; ++m) {
                uint32_t kept[N][2], ds[N][2];
                const RowStatistics* statistics = rows + warp_row + 16 * m + g;
                const uint32_t row = query + 16 * m;
                if (!scores.is_capped()) {
                    differentiate<DROPS, false, T>(s[m], dp[m - part], scores.factor, Logits(args, nullptr, 0), mask,
                                                  args, statistics, row, key, first, kept, ds);
                } else {
                    differentiate<DROPS, true, T>(s[m], dp[m - part], scores.factor, scores.logits(head), mask, args,
                                                 statistics, row, key, first, kept, ds);
                }
                // The lane's keys follow one another: 8 of them, or 4.
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int tile_row = warp_row + 16 * m + 8 * h + g;
                    const int at = ScoreTile<KEYS>::offset(tile_row, warp_key / 8 + lane_id() % 4) + 2 * first;
#pragma unroll
                    for (int n = 0; n < N; n += 2) {
                        *reinterpret_cast<uint2*>(kept_tile + at + 2 * n) = {kept[n][h], kept[n + 1][h]};
                        *reinterpret_cast<uint2*>(ds_tile + at + 2 * n) = {ds[n][h], ds[n + 1][h]};
                    }
                }
            }
        }
        __syncthreads();
        const int2 part = part_of_gradients(opaque(warp));
        multiply_transposed<D, KEYS, QUERIES, T>(dv_sums, kept_tile, part.x, dout_tile, part.y);
        multiply_transposed<D, KEYS, QUERIES, T>(dk_sums, ds_tile, part.x, q_tile, part.y);
        advance(head, first_query);
    }

    // Through the tiles of keys and values, which nobody reads any more.
    const float scale = float(args.scale), drop_scale = (DROPS ? drop.scale : 1.f) / RAISED;
    const float dk_factor[2][2] = {{scale, scale}, {scale, scale}};
    const float dv_factor[2][2] = {{drop_scale, drop_scale}, {drop_scale, drop_scale}};
    const int2 part = part_of_gradients(warp);
    put_rows<D, T>(k_tile, part.x, part.y, dk_sums, dk_factor);
    put_rows<D, T>(v_tile, part.x, part.y, dv_sums, dv_factor);
    __syncthreads();
    const HeadRows<T> dk_rows = head_rows(dk, grads.k, batch, kv_head, 0, args.keys);
    const HeadRows<T> dv_rows = head_rows(dv, grads.v, batch, kv_head, 0, args.keys);
    store_rows<D, KEYS, THREADS>(k_tile, 0, dk_rows, first_key, head_size, is_vector);
    store_rows<D, KEYS, THREADS>(v_tile, 0, dv_rows, first_key, head_size, is_vector);
}

}  // namespace

#define ATTENTION_FWD(NAME, D, DROPS, SUFFIX, T)                                                              \
    KERNEL(THREADS, 2) NAME##_d##D##_##SUFFIX(                                                                \
        const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                            \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes, T* __restrict__ o,  \
        RowSoftmax* __restrict__ softmax, AttentionArgs args, AttentionLayout layout, MaskArgs drop) {        \
        attention_fwd<D, DROPS>(q, k, v, key_lengths, alibi_slopes, o, softmax, args, layout, drop);          \
    }

#define ATTENTION_BWD_DQ(NAME, D, DROPS, SUFFIX, T)                                                           \
    KERNEL(THREADS, 2) NAME##_d##D##_##SUFFIX(                                                                \
        const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                            \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                     \
        const T* __restrict__ dout, const RowSoftmax* __restrict__ softmax, const float* __restrict__ delta,  \
        T* __restrict__ dq, AttentionArgs args, AttentionLayout layout, AttentionLayout grads, MaskArgs drop) { \
        attention_bwd_dq<D, DROPS>(q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dq, args, layout, grads, \
                                   drop);                                                                     \
    }

#define ATTENTION_BWD_DKDV(NAME, D, DROPS, SUFFIX, T)                                                         \
    KERNEL(THREADS, 2) NAME##_d##D##_##SUFFIX(                                                                \
        const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,                            \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                     \
        const T* __restrict__ dout, const RowSoftmax* __restrict__ softmax, const float* __restrict__ delta,  \
        T* __restrict__ dk, T* __restrict__ dv, AttentionArgs args, AttentionLayout layout,                   \
        AttentionLayout grads, MaskArgs drop) {                                                               \
        attention_bwd_dkdv<D, DROPS>(q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dk, dv, args, layout, \
                                     grads, drop);                                                            \
    }

#define FOR_EACH_HALF(ATTENTION, NAME, D)                    \
    ATTENTION(NAME, D, true, f16, __half)                    \
    ATTENTION(NAME, D, true, bf16, __nv_bfloat16)            \
    ATTENTION(NAME##_nodrop, D, false, f16, __half)          \
    ATTENTION(NAME##_nodrop, D, false, bf16, __nv_bfloat16)
#define FOR_EACH_HEAD_SIZE(ATTENTION, NAME) \
    FOR_EACH_HALF(ATTENTION, NAME, 32)      \
    FOR_EACH_HALF(ATTENTION, NAME, 64)      \
    FOR_EACH_HALF(ATTENTION, NAME, 96)      \
    FOR_EACH_HALF(ATTENTION, NAME, 128)     \
    FOR_EACH_HALF(ATTENTION, NAME, 256)
FOR_EACH_HEAD_SIZE(ATTENTION_FWD, attention_fwd)
FOR_EACH_HEAD_SIZE(ATTENTION_BWD_DQ, attention_bwd_dq)
FOR_EACH_HEAD_SIZE(ATTENTION_BWD_DKDV, attention_bwd_dkdv)
