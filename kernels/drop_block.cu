// drop_block: blocks of a feature map that are dropped together. Twin of src/functional/drop_block/cpu.rs.
//
//     seeds     what the mask drops, [planes, height, width]; if `inside`, those alone whose block lies in its plane
//     dropped   what has a seed s of its plane with  s_h - bh/2 <= h <= s_h + (bh - 1)/2,  w likewise
//     count     of the elements of a mask, how many are dropped
//     forward   y = dropped ? 0 : x * scale          scale = elements / (elements - count), or 1 without a count
//     backward  dx = dropped ? 0 : dy * scale        the same kernel
//
// x, y [planes, channels, height, width]: so many channels share a plane of the mask. Bytes moved an element: one
// read and one write; the count moves none.
// A block of 256 threads takes tiles of up to MAX_TILE mask elements in a row, across rows and planes, as bits in
// shared memory: each thread draws 8 columns of the rows from which a seed may reach the tile and, if there is one,
// which is rare, sets the bits of its block by atomic ors. Counts are integers. So no result depends on an order.
// Vectors of 16 bytes where the part of x under a tile begins and ends at such boundaries, else element by element.
#include "elem.cuh"
#include "philox.cuh"

struct DropBlockArgs {
    uint64_t elements;  // of the whole mask, of which a count is taken
    uint64_t span;      // neighbouring mask elements in which a tile lies: all, or a plane that channels share
    uint64_t spans;
    uint64_t height, width;
    uint64_t block_height, block_width;  // no more than those
    uint64_t channels;                   // planes of x that share a plane of the mask
    uint64_t chunk;                      // of these so many are taken with a tile
    uint32_t tile;                       // mask elements at most
    uint32_t inside;
};
static_assert(sizeof(DropBlockArgs) == 80 && offsetof(DropBlockArgs, tile) == 72, "as args.rs lays it out");

constexpr uint32_t MAX_TILE = 1 << 16;
// A word more than the bits, so that 8 of them can be read from any place.
constexpr uint32_t WORDS = MAX_TILE / 32 + 1;

// Mask elements first .. first + len.
struct Tile {
    uint64_t first;
    uint32_t len;
};

__device__ __forceinline__ uint64_t tiles_of_span(const DropBlockArgs& args) {
    return (args.span + args.tile - 1) / args.tile;
}

__device__ __forceinline__ Tile tile_at(const DropBlockArgs& args, uint64_t index) {
    const uint64_t tiles = tiles_of_span(args), offset = index % tiles * args.tile;
    return {index / tiles * args.span + offset, uint32_t(min(args.span - offset, uint64_t(args.tile)))};
}

// Sets the bits from .. to.
__device__ __forceinline__ void set_bits(uint32_t* bits, uint32_t from, uint32_t to) {
    for (uint32_t word = from / 32; word * 32 < to; ++word) {
        const uint32_t low = max(from, word * 32) - word * 32, high = min(to - word * 32, 32u);
        atomicOr(&bits[word], (0xffffffffu >> (32 - (high - low))) << low);
    }
}

// Sets the bits of the block around a seed, as far as it lies in its plane and in the tile.
__device__ __forceinline__ void drop_around(uint32_t* bits, Tile tile, uint64_t row, uint64_t col,
                                            const DropBlockArgs& args) {
    const uint64_t above = args.block_height / 2, below = (args.block_height - 1) / 2;
    const uint64_t left = args.block_width / 2, right = (args.block_width - 1) / 2;
    const uint64_t h = row % args.height;
    const bool is_inside =
        h >= above && h + below < args.height && col >= left && col + right < args.width;
    if (args.inside && !is_inside) return;
    const uint64_t first_row = row - min(h, above), last_row = row + min(args.height - 1 - h, below);
    const uint64_t first_col = col - min(col, left), end_col = min(col + right + 1, args.width);
    for (uint64_t r = first_row; r <= last_row; ++r) {
        const uint64_t from = max(r * args.width + first_col, tile.first);
        const uint64_t to = min(r * args.width + end_col, tile.first + tile.len);
        if (from < to) set_bits(bits, uint32_t(from - tile.first), uint32_t(to - tile.first));
    }
}

// The bits of a tile, 1 for what is dropped; all threads of the block call it.
__device__ __forceinline__ void draw_tile(uint32_t* bits, Tile tile, const DropBlockArgs& args,
                                          const MaskArgs& mask) {
    for (uint32_t word = threadIdx.x; word <= tile.len / 32 + 1 && word < WORDS; word += blockDim.x) bits[word] = 0;
    __syncthreads();
    const uint64_t first = tile.first / args.width, last = (tile.first + tile.len - 1) / args.width;
    // A block reaches from a seed so far down and up.
    const uint64_t seeds_first = first - min(first % args.height, (args.block_height - 1) / 2);
    const uint64_t seeds_last = last + min(args.height - 1 - last % args.height, args.block_height / 2);
    // Columns of a window need not begin with a call.
    const uint64_t first_call = mask.col_0 / 8;
    const uint32_t calls = uint32_t((mask.col_0 + args.width - 1) / 8 - first_call) + 1;
    const uint32_t draws_of_tile = uint32_t(seeds_last - seeds_first + 1) * calls;
    for (uint32_t i = threadIdx.x; i < draws_of_tile; i += blockDim.x) {
        const uint64_t row = seeds_first + i / calls, call = first_call + i % calls;
        const Draws draws = philox(mask.key, mask.rows.map(row), uint32_t(call));
        uint32_t seeds = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) seeds |= keeps(mask, draws[j]) ? 0 : 1u << j;
        for (; seeds; seeds &= seeds - 1) {
            // Wraps to a large number for a column before the first.
            const uint64_t col = call * 8 + (__ffs(int(seeds)) - 1) - mask.col_0;
            if (col < args.width) drop_around(bits, tile, row, col, args);  // tail
        }
    }
    __syncthreads();
}

// The bits at .. at + 8 of `len`, which begin again behind the last.
__device__ __forceinline__ uint32_t bits_at(const uint32_t* bits, uint32_t at, uint32_t len) {
    if (at + WIDTH <= len) return uint32_t((bits[at / 32] | uint64_t(bits[at / 32 + 1]) << 32) >> at % 32);
    uint32_t eight = 0;
    for (int j = 0; j < WIDTH; ++j, at = at + 1 < len ? at + 1 : 0) eight |= (bits[at / 32] >> at % 32 & 1) << j;
    return eight;
}

// `count` elements of x, whose bits are those of the tile, again and again.
template <bool VECTOR, typename T>
__device__ __forceinline__ void select_scaled(const T* __restrict__ x, T* __restrict__ y, uint32_t count,
                                              const uint32_t* bits, uint32_t len, float scale) {
    constexpr int N = TILE_OF<VECTOR>;
    Fetched<VECTOR, T> fetched[N];
    for_each_vector<N>(
        count,
        [&](int i, uint64_t at) {
            if (at < count) fetched[i].fetch(x + at, count_at(at, count));  // tail
        },
        [&](int i, uint64_t at) {
            if (at >= count) return;  // tail
            const uint32_t dropped = bits_at(bits, uint32_t(at) % len, len);
            float v[WIDTH];
            fetched[i].widen(v);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] = dropped >> j & 1 ? 0.f : __fmul_rn(v[j], scale);
            store<VECTOR>(y + at, count_at(at, count), v);
        });
}

template <typename T>
__device__ __forceinline__ void drop_block_fwd(const T* __restrict__ x, T* __restrict__ y,
                                               const uint64_t* __restrict__ dropped, const DropBlockArgs& args,
                                               const MaskArgs& mask) {
    __shared__ uint32_t bits[WORDS];
    const uint64_t kept = dropped ? args.elements - *dropped : args.elements;
    const float scale = kept > 0 ? float(double(args.elements) / double(kept)) : 0.f;
    const uint64_t chunks = (args.channels + args.chunk - 1) / args.chunk;
    const uint64_t tasks = args.spans * tiles_of_span(args) * chunks;
    const bool pointers_are_aligned = is_aligned(x) && is_aligned(y);
    for (uint64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const Tile tile = tile_at(args, task / chunks);
        draw_tile(bits, tile, args, mask);
        const uint64_t channel = task % chunks * args.chunk;
        const uint64_t channels = min(args.channels - channel, args.chunk);
        // Channels of a whole plane lie side by side.
        const bool is_whole = tile.len == args.span;
        const uint32_t count = is_whole ? uint32_t(channels * tile.len) : tile.len;
        const uint64_t stretches = is_whole ? 1 : channels;
        const uint64_t start = (tile.first / args.span * args.channels + channel) * args.span + tile.first % args.span;
        for (uint64_t i = 0; i < stretches; ++i) {
            const uint64_t at = start + i * args.span;
            if (pointers_are_aligned && at % WIDTH == 0 && count % WIDTH == 0) {
                select_scaled<true>(x + at, y + at, count, bits, tile.len, scale);
            } else {
                select_scaled<false>(x + at, y + at, count, bits, tile.len, scale);
            }
        }
        __syncthreads();
    }
}

// `dropped` is 0 at first.
KERNEL(256) drop_block_count(uint64_t* __restrict__ dropped, DropBlockArgs args, MaskArgs mask) {
    __shared__ uint32_t bits[WORDS];
    const uint64_t tiles = args.spans * tiles_of_span(args);
    unsigned long long count = 0;
    for (uint64_t task = blockIdx.x; task < tiles; task += gridDim.x) {
        const Tile tile = tile_at(args, task);
        draw_tile(bits, tile, args, mask);
        // No barrier behind it: a thread counts the very words that it clears for the next tile.
        for (uint32_t word = threadIdx.x; word * 32 < tile.len; word += blockDim.x) count += __popc(bits[word]);
    }
    for (int distance = 16; distance > 0; distance /= 2) count += __shfl_xor_sync(0xffffffffu, count, distance);
    if (threadIdx.x % 32 == 0) atomicAdd(reinterpret_cast<unsigned long long*>(dropped), count);
}

#define DROP_BLOCK(SUFFIX, T)                                                                     \
    KERNEL(256) drop_block_fwd_##SUFFIX(const T* __restrict__ x, T* __restrict__ y,               \
                                        const uint64_t* __restrict__ dropped, DropBlockArgs args, \
                                        MaskArgs mask) { drop_block_fwd(x, y, dropped, args, mask); }
FOR_EACH_DTYPE(DROP_BLOCK)
