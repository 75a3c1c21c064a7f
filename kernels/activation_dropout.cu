// activation_dropout: the dropout of an activation of a biased input. Twin of
// src/functional/activation_dropout/cpu.rs.
//
//     u = x + bias                             or, gated, (u, v) = the halves of x + bias, or x and up
//     forward   y = keep ? act(u) * scale : 0             or keep ? act(u) * v * scale : 0
//     backward  da = keep ? dy * scale : 0
//               dx = da * act'(u)                         or the halves da * act'(u) * v, da * act(u),
//                                                         or the first in dx, the second in dup
//
// y, dy [rows, cols]; dx [rows, cols] or, gated, [rows, 2 cols]; bias [cols or 2 cols], may be null. up is null but
// for gated forms of two tensors; then x, up, dx and dup are [rows, cols] each, without a bias. Rows of x and up
// begin x_stride elements apart, those of the others follow one another.
// Bytes moved an element of y: forward one or two reads, one write; backward two or three reads, one or two
// writes. Block: (lanes of a team, teams), grid-stride over tiles of a row; see for_each_tile.
// Vectors of 16 bytes where rows begin at such boundaries and the mask at a multiple of 8 columns, else
// element by element.
#include "elem.cuh"
#include "philox.cuh"

// As in src/functional/activation_dropout/mod.rs.
enum Activation : uint32_t {
    GELU_TANH, GELU_ERF, SILU, RELU, SWI_GLU, GE_GLU, QUICK_GELU, RELU2,
    TANH, SIGMOID, GE_GLU_ERF, RE_GLU, QUICK_GE_GLU, RELU2_GLU, TANH_GLU, GLU
};

// s = 1 / (1 + e^-x) and its derivative s (1 - s), without the cancellation of 1 - s.
struct Sigmoid {
    float value, slope;

    __device__ __forceinline__ explicit Sigmoid(float x) {
        const float e = expf(-fabsf(x)), of_abs = 1.f / (1.f + e);
        value = x >= 0.f ? of_abs : e * of_abs;
        slope = e * of_abs * of_abs;
    }
};

// 0.5 u (1 + tanh(w)) = u sigmoid(2 w) with w = sqrt(2 / pi) (u + 0.044715 u^3).
struct GeluTanh {
    static constexpr float LINEAR = 1.5957691216f, CUBIC = 0.0713548163f;
    __device__ __forceinline__ static float value(float u) {
        return u * Sigmoid(u * (LINEAR + CUBIC * (u * u))).value;
    }
    __device__ __forceinline__ static float slope(float u) {
        const Sigmoid s(u * (LINEAR + CUBIC * (u * u)));
        // Where the sigmoid is flat, the square may be infinite.
        const float square = s.slope != 0.f ? u * u : 0.f;
        return s.value + u * s.slope * (LINEAR + 3.f * CUBIC * square);
    }
};

struct GeluErf {
    __device__ __forceinline__ static float cdf(float u) { return 0.5f * erfcf(-0.70710678f * u); }
    __device__ __forceinline__ static float value(float u) { return u * cdf(u); }
    __device__ __forceinline__ static float slope(float u) {
        return cdf(u) + u * expf(-0.5f * (u * u)) * 0.3989422804f;
    }
};

struct Silu {
    __device__ __forceinline__ static float value(float u) { return u * Sigmoid(u).value; }
    __device__ __forceinline__ static float slope(float u) {
        const Sigmoid s(u);
        return s.value + u * s.slope;
    }
};

// A NaN stays one.
struct Relu {
    __device__ __forceinline__ static float value(float u) { return u < 0.f ? 0.f : u; }
    __device__ __forceinline__ static float slope(float u) { return u > 0.f ? 1.f : 0.f; }
};

struct QuickGelu {
    __device__ __forceinline__ static float value(float u) { return u * Sigmoid(1.702f * u).value; }
    __device__ __forceinline__ static float slope(float u) {
        const Sigmoid s(1.702f * u);
        return s.value + u * (1.702f * s.slope);
    }
};

struct Relu2 {
    __device__ __forceinline__ static float value(float u) { return Relu::value(u) * Relu::value(u); }
    __device__ __forceinline__ static float slope(float u) { return 2.f * Relu::value(u); }
};

// The slope without the cancellation of 1 - tanh^2.
struct Tanh {
    __device__ __forceinline__ static float value(float u) { return tanhf(u); }
    __device__ __forceinline__ static float slope(float u) { return 4.f * Sigmoid(2.f * u).slope; }
};

struct Logistic {
    __device__ __forceinline__ static float value(float u) { return Sigmoid(u).value; }
    __device__ __forceinline__ static float slope(float u) { return Sigmoid(u).slope; }
};

template <bool VECTOR, typename T>
__device__ __forceinline__ void add_bias(const T* bias, int count, float (&u)[WIDTH]) {
    float b[WIDTH];
    load<VECTOR>(bias, count, b);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) u[j] += b[j];
}

template <bool VECTOR, bool GATED, typename Function, typename T>
__device__ __forceinline__ void fwd_tiles(const T* __restrict__ x, const T* __restrict__ up,
                                          const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,
                                          uint64_t cols, uint64_t x_stride, const MaskArgs& mask) {
    constexpr int N = GATED ? 1 : TILE_OF<VECTOR>;
    if (GATED && !up) up = x + cols;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t x_start = row * x_stride;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N], gated[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            fetched[i].fetch(x + x_start + col, count_at(col, cols));
            if (GATED) gated[i].fetch(up + x_start + col, count_at(col, cols));
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const int count = count_at(col, cols);
            float u[WIDTH], v[WIDTH];
            fetched[i].widen(u);
            if (bias) add_bias<VECTOR>(bias + col, count, u);
            if (GATED) {
                gated[i].widen(v);
                if (bias) add_bias<VECTOR>(bias + cols + col, count, v);
            }
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const float a = GATED ? Function::value(u[j]) * v[j] : Function::value(u[j]);
                u[j] = keeps(mask, draws[j]) ? a * mask.scale : 0.f;
            }
            store<VECTOR>(y + row * cols + col, count, u);
        }
    });
}

// 0 where nothing comes back, whatever the slope: what is dropped vanishes.
__device__ __forceinline__ float selected(float da, float slope) { return da == 0.f ? 0.f : da * slope; }

template <bool VECTOR, bool GATED, typename Function, typename T>
__device__ __forceinline__ void bwd_tiles(const T* __restrict__ x, const T* __restrict__ up,
                                          const T* __restrict__ bias, const T* __restrict__ dy,
                                          T* __restrict__ dx, T* dup, uint64_t rows, uint64_t cols,
                                          uint64_t x_stride, const MaskArgs& mask) {
    constexpr int N = GATED ? 1 : TILE_OF<VECTOR>;
    const uint64_t dx_stride = GATED && !dup ? 2 * cols : cols;
    if (GATED && !up) up = x + cols;
    if (GATED && !dup) dup = dx + cols;
    for_each_tile<N>(rows, cols, [&](uint64_t row, uint64_t first, uint64_t step) {
        const uint64_t x_start = row * x_stride, dx_start = row * dx_stride;
        const uint64_t mask_row = mask.rows.map(row);
        Fetched<VECTOR, T> fetched[N], gated[N], back[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const int count = count_at(col, cols);
            fetched[i].fetch(x + x_start + col, count);
            if (GATED) gated[i].fetch(up + x_start + col, count);
            back[i].fetch(dy + row * cols + col, count);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const uint64_t col = first + i * step;
            if (col >= cols) break;  // tail
            const int count = count_at(col, cols);
            float u[WIDTH], v[WIDTH], da[WIDTH];
            fetched[i].widen(u);
            back[i].widen(da);
            if (bias) add_bias<VECTOR>(bias + col, count, u);
            if (GATED) {
                gated[i].widen(v);
                if (bias) add_bias<VECTOR>(bias + cols + col, count, v);
            }
            const Draws draws = VECTOR ? draw(mask, mask_row, col) : draw_unaligned(mask, mask_row, col);
            float du[WIDTH], dv[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                da[j] = keeps(mask, draws[j]) ? da[j] * mask.scale : 0.f;
                const float slope = Function::slope(u[j]);
                du[j] = selected(da[j], GATED ? slope * v[j] : slope);
                if (GATED) dv[j] = selected(da[j], Function::value(u[j]));
            }
            store<VECTOR>(dx + dx_start + col, count, du);
            if (GATED) store<VECTOR>(dup + dx_start + col, count, dv);
        }
    });
}

template <bool IS_GATED, typename F>
struct Form {
    static constexpr bool GATED = IS_GATED;
    using Function = F;
};

// Calls body(form): one branch a launch, outside of every loop.
template <typename Body>
__device__ __forceinline__ void with_form(uint32_t activation, Body body) {
    switch (activation) {
        case GELU_TANH: body(Form<false, GeluTanh>()); break;
        case GELU_ERF: body(Form<false, GeluErf>()); break;
        case SILU: body(Form<false, Silu>()); break;
        case RELU: body(Form<false, Relu>()); break;
        case SWI_GLU: body(Form<true, Silu>()); break;
        case GE_GLU: body(Form<true, GeluTanh>()); break;
        case QUICK_GELU: body(Form<false, QuickGelu>()); break;
        case RELU2: body(Form<false, Relu2>()); break;
        case TANH: body(Form<false, Tanh>()); break;
        case SIGMOID: body(Form<false, Logistic>()); break;
        case GE_GLU_ERF: body(Form<true, GeluErf>()); break;
        case RE_GLU: body(Form<true, Relu>()); break;
        case QUICK_GE_GLU: body(Form<true, QuickGelu>()); break;
        case RELU2_GLU: body(Form<true, Relu2>()); break;
        case TANH_GLU: body(Form<true, Tanh>()); break;
        default: body(Form<true, Logistic>()); break;
    }
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void fwd(const T* __restrict__ x, const T* __restrict__ up, const T* __restrict__ bias,
                                    T* __restrict__ y, uint64_t rows, uint64_t cols, uint64_t x_stride,
                                    uint32_t activation, const MaskArgs& mask) {
    with_form(activation, [&](auto form) {
        using Form = decltype(form);
        fwd_tiles<VECTOR, Form::GATED, typename Form::Function>(x, up, bias, y, rows, cols, x_stride, mask);
    });
}

template <bool VECTOR, typename T>
__device__ __forceinline__ void bwd(const T* __restrict__ x, const T* __restrict__ up, const T* __restrict__ bias,
                                    const T* __restrict__ dy, T* __restrict__ dx, T* dup, uint64_t rows,
                                    uint64_t cols, uint64_t x_stride, uint32_t activation, const MaskArgs& mask) {
    with_form(activation, [&](auto form) {
        using Form = decltype(form);
        bwd_tiles<VECTOR, Form::GATED, typename Form::Function>(x, up, bias, dy, dx, dup, rows, cols, x_stride,
                                                                mask);
    });
}

template <typename T>
__device__ __forceinline__ void activation_dropout_fwd(const T* __restrict__ x, const T* __restrict__ up,
                                                       const T* __restrict__ bias, T* __restrict__ y,
                                                       uint64_t rows, uint64_t cols, uint64_t x_stride,
                                                       uint32_t activation, const MaskArgs& mask) {
    if (rows_are_vectors(cols, x, up, bias, y) && x_stride % WIDTH == 0 && is_drawn_whole(mask)) {
        fwd<true>(x, up, bias, y, rows, cols, x_stride, activation, mask);
    } else {
        fwd<false>(x, up, bias, y, rows, cols, x_stride, activation, mask);
    }
}

template <typename T>
__device__ __forceinline__ void activation_dropout_bwd(const T* __restrict__ x, const T* __restrict__ up,
                                                       const T* __restrict__ bias, const T* __restrict__ dy,
                                                       T* __restrict__ dx, T* dup, uint64_t rows, uint64_t cols,
                                                       uint64_t x_stride, uint32_t activation,
                                                       const MaskArgs& mask) {
    if (rows_are_vectors(cols, x, up, bias, dy, dx, dup) && x_stride % WIDTH == 0 && is_drawn_whole(mask)) {
        bwd<true>(x, up, bias, dy, dx, dup, rows, cols, x_stride, activation, mask);
    } else {
        bwd<false>(x, up, bias, dy, dx, dup, rows, cols, x_stride, activation, mask);
    }
}

// dup is not restrict: it may be the second halves of the rows of dx.
#define ACTIVATION_DROPOUT(SUFFIX, T)                                                                          \
    KERNEL(256) activation_dropout_fwd_##SUFFIX(const T* __restrict__ x, const T* __restrict__ up,             \
                                                const T* __restrict__ bias, T* __restrict__ y, uint64_t rows,  \
                                                uint64_t cols, uint64_t x_stride, uint32_t activation,         \
                                                MaskArgs mask) {                                               \
        activation_dropout_fwd(x, up, bias, y, rows, cols, x_stride, activation, mask);                        \
    }                                                                                                          \
    KERNEL(256, 2) activation_dropout_bwd_##SUFFIX(const T* __restrict__ x, const T* __restrict__ up,          \
                                                   const T* __restrict__ bias, const T* __restrict__ dy,       \
                                                   T* __restrict__ dx, T* dup, uint64_t rows, uint64_t cols,   \
                                                   uint64_t x_stride, uint32_t activation, MaskArgs mask) {    \
        activation_dropout_bwd(x, up, bias, dy, dx, dup, rows, cols, x_stride, activation, mask);              \
    }
FOR_EACH_DTYPE(ACTIVATION_DROPOUT)
