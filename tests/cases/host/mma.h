// Tensor cores and asynchronous copies: what kernels/mma.cuh writes as inline PTX, by the layouts that
// the PTX ISA documents.
//
// All 32 lanes of a warp take part in ldmatrix and mma, as `.sync.aligned` demands: the last to come does
// the work for all. Asynchronous copies belong to a thread: they read when they start and write when
// their thread waits for them; in between what they will write is poison.
#pragma once
#include "machine.h"

namespace machine {

inline void check_copy(const char *call, const void *shared, const void *global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("%s: misaligned address, 16 bytes want a multiple of 16", call);
  if (!is_shared(shared, 16)) fail("%s writes 16 bytes that are not all shared memory", call);
}

// ---- ldmatrix -----------------------------------------------------------------------------------

struct Ldmatrix {
  const void *row; // of the matrices, this lane's
  uint32_t *to;
};

// Lane 8 m + r brings the address of row r of matrix m. Register m of lane 4 r + c gets elements 2c and
// 2c + 1 of row r of matrix m; transposed, of its column r.
template <bool transposed> void ldmatrix_work(Thread *warp) {
  const auto operand = [&](int lane) { return *reinterpret_cast<const Ldmatrix *>(warp[lane].offered); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t element[8][8];
    for (int row = 0; row < 8; ++row) {
      const void *from = operand(8 * matrix + row).row;
      if (reinterpret_cast<uintptr_t>(from) % 16) fail("ldmatrix: misaligned address, 16 bytes want a multiple of 16");
      if (!is_shared(from, 16)) fail("ldmatrix reads 16 bytes that are not all shared memory");
      memcpy(element[row], from, 16);
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = transposed ? element[c][r] : element[r][c];
      const uint32_t high = transposed ? element[c + 1][r] : element[r][c + 1];
      operand(lane).to[matrix] = low | high << 16;
    }
  }
}

template <bool transposed> void ldmatrix_x4(Site site, uint32_t (&to)[4], const void *row) {
  const Ldmatrix operand = {row, to};
  meet(site, ~0u, reinterpret_cast<uint64_t>(&operand), lane_id(), ldmatrix_work<transposed>);
}

// ---- mma ----------------------------------------------------------------------------------------

struct Mma {
  const uint32_t *a, *b;
  float *d;
};

inline float float_from(uint16_t bits, __half) { return float_from_half(bits); }
inline float float_from(uint16_t bits, __nv_bfloat16) { return float_from_bfloat16(bits); }

// D = A B + D, A [16, 16], B [16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   of A rows g, g + 8 (registers 0, 1) and columns 2t, 2t + 1, then (registers 2, 3) columns 2t + 8, 2t + 9;
//   of B rows 2t, 2t + 1, then (register 1) 2t + 8, 2t + 9, and column g;
//   of D rows g (elements 0, 1) and g + 8 (2, 3) and columns 2t, 2t + 1.
// Products of halves are exact in f32. They are added one by one, in the order of A's columns, each sum
// rounded; hardware adds in another order and truncates.
template <class T>
#ifndef __clang__
__attribute__((optimize("O3")))
#endif
__attribute__((no_sanitize("address", "undefined"))) void mma_work(Thread *warp) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < warpSize; ++lane) {
    const Mma &operand = *reinterpret_cast<const Mma *>(warp[lane].offered);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + i / 2 % 2 * 8][2 * t + i / 4 * 8 + i % 2] = float_from(uint16_t(operand.a[i / 2] >> i % 2 * 16), T());
    for (int i = 0; i < 4; ++i) {
      b[2 * t + i / 2 * 8 + i % 2][g] = float_from(uint16_t(operand.b[i / 2] >> i % 2 * 16), T());
      d[g + i / 2 * 8][2 * t + i % 2] = operand.d[i];
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < warpSize; ++lane) {
    const Mma &operand = *reinterpret_cast<const Mma *>(warp[lane].offered);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) operand.d[i] = d[g + i / 2 * 8][2 * t + i % 2];
  }
}

} // namespace machine

// ---- As kernels/mma.cuh spells it ---------------------------------------------------------------

inline void ldmatrix_x4(uint32_t (&to)[4], const void *row, KERNELS_ON_CPU_SITE) {
  machine::ldmatrix_x4<false>({"ldmatrix_x4", file, line}, to, row);
}
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void *row, KERNELS_ON_CPU_SITE) {
  machine::ldmatrix_x4<true>({"ldmatrix_x4_trans", file, line}, to, row);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b_low, uint32_t b_high, T, KERNELS_ON_CPU_SITE) {
  const uint32_t b[2] = {b_low, b_high};
  const machine::Mma operand = {a, b, d};
  machine::meet({"mma_m16n8k16", file, line}, ~0u, reinterpret_cast<uint64_t>(&operand), machine::lane_id(), machine::mma_work<T>);
}

inline void cp_async_16(void *shared, const void *global, bool is_read) {
  machine::check_copy("cp_async_16", shared, global);
  machine::Thread::Copy copy = {shared, {}, machine::current->groups};
  if (is_read) memcpy(copy.bytes, global, sizeof copy.bytes);
  memset(shared, machine::poison, sizeof copy.bytes);
  machine::current->copies.push_back(copy);
}
inline void cp_async_commit() { ++machine::current->groups; }
template <unsigned pending> void cp_async_wait() {
  auto &copies = machine::current->copies;
  const auto is_waited_for = [](const machine::Thread::Copy &copy) { return copy.group + pending < machine::current->groups; };
  const auto end = std::find_if_not(copies.begin(), copies.end(), is_waited_for);
  for (auto copy = copies.begin(); copy != end; ++copy) memcpy(copy->to, copy->bytes, sizeof copy->bytes);
  copies.erase(copies.begin(), end);
}

inline float exp2_approx(float x) { return exp2f(x); }
inline uint32_t spread_signs(uint32_t word) { return (word >> 31 ? 0xffff0000u : 0) | (word >> 15 & 1 ? 0xffffu : 0); }
inline uint32_t opaque(uint32_t x) { return x; }
