// The device language: qualifiers, vector types, 16-bit floats, intrinsics, atomics.
//
// `__global__` and `__shared__` are missing on purpose: the build rewrites them (see harness.rs).
#pragma once
#include "machine.h"

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// Set for kernels that have something to replace here, such as inline PTX.
#define KERNELS_ON_CPU 1

#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__ __restrict

using std::max;
using std::min;

// ---- Vector types -------------------------------------------------------------------------------

// Their alignment is the point: UBSan stops a 16-byte access to an address that is not a multiple
// of 16, as the GPU would.
#define VECTOR_TYPES(T, name, alignment2, alignment4)                                               \
  struct alignas(alignment2) name##2 { T x, y; };                                                   \
  struct alignas(alignment4) name##4 { T x, y, z, w; };                                             \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                        \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPES(float, float, 8, 16)
VECTOR_TYPES(int, int, 8, 16)
VECTOR_TYPES(unsigned, uint, 8, 16)
VECTOR_TYPES(unsigned short, ushort, 4, 8)
#undef VECTOR_TYPES

// ---- Bits ---------------------------------------------------------------------------------------

namespace machine {
template <class To, class From> To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
} // namespace machine

inline float __uint_as_float(unsigned bits) { return machine::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return machine::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return machine::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return machine::bit_cast<int>(value); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// Each nibble of the selector names one of the eight bytes of (b, a); its top bit replicates the
// sign of that byte instead.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 0xf;
    unsigned byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// ---- 16-bit floats ------------------------------------------------------------------------------

namespace machine {

constexpr uint16_t canonical_nan = 0x7fff; // what the hardware makes of every NaN

inline uint16_t half_from_float(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return canonical_nan;
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // 65520, the middle between 65504 and 2^16, and above
  if (magnitude < 0x38800000) {
    // Below 2^-14 the halves are the multiples of 2^-24, which is what a float at 0.5 resolves:
    // the addition rounds to nearest even for us.
    return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000);
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);          // half a unit, less one bit where that is even
  return sign | (magnitude - (112u << 23)) >> 13;      // from the exponent's bias 127 to 15
}
inline float float_from_half(uint16_t half) {
  // Shifted into place the exponent is too small by 2^112; the product is exact, subnormals included.
  uint32_t bits = __float_as_uint(__uint_as_float((half & 0x7fffu) << 13) * 0x1p112f);
  if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  return __uint_as_float(bits | (half & 0x8000u) << 16);
}
inline uint16_t bfloat16_from_float(float value) {
  uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return canonical_nan;
  bits += 0x7fff + (bits >> 16 & 1);
  return bits >> 16;
}
inline float float_from_bfloat16(uint16_t bfloat16) { return __uint_as_float(uint32_t{bfloat16} << 16); }

} // namespace machine

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half value) { return machine::float_from_half(value.bits); }
inline __half __float2half_rn(float value) { return {machine::half_from_float(value)}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 value) { return __floats2half2_rn(value.x, value.y); }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }

inline float __bfloat162float(__nv_bfloat16 value) { return machine::float_from_bfloat16(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {machine::bfloat16_from_float(value)}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return __floats2bfloat162_rn(value.x, value.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {__bfloat162float(value.x), __bfloat162float(value.y)}; }

// ---- Arithmetic ---------------------------------------------------------------------------------

// The build forbids contraction, so a plain product and sum round twice here, as the explicitly
// rounded intrinsics do everywhere.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __frcp_rn(float value) { return 1.0f / value; }

// The fast ones are more exact here than on a GPU: compare their results with a tolerance.
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

// ---- Memory -------------------------------------------------------------------------------------

// Cache hints change speed only.
template <class T> T __ldg(const T *address) { return *address; }
template <class T> T __ldcs(const T *address) { return *address; }
template <class T> T __ldcg(const T *address) { return *address; }
template <class T> void __stcs(T *address, T value) { *address = value; }
template <class T> void __stcg(T *address, T value) { *address = value; }
template <class T> void __stwb(T *address, T value) { *address = value; }

// Fibers change places only where they wait, so every statement is atomic.
template <class T> T atomicAdd(T *address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T> T atomicOr(T *address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <class T> T atomicMax(T *address, T value) {
  const T old = *address;
  *address = max(old, value);
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#include "mma.h"
