// attention of f32: softmax(q k^T) v with dropout, never in memory as a whole. Twin of src/functional/attention/cpu/.
// One text, since no other kernel shares the tiles that these three are written in.
//
//     s = scale * q·k      s = softcap * tanh(s / softcap)      t = s - slope * |i + Sk - Sq - j|
//     P = softmax(t) over the visible keys        y = keep ? P * drop.scale : 0
//     DropKey: t = keep ? t : -inf                y = P
//     forward   o = y v, and what the softmax of a row is made with
//     backward  delta = sum of o do over D        dP = keep ? drop.scale * do·v : 0
//               dt = P (dP - delta)               ds = dt * (1 - (s / softcap)^2)
//               dq = scale * ds k                 dk = scale * ds^T q        dv = y^T do
//
// q, o, do, dq [B, H, Sq, D]; k, v, dk, dv [B, Hkv, Sk, D], D <= 256, strided but for D; softmax, delta
// [B, H, Sq], contiguous. Query head h reads key and value head h / (H / Hkv). A query that sees no key gives
// zeros. Of a key that no query of a tile sees, nothing is read, so neither NaN nor inf; where
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
__device__ __forceinline__ int permuted_key(int key) { return key % 8 * 8 + key / 8; }

// The thread's part of a tile: rows row, row + 4, .. (R of them) and the `eighth` of the other dimension.
// The 8 threads that share rows are neighbours in a warp.
template <int R>
struct Place {
    static constexpr int THREADS = TILE_ROWS * 8 / R;
    int row = threadIdx.x / 32 * (4 * R) + threadIdx.x % 32 / 8;
    int eighth = threadIdx.x % 8;
};

// Loads 64 rows from `first` on, and of these the columns from `col` on. PERMUTED: in the order of keys.
template <bool PERMUTED, int R>
__device__ __forceinline__ void load_rows(float* tile, const HeadRows<const float>& rows, int first, int col,
                                          int head_size, bool is_vector) {
    constexpr int STEP = Place<R>::THREADS / (TILE_ROWS / 4);
    const int c = threadIdx.x % (TILE_ROWS / 4) * 4;
    const int count = head_size - col - c;
    int r = threadIdx.x / (TILE_ROWS / 4);
    // Unsigned: an index with a sign takes registers that a kernel lacks.
    const float* from = rows.start + uint32_t(first + r) * rows.stride + col + c;
#pragma unroll 4
    for (; r < TILE_ROWS; r += STEP, from += STEP * rows.stride) {
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (first + r >= rows.begin && first + r < rows.end) {  // tail
            if (is_vector) {
                if (count >= 4) x = *reinterpret_cast<const float4*>(from);  // tail
            } else {
                if (count > 0) x.x = from[0];  // tail
                if (count > 1) x.y = from[1];  // tail
                if (count > 2) x.z = from[2];  // tail
                if (count > 3) x.w = from[3];  // tail
            }
        }
        *reinterpret_cast<float4*>(tile + (PERMUTED ? permuted_key(r) : r) * TILE_STRIDE + c) = x;
    }
}

__device__ __forceinline__ float4 load_shared(const float* from) {
    return *reinterpret_cast<const float4*>(from);
}

// s[r][j] += a[row + 4 r] · keys[8 * eighth + j], over the first `depth` columns, a multiple of 4.
template <int R>
__device__ __forceinline__ void multiply_keys(float (&s)[R][8], const float* a, const float* keys, int depth,
                                              Place<R> place) {
#pragma unroll 1
    for (int d = 0; d < depth; d += 4) {
        float4 x[R];
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = load_shared(a + (place.row + 4 * r) * TILE_STRIDE + d);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float4 y = load_shared(keys + (8 * j + place.eighth) * TILE_STRIDE + d);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                s[r][j] = fmaf(x[r].w, y.w, fmaf(x[r].z, y.z, fmaf(x[r].y, y.y, fmaf(x[r].x, y.x, s[r][j]))));
            }
        }
    }
}

// o[r][c] += sum over i of p[row + 4 r][i] values[i][c], for 4 columns from 4 * eighth on and 4 more, 32 behind.
template <int R>
__device__ __forceinline__ void multiply_values(float (&o)[R][8], const float* p, const float* values,
                                                Place<R> place) {
#pragma unroll 1
    for (int i = 0; i < TILE_ROWS; i += 4) {
        float4 x[R];
#pragma unroll
        for (int r = 0; r < R; ++r) x[r] = load_shared(p + (place.row + 4 * r) * TILE_STRIDE + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* row = values + (i + k) * TILE_STRIDE + 4 * place.eighth;
            const float4 low = load_shared(row), high = load_shared(row + 32);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float xk = k == 0 ? x[r].x : k == 1 ? x[r].y : k == 2 ? x[r].z : x[r].w;
                o[r][0] = fmaf(xk, low.x, o[r][0]), o[r][1] = fmaf(xk, low.y, o[r][1]);
                o[r][2] = fmaf(xk, low.z, o[r][2]), o[r][3] = fmaf(xk, low.w, o[r][3]);
                o[r][4] = fmaf(xk, high.x, o[r][4]), o[r][5] = fmaf(xk, high.y, o[r][5]);
                o[r][6] = fmaf(xk, high.z, o[r][6]), o[r][7] = fmaf(xk, high.w, o[r][7]);
            }
        }
    }
}

// Stores a row's part of 64 columns from `col` on; x[..] are the columns of `multiply_values`.
__device__ __forceinline__ void store_row(float* row, int col, int eighth, int head_size, bool is_vector,
                                          const float (&x)[8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = col + 32 * half + 4 * eighth;
        if (is_vector) {
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

// What a query sees, and which row of the mask is its own.
struct Query {
    uint32_t own_key;
    uint32_t begin;
    uint32_t end;  // 0 for a query that does not exist
    uint64_t mask_row;
    bool drops_keys;

    __device__ __forceinline__ Query(const AttentionArgs& args, const MaskArgs& drop, uint32_t length,
                                     uint64_t first_row, uint32_t row)
        : own_key(row + args.keys - args.queries),
          begin(args.visible_begin(row)),
          end(row < args.queries ? args.visible_end(row, length) : 0),
          mask_row(drop.rows.map(first_row + row)),
          drops_keys(args.drop_key != 0) {}

    __device__ __forceinline__ bool sees(uint32_t key, bool keep) const {
        return key >= begin && key < end && (keep || !drops_keys);
    }
};

__device__ __forceinline__ float exponential_of(float x) { return exp2f(x * LOG2_E); }

// All 8 threads that share rows get the result.
template <typename Op>
__device__ __forceinline__ float reduce_row(float x, Op op) {
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
        x = op(x, __shfl_xor_sync(ALL_LANES, x, distance));
    }
    return x;
}

// SLICES of 64 columns make up a head.
template <int SLICES, int R>
__device__ __forceinline__ void clear(float (&sums)[SLICES][R][8]) {
#pragma unroll
    for (int i = 0; i < SLICES * R * 8; ++i) sums[i / (R * 8)][i / 8 % R][i % 8] = 0.f;
}

// s = queries times keys, over all columns. Both tiles may be in use until it begins.
template <int SLICES, int R>
__device__ __forceinline__ void multiply_all_columns(float (&s)[R][8], const HeadRows<const float>& queries,
                                                     int first_query, const HeadRows<const float>& keys,
                                                     int first_key, int head_size, bool is_vector,
                                                     float* query_tile, float* key_tile, Place<R> place) {
#pragma unroll
    for (int i = 0; i < R * 8; ++i) s[i / 8][i % 8] = 0.f;
#pragma unroll 1
    for (int slice = 0; slice < SLICES; ++slice) {
        __syncthreads();
        load_rows<false, R>(query_tile, queries, first_query, slice * TILE_ROWS, head_size, is_vector);
        load_rows<true, R>(key_tile, keys, first_key, slice * TILE_ROWS, head_size, is_vector);
        __syncthreads();
        const int depth = min(head_size - slice * TILE_ROWS + 3, TILE_ROWS) / 4 * 4;
        multiply_keys<R>(s, query_tile, key_tile, depth, place);
    }
}

template <bool DROPS, int SLICES, int R>
__device__ __forceinline__ void attention_fwd(const float* __restrict__ q, const float* __restrict__ k,
                                              const float* __restrict__ v, const uint32_t* __restrict__ key_lengths,
                                              const float* __restrict__ alibi_slopes, float* __restrict__ o,
                                              RowSoftmax* __restrict__ softmax, const AttentionArgs& args,
                                              const AttentionLayout& layout, const MaskArgs& drop) {
    __shared__ __align__(16) float query_tile[TILE_FLOATS];
    __shared__ __align__(16) float key_tile[TILE_FLOATS];
    const Place<R> place;
    // The last tiles see most under a causal mask, so they begin first.
    const uint32_t tiles = (args.queries + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * TILE_ROWS;
    const uint32_t head = blockIdx.x / tiles % args.heads, batch = blockIdx.x / tiles / args.heads;
    const uint32_t last_query = min(first_query + TILE_ROWS, args.queries) - 1;
    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);

    const uint32_t kv_head = head / (args.heads / args.kv_heads);
    const HeadRows<const float> q_rows = head_rows(q, layout.q, batch, head, first_query, last_query + 1);
    const HeadRows<const float> k_rows = head_rows(k, layout.k, batch, kv_head, begin, end);
    const HeadRows<const float> v_rows = head_rows(v, layout.v, batch, kv_head, begin, end);
    const int head_size = int(args.head_size);
    const bool is_vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(o, layout.o);
    const Logits logits(args, alibi_slopes, head);
    const uint64_t first_row = args.first_row(batch, head);

    float max[R], sums[R], o_sums[SLICES][R][8];
    clear(o_sums);
#pragma unroll
    for (int r = 0; r < R; ++r) max[r] = -INFINITY, sums[r] = 0.f;

    for (uint32_t first_key = begin / TILE_ROWS * TILE_ROWS; first_key < end; first_key += TILE_ROWS) {
        // Step 1: scores.
        float s[R][8];
        multiply_all_columns<SLICES, R>(s, q_rows, first_query, k_rows, first_key, head_size, is_vector,
                                        query_tile, key_tile, place);

        // Step 2: their exponentials, with what was summed so far brought to the new maximum.
        __syncthreads();
        const uint32_t key = first_key + 8 * place.eighth;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const Query query(args, drop, length, first_row, first_query + place.row + 4 * r);
            Draws draws;
            if (DROPS) draws = draw_keys(drop, query.mask_row, key);
            float new_max = max[r];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float logit = logits.biased(logits.capped<float>(s[r][j]), query.own_key, key + j);
                const bool keep = !DROPS || keeps(drop, draws[j]);
                s[r][j] = query.sees(key + j, keep) ? logit : -INFINITY;
                new_max = fmaxf(new_max, s[r][j]);
            }
            new_max = reduce_row(new_max, Max());
            // With no visible key yet, 0 stands in for the maximum: all exponentials are 0 then.
            const float base = new_max == -INFINITY ? 0.f : new_max;
            const float shrink = exponential_of(max[r] - base);
            max[r] = new_max;
            sums[r] *= shrink;
#pragma unroll
            for (int i = 0; i < SLICES * 8; ++i) o_sums[i / 8][r][i % 8] *= shrink;

#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float e = exponential_of(s[r][j] - base);
                sums[r] += e;
                const float kept = !DROPS || keeps(drop, draws[j]) ? e : 0.f;
                query_tile[(place.row + 4 * r) * TILE_STRIDE + 8 * j + place.eighth] = kept;
            }
        }

        // Step 3: their product with the values.
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            if (slice > 0) __syncthreads();
            load_rows<true, R>(key_tile, v_rows, first_key, slice * TILE_ROWS, head_size, is_vector);
            __syncthreads();
            multiply_values<R>(o_sums[slice], query_tile, key_tile, place);
        }
    }

    // Step 4: normalise.
    const HeadRows<float> o_rows = head_rows(o, layout.o, batch, head, 0, args.queries);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t row = first_query + place.row + 4 * r;
        const float sum = reduce_row(sums[r], Sum());
        if (row >= args.queries) continue;  // tail
        const float factor = (DROPS ? drop.scale : 1.f) / sum;
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
#pragma unroll
            for (int c = 0; c < 8; ++c) o_sums[slice][r][c] = sum == 0.f ? 0.f : o_sums[slice][r][c] * factor;
            store_row(o_rows.start + row * o_rows.stride, slice * TILE_ROWS, place.eighth, head_size, is_vector,
                      o_sums[slice][r]);
        }
        if (place.eighth == 0) softmax[first_row + row] = RowSoftmax::of(max[r], sum);
    }
}

// The scores of a row at 8 keys become y / drop.scale, and the gradients of y become ds.
template <bool DROPS>
__device__ __forceinline__ void differentiate(float (&s)[8], float (&dp)[8], const Query& query, uint32_t key,
                                              RowSoftmax softmax, float delta, const Logits& logits,
                                              const MaskArgs& drop) {
    Draws draws;
    if (DROPS) draws = draw_keys(drop, query.mask_row, key);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float capped = logits.capped<float>(s[j]);
        const float logit = logits.biased(capped, query.own_key, key + j);
        const float p = exponential_of(logit - softmax.reference) * softmax.normaliser;
        const bool keep = !DROPS || keeps(drop, draws[j]);
        const float kept_dp = keep ? (DROPS ? drop.scale * dp[j] : dp[j]) : 0.f;
        // By selection: neither the probability nor the gradient of a hidden key need be finite.
        const bool sees = query.sees(key + j, keep);
        s[j] = sees && keep ? p : 0.f;
        dp[j] = sees ? p * (kept_dp - delta) * logits.slope_of_cap(capped) : 0.f;
    }
}

template <bool DROPS, int SLICES, int R>
__device__ __forceinline__ void attention_bwd_dq(const float* __restrict__ q, const float* __restrict__ k,
                                                 const float* __restrict__ v,
                                                 const uint32_t* __restrict__ key_lengths,
                                                 const float* __restrict__ alibi_slopes,
                                                 const float* __restrict__ dout,
                                                 const RowSoftmax* __restrict__ softmax,
                                                 const float* __restrict__ delta, float* __restrict__ dq,
                                                 const AttentionArgs& args, const AttentionLayout& layout,
                                                 const AttentionLayout& grads, const MaskArgs& drop) {
    __shared__ __align__(16) float query_tile[TILE_FLOATS];
    __shared__ __align__(16) float key_tile[TILE_FLOATS];
    const Place<R> place;
    const uint32_t tiles = (args.queries + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_query = (tiles - 1 - blockIdx.x % tiles) * TILE_ROWS;
    const uint32_t head = blockIdx.x / tiles % args.heads, batch = blockIdx.x / tiles / args.heads;
    const uint32_t last_query = min(first_query + TILE_ROWS, args.queries) - 1;
    const uint32_t length = args.length(key_lengths, batch);
    const uint32_t begin = args.visible_begin(first_query), end = args.visible_end(last_query, length);

    const uint32_t kv_head = head / (args.heads / args.kv_heads);
    const HeadRows<const float> q_rows = head_rows(q, layout.q, batch, head, first_query, last_query + 1);
    const HeadRows<const float> dout_rows = head_rows(dout, grads.o, batch, head, first_query, last_query + 1);
    const HeadRows<const float> k_rows = head_rows(k, layout.k, batch, kv_head, begin, end);
    const HeadRows<const float> v_rows = head_rows(v, layout.v, batch, kv_head, begin, end);
    const int head_size = int(args.head_size);
    const bool is_vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) &&
                         rows_are_aligned(dq, grads.q);
    const Logits logits(args, alibi_slopes, head);
    const uint64_t first_row = args.first_row(batch, head);

    const RowSoftmax* const softmax_of_head = softmax + first_row;
    const float* const delta_of_head = delta + first_row;
    float dq_sums[SLICES][R][8];
    clear(dq_sums);
    for (uint32_t first_key = begin / TILE_ROWS * TILE_ROWS; first_key < end; first_key += TILE_ROWS) {
        // Step 1: scores and the gradients of y.
        float s[R][8], dp[R][8];
        multiply_all_columns<SLICES, R>(s, q_rows, first_query, k_rows, first_key, head_size, is_vector,
                                        query_tile, key_tile, place);
        multiply_all_columns<SLICES, R>(dp, dout_rows, first_query, v_rows, first_key, head_size, is_vector,
                                        query_tile, key_tile, place);

        // Step 2: gradients of the scores.
        __syncthreads();
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const uint32_t row = first_query + place.row + 4 * r;
            const Query query(args, drop, length, first_row, row);
            const uint32_t at = min(row, last_query);
            differentiate<DROPS>(s[r], dp[r], query, first_key + 8 * place.eighth, softmax_of_head[at],
                                 delta_of_head[at], logits, drop);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                query_tile[(place.row + 4 * r) * TILE_STRIDE + 8 * j + place.eighth] = dp[r][j];
            }
        }

        // Step 3: their product with the keys.
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
            if (slice > 0) __syncthreads();
            load_rows<true, R>(key_tile, k_rows, first_key, slice * TILE_ROWS, head_size, is_vector);
            __syncthreads();
            multiply_values<R>(dq_sums[slice], query_tile, key_tile, place);
        }
    }

    const HeadRows<float> dq_rows = head_rows(dq, grads.q, batch, head, 0, args.queries);
    const float factor = float(args.scale);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t row = first_query + place.row + 4 * r;
        if (row >= args.queries) continue;  // tail
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
#pragma unroll
            for (int c = 0; c < 8; ++c) dq_sums[slice][r][c] *= factor;
            store_row(dq_rows.start + row * dq_rows.stride, slice * TILE_ROWS, place.eighth, head_size, is_vector,
                      dq_sums[slice][r]);
        }
    }
}

template <bool DROPS, int SLICES, int R>
__device__ __forceinline__ void attention_bwd_dkdv(
    const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
    const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes, const float* __restrict__ dout,
    const RowSoftmax* __restrict__ softmax, const float* __restrict__ delta, float* __restrict__ dk,
    float* __restrict__ dv,
    const AttentionArgs& args, const AttentionLayout& layout, const AttentionLayout& grads, const MaskArgs& drop) {
    __shared__ __align__(16) float query_tile[TILE_FLOATS];
    __shared__ __align__(16) float key_tile[TILE_FLOATS];
    const Place<R> place;
    // The first tiles are seen most under a causal mask, so they begin first.
    const uint32_t tiles = (args.keys + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t first_key = blockIdx.x % tiles * TILE_ROWS;
    const uint32_t kv_head = blockIdx.x / tiles % args.kv_heads, batch = blockIdx.x / tiles / args.kv_heads;
    const uint32_t length = args.length(key_lengths, batch);
    const int last_key = int(min(first_key + TILE_ROWS, length)) - 1;

    const HeadRows<const float> k_rows = head_rows(k, layout.k, batch, kv_head, first_key, last_key + 1);
    const HeadRows<const float> v_rows = head_rows(v, layout.v, batch, kv_head, first_key, last_key + 1);
    const int head_size = int(args.head_size);
    const bool is_vector = head_size % 4 == 0 && rows_are_aligned(q, layout.q) && rows_are_aligned(k, layout.k) &&
                        rows_are_aligned(v, layout.v) && rows_are_aligned(dout, grads.o) &&
                         rows_are_aligned(dk, grads.k) && rows_are_aligned(dv, grads.v);

    float dk_sums[SLICES][R][8], dv_sums[SLICES][R][8];
    clear(dk_sums);
    clear(dv_sums);
    const uint32_t begin = args.seeing_begin(first_key);
    const uint32_t end = last_key < int(first_key) ? 0 : args.seeing_end(last_key);
    const uint32_t group = args.heads / args.kv_heads;
    for (uint32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const uint64_t first_row = args.first_row(batch, head);
        const HeadRows<const float> q_rows = head_rows(q, layout.q, batch, head, begin, end);
        const HeadRows<const float> dout_rows = head_rows(dout, grads.o, batch, head, begin, end);
        const Logits logits(args, alibi_slopes, head);
        for (uint32_t first_query = begin / TILE_ROWS * TILE_ROWS; first_query < end; first_query += TILE_ROWS) {
            // Step 1: scores and the gradients of y.
            float s[R][8], dp[R][8];
            multiply_all_columns<SLICES, R>(s, q_rows, first_query, k_rows, first_key, head_size, is_vector,
                                            query_tile, key_tile, place);
            multiply_all_columns<SLICES, R>(dp, dout_rows, first_query, v_rows, first_key, head_size, is_vector,
                                            query_tile, key_tile, place);

            // Step 2: y and the gradients of the scores.
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const uint32_t row = first_query + place.row + 4 * r;
                const Query query(args, drop, length, first_row, row);
                const uint64_t at = first_row + min(row, args.queries - 1);
                differentiate<DROPS>(s[r], dp[r], query, first_key + 8 * place.eighth, softmax[at], delta[at],
                                     logits, drop);
            }

            // Step 3: y^T do and ds^T q, with the keys as rows.
            auto multiply_transposed = [&](float(&sums)[SLICES][R][8], const float(&x)[R][8],
                                           const HeadRows<const float>& rows) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < R * 8; ++i) {
                    const int r = i / 8, j = i % 8;
                    key_tile[(8 * j + place.eighth) * TILE_STRIDE + place.row + 4 * r] = x[r][j];
                }
#pragma unroll
                for (int slice = 0; slice < SLICES; ++slice) {
                    if (slice > 0) __syncthreads();
                    load_rows<false, R>(query_tile, rows, first_query, slice * TILE_ROWS, head_size, is_vector);
                    __syncthreads();
                    multiply_values<R>(sums[slice], key_tile, query_tile, place);
                }
            };
            multiply_transposed(dv_sums, s, dout_rows);
            multiply_transposed(dk_sums, dp, q_rows);
        }
    }

    const HeadRows<float> dk_rows = head_rows(dk, grads.k, batch, kv_head, 0, args.keys);
    const HeadRows<float> dv_rows = head_rows(dv, grads.v, batch, kv_head, 0, args.keys);
    const float dk_factor = float(args.scale), dv_factor = DROPS ? drop.scale : 1.f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint32_t key = first_key + permuted_key(place.row + 4 * r);
        if (key >= args.keys) continue;  // tail
#pragma unroll
        for (int slice = 0; slice < SLICES; ++slice) {
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                dk_sums[slice][r][c] = key < length ? dk_sums[slice][r][c] * dk_factor : 0.f;
                dv_sums[slice][r][c] = key < length ? dv_sums[slice][r][c] * dv_factor : 0.f;
            }
            const int col = slice * TILE_ROWS;
            store_row(dk_rows.start + key * dk_rows.stride, col, place.eighth, head_size, is_vector, dk_sums[slice][r]);
            store_row(dv_rows.start + key * dv_rows.stride, col, place.eighth, head_size, is_vector, dv_sums[slice][r]);
        }
    }
}

}  // namespace

#define ATTENTION_FWD(NAME, D, DROPS, R)                                                                      \
    KERNEL(512 / R, D == 64 ? 3 : 1) NAME##_d##D##_f32(                                                       \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                     \
        float* __restrict__ o, RowSoftmax* __restrict__ softmax, AttentionArgs args, AttentionLayout layout,  \
        MaskArgs drop) {                                                                                      \
        attention_fwd<DROPS, D / 64, R>(q, k, v, key_lengths, alibi_slopes, o, softmax, args, layout, drop);  \
    }

#define ATTENTION_BWD_DQ(NAME, D, DROPS, R)                                                                   \
    KERNEL(512 / R) NAME##_d##D##_f32(                                                                        \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                     \
        const float* __restrict__ dout, const RowSoftmax* __restrict__ softmax,                               \
        const float* __restrict__ delta,                                                                      \
        float* __restrict__ dq, AttentionArgs args, AttentionLayout layout, AttentionLayout grads,            \
        MaskArgs drop) {                                                                                      \
        attention_bwd_dq<DROPS, D / 64, R>(q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dq, args, layout, \
                                           grads, drop);                                                      \
    }

#define ATTENTION_BWD_DKDV(NAME, D, DROPS, R)                                                                 \
    KERNEL(512 / R) NAME##_d##D##_f32(                                                                        \
        const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,                \
        const uint32_t* __restrict__ key_lengths, const float* __restrict__ alibi_slopes,                     \
        const float* __restrict__ dout, const RowSoftmax* __restrict__ softmax,                               \
        const float* __restrict__ delta,                                                                      \
        float* __restrict__ dk, float* __restrict__ dv, AttentionArgs args, AttentionLayout layout,           \
        AttentionLayout grads, MaskArgs drop) {                                                               \
        attention_bwd_dkdv<DROPS, D / 64, R>(q, k, v, key_lengths, alibi_slopes, dout, softmax, delta, dk, dv, args, \
                                             layout, grads, drop);                                            \
    }

// R: as many rows of a thread as leave room for its results.
#define FOR_EACH_HEAD_SIZE(ATTENTION, NAME, R_64, R_128, R_256) \
    ATTENTION(NAME, 64, true, R_64)                             \
    ATTENTION(NAME, 128, true, R_128)                           \
    ATTENTION(NAME, 256, true, R_256)                           \
    ATTENTION(NAME##_nodrop, 64, false, R_64)                   \
    ATTENTION(NAME##_nodrop, 128, false, R_128)                 \
    ATTENTION(NAME##_nodrop, 256, false, R_256)
FOR_EACH_HEAD_SIZE(ATTENTION_FWD, attention_fwd, 4, 4, 2)
FOR_EACH_HEAD_SIZE(ATTENTION_BWD_DQ, attention_bwd_dq, 4, 4, 2)
FOR_EACH_HEAD_SIZE(ATTENTION_BWD_DKDV, attention_bwd_dkdv, 4, 2, 2)
