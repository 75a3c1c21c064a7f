// What the tensor-core kernels of attention share: tiles of rows in shared memory, products of tiles, and
// scores in registers, laid out so that the draws of a lane are whole Philox calls.
//
// A warp's scores are accumulators s[m][n][2 h + e] of mma_m16n8k16: with g = lane / 4 and t = lane % 4, of the
// query 16 m + 8 h + g. Columns stand for permuted keys: in each block of 32 keys, column 8 n + 2 t + e for
// key 8 t + 2 n + e, so that a lane has 8 neighbouring keys of a query, word n of their draws beside the
// pair of tile n. Nothing but the rows that ldmatrix takes of K and V knows about the order.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

// Halves are moved as bits.
using Bits = uint16_t;

constexpr uint32_t ALL_LANES = 0xffffffffu;

// ---- Tiles in shared memory ------------------------------------------------------------------------

// Rows of D halves, in chunks of 16 bytes that change places within their row. So 8 chunks of one column lie in
// different banks for 8 neighbouring rows, and for the rows {0, 1, 8, 9, 16, 17, 24, 25} + 2 n alike.
template <int D>
struct Tile {
    static constexpr int CHUNKS = D / 8;
    // Chunks change places within groups of as many.
    static constexpr int GROUP = D % 64 == 0 ? 8 : 4;

    // Linear: of two numbers without a common bit, that of the sum is the exclusive or of both.
    __device__ static __forceinline__ int swizzle(int row) {
        const int s = ((row >> 1) ^ (row >> 3)) & 3;
        return GROUP == 8 ? (row & 1) | s << 1 : s;
    }
    __device__ static __forceinline__ int offset(int row, int chunk) {
        return row * D + (chunk ^ swizzle(row)) * 8;
    }
};

// Rows of KEYS scores, in the order of their keys. Chunks change places so that a warp that writes 8 rows of
// 32 keys, a chunk a lane, and ldmatrix on 8 rows find them in different banks.
template <int KEYS>
struct ScoreTile {
    __device__ static __forceinline__ int offset(int row, int chunk) {
        const int swizzle = (row >> 1) & 3;
        return row * KEYS + (chunk ^ (KEYS % 64 == 0 ? (row & 1) << 2 | swizzle : swizzle)) * 8;
    }
};

// Of a tile, the row whose address a lane brings to ldmatrix_x4, and which of two neighbouring chunks.
template <int D>
struct LaneRow {
    int offset;
    int chunk;

    __device__ __forceinline__ LaneRow(int row, int half) : offset(row * D), chunk(half ^ Tile<D>::swizzle(row)) {}

    // The same `rows` further down, a number without a bit of the row's own, in the columns 16 col on.
    __device__ __forceinline__ int at(int rows, int col) const {
        constexpr int GROUP = Tile<D>::GROUP;
        const int in_group = chunk ^ 2 * col % GROUP ^ Tile<D>::swizzle(rows);
        return offset + rows * D + (in_group + 2 * col / GROUP * GROUP) * 8;
    }
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// Matrices: rows 0..8 and 8..16, then the same of the next 8 columns. The fragment A of 16 rows; transposed,
// the fragments B of 16 rows and twice 8 columns.
template <int D>
__device__ __forceinline__ LaneRow<D> natural_rows(int lane, int first) {
    return {first + lane % 16, lane / 16};
}
// Matrices: 8 keys of column tile n, both halves of 16 columns, then the same for n + 1: fragments B of K^T, each
// in two neighbouring registers, as mma wants them.
template <int D>
__device__ __forceinline__ LaneRow<D> permuted_keys(int lane) {
    return {lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2, lane / 8 % 2};
}
// Matrices: 8 keys of column tile n, 8 of n + 1, then the same of the next 8 columns: fragments B of V.
template <int D>
__device__ __forceinline__ LaneRow<D> permuted_keys_of_values(int lane) {
    return {lane % 8 / 2 * 8 + lane % 2 + lane / 8 % 2 * 2, lane / 16};
}

// Rows of one head of a tensor. Those outside of begin .. end count as zeros and are not read.
struct HeadRows {
    const Bits* start;
    int64_t stride;
    int begin;
    int end;
};

// Whether all rows of a tensor can be read and written 16 bytes at a time.
__device__ __forceinline__ bool has_vectors(const void* tensor, const HeadStrides& strides) {
    return is_aligned(tensor) && (strides.batch | strides.head | strides.row) % WIDTH == 0;
}

template <typename T>
__device__ __forceinline__ HeadRows head_rows(const T* tensor, const HeadStrides& strides, uint32_t batch,
                                              uint32_t head, int begin, int end) {
    const T* start = tensor + batch * strides.batch + head * strides.head;
    return {reinterpret_cast<const Bits*>(start), int64_t(strides.row), begin, end};
}

// Starts to load ROWS rows from `first` on, which may be negative; those that are not aligned are loaded at
// once. Columns from head_size on become zeros.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(Bits* tile, const HeadRows& rows, int first, int head_size, bool is_vector) {
    constexpr int CHUNKS = Tile<D>::CHUNKS;
    // Rows that all threads load at once; a power of two, so for D = 96 some threads load nothing.
    constexpr int STEP = D == 96 ? THREADS / 16 : THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0, "whole steps");
    if (is_vector) {
        const int first_row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        if (first_row >= STEP) return;
        const int swizzled = chunk ^ Tile<D>::swizzle(first_row);
        Bits* to = tile + first_row * D;
        // Of a row that is not read the address is made up, but not accessed.
        const Bits* from = rows.start + (int(opaque(first)) + first_row) * rows.stride + chunk * WIDTH;
        if (first >= rows.begin && first + ROWS <= rows.end && head_size == D) {  // tail
#pragma unroll
            for (int row = 0; row < ROWS; row += STEP) {
                cp_async_16(to + row * D + (swizzled ^ Tile<D>::swizzle(row)) * WIDTH, from, true);
                from += STEP * rows.stride;
            }
        } else {
            const int end = chunk * WIDTH < head_size ? rows.end : rows.begin;  // tail
#pragma unroll
            for (int row = 0; row < ROWS; row += STEP) {
                const int at = first + first_row + row;
                const bool is_read = at >= rows.begin && at < end;  // tail
                cp_async_16(to + row * D + (swizzled ^ Tile<D>::swizzle(row)) * WIDTH, from, is_read);
                from += STEP * rows.stride;
            }
        }
    } else {
#pragma unroll 1
        for (int index = threadIdx.x; index < ROWS * CHUNKS; index += THREADS) {
            const int row = index / CHUNKS, chunk = index % CHUNKS;
            const bool is_read = first + row >= rows.begin && first + row < rows.end;  // tail
            const Bits* from = rows.start + (first + row) * rows.stride + chunk * WIDTH;
            uint32_t word[4] = {};
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                if (is_read && chunk * WIDTH + i < head_size) word[i / 2] |= uint32_t(from[i]) << i % 2 * 16;  // tail
            }
            *reinterpret_cast<uint4*>(tile + Tile<D>::offset(row, chunk)) = {word[0], word[1], word[2], word[3]};
        }
    }
}

// THREADS threads store ROWS rows of a tile, from row `from` on, as the rows `first` .. of a head.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void store_rows(const Bits* tile, int from, const HeadRows& rows, int first,
                                           int head_size, bool is_vector) {
    constexpr int CHUNKS = Tile<D>::CHUNKS;
    Bits* start = const_cast<Bits*>(rows.start);
#pragma unroll 1
    for (int index = threadIdx.x % THREADS; index < ROWS * CHUNKS; index += THREADS) {
        const int row = index / CHUNKS, chunk = index % CHUNKS;
        if (first + row < rows.begin) continue;    // tail
        if (first + row >= rows.end) continue;     // tail
        if (chunk * WIDTH >= head_size) continue;  // tail
        Bits* to = start + (first + row) * rows.stride + chunk * WIDTH;
        const uint4 eight = *reinterpret_cast<const uint4*>(tile + Tile<D>::offset(from + row, chunk));
        if (is_vector) {
            *reinterpret_cast<uint4*>(to) = eight;
        } else {
            const uint32_t word[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                if (chunk * WIDTH + i < head_size) to[i] = Bits(word[i / 2] >> i % 2 * 16);  // tail
            }
        }
    }
}

// A warp puts 16 M rows of results, times `factor[m][h]`, into a tile from row `first` on.
template <int D, typename T, int M, int N>
__device__ __forceinline__ void put_rows(Bits* tile, int first, int first_col, const float (&x)[M][N][4],
                                         const float (&factor)[M][2]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first + 16 * m + 8 * h + g;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint32_t word = pack(x[m][n][2 * h] * factor[m][h], x[m][n][2 * h + 1] * factor[m][h], T());
                *reinterpret_cast<uint32_t*>(tile + Tile<D>::offset(row, first_col / 8 + n) + 2 * t) = word;
            }
        }
    }
}

// ---- Products ---------------------------------------------------------------------------------------

// The fragments A of 16 M rows of a tile, `lane` being the caller's. KEPT: in registers, once `load` was called; else loaded anew.
template <int D, int M, bool KEPT>
struct Fragments {
    const Bits* tile;
    LaneRow<D> row;
    uint32_t a[KEPT ? D / 16 : 1][M][4];

    __device__ __forceinline__ Fragments(const Bits* tile, int lane, int first)
        : tile(tile), row(natural_rows<D>(lane, first)) {}

    __device__ __forceinline__ void load() {
        if (KEPT) {
#pragma unroll
            for (int col = 0; col < D / 16; ++col) fetch(a[KEPT ? col : 0], col);
        }
    }
    // Columns 16 col on.
    __device__ __forceinline__ const uint32_t (&columns(int col))[M][4] {
        if (!KEPT) fetch(a[0], col);
        return a[KEPT ? col : 0];
    }
    __device__ __forceinline__ void fetch(uint32_t (&to)[M][4], int col) const {
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_x4(to[m], tile + row.at(16 * m, col));
    }
};

// s += A K^T, for the column tiles first .. first + N of the keys in a tile; first is 0 or 2.
template <typename T, int D, int M, bool KEPT, int N>
__device__ __forceinline__ void multiply_keys(float (&s)[M][N][4], Fragments<D, M, KEPT>& a, const Bits* keys,
                                              int first = 0) {
    const LaneRow<D> row = permuted_keys<D>(lane_id());
#pragma unroll
    for (int col = 0; col < D / 16; ++col) {
        const uint32_t(&x)[M][4] = a.columns(col);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, keys + row.at(n / 4 * 32 + (first + n % 4) * 2, col));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16(s[m][n], x[m], b[0], b[1], T());
                mma_m16n8k16(s[m][n + 1], x[m], b[2], b[3], T());
            }
        }
    }
}

// o += P V; p[m][n][h] is the pair of column tile n.
template <int D, typename T, int M, int N>
__device__ __forceinline__ void multiply_values(float (&o)[M][D / 8][4], const uint32_t (&p)[M][N][2],
                                                const Bits* values) {
    const LaneRow<D> row = permuted_keys_of_values<D>(opaque(lane_id()));
#pragma unroll
    for (int n = 0; n < N; n += 2) {
#pragma unroll
        for (int col = 0; col < D / 16; ++col) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, values + row.at(n / 4 * 32 + n % 4 * 2, col));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const uint32_t a[4] = {p[m][n][0], p[m][n][1], p[m][n + 1][0], p[m][n + 1][1]};
                mma_m16n8k16(o[m][2 * col], a, b[0], b[1], T());
                mma_m16n8k16(o[m][2 * col + 1], a, b[2], b[3], T());
            }
        }
    }
}

// x += Y^T R for 16 M columns of the tile Y [ROWS, KEYS] from first_key on, and 8 N of R [ROWS, D] from
// first_col on.
template <int D, int KEYS, int ROWS, typename T, int M, int N>
__device__ __forceinline__ void multiply_transposed(float (&x)[M][N][4], const Bits* y, int first_key, const Bits* r,
                                                    int first_col) {
    const int lane = opaque(lane_id());
    const LaneRow<D> row = natural_rows<D>(lane, 0);
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            // Matrices: both halves of 16 columns, then the same of the next 8 rows.
            const int chunk = (first_key + 16 * m) / 8 + lane / 8 % 2;
            ldmatrix_x4_trans(a[m], y + ScoreTile<KEYS>::offset(16 * k + lane / 16 * 8 + lane % 8, chunk));
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, r + row.at(16 * k, first_col / 16 + n / 2));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16(x[m][n], a[m], b[0], b[1], T());
                mma_m16n8k16(x[m][n + 1], a[m], b[2], b[3], T());
            }
        }
    }
}

// ---- Scores -----------------------------------------------------------------------------------------

// Of the column tile n in a tile of keys, the lane's first key.
__device__ __forceinline__ int key_of(int n) { return n / 4 * 32 + lane_id() % 4 * 8 + n % 4 * 2; }

// Backward multiplies probabilities by this, and what they are multiplied with by its inverse, since the small
// ones of long rows would be subnormal halves.
constexpr float RAISED = 4096.f, LOG2_RAISED = 12.f;

// What backward knows of a query; it lies in shared memory, since registers are scarce.
struct RowStatistics {
    float lse;    // in base 2, of raised probabilities
    float delta;  // divided by RAISED
};

// Rows that do not exist, and those that see nothing, have probabilities 0.
__device__ __forceinline__ RowStatistics row_statistics(const float* lse, const float* delta, uint64_t row,
                                                        bool exists) {
    RowStatistics statistics = {INFINITY, 0.f};
    if (exists) statistics.lse = lse[row] * LOG2_E - LOG2_RAISED;  // tail
    if (statistics.lse != INFINITY) statistics.delta = delta[row] / RAISED;
    return statistics;
}

// How scores become logits in base 2: by one product, the cheap way, or through all steps.
struct Scores {
    const AttentionArgs& args;
    const float* alibi_slopes;
    // A positive factor is applied together with the subtraction of the maximum. Any other, softcap and slopes
    // turn scores into logits first, and leave 1 for it.
    bool is_plain;
    float factor;

    __device__ __forceinline__ Scores(const AttentionArgs& args, const float* alibi_slopes)
        : args(args), alibi_slopes(alibi_slopes) {
        factor = float(args.scale * Logits::LOG2_E_F64);
        is_plain = args.softcap == 0. && !alibi_slopes && factor > 0.f;
        if (!is_plain) factor = 1.f;
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
    uint64_t first_row;  // of query 0; the queries of a head have neighbouring rows
    uint32_t first_call;
    int shift;
    uint32_t threshold;  // in both halves

    __device__ __forceinline__ HeadMask(const MaskArgs& drop, const AttentionArgs& args, uint32_t batch, uint32_t head)
        : drop(drop),
          first_row(drop.rows.map((uint64_t(batch) * args.heads + head) * args.queries)),
          first_call(uint32_t(drop.col_0 / WIDTH)),
          shift(shift_of(drop)),
          threshold(drop.threshold | drop.threshold << 16) {}

    __device__ static __forceinline__ int shift_of(const MaskArgs& drop) { return int(drop.col_0 % WIDTH); }

    // Of the 8 keys from `key` on.
    __device__ __forceinline__ Draws draw_keys(uint32_t query, int key) const {
        return philox(drop.key, first_row + query, first_call + uint32_t(key + shift) / WIDTH);
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

// ---- Backward ---------------------------------------------------------------------------------------

// From logits and dP of 16 queries and the column tiles first .. first + N: RAISED times the probabilities that
// were kept, not yet scaled, and the gradient of the scores but for args.scale. `query` is the lane's first, and
// `rows` begins with it.
template <bool DROP, bool CAPPED, typename T, int N>
__device__ __forceinline__ void differentiate(const float (&s)[N][4], const float (&dp)[N][4], float factor,
                                              const Logits& logits, const HeadMask& mask, const AttentionArgs& args,
                                              const RowStatistics* rows, uint32_t query, int key, int first,
                                              uint32_t (&kept)[N][2], uint32_t (&ds)[N][2]) {
    static_assert(N <= 4, "a lane draws once a row");
    const float dp_scale = (DROP ? mask.drop.scale : 1.f) / RAISED;
    const int first_key = opaque(key + key_of(0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t row = query + 8 * h, own_key = row + args.keys - args.queries;
        const RowStatistics statistics = rows[8 * h];
        Draws draws;
        if (DROP) draws = mask.draw_keys(opaque(row), first_key);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint32_t word = 0;
            if (DROP) word = first == 0 ? draws.word[n] : draws.word[(n + 2) % 4];
            float y[2], dt[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float t = s[n][2 * h + e];
                const float p = exp2_approx(fmaf(t, factor, -statistics.lse));
                const bool keep = !DROP || mask.keeps(word, e);
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
