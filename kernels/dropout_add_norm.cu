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

// The vectors of a row that a thread keeps, with zeros behind its end, and the statistics of the row.
template <bool VECTOR, bool RESIDENT, typename T>
struct Row {
    static constexpr int N = KEPT<RESIDENT>;
    const T* row;
    uint64_t cols;
    float mean;
    float rstd;
    float v[N][WIDTH];

    __device__ __forceinline__ Row(const T* row, uint64_t cols) : row(row), cols(cols) {}

    __device__ __forceinline__ void load_vector_at(int i, uint64_t col) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) v[i][j] = 0.f;
        if (col < cols) load<VECTOR>(row + col, count_at(col, cols), v[i]);  // tail
    }

    // From v if it holds the row, else from memory. All threads of the block call it.
    __device__ __forceinline__ void take_statistics(float eps, uint32_t removes_mean, float* scratch) {
        mean = 0.f;
        if (removes_mean) {
            float thread_sum = 0.f;
            for_each_vector<N>(cols, [&](int i, uint64_t col) {
                if (!RESIDENT) load_vector_at(i, col);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) thread_sum += v[i][j];
            });
            mean = team_reduce(thread_sum, scratch, Sum()) / float(cols);
        }
        float thread_squares = 0.f;
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (!RESIDENT) load_vector_at(i, col);
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

template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void dropout_add_norm_fwd(
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
        Row<VECTOR, RESIDENT, T> row((z ? z : x) + start, cols);

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
            if (!z) return;
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
        if (!is_mine) continue;
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            if (!RESIDENT) row.load_vector_at(i, col);
            const int count = count_at(col, cols);
            float w[WIDTH], b[WIDTH] = {};
            load<VECTOR>(weight + col, count, w);
            if (norm_bias) load<VECTOR>(norm_bias + col, count, b);
            float(&v)[WIDTH] = row.v[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] = (v[j] - row.mean) * row.rstd * w[j] + b[j];
            store<VECTOR>(n + start + col, count, v);
        });
    }
}

constexpr int THREADS = 256;

// The sums that the threads of a block have of their columns, as one row of `total`. The block has taken its
// rows in teams of blockDim.x lanes; `partial` is free for use again on return.
__device__ __forceinline__ void store_block_sums(const float (&sum)[TILE][WIDTH], float* partial,
                                                 float* __restrict__ total, uint64_t cols) {
    if (blockDim.y == 1) {
        for_each_vector<TILE>(cols, [&](int i, uint64_t col) {
            store<false>(total + col, count_at(col, cols), sum[i]);  // tail
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
template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void dropout_add_norm_bwd(const T* __restrict__ z, const T* __restrict__ weight,
                                                     const T* __restrict__ dn, T* __restrict__ dz,
                                                     float* __restrict__ sums, uint64_t rows, uint64_t cols,
                                                     float eps, uint32_t removes_mean, float* scratch,
                                                     float* partial) {
    constexpr int N = KEPT<RESIDENT>;
    float* dweight = sums + blockIdx.x * cols;
    float* dnorm_bias = sums + (uint64_t(gridDim.x) + blockIdx.x) * cols;
    float dweight_sum[N][WIDTH] = {}, dnorm_bias_sum[N][WIDTH] = {};
    if (!RESIDENT) {
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            store<false>(dweight + col, count_at(col, cols), dweight_sum[i]);
            store<false>(dnorm_bias + col, count_at(col, cols), dnorm_bias_sum[i]);
        });
    }
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t r = is_mine ? first + threadIdx.y : rows - 1;
        const uint64_t start = r * cols;

        // Step 1: the statistics, as forward took them.
        Row<VECTOR, RESIDENT, T> row(z + start, cols);
        Fetched<VECTOR, T> fetched[N];
        auto fetch = [&](int i, uint64_t col) {
            if (col < cols) fetched[i].fetch(dn + start + col, count_at(col, cols));  // tail
        };
        if (RESIDENT) {
            for_each_vector<N>(cols, [&](int i, uint64_t col) {
                row.load_vector_at(i, col);
                fetch(i, col);
            });
        }
        row.take_statistics(eps, removes_mean, scratch);

        // Step 2: h = (z - mean) * rstd in place of z; the sums over rows.
        float thread_g = 0.f, thread_gh = 0.f;
        auto load_d_and_g = [&](int i, uint64_t col, float (&d)[WIDTH], float (&g)[WIDTH]) {
            const int count = count_at(col, cols);
            if (!RESIDENT) {
                row.load_vector_at(i, col);
                fetch(i, col);
            }
            fetched[i].widen(d);
            load<VECTOR>(weight + col, count, g);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) g[j] *= d[j];
        };
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            float d[WIDTH], g[WIDTH];
            load_d_and_g(i, col, d, g);
            const int count = count_at(col, cols);
            if (!RESIDENT) {
                load<false>(dweight + col, count, dweight_sum[i]);
                load<false>(dnorm_bias + col, count, dnorm_bias_sum[i]);
            }
            float(&h)[WIDTH] = row.v[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                h[j] = (h[j] - row.mean) * row.rstd;
                if (is_mine) {
                    dweight_sum[i][j] += d[j] * h[j];
                    dnorm_bias_sum[i][j] += d[j];
                }
                thread_g += g[j];
                thread_gh += g[j] * h[j];
            }
            if (!RESIDENT) {
                store<false>(dweight + col, count, dweight_sum[i]);
                store<false>(dnorm_bias + col, count, dnorm_bias_sum[i]);
            }
        });

        // Step 3: the sums over columns.
        const float mean_g = removes_mean ? team_reduce(thread_g, scratch, Sum()) / float(cols) : 0.f;
        const float mean_gh = team_reduce(thread_gh, scratch, Sum()) / float(cols);
        if (!is_mine) continue;

        // Step 4: the gradient.
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            float d[WIDTH], g[WIDTH];
            load_d_and_g(i, col, d, g);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float h = RESIDENT ? row.v[i][j] : (row.v[i][j] - row.mean) * row.rstd;
                g[j] = (g[j] - mean_g - h * mean_gh) * row.rstd;
            }
            store<VECTOR>(dz + start + col, count_at(col, cols), g);
        });
    }
    if constexpr (RESIDENT) {
        store_block_sums(dweight_sum, partial, dweight, cols);
        store_block_sums(dnorm_bias_sum, partial, dnorm_bias, cols);
    }
}

__device__ __forceinline__ bool fits_in_registers(uint64_t cols) {
    return cols <= uint64_t(blockDim.x) * TILE * WIDTH;
}

// What the rows of f32 occupy leaves room for one block.
template <typename T>
constexpr int MIN_BLOCKS = sizeof(T) == 2 ? 2 : 1;

#define DROPOUT_ADD_NORM_FWD(SUFFIX, T)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS<T>)                         \
    dropout_add_norm_fwd_##SUFFIX(                                                                    \
        const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ bias,          \
        const T* __restrict__ weight, const T* __restrict__ norm_bias, T* z, T* __restrict__ n,       \
        uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean, MaskArgs mask) {              \
        __shared__ float scratch[MAX_WARPS];                                                          \
        if (cols % WIDTH != 0 || mask.col_0 % WIDTH != 0 || !is_aligned(x) ||                         \
            !is_aligned(residual) || !is_aligned(bias) || !is_aligned(weight) ||                      \
            !is_aligned(norm_bias) || !is_aligned(z) || !is_aligned(n)) {                             \
            dropout_add_norm_fwd<false, false>(x, residual, bias, weight, norm_bias, z, n, rows,      \
                                               cols, eps, removes_mean, mask, scratch);               \
        } else if (!fits_in_registers(cols)) {                                                        \
            dropout_add_norm_fwd<true, false>(x, residual, bias, weight, norm_bias, z, n, rows, cols, \
                                              eps, removes_mean, mask, scratch);                      \
        } else {                                                                                      \
            dropout_add_norm_fwd<true, true>(x, residual, bias, weight, norm_bias, z, n, rows, cols,  \
                                             eps, removes_mean, mask, scratch);                       \
        }                                                                                             \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_NORM_FWD)

// The sums of rows that do not fit lie in memory, which only a team that is alone in its block may write:
// shorter rows are resident, aligned or not.
#define DROPOUT_ADD_NORM_BWD(SUFFIX, T)                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) dropout_add_norm_bwd_##SUFFIX(           \
        const T* __restrict__ z, const T* __restrict__ weight, const T* __restrict__ dn,              \
        T* __restrict__ dz, float* __restrict__ sums, uint64_t rows, uint64_t cols, float eps,        \
        uint32_t removes_mean) {                                                                      \
        __shared__ float scratch[MAX_WARPS];                                                          \
        __shared__ float partial[THREADS * TILE * WIDTH];                                             \
        const bool is_vector = cols % WIDTH == 0 && is_aligned(z) && is_aligned(weight) &&            \
                               is_aligned(dn) && is_aligned(dz);                                      \
        const bool is_resident = fits_in_registers(cols);                                             \
        if (is_vector && is_resident) {                                                               \
            dropout_add_norm_bwd<true, true>(z, weight, dn, dz, sums, rows, cols, eps, removes_mean,  \
                                             scratch, partial);                                       \
        } else if (is_vector) {                                                                       \
            dropout_add_norm_bwd<true, false>(z, weight, dn, dz, sums, rows, cols, eps, removes_mean, \
                                              scratch, partial);                                      \
        } else if (is_resident) {                                                                     \
            dropout_add_norm_bwd<false, true>(z, weight, dn, dz, sums, rows, cols, eps, removes_mean, \
                                              scratch, partial);                                      \
        } else {                                                                                      \
            dropout_add_norm_bwd<false, false>(z, weight, dn, dz, sums, rows, cols, eps,              \
                                               removes_mean, scratch, partial);                       \
        }                                                                                             \
    }
FOR_EACH_DTYPE(DROPOUT_ADD_NORM_BWD)

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
