// norm: LayerNorm and RMSNorm of rows. Twin of src/functional/norm/cpu.rs.
//
//     forward   y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(variance + eps)
//     backward  h = (x - mean) * rstd, g = dy * weight
//               dx = rstd * (g - mean of g - h * mean of g h), the mean of g in two parts as that of x
//               dweight[c] = sum over rows of dy h, dbias[c] = sum over rows of dy
//
// x, y, dy, dx [rows, cols]; weight, bias, dweight, dbias [cols]; bias may be null. RMSNorm: removes_mean is 0,
// and neither the mean of x nor that of g is taken.
// Bytes moved an element: forward one read, one write; backward two reads, one write.
// A team takes a row; see norm.cuh. Column sums: a thread keeps those of its columns in registers (in memory, for
// long rows) over all rows of its team; the teams of a block add theirs up in shared memory, the blocks theirs in
// a second kernel. Each sum has a fixed order, so the result is the same at every run.
// Vectors of 16 bytes where rows begin at such boundaries, else element by element.
#include "norm.cuh"

template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void norm_fwd_rows(const T* __restrict__ x, const T* __restrict__ weight,
                                              const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,
                                              uint64_t cols, float eps, uint32_t removes_mean, float* scratch) {
    // Teams without a row of their own do the last row again, since reductions need all threads.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t start = (is_mine ? first + threadIdx.y : rows - 1) * cols;
        Row<VECTOR, RESIDENT, T> row(x + start, cols);
        if (RESIDENT) row.load_vectors();
        row.take_statistics(eps, removes_mean, scratch);
        if (is_mine) row.store_norm(weight, bias, y + start);
    }
}

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

// sums [2, gridDim.x, cols]: the column sums of each block, of dweight and of dbias.
template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void norm_bwd_rows(const T* __restrict__ x, const T* __restrict__ weight,
                                              const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ sums,
                                              uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean,
                                              float* scratch, float* partial) {
    constexpr int N = KEPT<RESIDENT>;
    float* dweight = sums + blockIdx.x * cols;
    float* dbias = sums + (uint64_t(gridDim.x) + blockIdx.x) * cols;
    float dweight_sum[N][WIDTH] = {}, dbias_sum[N][WIDTH] = {};
    if (!RESIDENT) {
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            store<false>(dweight + col, count_at(col, cols), dweight_sum[i]);
            store<false>(dbias + col, count_at(col, cols), dbias_sum[i]);
        });
    }
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t r = is_mine ? first + threadIdx.y : rows - 1;
        const uint64_t start = r * cols;

        // Step 1: the statistics, as forward took them.
        Row<VECTOR, RESIDENT, T> row(x + start, cols);
        Fetched<VECTOR, T> fetched[N];
        auto fetch = [&](int i, uint64_t col) {
            if (col < cols) fetched[i].fetch(dy + start + col, count_at(col, cols));  // tail
        };
        if (RESIDENT) {
            for_each_vector<N>(cols, [&](int i, uint64_t col) {
                row.load_vector_at(i, col);
                fetch(i, col);
            });
        }
        row.take_statistics(eps, removes_mean, scratch);

        // Step 2: h = (x - mean) * rstd in place of x; the sums over rows.
        Extent extent_of_g;
        auto load_dy_and_g = [&](int i, uint64_t col, float (&d)[WIDTH], float (&g)[WIDTH]) {
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
            load_dy_and_g(i, col, d, g);
            const int count = count_at(col, cols);
            if (!RESIDENT) {
                load<false>(dweight + col, count, dweight_sum[i]);
                load<false>(dbias + col, count, dbias_sum[i]);
            }
            float(&h)[WIDTH] = row.v[i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                h[j] = row.centered(i, j) * row.rstd;
                if (is_mine) {
                    dweight_sum[i][j] += d[j] * h[j];
                    dbias_sum[i][j] += d[j];
                }
                extent_of_g.add(g[j]);  // zeros behind the end widen the range at most
            }
            if (!RESIDENT) {
                store<false>(dweight + col, count, dweight_sum[i]);
                store<false>(dbias + col, count, dbias_sum[i]);
            }
        });

        // Step 3: the mean of g; the rest of it, and the mean of g h without it.
        const float mean_g = removes_mean ? extent_of_g.team_mean(cols, scratch) : 0.f;
        float sums_of_g[2] = {};
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            float d[WIDTH], g[WIDTH];
            load_dy_and_g(i, col, d, g);
            const int count = count_at(col, cols);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float h = RESIDENT ? row.v[i][j] : row.centered(i, j) * row.rstd;
                const float left = j < count ? g[j] - mean_g : 0.f;  // tail
                sums_of_g[0] += left;
                sums_of_g[1] += left * h;
            }
        });
        team_merge(sums_of_g, scratch, [](float(&a)[2], const float(&b)[2]) { a[0] += b[0], a[1] += b[1]; });
        const float rest_of_g = removes_mean ? sums_of_g[0] / float(cols) : 0.f;
        const float mean_gh = sums_of_g[1] / float(cols);
        if (!is_mine) continue;

        // Step 4: the gradient.
        for_each_vector<N>(cols, [&](int i, uint64_t col) {
            if (col >= cols) return;  // tail
            float d[WIDTH], g[WIDTH];
            load_dy_and_g(i, col, d, g);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float h = RESIDENT ? row.v[i][j] : row.centered(i, j) * row.rstd;
                g[j] = (g[j] - mean_g - rest_of_g - h * mean_gh) * row.rstd;
            }
            store<VECTOR>(dx + start + col, count_at(col, cols), g);
        });
    }
    if constexpr (RESIDENT) {
        store_block_sums(dweight_sum, partial, dweight, cols);
        store_block_sums(dbias_sum, partial, dbias, cols);
    }
}

// Block (LANES columns, TEAMS threads that share a column), grid (column blocks, 2): adds up the sums
// [2, blocks, cols] of the first kernel, row 0 of the grid those of dweight, row 1 those of dbias.
constexpr int LANES = 32;
constexpr int TEAMS = 8;

template <typename T>
__device__ __forceinline__ void norm_bwd_total(const float* __restrict__ sums, T* __restrict__ dweight,
                                               T* __restrict__ dbias, uint64_t blocks, uint64_t cols) {
    __shared__ float partial[TEAMS][LANES];
    const uint64_t col = uint64_t(blockIdx.x) * LANES + threadIdx.x;
    float sum = 0.f;
    for (uint64_t block = threadIdx.y; col < cols && block < blocks; block += TEAMS) {
        sum += sums[(blockIdx.y * blocks + block) * cols + col];
    }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || col >= cols) return;  // tail
    for (int team = 1; team < TEAMS; ++team) sum += partial[team][threadIdx.x];
    (blockIdx.y == 0 ? dweight : dbias)[col] = narrow<T>(sum);
}

// ---- Entry points -----------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void norm_fwd(const T* __restrict__ x, const T* __restrict__ weight,
                                         const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,
                                         uint64_t cols, float eps, uint32_t removes_mean) {
    __shared__ float scratch[SCRATCH];
    if (!rows_are_vectors(cols, x, weight, bias, y)) {
        norm_fwd_rows<false, false>(x, weight, bias, y, rows, cols, eps, removes_mean, scratch);
    } else if (!fits_in_registers(cols)) {
        norm_fwd_rows<true, false>(x, weight, bias, y, rows, cols, eps, removes_mean, scratch);
    } else {
        norm_fwd_rows<true, true>(x, weight, bias, y, rows, cols, eps, removes_mean, scratch);
    }
}

// The sums of rows that do not fit lie in memory, which only a team that is alone in its block may write:
// shorter rows are resident, aligned or not.
template <typename T>
__device__ __forceinline__ void norm_bwd(const T* __restrict__ x, const T* __restrict__ weight,
                                         const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ sums,
                                         uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean) {
    __shared__ float scratch[SCRATCH];
    __shared__ float partial[THREADS * TILE * WIDTH];
    auto take_rows = [&](auto vector, auto resident) {
        norm_bwd_rows<decltype(vector)::value, decltype(resident)::value>(
            x, weight, dy, dx, sums, rows, cols, eps, removes_mean, scratch, partial);
    };
    const bool is_vector = rows_are_vectors(cols, x, weight, dy, dx), is_resident = fits_in_registers(cols);
    if (is_vector && is_resident) {
        take_rows(Yes(), Yes());
    } else if (is_vector) {
        take_rows(Yes(), No());
    } else if (is_resident) {
        take_rows(No(), Yes());
    } else {
        take_rows(No(), No());
    }
}

#define NORM(SUFFIX, T)                                                                                       \
    KERNEL(THREADS, 2) norm_fwd_##SUFFIX(                                                                     \
        const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y, \
        uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean) {                                     \
        norm_fwd(x, weight, bias, y, rows, cols, eps, removes_mean);                                          \
    }                                                                                                         \
    KERNEL(THREADS, 1) norm_bwd_##SUFFIX(                                                                     \
        const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ dy, T* __restrict__ dx,  \
        float* __restrict__ sums, uint64_t rows, uint64_t cols, float eps, uint32_t removes_mean) {           \
        norm_bwd(x, weight, dy, dx, sums, rows, cols, eps, removes_mean);                                     \
    }                                                                                                         \
    KERNEL(LANES * TEAMS) norm_bwd_total_##SUFFIX(const float* __restrict__ sums, T* __restrict__ dweight,    \
                                                  T* __restrict__ dbias, uint64_t blocks, uint64_t cols) {    \
        norm_bwd_total(sums, dweight, dbias, blocks, cols);                                                   \
    }
FOR_EACH_DTYPE(NORM)
