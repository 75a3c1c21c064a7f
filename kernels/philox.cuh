// The mask law: which elements are dropped. Twin of src/mask/.
//
//     keep(key, threshold, row, col) = u16(key, row, col) < threshold
//
// The bits come from Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
// as easy as 1, 2, 3", SC'11). One call serves 8 neighbouring columns of one row:
//
//     counter = (col / 8, row >> 32, row, 0),  u16 = half-word col % 8 of the four words.
//
// Ops that need a uniform or normal number a column take a whole word, of other calls:
//
//     counter = (col / 4, row >> 32, row, 1),  u32 = word col % 4.
//
// Cost of a call: 14 wide multiplies and 14 three-way XORs; the key schedule is uniform over the block.
#pragma once

#include "rows.cuh"

// A mask over a tensor of known shape, as src/mask/args.rs fills it in.
struct MaskArgs {
    uint32_t key[2];
    uint32_t threshold;  // 0 drops everything, 65536 keeps everything
    float scale;
    uint64_t col_0;  // column of the whole mask at which the tensor begins
    RowMap rows;     // row of the whole mask for a row of the tensor
};
static_assert(sizeof(MaskArgs) == 88 && offsetof(MaskArgs, threshold) == 8 && offsetof(MaskArgs, scale) == 12 &&
                  offsetof(MaskArgs, col_0) == 16 && offsetof(MaskArgs, rows) == 24,
              "as src/mask/args.rs lays it out");

// The 16-bit draws of 8 neighbouring columns, two to a word.
struct Draws {
    uint32_t word[4];

    __device__ __forceinline__ uint32_t operator[](int column) const {
        return column % 2 == 0 ? word[column / 2] & 0xffff : word[column / 2] >> 16;
    }
};

// The last word of the counter says which draws these are: 0 for 16 bits a column, 1 for 32.
__device__ __forceinline__ Draws philox(const uint32_t (&key)[2], uint64_t row, uint32_t block, uint32_t kind = 0) {
    uint32_t c0 = block, c1 = uint32_t(row >> 32), c2 = uint32_t(row), c3 = kind;
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        // One 32 x 32 -> 64 bit multiply each; __umulhi and a product would cost two.
        const uint64_t product_0 = uint64_t(c0) * 0xD2511F53u;
        const uint64_t product_1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(product_1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(product_1);
        c2 = uint32_t(product_0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(product_0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The draws of the tensor's columns col .. col + 8; `mask_row` comes from mask.rows.map(row). At both
// ends of the threshold they are drawn in vain, in the shadow of the memory accesses.
__device__ __forceinline__ Draws draw(const MaskArgs& mask, uint64_t mask_row, uint64_t col) {
    return philox(mask.key, mask_row, uint32_t((mask.col_0 + col) / 8));
}

// True if the tensor's columns 8 i .. 8 i + 8 are those of one call, for which `draw` is enough.
__device__ __forceinline__ bool is_drawn_whole(const MaskArgs& mask) { return mask.col_0 % 8 == 0; }

// The same as `draw` for a window whose first column is no multiple of 8, so that 8 columns straddle two calls.
__device__ __forceinline__ Draws draw_unaligned(const MaskArgs& mask, uint64_t mask_row, uint64_t col) {
    const Draws low = draw(mask, mask_row, col);
    const int skip = int((mask.col_0 + col) % 8);
    if (skip == 0) return low;
    const Draws high = draw(mask, mask_row, col + 8);
    // A shifter of three stages, since an index that is not constant would go through local memory.
    uint32_t word[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = low.word[i], word[4 + i] = high.word[i];
#pragma unroll
    for (int i = 0; i < 6; ++i) word[i] = skip & 4 ? word[i + 2] : word[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) word[i] = skip & 2 ? word[i + 1] : word[i];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = skip & 1 ? word[i] >> 16 | word[i + 1] << 16 : word[i];
    return {{word[0], word[1], word[2], word[3]}};
}

// The 32-bit draws of the tensor's columns col .. col + 4, where col_0 + col is a multiple of 4: column col + i has
// word i.
__device__ __forceinline__ Draws draw_wide(const MaskArgs& mask, uint64_t mask_row, uint64_t col) {
    return philox(mask.key, mask_row, uint32_t((mask.col_0 + col) / 4), 1);
}

// The same for one column, wherever it lies.
__device__ __forceinline__ uint32_t draw_wide_one(const MaskArgs& mask, uint64_t mask_row, uint64_t col) {
    const Draws draws = draw_wide(mask, mask_row, col);
    const uint32_t low = (mask.col_0 + col) & 1 ? draws.word[1] : draws.word[0];
    const uint32_t high = (mask.col_0 + col) & 1 ? draws.word[3] : draws.word[2];
    return (mask.col_0 + col) & 2 ? high : low;
}

__device__ __forceinline__ bool keeps(const MaskArgs& mask, uint32_t draw) {
    return draw < mask.threshold;
}
