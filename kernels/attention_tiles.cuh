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

// Starts to load ROWS rows from `first` on, which may be negative; those that are not aligned are loaded at
// once. Columns from head_size on become zeros.
template <int D, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void load_rows(Bits* tile, const HeadRows<const T>& rows, int first, int head_size,
                                          bool is_vector) {
    const Bits* const start = reinterpret_cast<const Bits*>(rows.start);
    constexpr int CHUNKS = Tile<D>::CHUNKS;
    // Rows that all threads load at once; a power of two, so for D = 96 some threads load nothing.
    constexpr int STEP = D == 96 ? THREADS / 16 : THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0, "whole steps");
    if (is_vector) {
        const int thread_row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        if (thread_row >= STEP) return;
        const int swizzled = chunk ^ Tile<D>::swizzle(thread_row);
        Bits* to = tile + thread_row * D;
        // Of a row that is not read the address is made up, but not accessed.
        const Bits* from = start + (int(opaque(first)) + thread_row) * rows.stride + chunk * WIDTH;
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
                const int at = first + thread_row + row;
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
            const Bits* from = start + (first + row) * rows.stride + chunk * WIDTH;
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
template <int D, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void store_rows(const Bits* tile, int from, const HeadRows<T>& rows, int first,
                                           int head_size, bool is_vector) {
    constexpr int CHUNKS = Tile<D>::CHUNKS;
    Bits* const start = reinterpret_cast<Bits*>(rows.start);
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

// The fragments A of 16 M rows of a tile, `lane` being the caller's. RESIDENT: they stay in registers, once `load`
// was called; else they are loaded anew.
template <int D, int M, bool RESIDENT>
struct Fragments {
    const Bits* tile;
    LaneRow<D> row;
    uint32_t a[RESIDENT ? D / 16 : 1][M][4];

    __device__ __forceinline__ Fragments(const Bits* tile, int lane, int first)
        : tile(tile), row(natural_rows<D>(lane, first)) {}

    __device__ __forceinline__ void load() {
        if (RESIDENT) {
#pragma unroll
            for (int col = 0; col < D / 16; ++col) fetch(a[RESIDENT ? col : 0], col);
        }
    }
    // Columns 16 col on.
    __device__ __forceinline__ const uint32_t (&columns(int col))[M][4] {
        if (!RESIDENT) fetch(a[0], col);
        return a[RESIDENT ? col : 0];
    }
    __device__ __forceinline__ void fetch(uint32_t (&to)[M][4], int col) const {
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_x4(to[m], tile + row.at(16 * m, col));
    }
};

// s += A K^T, for the column tiles first .. first + N of the keys in a tile; first is 0 or 2.
template <typename T, int D, int M, bool RESIDENT, int N>
__device__ __forceinline__ void multiply_keys(float (&s)[M][N][4], Fragments<D, M, RESIDENT>& a, const Bits* keys,
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
