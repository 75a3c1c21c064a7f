// softmax_dropout: attention probabilities from scores. Twin of src/functional/softmax_dropout/cpu.rs.
//
//     t = scale * scores + mask        P = softmax(t) over the keys
//     forward   y = keep ? P * drop.scale : 0
//     backward  dP = keep ? dy * drop.scale : 0
//               dscores = grad_scale * P * (dP - sum of P dP), the sum once more of what that leaves of dP
//
// DropKey drops keys instead, before the softmax: t = keep ? t : -inf. Its mask has a scale of 1, and whatever is
// dropped has a weight of 0 when the dropout of weights comes to it, so that nothing else differs.
//
// scores, y, dy, dscores [rows, keys]; additive mask [.., keys or 1], may be null. A row without any
// visible key gives zeros.
// Bytes moved an element: forward one read, one write; backward two reads, one write.
// A team of blockDim.x threads (a power of two, 4 to 256) takes a row; threadIdx.y counts the teams of a
// block, the grid strides over the rows. A thread keeps TILE vectors of its row in registers; a row of
// more than 256 * TILE * 8 = 8192 keys is read again for each step instead, mostly from L2.
// Vectors of 16 bytes where rows begin at such boundaries and the drop mask at a multiple of 8 columns;
// else element by element, and again for each step, since such rows are rare and code is not free.
#include "elem.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// How scores become softmax inputs, as src/functional/softmax_dropout/args.rs fills it in.
struct ScoreArgs {
    uint64_t queries;
    RowMap additive_rows;    // row of the additive mask for a row of the scores
    uint64_t additive_cols;  // as many as there are keys, or 1 if it is broadcast over them
    double scale;            // rounded to f32 once, in a register that all threads share
    double grad_scale;
    uint32_t causal;    // 1: query i sees the keys up to i + keys - queries
    uint32_t drop_key;  // 1: keys are dropped, not weights

    __device__ __forceinline__ uint64_t visible(uint64_t row, uint64_t keys) const {
        if (!causal) return keys;
        const uint64_t end = row % queries + 1 + keys;
        return end > queries ? end - queries : 0;
    }
};
static_assert(sizeof(ScoreArgs) == 104 && offsetof(ScoreArgs, additive_rows) == 8 &&
                  offsetof(ScoreArgs, additive_cols) == 72 && offsetof(ScoreArgs, scale) == 80 &&
                  offsetof(ScoreArgs, grad_scale) == 88 && offsetof(ScoreArgs, causal) == 96 &&
                  offsetof(ScoreArgs, drop_key) == 100,
              "as src/functional/softmax_dropout/args.rs lays it out");

template <bool VECTOR, typename T>
struct Row {
    const T* scores;
    const T* additive;  // null, or the mask of this row
    uint64_t additive_step;
    uint64_t keys;
    uint64_t visible;
    float scale;
    bool drops_keys;
    const MaskArgs& drop;
    uint64_t mask_row;

    __device__ __forceinline__ Row(const T* all_scores, const T* all_additive, const ScoreArgs& args,
                                   const MaskArgs& drop, uint64_t row, uint64_t keys)
        : scores(all_scores + row * keys),
          additive(all_additive ? all_additive + args.additive_rows.map(row) * args.additive_cols
                                : nullptr),
          additive_step(args.additive_cols == 1 ? 0 : 1),
          keys(keys),
          visible(args.visible(row, keys)),
          scale(float(args.scale)),
          drops_keys(args.drop_key != 0),
          drop(drop),
          mask_row(drop.rows.map(row)) {}

    __device__ __forceinline__ Draws draw_keys(uint64_t key) const {
        return VECTOR ? draw(drop, mask_row, key) : draw_unaligned(drop, mask_row, key);
    }

    // Softmax inputs of the 8 keys from `key` on; -inf where a key is masked or does not exist.
    __device__ __forceinline__ void load_inputs(uint64_t key, float (&t)[WIDTH]) const {
        const int count = count_at(key, visible);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) t[j] = 0.f;
        if (count > 0) load<VECTOR>(scores + key, count, t);
        float bias[WIDTH] = {};
        if (additive && count > 0) {
            if (additive_step) {
                load<VECTOR>(additive + key, count, bias);
            } else {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) bias[j] = widen(additive[0]);
            }
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            t[j] = j < count ? __fadd_rn(__fmul_rn(t[j], scale), bias[j]) : -INFINITY;  // tail
        }
    }

    // Of these, -inf where the key is dropped.
    __device__ __forceinline__ void hide_dropped(uint64_t key, float (&t)[WIDTH]) const {
        if (!drops_keys) return;
        const Draws draws = draw_keys(key);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) t[j] = keeps(drop, draws[j]) ? t[j] : -INFINITY;
    }
};

// What the steps of a row share: its softmax inputs, then their exponentials. RESIDENT: the row has one
// stretch, which stays in registers.
template <bool VECTOR, bool RESIDENT, typename T>
struct Softmax {
    static constexpr int N = KEPT<RESIDENT>;
    const Row<VECTOR, T>& row;
    float max;
    float normaliser;
    float t[N][WIDTH];

    // Steps 1 and 2: the maximum, then the sum of the exponentials. All threads of the block call it.
    __device__ __forceinline__ Softmax(const Row<VECTOR, T>& row, float* scratch) : row(row) {
        float thread_max = -INFINITY;
        for_each_vector<N>(
            row.keys, [&](int i, uint64_t key) { row.load_inputs(key, t[i]); },
            [&](int i, uint64_t key) {
                row.hide_dropped(key, t[i]);
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) thread_max = fmaxf(thread_max, t[i][j]);
            });
        max = team_reduce(thread_max, scratch, Max());
        // With every key at -inf, 0 stands in for the maximum: all exponentials are 0 then.
        if (max == -INFINITY) max = 0.f;

        float thread_sum = 0.f;
        for_each_vector<N>(row.keys, [&](int i, uint64_t key) {
            if (!RESIDENT) reload_inputs(i, key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                t[i][j] = exponential<T>(t[i][j] - max);
                thread_sum += t[i][j];
            }
        });
        const float sum = team_reduce(thread_sum, scratch, Sum());
        normaliser = sum == 0.f ? 0.f : 1.f / sum;
    }

    // The exponentials of the thread's vector i, which begins at `key`.
    __device__ __forceinline__ float (&exponentials(int i, uint64_t key))[WIDTH] {
        if (!RESIDENT) {
            reload_inputs(i, key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) t[i][j] = exponential<T>(t[i][j] - max);
        }
        return t[i];
    }

    __device__ __forceinline__ void reload_inputs(int i, uint64_t key) {
        row.load_inputs(key, t[i]);
        row.hide_dropped(key, t[i]);
    }
};

template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void softmax_dropout_fwd_rows(const T* __restrict__ scores,
                                                         const T* __restrict__ additive, T* __restrict__ y,
                                                         uint64_t rows, uint64_t keys, const ScoreArgs& args,
                                                         const MaskArgs& drop, float* scratch) {
    constexpr int N = KEPT<RESIDENT>;
    // Teams without a row of their own do the last row again, since reductions need all threads.
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t r = is_mine ? first + threadIdx.y : rows - 1;
        const Row<VECTOR, T> row(scores, additive, args, drop, r, keys);
        Softmax<VECTOR, RESIDENT, T> softmax(row, scratch);
        if (!is_mine) continue;

        const float scale = softmax.normaliser * drop.scale;
        for_each_vector<N>(keys, [&](int i, uint64_t key) {
            if (key >= keys) return;  // tail
            float(&e)[WIDTH] = softmax.exponentials(i, key);
            const Draws draws = row.draw_keys(key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) e[j] = keeps(drop, draws[j]) ? e[j] * scale : 0.f;
            store<VECTOR>(y + r * keys + key, count_at(key, keys), e);
        });
    }
}

template <bool VECTOR, bool RESIDENT, typename T>
__device__ __forceinline__ void softmax_dropout_bwd_rows(const T* __restrict__ scores,
                                                         const T* __restrict__ additive,
                                                         const T* __restrict__ dy, T* __restrict__ dscores,
                                                         uint64_t rows, uint64_t keys, const ScoreArgs& args,
                                                         const MaskArgs& drop, float* scratch) {
    constexpr int N = KEPT<RESIDENT>;
    for (uint64_t first = uint64_t(blockIdx.x) * blockDim.y; first < rows;
         first += uint64_t(gridDim.x) * blockDim.y) {
        const bool is_mine = first + threadIdx.y < rows;
        const uint64_t r = is_mine ? first + threadIdx.y : rows - 1;
        const Row<VECTOR, T> row(scores, additive, args, drop, r, keys);
        Softmax<VECTOR, RESIDENT, T> softmax(row, scratch);

        // Step 3: dP and its product with P. A key of probability 0 passes nothing on, by selection: its
        // dy may be infinite.
        float dp[N][WIDTH];
        auto load_dp = [&](int i, uint64_t key) {
            const int count = count_at(key, keys);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) dp[i][j] = 0.f;
            if (count == 0) return;  // tail
            load<VECTOR>(dy + r * keys + key, count, dp[i]);
            const Draws draws = row.draw_keys(key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                dp[i][j] = keeps(drop, draws[j]) ? dp[i][j] * drop.scale : 0.f;
            }
        };
        float thread_dot = 0.f;
        for_each_vector<N>(keys, [&](int i, uint64_t key) {
            const float(&e)[WIDTH] = softmax.exponentials(i, key);
            load_dp(i, key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) thread_dot += e[j] == 0.f ? 0.f : e[j] * dp[i][j];
        });
        const float dot = team_reduce(thread_dot, scratch, Sum()) * softmax.normaliser;

        // Step 4: what it was rounded by is left in every dP.
        float thread_rest = 0.f;
        for_each_vector<N>(keys, [&](int i, uint64_t key) {
            const float(&e)[WIDTH] = softmax.exponentials(i, key);
            if (!RESIDENT) load_dp(i, key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) thread_rest += e[j] == 0.f ? 0.f : e[j] * (dp[i][j] - dot);
        });
        const float rest = team_reduce(thread_rest, scratch, Sum()) * softmax.normaliser;
        if (!is_mine) continue;

        // Step 5: the gradient.
        const float scale = softmax.normaliser * float(args.grad_scale);
        for_each_vector<N>(keys, [&](int i, uint64_t key) {
            if (key >= keys) return;  // tail
            float(&e)[WIDTH] = softmax.exponentials(i, key);
            if (!RESIDENT) load_dp(i, key);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const bool passes = e[j] != 0.f && drop.threshold != 0;
                e[j] = passes ? e[j] * (dp[i][j] - dot - rest) * scale : 0.f;
            }
            store<VECTOR>(dscores + r * keys + key, count_at(key, keys), e);
        });
    }
}

template <typename T>
__device__ __forceinline__ void softmax_dropout_fwd(const T* __restrict__ scores, const T* __restrict__ additive,
                                                    T* __restrict__ y, uint64_t rows, uint64_t keys,
                                                    const ScoreArgs& args, const MaskArgs& drop) {
    __shared__ float scratch[MAX_WARPS];
    if (!rows_are_vectors(keys, scores, additive, y) || !is_drawn_whole(drop)) {
        softmax_dropout_fwd_rows<false, false>(scores, additive, y, rows, keys, args, drop, scratch);
    } else if (!fits_in_registers(keys)) {
        softmax_dropout_fwd_rows<true, false>(scores, additive, y, rows, keys, args, drop, scratch);
    } else {
        softmax_dropout_fwd_rows<true, true>(scores, additive, y, rows, keys, args, drop, scratch);
    }
}

template <typename T>
__device__ __forceinline__ void softmax_dropout_bwd(const T* __restrict__ scores, const T* __restrict__ additive,
                                                    const T* __restrict__ dy, T* __restrict__ dscores,
                                                    uint64_t rows, uint64_t keys, const ScoreArgs& args,
                                                    const MaskArgs& drop) {
    __shared__ float scratch[MAX_WARPS];
    if (!rows_are_vectors(keys, scores, additive, dy, dscores) || !is_drawn_whole(drop)) {
        softmax_dropout_bwd_rows<false, false>(scores, additive, dy, dscores, rows, keys, args, drop, scratch);
    } else if (!fits_in_registers(keys)) {
        softmax_dropout_bwd_rows<true, false>(scores, additive, dy, dscores, rows, keys, args, drop, scratch);
    } else {
        softmax_dropout_bwd_rows<true, true>(scores, additive, dy, dscores, rows, keys, args, drop, scratch);
    }
}

// Three blocks of halves share a multiprocessor forward, as many as without DropKey.
#define SOFTMAX_DROPOUT(SUFFIX, T)                                                                                \
    KERNEL(256, sizeof(T) == 2 ? 3 : 2)                                                                           \
    softmax_dropout_fwd_##SUFFIX(const T* __restrict__ scores, const T* __restrict__ additive, T* __restrict__ y, \
                                 uint64_t rows, uint64_t keys, ScoreArgs args, MaskArgs drop) {                   \
        softmax_dropout_fwd(scores, additive, y, rows, keys, args, drop);                                         \
    }                                                                                                             \
    KERNEL(256, 2)                                                                                                \
    softmax_dropout_bwd_##SUFFIX(const T* __restrict__ scores, const T* __restrict__ additive,                    \
                                 const T* __restrict__ dy, T* __restrict__ dscores, uint64_t rows, uint64_t keys, \
                                 ScoreArgs args, MaskArgs drop) {                                                 \
        softmax_dropout_bwd(scores, additive, dy, dscores, rows, keys, args, drop);                               \
    }
FOR_EACH_DTYPE(SOFTMAX_DROPOUT)
