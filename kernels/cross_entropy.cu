// cross_entropy: mean loss of logits and target classes. Twin of src/ops/cross_entropy/cpu.rs.
//
//     forward   lse = log of the sum of exp(logits)       over the classes of a row
//               row_loss = lse - logits[target] - uniform * sum of (logits - logits[target])
//               loss = sum of row_loss / count            over the rows that are not ignored
//     backward  dlogits = (exp(logits - lse) - uniform - (peak at the target)) * dloss / count
//
// logits, dlogits [rows, classes]; targets [rows] i64; lse, row_loss [rows] f32; loss, inverse_count,
// dloss one f32. A target that is no class makes its row_loss and lse, so its gradients, NaN.
// Bytes moved an element: forward one read, backward one read and one write.
// A team of blockDim.x threads (a power of two, 4 to 256) takes a row; threadIdx.y counts the teams of
// a block, the grid strides over the rows. Each thread keeps a running maximum and rescales its sum when
// that grows, so a row of any length is read once.
// Vocabularies are seldom a multiple of 8 (GPT-2's has 50257 tokens), so each row has a middle of whole
// vectors at 16-byte boundaries, and a few elements before and behind that go one by one.
#include <cstddef>

#include "elem.cuh"
#include "reduce.cuh"

// Sizes and settings, as src/ops/cross_entropy/args.rs fills them in.
struct CrossEntropyArgs {
    uint64_t rows;
    uint64_t classes;
    double uniform;  // label_smoothing / classes; rounded to f32 once
    double peak;     // 1 - label_smoothing
    int64_t ignore_index;
    uint32_t ignores;  // 1 if there is an ignore_index
    uint32_t padding;

    __device__ __forceinline__ bool ignored(int64_t target) const {
        return ignores && target == ignore_index;
    }
    __device__ __forceinline__ bool is_class(int64_t target) const {
        return target >= 0 && uint64_t(target) < classes;
    }
};
static_assert(sizeof(CrossEntropyArgs) == 48 && offsetof(CrossEntropyArgs, uniform) == 16 &&
                  offsetof(CrossEntropyArgs, peak) == 24 && offsetof(CrossEntropyArgs, ignore_index) == 32 &&
                  offsetof(CrossEntropyArgs, ignores) == 40,
              "as src/ops/cross_entropy/args.rs lays it out");

// The parts of a row of `cols` elements: head, then `middle` elements in whole aligned vectors, then the
// rest. Without vectors everything is head.
struct Parts {
    uint64_t cols, head, middle;

    template <typename T>
    __device__ __forceinline__ Parts(const T* row, uint64_t cols, bool vectors) : cols(cols), head(cols), middle(0) {
        if (!vectors) return;
        head = min(uint64_t(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)), cols);
        middle = (cols - head) / WIDTH * WIDTH;
    }

    // body(col) for the elements of this thread that lie in no vector.
    template <typename Body>
    __device__ __forceinline__ void for_each_single(Body body) const {
        for (uint64_t i = threadIdx.x; i < cols - middle; i += blockDim.x) body(i < head ? i : i + middle);
    }
};

// A thread's part of the sums of a row.
template <typename T>
struct Sums {
    float max = -INFINITY;
    float exponentials = 0.f;  // of logit - max
    float above_target = 0.f;  // of logit - of_target
    float of_target;

    __device__ __forceinline__ explicit Sums(float of_target) : of_target(of_target) {}

    // What the exponentials are taken of: with every logit at -inf so far, 0 stands in for the maximum.
    __device__ __forceinline__ float shift() const { return max == -INFINITY ? 0.f : max; }

    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        float grown = max;
#pragma unroll
        for (int j = 0; j < N; ++j) grown = fmaxf(grown, x[j]);
        if (grown > max) {
            exponentials *= exponential<T>(max - grown);  // by 0 at the first maximum
            max = grown;
        }
        const float from = shift();
#pragma unroll
        for (int j = 0; j < N; ++j) {
            exponentials += exponential<T>(x[j] - from);
            above_target += x[j] - of_target;
        }
    }
};

template <typename T>
__device__ __forceinline__ void cross_entropy_fwd(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                                                  float* __restrict__ lse, float* __restrict__ row_loss,
                                                  const CrossEntropyArgs& args) {
    __shared__ float scratch[MAX_WARPS];
    // Teams without a row of their own do the last row again, since reductions need all threads.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < args.rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < args.rows;
        const uint64_t r = is_mine ? first + threadIdx.y : args.rows - 1;
        const T* row = logits + r * args.classes;
        const int64_t target = targets[r];
        const bool ignored = args.ignored(target);
        const bool is_class = args.is_class(target);
        const float of_target = is_class && !ignored ? widen(row[target]) : NAN;

        // Step 1: the sums of each thread. A row that is ignored is not read.
        const Parts parts(row, ignored ? 0 : args.classes, true);
        Sums<T> sums(of_target);
        parts.for_each_single([&](uint64_t col) { sums.add({widen(row[col])}); });
        Fetched<true, T> fetched[TILE];
        for_each_vector<TILE>(
            parts.middle,
            [&](int i, uint64_t col) {
                if (col < parts.middle) fetched[i].fetch(row + parts.head + col, WIDTH);  // tail
            },
            [&](int i, uint64_t col) {
                if (col >= parts.middle) return;  // tail
                float x[WIDTH];
                fetched[i].widen(x);
                sums.add(x);
            });

        // Step 2: those of the team.
        const float thread_max = sums.max;
        sums.max = team_reduce(sums.max, scratch, Max());
        sums.exponentials *= exponential<T>(thread_max - sums.shift());  // by 0 if a thread saw nothing
        const float exponentials = team_reduce(sums.exponentials, scratch, Sum());
        const float above_target = team_reduce(sums.above_target, scratch, Sum());
        if (!is_mine || threadIdx.x != 0) continue;

        // Step 3: the loss of the row, from differences of logits, so that what they have in common loses
        // no digits. A target at -inf has an infinite loss as it is.
        float log_sum = 0.f, loss = 0.f;
        if (!ignored) {
            log_sum = is_class ? logf(exponentials) : NAN;
            loss = log_sum + (sums.max - of_target);
            if (args.uniform != 0. && of_target != -INFINITY) loss -= float(args.uniform) * above_target;
        }
        lse[r] = ignored ? 0.f : sums.max + log_sum;
        row_loss[r] = loss;
    }
}

// The mean: one block, whose threads add up in f64 and always in the same order.
constexpr int TOTAL_THREADS = 256;

KERNEL(TOTAL_THREADS)
cross_entropy_fwd_total(const float* __restrict__ row_loss, const int64_t* __restrict__ targets,
                        float* __restrict__ loss, float* __restrict__ inverse_count, CrossEntropyArgs args) {
    __shared__ double totals[TOTAL_THREADS];
    __shared__ double counts[TOTAL_THREADS];
    const int thread = threadIdx.x;
    double total = 0., count = 0.;
    for (uint64_t r = thread; r < args.rows; r += TOTAL_THREADS) {
        total += double(row_loss[r]);
        count += args.ignored(targets[r]) ? 0. : 1.;
    }
    totals[thread] = total;
    counts[thread] = count;
    for (int distance = TOTAL_THREADS / 2; distance > 0; distance /= 2) {
        __syncthreads();
        if (thread < distance) {
            totals[thread] += totals[thread + distance];
            counts[thread] += counts[thread + distance];
        }
    }
    if (thread != 0) return;
    const double inverse = counts[0] == 0. ? 0. : 1. / counts[0];
    *loss = float(totals[0] * inverse);
    *inverse_count = float(inverse);
}

template <typename T>
__device__ __forceinline__ void cross_entropy_bwd(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                                                  const float* __restrict__ lse,
                                                  const float* __restrict__ inverse_count,
                                                  const float* __restrict__ dloss, T* __restrict__ dlogits,
                                                  const CrossEntropyArgs& args) {
    const float scale = *dloss * *inverse_count;
    const float uniform = float(args.uniform), peak = float(args.peak);
    const bool vectors = (reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(dlogits)) % 16 == 0;
    for (uint64_t r = uint64_t(blockIdx.x) * blockDim.y + threadIdx.y; r < args.rows;
         r += uint64_t(gridDim.x) * blockDim.y) {
        const T* row = logits + r * args.classes;
        T* drow = dlogits + r * args.classes;
        const int64_t target = targets[r];
        const bool ignored = args.ignored(target);
        const float row_lse = lse[r];
        auto gradient = [&](float logit, bool is_target) {
            const float p = exponential<T>(logit - row_lse) - uniform;
            return ignored ? 0.f : (is_target ? p - peak : p) * scale;
        };

        const Parts parts(row, args.classes, vectors);
        parts.for_each_single([&](uint64_t col) {
            drow[col] = narrow<T>(gradient(widen(row[col]), int64_t(col) == target));
        });
        Fetched<true, T> fetched[TILE];
        for_each_vector<TILE>(
            parts.middle,
            [&](int i, uint64_t col) {
                if (col < parts.middle) fetched[i].fetch(row + parts.head + col, WIDTH);  // tail
            },
            [&](int i, uint64_t col) {
                if (col >= parts.middle) return;  // tail
                float x[WIDTH];
                fetched[i].widen(x);
                const int64_t at = target - int64_t(parts.head + col);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) x[j] = gradient(x[j], at == j);
                store_vector(drow + parts.head + col, x);
            });
    }
}

#define CROSS_ENTROPY(SUFFIX, T)                                                                               \
    KERNEL(256) cross_entropy_fwd_##SUFFIX(const T* __restrict__ logits, const int64_t* __restrict__ targets,  \
                                           float* __restrict__ lse, float* __restrict__ row_loss,              \
                                           CrossEntropyArgs args) {                                            \
        cross_entropy_fwd(logits, targets, lse, row_loss, args);                                               \
    }                                                                                                          \
    KERNEL(256) cross_entropy_bwd_##SUFFIX(const T* __restrict__ logits, const int64_t* __restrict__ targets,  \
                                           const float* __restrict__ lse,                                      \
                                           const float* __restrict__ inverse_count,                            \
                                           const float* __restrict__ dloss, T* __restrict__ dlogits,           \
                                           CrossEntropyArgs args) {                                            \
        cross_entropy_bwd(logits, targets, lse, inverse_count, dloss, dlogits, args);                          \
    }
FOR_EACH_DTYPE(CROSS_ENTROPY)
