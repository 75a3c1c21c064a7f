// Standard normal numbers, each pair from two 32-bit draws (Box and Muller, 1958). Twin of src/mask/normal.rs, step
// by step and so bit for bit: products and sums round one by one on both sides, and no function of a library is called
// but the root, which is rounded correctly.
//
//     z[2 i], z[2 i + 1] = r cos a, r sin a,  r = sqrt(-2 ln((u32[2 i] + 0.5) 2^-32)),  a = 2 pi u32[2 i + 1] 2^-32
//
// Cost of a pair, beside half a call of Philox: 29 products, 25 sums, a root and 4 conversions.
#pragma once

#include "elem.cuh"
#include "philox.cuh"

// sqrt(-2 ln((word + 0.5) 2^-32)): between 1.5e-5 and 6.77.
__device__ __forceinline__ float normal_radius(uint32_t word) {
    // Near 1 the distance to it is an integer, whose digits would be lost in the number itself.
    const bool near_1 = word >= 0xb504f334u;
    const float below_1 = __fmul_rn(__fadd_rn(float(~word), 0.5f), 2.3283064e-10f);
    // Elsewhere m 2^e, with m between the roots of 1/2 and 2.
    const uint32_t bits = __float_as_uint(__fadd_rn(float(word), 0.5f));
    const int whole = int(bits - 0x3f3504f3u) >> 23;
    const float m = __uint_as_float(bits - (uint32_t(whole) << 23));
    const float f = near_1 ? -below_1 : __fadd_rn(m, -1.f);
    const float e = near_1 ? 0.f : float(whole - 32);
    const float f2 = __fmul_rn(f, f);
    float p = 7.0376836e-2f;
    p = __fadd_rn(__fmul_rn(p, f), -1.151461e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 1.16769984e-1f);
    p = __fadd_rn(__fmul_rn(p, f), -1.2420141e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 1.4249323e-1f);
    p = __fadd_rn(__fmul_rn(p, f), -1.6668057e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 2.0000714e-1f);
    p = __fadd_rn(__fmul_rn(p, f), -2.4999994e-1f);
    p = __fadd_rn(__fmul_rn(p, f), 3.333333e-1f);
    const float cubed = __fmul_rn(__fmul_rn(p, f), f2);
    const float small = __fadd_rn(__fadd_rn(cubed, __fmul_rn(e, -2.1219444e-4f)), -__fmul_rn(0.5f, f2));
    const float ln = __fadd_rn(__fmul_rn(e, 6.933594e-1f), __fadd_rn(f, small));
    return __fsqrt_rn(__fmul_rn(-2.f, ln));
}

__device__ __forceinline__ float with_sign(float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ (sign & 2) << 30);
}

// The two normal numbers of the draws of an even column and of the odd one beside it.
__device__ __forceinline__ float2 normal_pair(uint32_t even, uint32_t odd) {
    const float r = normal_radius(even);
    const uint32_t quarter = (odd + (1u << 29)) >> 30;
    const float t = __fmul_rn(float(int(odd - (quarter << 30))), 1.4629181e-9f);
    const float t2 = __fmul_rn(t, t);
    float s = -1.9515296e-4f;
    s = __fadd_rn(__fmul_rn(s, t2), 8.332161e-3f);
    s = __fadd_rn(__fmul_rn(s, t2), -1.6666655e-1f);
    const float sin = __fadd_rn(__fmul_rn(__fmul_rn(s, t2), t), t);
    float c = 2.4433157e-5f;
    c = __fadd_rn(__fmul_rn(c, t2), -1.3887316e-3f);
    c = __fadd_rn(__fmul_rn(c, t2), 4.1666646e-2f);
    const float cos = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(c, t2), t2), -__fmul_rn(0.5f, t2)), 1.f);
    const float x = quarter & 1 ? sin : cos;
    const float y = quarter & 1 ? cos : sin;
    return {__fmul_rn(r, with_sign(x, quarter + 1)), __fmul_rn(r, with_sign(y, quarter))};
}

// The normal numbers of the columns of `CALLS` calls from the one of column `col` on.
template <int CALLS>
__device__ __forceinline__ void normals_of_calls(const MaskArgs& mask, uint64_t mask_row, uint64_t col,
                                                 float (&z)[4 * CALLS]) {
#pragma unroll
    for (int call = 0; call < CALLS; ++call) {
        const Draws draws = draw_wide(mask, mask_row, col + 4 * call);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const float2 pair = normal_pair(draws.word[i], draws.word[i + 1]);
            z[4 * call + i] = pair.x, z[4 * call + i + 1] = pair.y;
        }
    }
}

// True if the tensor's columns 8 i .. 8 i + 8 are those of two calls, for which ALIGNED is enough.
__device__ __forceinline__ bool is_wide_drawn_whole(const MaskArgs& mask) { return mask.col_0 % 4 == 0; }

// The normal numbers of the tensor's columns col .. col + 8. ALIGNED: they begin where a call does.
template <bool ALIGNED>
__device__ __forceinline__ void normals(const MaskArgs& mask, uint64_t mask_row, uint64_t col, float (&z)[WIDTH]) {
    if constexpr (ALIGNED) {
        normals_of_calls<2>(mask, mask_row, col, z);
    } else {
        float all[12];
        normals_of_calls<3>(mask, mask_row, col, all);
        const int skip = int((mask.col_0 + col) % 4);
        // A shifter of two stages, since an index that is not constant would go through local memory.
#pragma unroll
        for (int i = 0; i < 10; ++i) all[i] = skip & 2 ? all[i + 2] : all[i];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) z[i] = skip & 1 ? all[i + 1] : all[i];
    }
}
