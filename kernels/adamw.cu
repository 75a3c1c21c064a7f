// adamw: a step of AdamW over all variables of a dtype in one launch. Twin of src/training/adamw/cpu.rs.
//
//     norm      partials[chunk] = sum of grad * grad, in f64
//     total     norm = sqrt(sum of partials) / loss_scale; the loss scale and the count of steps go on
//     step      g = grad * factor                     factor = min(1, max_norm / norm) / loss_scale
//               m = beta1 * m + (1 - beta1) * g
//               v = beta2 * v + (1 - beta2) * g * g
//               w = kept * w - lr * (m * scale_m) / (sqrt(v * scale_v) + eps)
//                                                     kept = 1 - lr * weight_decay, scale = 1 / (1 - beta^t)
//
// w and g in the dtype, m and v in f32; where there are master weights these are w, in f32, and the variable is
// their rounded copy. g may be f32 where w is a half.
// Bytes moved an element: f32 28 (w, m, v read and written, g read); halves 22, with master weights 28 (the
// variable is only written). The norm reads g once.
// A table names the variables. A block takes a chunk of 16384 elements of one of them, found by binary search,
// then another chunk; a thread takes vectors of 8. Sums of a chunk do not depend on the grid, so the norm is the
// same on every GPU. Variables of which a pointer is not aligned to 16 bytes, a view of a gradient say, and the
// last elements of each go one by one.
// The norm stays on the device: the step reads it there, and does nothing where it is to be skipped. Products
// and sums round one by one, as on the CPU.
#include <cstddef>

#include "elem.cuh"

constexpr int THREADS = 256;
constexpr uint64_t CHUNK = 16384;

// As src/training/adamw/args.rs fills them in.
struct AdamWTensor {
    void* param;
    const void* grad;
    float* first_moment;
    float* second_moment;
    float* master;  // may be absent
    uint64_t len;
    uint64_t first_chunk;
    float lr;
    float kept;
};
static_assert(sizeof(AdamWTensor) == 64 && offsetof(AdamWTensor, grad) == 8 &&
                  offsetof(AdamWTensor, first_moment) == 16 && offsetof(AdamWTensor, second_moment) == 24 &&
                  offsetof(AdamWTensor, master) == 32 && offsetof(AdamWTensor, len) == 40 &&
                  offsetof(AdamWTensor, first_chunk) == 48 && offsetof(AdamWTensor, lr) == 56 &&
                  offsetof(AdamWTensor, kept) == 60,
              "as src/training/adamw/args.rs lays it out");

struct AdamWArgs {
    uint64_t tensors;
    uint64_t chunks;
    double beta1;
    double beta2;
    double eps;
    double scale_m;
    double scale_v;
    double factor;
};
static_assert(sizeof(AdamWArgs) == 64 && offsetof(AdamWArgs, beta1) == 16 && offsetof(AdamWArgs, eps) == 32 &&
                  offsetof(AdamWArgs, scale_m) == 40 && offsetof(AdamWArgs, factor) == 56,
              "as src/training/adamw/args.rs lays it out");

struct AdamWRule {
    double beta1;
    double beta2;
    double max_norm;         // infinite without clipping
    double growth_interval;  // 0 without a loss scale
};
static_assert(sizeof(AdamWRule) == 32 && offsetof(AdamWRule, max_norm) == 16, "as args.rs lays it out");

struct AdamWProgress {
    double norm;
    double loss_scale;
    double good_steps;
    double step;
    double factor;
    double scale_m;
    double scale_v;
    double skipped;
};
static_assert(sizeof(AdamWProgress) == 64 && offsetof(AdamWProgress, step) == 24 &&
                  offsetof(AdamWProgress, skipped) == 56,
              "as src/training/adamw/args.rs lays it out");

// A pointer out of a table leads to global memory, which the compiler cannot know.
template <typename T>
__device__ __forceinline__ T* global(T* pointer) {
#ifndef KERNELS_ON_CPU
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

// Calls body(tensor, chunk, start, end) for the chunks of this block: elements start to end of the tensor.
template <typename Body>
__device__ __forceinline__ void for_each_chunk(const AdamWTensor* __restrict__ tensors, const AdamWArgs& args,
                                               Body body) {
    for (uint64_t chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
        // The last one that begins no later; those without elements begin where the next one does.
        uint32_t found = 0, behind = uint32_t(args.tensors);
        while (behind - found > 1) {
            const uint32_t middle = found + (behind - found) / 2;
            if (tensors[middle].first_chunk <= chunk) {
                found = middle;
            } else {
                behind = middle;
            }
        }
        const AdamWTensor tensor = tensors[found];
        const uint64_t start = (chunk - tensor.first_chunk) * CHUNK;
        body(tensor, chunk, start, min(tensor.len, start + CHUNK));
    }
}

// Calls body(vector, at, count) for the vectors of this thread: 8 elements, or the count of them that exist,
// at.
template <typename Body>
__device__ __forceinline__ void for_each_vector_of(bool aligned, uint64_t start, uint64_t end, Body body) {
    for (uint64_t at = start + threadIdx.x * WIDTH; at < end; at += THREADS * WIDTH) {
        const int count = count_at(at, end);
        if (aligned && count == WIDTH) {
            body(Yes(), at, count);
        } else {
            body(No(), at, count);
        }
    }
}

// What the threads of a block have summed, in thread 0. Another call needs a barrier in between.
__device__ __forceinline__ double block_sum(double sum, double* sums) {
    const int thread = threadIdx.x;
    sums[thread] = sum;
    for (int distance = THREADS / 2; distance > 0; distance /= 2) {
        __syncthreads();
        if (thread < distance) sums[thread] += sums[thread + distance];
    }
    return sums[0];
}

template <typename G>
__device__ __forceinline__ void adamw_norm(const AdamWTensor* __restrict__ tensors, double* __restrict__ partials,
                                           const AdamWArgs& args) {
    __shared__ double sums[THREADS];
    for_each_chunk(tensors, args, [&](const AdamWTensor& tensor, uint64_t chunk, uint64_t start, uint64_t end) {
        const G* grad = global(static_cast<const G*>(tensor.grad));
        double sum = 0.;
        for_each_vector_of(is_aligned(grad), start, end, [&](auto vector, uint64_t at, int count) {
            float x[WIDTH];
            load<decltype(vector)::value>(grad + at, count, x);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum += double(x[j]) * double(x[j]);  // exact products
        });
        sum = block_sum(sum, sums);
        if (threadIdx.x == 0) partials[chunk] = sum;
        __syncthreads();
    });
}

// base^exponent by repeated squaring, as src/training/adamw/args.rs takes it.
__device__ __forceinline__ double power(double base, double exponent) {
    double result = 1.;
    for (uint64_t rest = uint64_t(exponent);;) {
        if (rest % 2 == 1) result = __dmul_rn(result, base);
        rest /= 2;
        if (rest == 0) return result;
        base = __dmul_rn(base, base);
    }
}

// How the step follows from the one before. Twin of AdamWProgress::advance in src/training/adamw/args.rs.
__device__ __forceinline__ void advance(AdamWProgress& progress, double sum_of_squares, const AdamWRule& rule) {
    constexpr double LEAST_SCALE = 1. / (1 << 24), MOST_SCALE = 1 << 24;
    const double unscaled = 1. / progress.loss_scale;
    progress.norm = sqrt(sum_of_squares) * unscaled;
    progress.skipped = 0.;
    if (rule.growth_interval > 0.) {
        const bool finite = sum_of_squares < INFINITY;  // and no NaN
        progress.good_steps = finite ? progress.good_steps + 1. : 0.;
        if (!finite) {
            progress.loss_scale = max(progress.loss_scale * 0.5, LEAST_SCALE);
            progress.skipped = 1.;
            return;
        }
        if (progress.good_steps >= rule.growth_interval) {
            progress.loss_scale = min(progress.loss_scale * 2., MOST_SCALE);
            progress.good_steps = 0.;
        }
    }
    progress.step += 1.;
    progress.scale_m = 1. / (1. - power(rule.beta1, progress.step));
    progress.scale_v = 1. / (1. - power(rule.beta2, progress.step));
    // A norm that is NaN clips nothing.
    progress.factor = unscaled * (progress.norm > rule.max_norm ? rule.max_norm / progress.norm : 1.);
}

// One block, whose threads add up always in the same order.
KERNEL(THREADS)
adamw_norm_total(const double* __restrict__ partials, AdamWProgress* __restrict__ progress, uint64_t chunks,
                 AdamWRule rule) {
    __shared__ double sums[THREADS];
    double sum = 0.;
    for (uint64_t chunk = threadIdx.x; chunk < chunks; chunk += THREADS) sum += partials[chunk];
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) advance(*progress, sum, rule);
}

// The numbers of a step, each rounded once.
struct Rule {
    float beta1, beta1_left, beta2, beta2_left, scale_m, scale_v, eps, factor, lr, kept;

    // The next weight; in the order of the CPU's operations.
    __device__ __forceinline__ float next(float weight, float grad, float& m, float& v) const {
        grad = __fmul_rn(grad, factor);
        m = __fadd_rn(__fmul_rn(m, beta1), __fmul_rn(grad, beta1_left));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(grad, grad), beta2_left));
        const float deviation = __fadd_rn(__fsqrt_rn(__fmul_rn(v, scale_v)), eps);
        const float step = __fdiv_rn(__fmul_rn(m, scale_m), deviation);
        return __fsub_rn(__fmul_rn(weight, kept), __fmul_rn(step, lr));
    }
};

template <bool VECTOR, typename P, typename G>
__device__ __forceinline__ void update(const AdamWTensor& tensor, const Rule& rule, uint64_t at, int count) {
    P* param = global(static_cast<P*>(tensor.param)) + at;
    const G* from_grad = global(static_cast<const G*>(tensor.grad)) + at;
    float* first_moment = global(tensor.first_moment) + at;
    float* second_moment = global(tensor.second_moment) + at;
    Fetched<VECTOR, G> fetched_grad;
    Fetched<VECTOR, float> fetched_m, fetched_v;
    fetched_grad.fetch(from_grad, count);
    fetched_m.fetch(first_moment, count);
    fetched_v.fetch(second_moment, count);
    float weight[WIDTH], grad[WIDTH], m[WIDTH], v[WIDTH];
    if (tensor.master) {
        load<VECTOR>(static_cast<const float*>(global(tensor.master)) + at, count, weight);
    } else {
        load<VECTOR>(static_cast<const P*>(param), count, weight);
    }
    fetched_grad.widen(grad);
    fetched_m.widen(m);
    fetched_v.widen(v);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) weight[j] = rule.next(weight[j], grad[j], m[j], v[j]);
    store<VECTOR>(first_moment, count, m);
    store<VECTOR>(second_moment, count, v);
    if (tensor.master) store<VECTOR>(global(tensor.master) + at, count, weight);
    store<VECTOR>(param, count, weight);
}

template <typename P, typename G>
__device__ __forceinline__ void adamw_step(const AdamWTensor* __restrict__ tensors,
                                           const AdamWProgress* __restrict__ progress, const AdamWArgs& args) {
    double scale_m = args.scale_m, scale_v = args.scale_v, factor = args.factor;
    if (progress) {
        if (progress->skipped != 0.) return;
        scale_m = progress->scale_m, scale_v = progress->scale_v, factor = progress->factor;
    }
    Rule rule;
    rule.beta1 = float(args.beta1), rule.beta1_left = float(1. - args.beta1);
    rule.beta2 = float(args.beta2), rule.beta2_left = float(1. - args.beta2);
    rule.scale_m = float(scale_m), rule.scale_v = float(scale_v);
    rule.eps = float(args.eps), rule.factor = float(factor);
    for_each_chunk(tensors, args, [&](const AdamWTensor& tensor, uint64_t, uint64_t start, uint64_t end) {
        rule.lr = tensor.lr, rule.kept = tensor.kept;
        const bool aligned = is_aligned(tensor.param) && is_aligned(tensor.grad) &&
                             is_aligned(tensor.first_moment) && is_aligned(tensor.second_moment) &&
                             is_aligned(tensor.master);
        for_each_vector_of(aligned, start, end, [&](auto vector, uint64_t at, int count) {
            update<decltype(vector)::value, P, G>(tensor, rule, at, count);
        });
    });
}

#define ADAMW_STEP(NAME, P, G)                                                                                      \
    KERNEL(THREADS) NAME(const AdamWTensor* __restrict__ tensors, const AdamWProgress* __restrict__ progress,       \
                         AdamWArgs args) {                                                                          \
        adamw_step<P, G>(tensors, progress, args);                                                                  \
    }
#define ADAMW(SUFFIX, T)                                                                                            \
    KERNEL(THREADS) adamw_norm_##SUFFIX(const AdamWTensor* __restrict__ tensors, double* __restrict__ partials,     \
                                        AdamWArgs args) {                                                           \
        adamw_norm<T>(tensors, partials, args);                                                                     \
    }                                                                                                               \
    ADAMW_STEP(adamw_step_##SUFFIX, T, T)
FOR_EACH_DTYPE(ADAMW)
// Halves whose gradients are f32, after accumulation say.
ADAMW_STEP(adamw_step_of_f32_f16, __half, float)
ADAMW_STEP(adamw_step_of_f32_bf16, __nv_bfloat16, float)
