// dropout_add_norm: the dropout of a biased branch, added to its residual stream, and the norm of the sum.
// Twin of src/ops/dropout_add_norm/cpu.rs.
//
//     forward   z = residual + (keep ? (x + bias) * scale : 0)
//               n = (z - mean) * rstd * weight + norm_bias        rstd = 1 / sqrt(variance + eps)
//     backward  h = (z - mean) * rstd, g = dn * weight
//               dz = rstd * (g - mean of g - h * mean of g h)
//               dweight[c] = sum over rows of dn h, dnorm_bias[c] = sum over rows of dn
//               dx, dresidual, dbias from dz: kernels of dropout and dropout_add
//
// x, residual, z, n, dn, dz [rows, cols]; bias, weight, norm_bias, dweight, dnorm_bias [cols]. residual, bias
// and norm_bias may be null. RMSNorm: removes_mean is 0, and neither the mean of z nor that of g is taken.
// A null z makes n the norm of x, which must be neither biased nor dropped then.
// Bytes moved an element: forward two reads, two writes; backward two reads, one write. Statistics are taken
// from the stored, rounded z, so that backward finds the same ones.
// A team of blockDim.x threads (a power of two, 4 to 256) takes a row; threadIdx.y counts the teams of a
// block, the grid strides over the rows. A thread keeps TILE vectors of its row in registers; a row longer
// than 256 * TILE * 8 = 8192 columns is read again for each step instead, mostly from L2.
// Column sums: a thread keeps those of its columns in registers (in memory, for long rows) over all rows of
// its team; the teams of a block add theirs up in shared memory, the blocks theirs in a second kernel. Each
// sum has a fixed order, so the result is the same at every run.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
#include "elem.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// As it is stored and read again.
template <typename T>
__device__ __forceinline__ float rounded(float x) { return widen(narrow<T>(x)); }

// The statistics of a row from its vectors: load(i, col) fills v[i]. All threads of the block call it.
struct Statistics {
    float mean;
    float rstd;

    template <typename Load>
    __device__ __forceinline__ Statistics(float (&v)[TILE][WIDTH], bool fits, uint64_t cols, float eps,
                                          uint32_t removes_mean, float* scratch, Load load) {
        mean = 0.f;
        if (removes_mean) {
            float thread_sum = 0.f;
            for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
                if (!fits) load(i, col);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) thread_sum += v[i][j];
            });
            mean = team_reduce(thread_sum, scratch, Sum()) / float(cols);
        }
        float thread_squares = 0.f;
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            if (!fits) load(i, col);
            const int count = count_at(col, cols);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float centered = j < count ? v[i][j] - mean : 0.f;  // tail
                thread_squares += centered * centered;
            }
        });
        rstd = 1.f / sqrtf(team_reduce(thread_squares, scratch, Sum()) / float(cols) + eps);
    }
};

// Fills the vector from `col` on, with zeros behind the end of the row.
template <bool VECTOR, typename T>
__device__ __forceinline__ void load_or_zero(const T* row, uint64_t col, uint64_t cols, float (&x)[WIDTH]) {
    if (col < cols) {
        load<VECTOR>(row + col, count_at(col, cols), x);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) x[j] = 0.f;  // tail
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void dropout_add_norm_fwd(
    const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,
    const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n, uint64_t rows,
    uint64_t cols, float eps, uint32_t removes_mean, const MaskArgs& mask) {
    __shared__ float scratch[MAX_WARPS];
    const bool fits = cols <= uint64_t(blockDim.x) * TILE * WIDTH;
    // Teams without a row of their own do the last row again, since reductions need all threads.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t row = is_mine ? first + threadIdx.y : rows - 1;
        const uint64_t start = row * cols;
        const uint64_t mask_row = mask.rows.map(row);

        // Steps 1 and 2: the biased branch; its dropout, added to the stream.
        float v[TILE][WIDTH];
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            load_or_zero<VECTOR>(x + start, col, cols, v[i]);
            if (col >= cols || !z) return;  // tail
            const int count = count_at(col, cols);
            float r[WIDTH] = {};
            if (residual) load<VECTOR>(residual + start + col, count, r);
            if (bias) {
                float b[WIDTH];
                load<VECTOR>(bias + col, count, b);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) v[i][j] = __fadd_rn(v[i][j], b[j]);
            }
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float branch = __fmul_rn(v[i][j], mask.scale);
                const float kept = residual ? __fadd_rn(r[j], branch) : branch;
                v[i][j] = rounded<T>(keeps(mask, draws[j]) ? kept : r[j]);
            }
            if (is_mine) store<VECTOR>(z + start + col, count, v[i]);
        });

        // Step 3: statistics and norm. A thread reads no element of z but those that it has written.
        const T* stream = z ? z : x;
        auto reload = [&](int i, uint64_t col) {
            load_or_zero<VECTOR>(stream + start, col, cols, v[i]);
        };
        const Statistics row_is(v, fits, cols, eps, removes_mean, scratch, reload);
        if (!is_mine) continue;  // tail
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            if (!fits) reload(i, col);
            const int count = count_at(col, cols);
            float w[WIDTH], b[WIDTH] = {};
            load<VECTOR>(weight + col, count, w);
            if (norm_bias) load<VECTOR>(norm_bias + col, count, b);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[i][j] = (v[i][j] - row_is.mean) * row_is.rstd * w[j] + b[j];
            store<VECTOR>(n + start + col, count, v[i]);
        });
    }
}

constexpr int THREADS = 256;

// The sums that the threads of a block have of their columns, as one row of `total`. The block has taken its
// rows in teams of blockDim.x lanes; `partial` is free for use again on return.
template <bool VECTOR>
__device__ __forceinline__ void store_block_sums(const float (&sum)[TILE][WIDTH], float* partial,
                                                 float* __restrict__ total, uint64_t cols) {
    if (blockDim.y == 1) {
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            store<VECTOR>(total + col, count_at(col, cols), sum[i]);  // tail: nothing if it counts 0
        });
        return;
    }
    const int width = blockDim.x * TILE * WIDTH;
    // Transposed within a vector, so that neighbouring lanes write neighbouring words: no bank conflicts.
#pragma unroll
    for (int i = 0; i < TILE; ++i) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            partial[threadIdx.y * width + (i * WIDTH + j) * blockDim.x + threadIdx.x] = sum[i][j];
        }
    }
    __syncthreads();
    for (int at = threadIdx.y * blockDim.x + threadIdx.x; at < width; at += blockDim.x * blockDim.y) {
        const int vector = at / int(blockDim.x * WIDTH), j = at / int(blockDim.x) % WIDTH;
        const uint64_t col = (uint64_t(vector) * blockDim.x + at % int(blockDim.x)) * WIDTH + j;
        float sum_of_teams = 0.f;
        for (int team = 0; team < int(blockDim.y); ++team) sum_of_teams += partial[team * width + at];
        if (col < cols) total[col] = sum_of_teams;  // tail
    }
    __syncthreads();
}

// sums [2, gridDim.x, cols]: the column sums of each block, of dweight and of dnorm_bias.
template <bool VECTOR, typename T>
__device__ __forceinline__ void dropout_add_norm_bwd(const T* __restrict__ z, const T* __restrict__ weight,
                                                     const T* __restrict__ dn, T* __restrict__ dz,
                                                     float* __restrict__ sums, uint64_t rows, uint64_t cols,
                                                     float eps, uint32_t removes_mean, float* scratch,
                                                     float* partial) {
    float* dweight = sums + blockIdx.x * cols;
    float* dnorm_bias = sums + (uint64_t(gridDim.x) + blockIdx.x) * cols;
    const bool fits = cols <= uint64_t(blockDim.x) * TILE * WIDTH;
    if (!fits) {
        for_each_vector<TILE>(cols, [&](int, uint64_t col) {
            for (int j = 0; j < count_at(col, cols); ++j) dweight[col + j] = dnorm_bias[col + j] = 0.f;
        });
    }
    float dweight_sum[TILE][WIDTH] = {}, dnorm_bias_sum[TILE][WIDTH] = {};
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t row = is_mine ? first + threadIdx.y : rows - 1;
        const uint64_t start = row * cols;

        // Step 1: the statistics, as forward took them.
        float h[TILE][WIDTH], g[TILE][WIDTH];
        auto load_z = [&](int i, uint64_t col) { load_or_zero<VECTOR>(z + start, col, cols, h[i]); };
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            load_z(i, col);
            load_or_zero<VECTOR>(dn + start, col, cols, g[i]);
        });
        const Statistics row_is(h, fits, cols, eps, removes_mean, scratch, load_z);

        // Step 2: h, g and the sums over rows. Behind the end of the row g is 0, whatever h is.
        auto normalise = [&](int i, uint64_t col) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) h[i][j] = (h[i][j] - row_is.mean) * row_is.rstd;
            float w[WIDTH];
            load_or_zero<VECTOR>(weight, col, cols, w);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) g[i][j] *= w[j];
        };
        float thread_g = 0.f, thread_gh = 0.f;
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            if (!fits) {
                load_z(i, col);
                load_or_zero<VECTOR>(dn + start, col, cols, g[i]);
            }
            float d[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) d[j] = g[i][j];
            normalise(i, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                if (fits && is_mine) {
                    dweight_sum[i][j] += d[j] * h[i][j];
                    dnorm_bias_sum[i][j] += d[j];
                } else if (!fits && j < count_at(col, cols)) {
                    dweight[col + j] += d[j] * h[i][j];
                    dnorm_bias[col + j] += d[j];
                }
                thread_g += g[i][j];
                thread_gh += g[i][j] * h[i][j];
            }
        });

        // Step 3: the sums over columns.
        const float mean_g = removes_mean ? team_reduce(thread_g, scratch, Sum()) / float(cols) : 0.f;
        const float mean_gh = team_reduce(thread_gh, scratch, Sum()) / float(cols);
        if (!is_mine) continue;  // tail

        // Step 4: the gradient.
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            if (!fits) {
                load_z(i, col);
                load_or_zero<VECTOR>(dn + start, col, cols, g[i]);
                normalise(i, col);
            }
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) g[i][j] = (g[i][j] - mean_g - h[i][j] * mean_gh) * row_is.rstd;
            store<VECTOR>(dz + start + col, count_at(col, cols), g[i]);
        });
    }
    if (fits) {
        store_block_sums<false>(dweight_sum, partial, dweight, cols);
        store_block_sums<false>(dnorm_bias_sum, partial, dnorm_bias, cols);
    }
}

#define DROPOUT_ADD_NORM(SUFFIX, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) dropout_add_norm_fwd_##SUFFIX(                \
        const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,               \
        const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n,            \
        uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean, MaskArgs mask) {                   \
        if (cols % WIDTH == 0 && mask.col_0 % WIDTH == 0 && is_aligned(x) && is_aligned(residual) &&       \
            is_aligned(bias) && is_aligned(weight) && is_aligned(norm_bias) && is_aligned(z) &&            \
            is_aligned(n)) {                                                                               \
            dropout_add_norm_fwd<true>(x, residual, bias, weight, norm_bias, z, n, rows, cols, eps,        \
                                       removes_mean, mask);                                                \
        } else {                                                                                           \
            dropout_add_norm_fwd<false>(x, residual, bias, weight, norm_bias, z, n, rows, cols, eps,       \
                                        removes_mean, mask);                                               \
        }                                                                                                  \
    }                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) dropout_add_norm_bwd_##SUFFIX(                \
        const T* __restrict__ z, const T* __restrict__ weight, const T* __restrict__ dn,                   \
        T* __restrict__ dz, float* __restrict__ sums, uint64_t rows, uint64_t cols, float eps,             \
        uint32_t removes_mean) {                                                                           \
        __shared__ float scratch[MAX_WARPS];                                                               \
        __shared__ float partial[THREADS * TILE * WIDTH];                                                  \
        if (cols % WIDTH == 0 && is_aligned(z) && is_aligned(weight) && is_aligned(dn) &&                  \
            is_aligned(dz)) {                                                                              \
            dropout_add_norm_bwd<true>(z, weight, dn, dz, sums, rows, cols, eps, removes_mean, scratch,    \
                                       partial);                                                           \
        } else {                                                                                           \
            dropout_add_norm_bwd<false>(z, weight, dn, dz, sums, rows, cols, eps, removes_mean, scratch,   \
                                        partial);                                                          \
        }                                                                                                  \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_NORM)

// Block (LANES columns, TEAMS threads that share a column), grid (column blocks, 2): adds up the sums
// [2, blocks, cols] of the first kernel, row 0 of the grid those of dweight, row 1 those of dnorm_bias.
constexpr int LANES = 32;
constexpr int TEAMS = 8;

#define DROPOUT_ADD_NORM_TOTAL(SUFFIX, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(LANES* TEAMS) dropout_add_norm_bwd_total_##SUFFIX(        \
        const float* __restrict__ sums, T* __restrict__ dweight, T* __restrict__ dnorm_bias,               \
        uint64_t blocks, uint64_t cols) {                                                                  \
        __shared__ float partial[TEAMS][LANES];                                                            \
        const uint64_t col = uint64_t(blockIdx.x) * LANES + threadIdx.x;                                   \
        float sum = 0.f;                                                                                   \
        for (uint64_t block = threadIdx.y; col < cols && block < blocks; block += TEAMS) {                 \
            sum += sums[(blockIdx.y * blocks + block) * cols + col];                                       \
        }                                                                                                  \
        partial[threadIdx.y][threadIdx.x] = sum;                                                           \
        __syncthreads();                                                                                   \
        if (threadIdx.y != 0 || col >= cols) return; /* tail */                                            \
        for (int team = 1; team < TEAMS; ++team) sum += partial[team][threadIdx.x];                        \
        (blockIdx.y == 0 ? dweight : dnorm_bias)[col] = narrow<T>(sum);                                    \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_NORM_TOTAL)
