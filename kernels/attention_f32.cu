// attention, f32: softmax(q k^T) v with dropout, never in memory as a whole. Twin of src/ops/attention/cpu.rs.
//
//     s = scale * q·k      s = softcap * tanh(s / softcap)      t = s - slope * |i + Sk - Sq - j|
//     P = softmax(t) over the visible keys        y = keep ? P * drop.scale : 0
//     forward   o = y v,  lse = ln sum exp(t)
//     backward  delta = sum of o do over D        dP = keep ? drop.scale * do·v : 0
//               dt = P (dP - delta)               ds = dt * (1 - (s / softcap)^2)
//               dq = scale * ds k                 dk = scale * ds^T q        dv = y^T do
//
// q, o, do, dq [B, H, Sq, D]; k, v, dk, dv [B, Hkv, Sk, D], D <= 256, strided but for D; lse, delta
// [B, H, Sq], contiguous. Query head h reads key and value head h / (H / Hkv). A query that sees no key gives
// zeros and lse = inf. Of a key that no query of a tile sees, nothing is read, so neither NaN nor inf; where
// only some see it, the others get 0 * v, as in the product of the materialised probabilities.
// FLOPs: 4 Sq Sk D a head forward, 8 for dk and dv, 6 for dq, of tiles with a visible key only. Bytes are
// few: a tile does 64 * 64 * 64 multiply-adds for each 3 * 16 KiB it loads, mostly from L2.
//
// Plain multiply-adds, no tensor cores: products are as exact as those of f32 elsewhere. Everything is cut
// into tiles of 64 queries x 64 keys x 64 columns. A block of 512 / R threads takes a tile of queries (dk and dv:
// of keys, for all heads that share them, so that sums need no atomics) and walks over the other side,
// with scores and results in registers and two tiles in shared memory. A thread holds R rows x 8
// neighbouring keys of the scores, the columns of one Philox call.
// 16-byte loads and stores where D, all strides and all tensors are multiples of 16 bytes, else one by one.
#include "attention.cuh"
#include "reduce.cuh"

namespace {

// Queries, keys or columns of a tile.
constexpr int TILE_ROWS = 64;
// Floats from row to row in shared memory: 8 rows that follow one another begin in different banks.
constexpr int TILE_STRIDE = TILE_ROWS + 4;
constexpr int TILE_FLOATS = TILE_ROWS * TILE_STRIDE;

// Keys lie in shared memory transposed as a matrix of 8 x 8, so that the 8 threads of a row, who hold 8
// neighbouring keys each, read neighbouring rows. It is its own inverse.
__device__ __forceinline__ int place_of_key(int key) { return key % 8 * 8 + key / 8; }

// Of a head, the tensor's rows begin .. end; all others count as zeros.
struct Rows {
    const float* start;
    uint64_t stride;
    uint32_t begin;
    uint32_t end;
};

// The thread's part of a tile: rows row, row + 4, .. (R of them) and the `eighth` of the other dimension.
// The 8 threads that share rows are neighbours in a warp.
template <int R>
struct Place {
    static constexpr int THREADS = TILE_ROWS * 8 / R;
    int row = threadIdx.x / 32 * (4 * R) + threadIdx.x % 32 / 8;
    int eighth = threadIdx.x % 8;
};

// Loads 64 rows from `first` on, and of these the columns from `col` on.
template <bool KEYS, int R>
__device__ __forceinline__ void load_tile(float* tile, const Rows& rows, uint32_t first, int col, int head_size,
                                          bool vector) {
    constexpr int STEP = Place<R>::THREADS / (TILE_ROWS / 4);
    const int c = threadIdx.x % (TILE_ROWS / 4) * 4;
    const int count = head_size - col - c;
    int r = threadIdx.x / (TILE_ROWS / 4);
    const float* from = rows.start + (first + r) * rows.stride + col + c;
#pragma unroll 4
    for (; r < TILE_ROWS; r += STEP, from += STEP * rows.stride) {
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (first + r >= rows.begin && first + r < rows.end) {  // tail
            if (vector) {
                if (count >= 4) x = *reinterpret_cast<const float4*>(from);  // tail
            } else {
                if (count > 0) x.x = from[0];  // tail
                if (count > 1) x.y = from[1];  // tail
                if (count > 2) x.z = from[2];  // tail
                if (count > 3) x.w = from[3];  // tail
            }
        }
        *reinterpret_cast<float4*>(tile + (KEYS ? place_of_key(r) : r) * TILE_STRIDE + c) = x;
    }
}

__device__ __forceinline__ float4 load_shared(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}

// acc[r][j] += a[row + 4 r] · b[key 8 * eighth + j], over the first `depth` columns, a multiple of 4.
template <int R>
__device__ __forceinline__ void multiply_rows(float (&acc)[R][8], const float* a, const float* b, int depth,
                                              Place<R> place) {
#pragma unroll 1
    for (int d = 0; d < depth; d += 4) {
        float4 x[R];
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = load_shared(a + (place.row + 4 * r) * TILE_STRIDE + d);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float4 y = load_shared(b + (8 * j + place.eighth) * TILE_STRIDE + d);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                acc[r][j] = fmaf(x[r].w, y.w, fmaf(x[r].z, y.z, fmaf(x[r].y, y.y, fmaf(x[r].x, y.x, acc[r][j]))));
            }
        }
    }
}

// acc[r][c] += sum over i of a[row + 4 r][i] b[i][c], for 4 columns from 4 * eighth on and 4 more, 32 behind.
template <int R>
__device__ __forceinline__ void multiply(float (&acc)[R][8], const float* a, const float* b, Place<R> place) {
#pragma unroll 1
    for (int i = 0; i < TILE_ROWS; i += 4) {
        float4 x[R];
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = load_shared(a + (place.row + 4 * r) * TILE_STRIDE + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* row = b + (i + k) * TILE_STRIDE + 4 * place.eighth;
            const float4 low = load_shared(row), high = load_shared(row + 32);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float xk = k == 0 ? x[r].x : k == 1 ? x[r].y : k == 2 ? x[r].z : x[r].w;
                acc[r][0] = fmaf(xk, low.x, acc[r][0]), acc[r][1] = fmaf(xk, low.y, acc[r][1]);
                acc[r][2] = fmaf(xk, low.z, acc[r][2]), acc[r][3] = fmaf(xk, low.w, acc[r][3]);
                acc[r][4] = fmaf(xk, high.x, acc[r][4]), acc[r][5] = fmaf(xk, high.y, acc[r][5]);
                acc[r][6] = fmaf(xk, high.z, acc[r][6]), acc[r][7] = fmaf(xk, high.w, acc[r][7]);
            }
        }
    }
}

// Stores a row's part of 64 columns from `col` on; x[..] are the columns of `multiply`.
__device__ __forceinline__ void store_row(float* row, int col, int eighth, int head_size, bool vector,
                                          const float (&x)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = col + 32 * half + 4 * eighth;
        if (vector) {
            const float4 four = {x[4 * half], x[4 * half + 1], x[4 * half + 2], x[4 * half + 3]};
            if (first < head_size) *reinterpret_cast<float4*>(row + first) = four;  // tail
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (first + c < head_size) row[first + c] = x[4 * half + c];  // tail
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ T* head_of(T* tensor, const HeadStrides& strides, uint32_t batch, uint32_t head) {
    return tensor + batch * strides.batch + head * strides.head;
}

// What a query sees, and which row of the mask is its own.
struct Query {
    uint32_t own_key;
    uint32_t begin;
    uint32_t end;  // 0 for a query that does not exist
    uint64_t mask_row;

    __device__ __forceinline__ Query(const AttentionArgs& args, const MaskArgs& drop, uint32_t length, uint32_t head,
                                     uint32_t query)
        : own_key(query + args.keys - args.queries),
          begin(args.visible_begin(query)),
          end(query < args.queries ? args.visible_end(query, length) : 0),
          mask_row(drop.rows.map(uint64_t(head) * args.queries + query)) {}

    __device__ __forceinline__ bool sees(uint32_t key) const { return key >= begin && key < end; }
};

// All 8 threads that share rows get the result.
template <typename Op>
__device__ __forceinline__ float reduce_row(float x, Op op) {
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

template <int CHUNKS, int R>
__device__ __forceinline__ void clear(float (&acc)[CHUNKS][R][8]) {
#pragma unroll
    for (int i = 0; i < CHUNKS * R * 8; ++i) acc[i / (R * 8)][i / 8 % R][i % 8] = 0.f;
}

// scores = rows of a times keys of b, over all columns. `a_tile` and `b_tile` may be in use until it begins.
template <int CHUNKS, int R>
__device__ __forceinline__ void multiply_all_columns(float (&scores)[R][8], const Rows& a, uint32_t first_a,
                                                     const Rows& b, uint32_t first_b, int head_size, bool vector,
                                                     float* a_tile, float* b_tile, Place<R> place) {
#pragma unroll
    for (int i = 0; i < R * 8; ++i) scores[i / 8][i % 8] = 0.f;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        __syncthreads();
        load_tile<false, R>(a_tile, a, first_a, chunk * TILE_ROWS, head_size, vector);
        load_tile<true, R>(b_tile, b, first_b, chunk * TILE_ROWS, head_size, vector);
        __syncthreads();
        const int depth = min(head_size - chunk * TILE_ROWS + 3, TILE_ROWS) / 4 * 4;
        multiply_rows<R>(scores, a_tile, b_tile, depth, place);
    }
}

template <bool DROPS, int CHUNKS, int R>
__device__ __forceinline__ void attention_fwd(const float* __restrict__ q, const float* __restrict__ k,
                                              const float* __restrict__ v, const uint32_t* __restrict__ key_lengths,
                                              const float* __restrict__ alibi_slopes, float* __restrict__ o,
                                              float* __restrict__ lse, const AttentionArgs& args,
                                              const AttentionLayout& layout, const MaskArgs& drop, float* query_tile,
                                              float* key_tile) {
    const Place<R> place;
    // The last tiles see most under a causal mask, so they begin first.
    const uint32_t tiles = (args.queries + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * TILE_ROWS;
    const uint32_t head = blockIdx.x / tiles, batch = head / args.heads, h = head % args.heads;
    const uint32_t last_query = min(first_query + TILE_ROWS, args.queries) - 1;
    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);

    const uint32_t kv_head = h / (args.heads / args.kv_heads);
    const Rows queries = {head_of(q, layout.q, batch, h), layout.q.row, first_query, last_query + 1};
    const Rows keys = {head_of(k, layout.k, batch, kv_head), layout.k.row, begin, end};
    const Rows values = {head_of(v, layout.v, batch, kv_head), layout.v.row, begin, end};
    const int head_size = int(args.head_size);
    const bool vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(o, layout.o);
    const Logits logits(args, alibi_slopes, h);

    float max[R], sum[R], acc[CHUNKS][R][8];
    clear(acc);
#pragma unroll
    for (int r = 0; r < R; ++r) max[r] = -INFINITY, sum[r] = 0.f;

    for (uint32_t first_key = begin / TILE_ROWS * TILE_ROWS; first_key < end; first_key += TILE_ROWS) {
        // Step 1: scores.
        float s[R][8];
        multiply_all_columns<CHUNKS, R>(s, queries, first_query, keys, first_key, head_size, vector, query_tile,
                                        key_tile, place);

        // Step 2: their exponentials, with what was summed so far brought to the new maximum.
        __syncthreads();
        const uint32_t key = first_key + 8 * place.eighth;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const Query query(args, drop, length, head, first_query + place.row + 4 * r);
            float new_max = max[r];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float logit = logits.biased(logits.capped<float>(s[r][j]), query.own_key, key + j);
                s[r][j] = query.sees(key + j) ? logit : -INFINITY;
                new_max = fmaxf(new_max, s[r][j]);
            }
            new_max = reduce_row(new_max, Max());
            // With no visible key yet, 0 stands in for the maximum: all exponentials are 0 then.
            const float base = new_max == -INFINITY ? 0.f : new_max;
            const float shrink = exp2f(max[r] - base);
            max[r] = new_max;
            sum[r] *= shrink;
#pragma unroll
            for (int i = 0; i < CHUNKS * 8; ++i) acc[i / 8][r][i % 8] *= shrink;

            Draws draws;
            if (DROPS) draws = draw_keys(drop, query.mask_row, key);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float e = exp2f(s[r][j] - base);
                sum[r] += e;
                const float kept = !DROPS || keeps(drop, draws[j]) ? e : 0.f;
                query_tile[(place.row + 4 * r) * TILE_STRIDE + 8 * j + place.eighth] = kept;
            }
        }

        // Step 3: their product with the values.
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (chunk > 0) __syncthreads();
            load_tile<true, R>(key_tile, values, first_key, chunk * TILE_ROWS, head_size, vector);
            __syncthreads();
            multiply<R>(acc[chunk], query_tile, key_tile, place);
        }
    }

    // Step 4: normalise.
    float* const o_head = head_of(o, layout.o, batch, h);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t query = first_query + place.row + 4 * r;
        const float total = reduce_row(sum[r], Sum());
        if (query >= args.queries) continue;  // tail
        const float scale = (DROPS ? drop.scale : 1.f) / total;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int c = 0; c < 8; ++c) acc[chunk][r][c] = total == 0.f ? 0.f : acc[chunk][r][c] * scale;
            store_row(o_head + query * layout.o.row, chunk * TILE_ROWS, place.eighth, head_size, vector,
                      acc[chunk][r]);
        }
        if (place.eighth == 0) {
            lse[uint64_t(head) * args.queries + query] = total == 0.f ? INFINITY : (max[r] + log2f(total)) * LN_2;
        }
    }
}

// The scores of a row at 8 keys become y / drop.scale, and the gradients of y become ds.
template <bool DROPS>
__device__ __forceinline__ void backpropagate(float (&s)[8], float (&dp)[8], const Query& query, uint32_t key,
                                              float lse, float delta, const Logits& logits, const MaskArgs& drop) {
    Draws draws;
    if (DROPS) draws = draw_keys(drop, query.mask_row, key);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float capped = logits.capped<float>(s[j]);
        const float logit = logits.biased(capped, query.own_key, key + j);
        const float p = exp2f(logit - lse * LOG2_E);
        const bool keep = !DROPS || keeps(drop, draws[j]);
        const float dy = keep ? (DROPS ? drop.scale * dp[j] : dp[j]) : 0.f;
        // By selection: neither the probability nor the gradient of a hidden key need be finite.
        s[j] = query.sees(key + j) && keep ? p : 0.f;
        dp[j] = query.sees(key + j) ? p * (dy - delta) * logits.slope_of_cap(capped) : 0.f;
    }
}

template <bool DROPS, int CHUNKS, int R>
__device__ __forceinline__ void attention_bwd_dq(const float* __restrict__ q, const float* __restrict__ k,
                                                 const float* __restrict__ v,
                                                 const uint32_t* __restrict__ key_lengths,
                                                 const float* __restrict__ alibi_slopes,
                                                 const float* __restrict__ dout, const float* __restrict__ lse,
                                                 const float* __restrict__ delta, float* __restrict__ dq,
                                                 const AttentionArgs& args, const AttentionLayout& layout,
                                                 const AttentionLayout& grads, const MaskArgs& drop,
                                                 float* query_tile, float* key_tile) {
    const Place<R> place;
    const uint32_t tiles = (args.queries + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * TILE_ROWS;
    const uint32_t head = blockIdx.x / tiles, batch = head / args.heads, h = head % args.heads;
    const uint32_t last_query = min(first_query + TILE_ROWS, args.queries) - 1;
    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);

    const uint32_t kv_head = h / (args.heads / args.kv_heads);
    const Rows queries = {head_of(q, layout.q, batch, h), layout.q.row, first_query, last_query + 1};
    const Rows douts = {head_of(dout, grads.o, batch, h), grads.o.row, first_query, last_query + 1};
    const Rows keys = {head_of(k, layout.k, batch, kv_head), layout.k.row, begin, end};
    const Rows values = {head_of(v, layout.v, batch, kv_head), layout.v.row, begin, end};
    const int head_size = int(args.head_size);
    const bool vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) && rows_are_aligned(dq, grads.q);
    const Logits logits(args, alibi_slopes, h);

    const float* const lse_head = lse + uint64_t(head) * args.queries;
    const float* const delta_head = delta + uint64_t(head) * args.queries;
    float acc[CHUNKS][R][8];
    clear(acc);
    for (uint32_t first_key = begin / TILE_ROWS * TILE_ROWS; first_key < end; first_key += TILE_ROWS) {
        // Step 1: scores and the gradients of y.
        float s[R][8], dp[R][8];
        multiply_all_columns<CHUNKS, R>(s, queries, first_query, keys, first_key, head_size, vector, query_tile,
                                        key_tile, place);
        multiply_all_columns<CHUNKS, R>(dp, douts, first_query, values, first_key, head_size, vector, query_tile,
                                        key_tile, place);

        // Step 2: gradients of the scores.
        __syncthreads();
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const uint32_t i = first_query + place.row + 4 * r;
            const Query query(args, drop, length, head, i);
            const uint32_t at = min(i, last_query);
            backpropagate<DROPS>(s[r], dp[r], query, first_key + 8 * place.eighth, lse_head[at], delta_head[at],
                                 logits, drop);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                query_tile[(place.row + 4 * r) * TILE_STRIDE + 8 * j + place.eighth] = dp[r][j];
            }
        }

        // Step 3: their product with the keys.
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (chunk > 0) __syncthreads();
            load_tile<true, R>(key_tile, keys, first_key, chunk * TILE_ROWS, head_size, vector);
            __syncthreads();
            multiply<R>(acc[chunk], query_tile, key_tile, place);
        }
    }

    float* const dq_head = head_of(dq, grads.q, batch, h);
    const float scale = float(args.scale);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t i = first_query + place.row + 4 * r;
        if (i >= args.queries) continue;  // tail
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int c = 0; c < 8; ++c) acc[chunk][r][c] *= scale;
            store_row(dq_head + i * grads.q.row, chunk * TILE_ROWS, place.eighth, head_size, vector, acc[chunk][r]);
        }
    }
}

template <bool DROPS, int CHUNKS, int R>
__device__ __forceinline__ void attention_bwd_dkdv(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
    const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes, const float* __restrict__ dout,
    const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dk, float* __restrict__ dv,
    const AttentionArgs& args, const AttentionLayout& layout, const AttentionLayout& grads, const MaskArgs& drop,
    float* query_tile, float* key_tile) {
    const Place<R> place;
    // The first tiles are seen most under a causal mask, so they begin first.
    const uint32_t tiles = (args.keys + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_key = blockIdx.x % tiles * TILE_ROWS;
    const uint32_t kv_head = blockIdx.x / tiles % args.kv_heads, batch = blockIdx.x / tiles / args.kv_heads;
    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t end_key = min(first_key + TILE_ROWS, length);

    const Rows keys = {head_of(k, layout.k, batch, kv_head), layout.k.row, first_key, end_key};
    const Rows values = {head_of(v, layout.v, batch, kv_head), layout.v.row, first_key, end_key};
    const int head_size = int(args.head_size);
    const bool vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) && rows_are_aligned(dk, grads.k) &&
                        rows_are_aligned(dv, grads.v);

    float dk_acc[CHUNKS][R][8], dv_acc[CHUNKS][R][8];
    clear(dk_acc);
    clear(dv_acc);
    const uint32_t begin = args.seeing_begin(first_key);
    const uint32_t end = first_key < end_key ? args.seeing_end(end_key - 1) : 0;
    const uint32_t group = args.heads / args.kv_heads;
    for (uint32_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        const uint32_t head = batch * args.heads + h;
        const Rows queries = {head_of(q, layout.q, batch, h), layout.q.row, begin, end};
        const Rows douts = {head_of(dout, grads.o, batch, h), grads.o.row, begin, end};
        const Logits logits(args, alibi_slopes, h);
        for (uint32_t first_query = begin / TILE_ROWS * TILE_ROWS; first_query < end; first_query += TILE_ROWS) {
            // Step 1: scores and the gradients of y.
            float s[R][8], dp[R][8];
            multiply_all_columns<CHUNKS, R>(s, queries, first_query, keys, first_key, head_size, vector, query_tile,
                                            key_tile, place);
            multiply_all_columns<CHUNKS, R>(dp, douts, first_query, values, first_key, head_size, vector, query_tile,
                                            key_tile, place);

            // Step 2: y and the gradients of the scores.
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const uint32_t i = first_query + place.row + 4 * r;
                const Query query(args, drop, length, head, i);
                const uint64_t at = uint64_t(head) * args.queries + min(i, args.queries - 1);
                backpropagate<DROPS>(s[r], dp[r], query, first_key + 8 * place.eighth, lse[at], delta[at], logits,
                                     drop);
            }

            // Step 3: y^T do and ds^T q, with the keys as rows.
            auto multiply_transposed = [&](float(&acc)[CHUNKS][R][8], const float(&x)[R][8], const Rows& rows) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < R * 8; ++i) {
                    const int r = i / 8, j = i % 8;
                    key_tile[(8 * j + place.eighth) * TILE_STRIDE + place.row + 4 * r] = x[r][j];
                }
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                    if (chunk > 0) __syncthreads();
                    load_tile<false, R>(query_tile, rows, first_query, chunk * TILE_ROWS, head_size, vector);
                    __syncthreads();
                    multiply<R>(acc[chunk], key_tile, query_tile, place);
                }
            };
            multiply_transposed(dv_acc, s, douts);
            multiply_transposed(dk_acc, dp, queries);
        }
    }

    float* const dk_head = head_of(dk, grads.k, batch, kv_head);
    float* const dv_head = head_of(dv, grads.v, batch, kv_head);
    const float dk_scale = float(args.scale), dv_scale = DROPS ? drop.scale : 1.f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t key = first_key + place_of_key(place.row + 4 * r);
        if (key >= args.keys) continue;  // tail
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                dk_acc[chunk][r][c] = key < length ? dk_acc[chunk][r][c] * dk_scale : 0.f;
                dv_acc[chunk][r][c] = key < length ? dv_acc[chunk][r][c] * dv_scale : 0.f;
            }
            const int col = chunk * TILE_ROWS;
            store_row(dk_head + key * grads.k.row, col, place.eighth, head_size, vector, dk_acc[chunk][r]);
            store_row(dv_head + key * grads.v.row, col, place.eighth, head_size, vector, dv_acc[chunk][r]);
        }
    }
}

}  // namespace

#define ATTENTION(NAME, DROPS, D, FWD_R, DQ_R, DKDV_R)                                                            \
    extern "C" __global__ void __launch_bounds__(512 / FWD_R, D == 64 ? 3 : 1) attention_fwd_##NAME##_f32(                         \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                    \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes, float* __restrict__ o,  \
        float* __restrict__ lse, AttentionArgs args, AttentionLayout layout, MaskArgs drop) {                     \
        __shared__ float4 query_tile[TILE_FLOATS / 4];                                                            \
        __shared__ float4 key_tile[TILE_FLOATS / 4];                                                              \
        attention_fwd<DROPS, D / 64, FWD_R>(q, k, v, key_lengths, alibi_slopes, o, lse, args, layout, drop,       \
                                            &query_tile[0].x, &key_tile[0].x);                                    \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512 / DQ_R) attention_bwd_dq_##NAME##_f32(                       \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                    \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                         \
        const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,           \
        float* __restrict__ dq, AttentionArgs args, AttentionLayout layout, AttentionLayout grads,                \
        MaskArgs drop) {                                                                                          \
        __shared__ float4 query_tile[TILE_FLOATS / 4];                                                            \
        __shared__ float4 key_tile[TILE_FLOATS / 4];                                                              \
        attention_bwd_dq<DROPS, D / 64, DQ_R>(q, k, v, key_lengths, alibi_slopes, dout, lse, delta, dq, args,     \
                                              layout, grads, drop, &query_tile[0].x, &key_tile[0].x);             \
    }                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512 / DKDV_R) attention_bwd_dkdv_##NAME##_f32(                   \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                    \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                         \
        const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,           \
        float* __restrict__ dk, float* __restrict__ dv, AttentionArgs args, AttentionLayout layout,               \
        AttentionLayout grads, MaskArgs drop) {                                                                   \
        __shared__ float4 query_tile[TILE_FLOATS / 4];                                                            \
        __shared__ float4 key_tile[TILE_FLOATS / 4];                                                              \
        attention_bwd_dkdv<DROPS, D / 64, DKDV_R>(q, k, v, key_lengths, alibi_slopes, dout, lse, delta, dk, dv,   \
                                                  args, layout, grads, drop, &query_tile[0].x, &key_tile[0].x);   \
    }

ATTENTION(d64, true, 64, 4, 4, 4)
ATTENTION(d128, true, 128, 4, 4, 2)
ATTENTION(d256, true, 256, 2, 2, 2)
ATTENTION(nodrop_d64, false, 64, 4, 4, 4)
ATTENTION(nodrop_d128, false, 128, 4, 4, 2)
ATTENTION(nodrop_d256, false, 256, 2, 2, 2)
