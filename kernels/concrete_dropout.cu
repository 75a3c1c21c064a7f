// concrete_dropout: a relaxed mask, at a rate that learns. Twin of src/functional/concrete_dropout/cpu.rs.
//
//     z = sigmoid((logit_p + logit u) / temperature)          u = (w + 1/2) / 2^32 of the wide draw w
//     forward   y  = x (1 - z) / (1 - p)
//     backward  dx = dy (1 - z) / (1 - p)
//               dlogit_p = sum over all of dy y (p - z / temperature)
//
// x, y, dy, dx [rows, cols]; logit_p, dlogit_p [1]. Bytes moved an element: forward one read, one write; backward two
// reads, one write; no mask. Each block leaves the sum of its elements, and a block of a second kernel adds them up,
// both in a fixed order.
// Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element, with a Philox call for each.
#include "elem.cuh"
#include "philox.cuh"

constexpr int BLOCK_THREADS = 256;

// As in src/functional/concrete_dropout/mod.rs.
constexpr float MAX_LOGIT = 60.f;

// What all elements have in common.
struct Concrete {
    float logit_p, p, inverse_keep_p, inverse_temperature;

    __device__ __forceinline__ Concrete(float of, float inverse_temperature)
        : inverse_temperature(inverse_temperature) {
        // A NaN stays one.
        of = of > MAX_LOGIT ? MAX_LOGIT : of;
        logit_p = of < -MAX_LOGIT ? -MAX_LOGIT : of;
        const float e = expf(-fabsf(logit_p));
        p = (logit_p >= 0.f ? 1.f : e) / (1.f + e);
        inverse_keep_p = logit_p >= 0.f ? (1.f + e) / e : 1.f + e;
    }

    // (1 - z) / (1 - p) at a draw; z is left there.
    __device__ __forceinline__ float gain(uint32_t draw, float& z) const {
        // Neither u nor 1 - u rounds to 0 or 1.
        const float odds = (float(draw) + 0.5f) / (float(~draw) + 0.5f);
        const float logit_z = (logit_p + logf(odds)) * inverse_temperature;
        const float e = expf(-fabsf(logit_z)), of_abs = 1.f / (1.f + e);
        const bool is_positive = logit_z >= 0.f;
        z = is_positive ? of_abs : e * of_abs;
        return (is_positive ? e * of_abs : of_abs) * inverse_keep_p;
    }
};

// The wide draws of the columns col .. col + 8.
template <bool VECTOR>
__device__ __forceinline__ void wide_draws(const MaskArgs& mask, uint64_t mask_row, uint64_t col,
                                           uint32_t (&draws)[WIDTH]) {
    if (VECTOR) {
        const Draws low = draw_wide(mask, mask_row, col), high = draw_wide(mask, mask_row, col + 4);
#pragma unroll
        for (int j = 0; j < 4; ++j) draws[j] = low.word[j], draws[4 + j] = high.word[j];
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) draws[j] = draw_wide_one(mask, mask_row, col + j);
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void fwd_tiles(const T* __restrict__ x, T* __restrict__ y, uint64_t rows, uint64_t cols,
                                          const Concrete& concrete, const MaskArgs& mask) {
    constexpr int N = TILE_OF<VECTOR>;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const T* x_row = x + row * cols;
        T* y_row = y + row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col < cols) fetched[i].fetch(x_row + col, count_at(col, cols));  // tail
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            uint32_t draws[WIDTH];
            wide_draws<VECTOR>(mask, mask_row, col, draws);
            float v[WIDTH], z;
            fetched[i].widen(v);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] *= concrete.gain(draws[j], z);
            store<VECTOR>(y_row + col, count_at(col, cols), v);
        }
    });
}

// Writes dx; what the thread's elements give dlogit_p is returned.
template <bool VECTOR, typename T>
__device__ __forceinline__ float bwd_tiles(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx,
                                           uint64_t rows, uint64_t cols, const Concrete& concrete,
                                           const MaskArgs& mask) {
    // Half as many vectors as forward, since there are two tensors to read.
    constexpr int N = VECTOR ? TILE / 2 : 1;
    float sum = 0.f;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N], back[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            fetched[i].fetch(x + start + col, count_at(col, cols));
            back[i].fetch(dy + start + col, count_at(col, cols));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            uint32_t draws[WIDTH];
            wide_draws<VECTOR>(mask, mask_row, col, draws);
            float v[WIDTH], d[WIDTH], z;
            fetched[i].widen(v);
            back[i].widen(d);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                // Behind the end of a row both are 0, and so is what they add.
                d[j] *= concrete.gain(draws[j], z);
                sum += d[j] * v[j] * (concrete.p - z * concrete.inverse_temperature);
            }
            store<VECTOR>(dx + start + col, count_at(col, cols), d);
        }
    });
    return sum;
}

// The sum over the threads of a block, in f64 and in a fixed order; the first thread has it.
__device__ __forceinline__ double block_sum(int thread, double x, double (&sums)[BLOCK_THREADS]) {
    sums[thread] = x;
    for (int distance = BLOCK_THREADS / 2; distance > 0; distance /= 2) {
        __syncthreads();
        if (thread < distance) sums[thread] += sums[thread + distance];
    }
    return sums[0];
}

template <typename T>
__device__ __forceinline__ void concrete_dropout_fwd(const T* __restrict__ x, const float* __restrict__ logit_p,
                                                     T* __restrict__ y, uint64_t rows, uint64_t cols,
                                                     float inverse_temperature, const MaskArgs& mask) {
    const Concrete concrete(*logit_p, inverse_temperature);
    if (rows_are_vectors(cols, x, y) && is_drawn_whole(mask)) {
        fwd_tiles<true>(x, y, rows, cols, concrete, mask);
    } else {
        fwd_tiles<false>(x, y, rows, cols, concrete, mask);
    }
}

// sums [gridDim.x]
template <typename T>
__device__ __forceinline__ void concrete_dropout_bwd(const T* __restrict__ x, const float* __restrict__ logit_p,
                                                     const T* __restrict__ dy, T* __restrict__ dx,
                                                     double* __restrict__ sums, uint64_t rows, uint64_t cols,
                                                     float inverse_temperature, const MaskArgs& mask,
                                                     double (&scratch)[BLOCK_THREADS]) {
    const Concrete concrete(*logit_p, inverse_temperature);
    const float sum = rows_are_vectors(cols, x, dy, dx) && is_drawn_whole(mask)
                          ? bwd_tiles<true>(x, dy, dx, rows, cols, concrete, mask)
                          : bwd_tiles<false>(x, dy, dx, rows, cols, concrete, mask);
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    const double total = block_sum(thread, double(sum), scratch);
    if (thread == 0) sums[blockIdx.x] = total;
}

// One block.
KERNEL(BLOCK_THREADS)
concrete_dropout_bwd_total(const double* __restrict__ sums, float* __restrict__ dlogit_p, uint64_t count) {
    __shared__ double scratch[BLOCK_THREADS];
    const int thread = threadIdx.x;
    double sum = 0.;
    for (uint64_t i = thread; i < count; i += BLOCK_THREADS) sum += sums[i];  // tail
    const double total = block_sum(thread, sum, scratch);
    if (thread == 0) *dlogit_p = float(total);
}

// Without a bound on registers ptxas takes 80 for f32 and spills.
#define CONCRETE_DROPOUT(SUFFIX, T)                                                                               \
    KERNEL(BLOCK_THREADS, sizeof(T) == 2 ? 3 : 2) concrete_dropout_fwd_##SUFFIX(                                  \
        const T* __restrict__ x, const float* __restrict__ logit_p, T* __restrict__ y, uint64_t rows,             \
        uint64_t cols, float inverse_temperature, MaskArgs mask) {                                                \
        concrete_dropout_fwd(x, logit_p, y, rows, cols, inverse_temperature, mask);                               \
    }                                                                                                             \
    KERNEL(BLOCK_THREADS) concrete_dropout_bwd_##SUFFIX(                                                          \
        const T* __restrict__ x, const float* __restrict__ logit_p, const T* __restrict__ dy, T* __restrict__ dx, \
        double* __restrict__ sums, uint64_t rows, uint64_t cols, float inverse_temperature, MaskArgs mask) {      \
        __shared__ double scratch[BLOCK_THREADS];                                                                 \
        concrete_dropout_bwd(x, logit_p, dy, dx, sums, rows, cols, inverse_temperature, mask, scratch);           \
    }
FOR_EACH_DTYPE(CONCRETE_DROPOUT)
