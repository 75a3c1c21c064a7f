// dropout_add_norm: the dropout of a biased branch, added to its residual stream, and the norm of the sum.
// Twin of src/functional/dropout_add_norm/cpu.rs.
//
//     forward   z = residual + (keep ? (x + bias) * scale : 0)
//               n = (z - mean) * rstd * weight + norm_bias        rstd = 1 / sqrt(variance + eps)
//     backward  dz from dn: kernels of norm, applied to z
//               dx, dresidual, dbias from dz: kernels of dropout and column_sums
//
// x, residual, z, n [rows, cols]; bias, weight, norm_bias [cols]. residual, bias and norm_bias may be null.
// Bytes moved an element: two reads, two writes. Statistics are taken from the stored, rounded z, so that
// backward finds the same ones.
// A team takes a row; see norm.cuh. Vectors of 16 bytes where rows begin at such boundaries and the mask at a
// multiple of 8 columns, else element by element.
#include "norm.cuh"
#include "philox.cuh"

// As it is stored and read again.
template <typename T>
__device__ __forceinline__ float rounded(float x) { return widen(narrow<T>(x)); }

template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void dropout_add_norm_fwd_rows(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,
    const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n, uint64_t rows,
    uint64_t cols, float eps, uint32_t removes_mean, const MaskArgs& mask, float* scratch) {
    constexpr int N = KEPT<RESIDENT>;
    // Teams without a row of their own do the last row again, since reductions need all threads.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t r = is_mine ? first + threadIdx.y : rows - 1;
        const uint64_t start = r * cols;
        const uint64_t mask_row = mask.rows.map(r);
        // A thread reads no element of z but those that it has written itself.
        Row<VECTOR, RESIDENT, T> row(z + start, cols);

        // Steps 1 and 2: the biased branch; its dropout, added to the stream.
        Fetched<VECTOR, T> branch[N], stream[N];
        auto fetch = [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            branch[i].fetch(x + start + col, count_at(col, cols));
            if (residual) stream[i].fetch(residual + start + col, count_at(col, cols));
        };
        for_each_vector<N>(cols, fetch, [&](int i, uint64_t col) {
            float(&v)[WIDTH] = row.v[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] = 0.f;
            if (col >= cols) return;  // tail
            branch[i].widen(v);
            const int count = count_at(col, cols);
            if (bias) {
                float b[WIDTH];
                load<VECTOR>(bias + col, count, b);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) v[j] = __fadd_rn(v[j], b[j]);
            }
            float s[WIDTH] = {};
            if (residual) stream[i].widen(s);
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float scaled = __fmul_rn(v[j], mask.scale);
                const float kept = residual ? __fadd_rn(s[j], scaled) : scaled;
                v[j] = rounded<T>(keeps(mask, draws[j]) ? kept : s[j]);
            }
            if (is_mine) store<VECTOR>(z + start + col, count, v);
        });

        // Step 3: statistics and norm.
        row.take_statistics(eps, removes_mean, scratch);
        if (is_mine) row.store_norm(weight, norm_bias, n + start);
    }
}

template <typename T>
__device__ __forceinline__ void dropout_add_norm_fwd(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,
    const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n, uint64_t rows,
    uint64_t cols, float eps, uint32_t removes_mean, const MaskArgs& mask) {
    __shared__ float scratch[SCRATCH];
    auto take_rows = [&](auto vector, auto resident) {
        dropout_add_norm_fwd_rows<decltype(vector)::value, decltype(resident)::value>(
            x, residual, bias, weight, norm_bias, z, n, rows, cols, eps, removes_mean, mask, scratch);
    };
    if (!rows_are_vectors(cols, x, residual, bias, weight, norm_bias, z, n) || !is_drawn_whole(mask)) {
        take_rows(No(), No());
    } else if (!fits_in_registers(cols)) {
        take_rows(Yes(), No());
    } else {
        take_rows(Yes(), Yes());
    }
}

// What the rows of f32 occupy leaves room for one block.
template <typename T>
constexpr int MIN_BLOCKS = sizeof(T) == 2 ? 2 : 1;

#define DROPOUT_ADD_NORM(SUFFIX, T)                                                                           \
    KERNEL(THREADS, MIN_BLOCKS<T>) dropout_add_norm_fwd_##SUFFIX(                                             \
        const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,                  \
        const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n,               \
        uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean, MaskArgs mask) {                      \
        dropout_add_norm_fwd(x, residual, bias, weight, norm_bias, z, n, rows, cols, eps, removes_mean, mask); \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_NORM)
