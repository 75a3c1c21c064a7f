// cross_entropy: loss of logits and target classes. Twin of src/functional/cross_entropy/cpu.rs.
//
//     forward   max, sum = sum of exp(logits - max)       over the classes of a row; lse = max + log(sum)
//               row_loss = log(sum) + peak * (max - logits[target]) + uniform * sum of (max - logits) + z_loss * lse^2
//               loss = row_weight * sum of row_loss       over the rows that are not ignored
//               row_weight = 1 / count for their mean, 1 for their sum
//     backward  p = exp(logits - max) * (1 + 2 z_loss lse) / sum
//               dlogits = (p - uniform - (peak at the target)) * dloss * row_weight
//
// logits, dlogits [rows, classes]; targets [rows] i64; statistics [rows, 2] f32, max and sum; row_loss [rows]
// f32; loss, row_weight, dloss one f32. A target that is no class makes its row_loss and sum, so its gradients, NaN.
// Max and sum stay apart, and losses are sums of terms of one sign: what logits have in common loses no digits.
// Bytes moved an element: forward one read, backward one read and one write.
// A team of blockDim.x threads (a power of two, 4 to 256) takes a row; threadIdx.y counts the teams of
// a block, the grid strides over the rows. Each thread keeps a running maximum and rescales its sum when
// that grows, so a row of any length is read once.
// Vocabularies are seldom a multiple of 8 (GPT-2's has 50257 tokens), so each row has a middle of whole
// vectors at 16-byte boundaries, and a few elements before and behind that go one by one.
#include <cstddef>

#include "elem.cuh"
#include "reduce.cuh"

// Sizes and settings, as src/functional/cross_entropy/args.rs fills them in.
struct CrossEntropyArgs {
    uint64_t rows;
    uint64_t classes;
    double uniform;  // label_smoothing / classes; rounded to f32 once
    double peak;     // 1 - label_smoothing
    double z_loss;
    int64_t ignore_index;
    uint32_t ignores;   // 1 if there is an ignore_index
    uint32_t averages;  // 1 for the mean of the rows that count, 0 for their sum

    __device__ __forceinline__ bool ignored(int64_t target) const {
        return ignores && target == ignore_index;
    }
    __device__ __forceinline__ bool is_class(int64_t target) const {
        return target >= 0 && uint64_t(target) < classes;
    }
};
static_assert(sizeof(CrossEntropyArgs) == 56 && offsetof(CrossEntropyArgs, uniform) == 16 &&
                  offsetof(CrossEntropyArgs, peak) == 24 && offsetof(CrossEntropyArgs, z_loss) == 32 &&
                  offsetof(CrossEntropyArgs, ignore_index) == 40 && offsetof(CrossEntropyArgs, ignores) == 48 &&
                  offsetof(CrossEntropyArgs, averages) == 52,
              "as src/functional/cross_entropy/args.rs lays it out");

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
    float below_max = 0.f;     // of max - logit
    float count = 0.f;

    // What the exponentials are taken of: with every logit at -inf so far, 0 stands in for the maximum.
    __device__ __forceinline__ float shift() const { return max == -INFINITY ? 0.f : max; }

    template <int N>
    __device__ __forceinline__ void add(const float (&x)[N]) {
        float grown = max;
#pragma unroll
        for (int j = 0; j < N; ++j) grown = fmaxf(grown, x[j]);
        raise(grown);
        const float from = shift();
#pragma unroll
        for (int j = 0; j < N; ++j) {
            exponentials += exponential<T>(x[j] - from);
            below_max += from - x[j];
        }
        count += N;
    }

    // To a maximum that is no smaller.
    __device__ __forceinline__ void raise(float grown) {
        if (!(grown > max)) return;
        exponentials *= exponential<T>(max - grown);  // by 0 at the first maximum
        if (count > 0.f) below_max += count * (grown - max);
        max = grown;
    }
};

template <typename T>
__device__ __forceinline__ void cross_entropy_fwd(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                                                  float* __restrict__ statistics, float* __restrict__ row_loss,
                                                  const CrossEntropyArgs& args) {
    __shared__ float scratch[2 * MAX_WARPS];
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
        Sums<T> sums;
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
        sums.raise(team_reduce(sums.max, scratch, Max()));
        float of_team[2] = {sums.exponentials, sums.below_max};
        team_merge(of_team, scratch, [](float(&a)[2], const float(&b)[2]) { a[0] += b[0], a[1] += b[1]; });
        if (!is_mine || threadIdx.x != 0) continue;

        // Step 3: the loss of the row.
        const float sum = is_class ? of_team[0] : NAN;
        const float log_sum = logf(sum);
        float loss = log_sum;
        // By selection: a difference from a logit at -inf, which counts nothing, would be NaN.
        if (args.peak != 0.) loss += float(args.peak) * (sums.max - of_target);
        if (args.uniform != 0.) loss += float(args.uniform) * of_team[1];
        if (args.z_loss != 0.) loss += float(args.z_loss) * (sums.max + log_sum) * (sums.max + log_sum);
        statistics[2 * r] = ignored ? 0.f : sums.max;
        statistics[2 * r + 1] = ignored ? 1.f : sum;
        row_loss[r] = ignored ? 0.f : loss;
    }
}

// Mean or sum: one block, whose threads add up in f64 and always in the same order.
constexpr int TOTAL_THREADS = 256;

KERNEL(TOTAL_THREADS)
cross_entropy_fwd_total(const float* __restrict__ row_loss, const int64_t* __restrict__ targets,
                        float* __restrict__ loss, float* __restrict__ row_weight, CrossEntropyArgs args) {
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
    const double weight = args.averages ? 1. / fmax(counts[0], 1.) : 1.;
    *loss = float(totals[0] * weight);
    *row_weight = float(weight);
}

template <typename T>
__device__ __forceinline__ void cross_entropy_bwd(const T* __restrict__ logits, const int64_t* __restrict__ targets,
                                                  const float* __restrict__ statistics,
                                                  const float* __restrict__ row_weight,
                                                  const float* __restrict__ dloss, T* __restrict__ dlogits,
                                                  const CrossEntropyArgs& args) {
    const float scale = *dloss * *row_weight;
    const float uniform = float(args.uniform), peak = float(args.peak);
    const bool vectors = (reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(dlogits)) % 16 == 0;
    for (uint64_t r = uint64_t(blockIdx.x) * blockDim.y + threadIdx.y; r < args.rows;
         r += uint64_t(gridDim.x) * blockDim.y) {
        const T* row = logits + r * args.classes;
        T* drow = dlogits + r * args.classes;
        const int64_t target = targets[r];
        const bool ignored = args.ignored(target);
        const float max = statistics[2 * r], sum = statistics[2 * r + 1];
        // Of the probabilities, with what the z-loss adds to their gradient.
        const float normaliser = (1.f + 2.f * float(args.z_loss) * (max + logf(sum))) / sum;
        auto gradient = [&](float logit, bool is_target) {
            const float p = exponential<T>(logit - max) * normaliser - uniform;
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
                                           float* __restrict__ statistics, float* __restrict__ row_loss,       \
                                           CrossEntropyArgs args) {                                            \
        cross_entropy_fwd(logits, targets, statistics, row_loss, args);                                        \
    }                                                                                                          \
    KERNEL(256) cross_entropy_bwd_##SUFFIX(const T* __restrict__ logits, const int64_t* __restrict__ targets,  \
                                           const float* __restrict__ statistics,                               \
                                           const float* __restrict__ row_weight,                               \
                                           const float* __restrict__ dloss, T* __restrict__ dlogits,           \
                                           CrossEntropyArgs args) {                                            \
        cross_entropy_bwd(logits, targets, statistics, row_weight, dloss, dlogits, args);                      \
    }
FOR_EACH_DTYPE(CROSS_ENTROPY)
