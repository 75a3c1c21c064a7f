// Tensor cores and asynchronous copies, an instruction of PTX each (sm_80 and later). On the host
// tests/cases/host/mma.h has functions of the same names, by the layouts that the PTX ISA documents.
//
// All 32 lanes of a warp call ldmatrix and mma together. With g = lane / 4 and t = lane % 4, a lane holds
//     of A [16, 16]  rows g (registers 0, 2) and g + 8 (1, 3), columns 2t, 2t + 1 (0, 1) and 8 more (2, 3);
//     of B [16, 8]   rows 2t, 2t + 1 (register 0) and 8 more (1), column g;
//     of D [16, 8]   rows g (elements 0, 1) and g + 8 (2, 3), columns 2t, 2t + 1.
#pragma once

#include "elem.cuh"

#ifndef KERNELS_ON_CPU

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Matrices of 8 x 8 halves. Lane 8 m + r brings the address of row r of matrix m, a multiple of 16;
// register m of lane 4 r + c gets elements 2c, 2c + 1 of row r, transposed of column r.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// D += A B, products of halves summed in f32. The last argument picks the type. What is added to is an input
// of its own, so that zeros need no register.
#define MMA_M16N8K16(T, NAME)                                                                           \
    __device__ __forceinline__ void mma_m16n8k16(float(&d)[4], const uint32_t(&a)[4], uint32_t b_low,   \
                                                 uint32_t b_high, T) {                                  \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                             \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"         \
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high), "f"(d[0]),  \
                       "f"(d[1]), "f"(d[2]), "f"(d[3]));                                                \
    }
MMA_M16N8K16(__half, "f16")
MMA_M16N8K16(__nv_bfloat16, "bf16")
#undef MMA_M16N8K16

// Starts to copy 16 bytes to shared memory; zeros if they are not to be read. Both addresses are multiples
// of 16. What is copied is there after a wait of this thread, and for others after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool is_read) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(is_read ? 16 : 0)
                 : "memory");
}
// Closes a group: the copies that the thread has started since the last.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits for all groups but the `PENDING` last.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// 2^x, to about 2^-22; what would be subnormal is 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// All ones in each half of the word whose highest bit is set, zeros in the others.
__device__ __forceinline__ uint32_t spread_signs(uint32_t word) {
    uint32_t spread;
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(spread) : "r"(word));
    return spread;
}

// The same, unknown to the compiler: what follows from it is computed anew in every round of a loop instead of
// being kept in registers.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

#endif
