// bias_act for one dense tensor: clip(gain * act(x + b), +-clamp), and its first and second derivative.
//
// With u = x + b, order 0 gives y; order 1 takes the gradient of y in `x` and gives that of u,
//     x * gain * act'(u) * [|gain act(u)| <= clamp];
// order 2 takes in `x` a gradient of order 1's result and in `dy` what order 1 took, and gives the gradient of u,
//     x * dy * gain * act''(u) * [|gain act(u)| <= clamp].
// u comes from `xref` (+ b) where given, else act(u) = yref / gain: enough for all but swish and lrelu of negative
// slope.
// Through `yref` a value at +-clamp counts as clipped, as it cannot be told from a clipped one.
//
// All tensors lie in memory in the same order, whichever; the bias index of the element at offset i is
// (i / bias_step) % num_bias, bias_step being the stride of the bias axis. Arithmetic is float32, float64 for float64.

#pragma once

#include "kernel_common.h"

namespace sgr {

enum Act : int { LINEAR = 1, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

struct BiasActParams {
    const void *x, *b, *xref, *yref, *dy;  // all but x may be null
    void* y;
    int64_t numel, bias_step, num_bias;
    double alpha, gain, clamp;  // clamp < 0: none
    int dtype, act, order;
    // Set by bias_act_prepare:
    double inverse_gain;
    float alpha32, gain32, clamp32, inverse_gain32;
    int is_clamped;
    Divider by_step, by_num;
    int is_wide;        // offsets need 64 bits
    int is_aligned;     // 16-byte accesses are allowed
    int is_aligned_b;   // for the bias too
};

constexpr double SELU_SCALE = 1.0507009873554804934193349852946;  // Klambauer et al. 2017
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;

// Value and derivatives of an activation, from its argument u or from its own value v.
template <int ACT, class S> struct Activation {
    static SGR_DEVICE S sigmoid(S u) { return S(1) / (S(1) + exp(-u)); }

    static SGR_DEVICE S value(S u, S alpha) {
        if constexpr (ACT == RELU) return u > S(0) || u != u ? u : S(0);
        if constexpr (ACT == LRELU) return u > S(0) ? u : u * alpha;
        if constexpr (ACT == TANH) return tanh(u);
        if constexpr (ACT == SIGMOID) return sigmoid(u);
        if constexpr (ACT == ELU) return u > S(0) ? u : expm1(u);
        if constexpr (ACT == SELU) return u > S(0) ? S(SELU_SCALE) * u : S(SELU_SCALE * SELU_ALPHA) * expm1(u);
        if constexpr (ACT == SOFTPLUS) return u > S(20) ? u : log1p(exp(u));  // beyond 20 both agree in float32
        if constexpr (ACT == SWISH) return u * sigmoid(u);
        return u;
    }

    static SGR_DEVICE S first(S u, S v, S alpha) {
        if constexpr (ACT == SOFTPLUS) return u > S(20) ? S(1) : sigmoid(u);
        if constexpr (ACT == SWISH) {
            const S s = sigmoid(u);
            return s * (S(1) + u * (S(1) - s));
        }
        return first_of_value(v, alpha);
    }

    static SGR_DEVICE S second(S u, S v) {
        if constexpr (ACT == SOFTPLUS) {
            const S s = sigmoid(u);
            return u > S(20) ? S(0) : s * (S(1) - s);
        }
        if constexpr (ACT == SWISH) {
            const S s = sigmoid(u);
            return s * (S(1) - s) * (S(2) + u * (S(1) - S(2) * s));
        }
        return second_of_value(v);
    }

    static SGR_DEVICE S first_of_value(S v, S alpha) {
        if constexpr (ACT == RELU) return v > S(0) ? S(1) : S(0);
        if constexpr (ACT == LRELU) return v > S(0) ? S(1) : alpha;
        if constexpr (ACT == TANH) return S(1) - v * v;
        if constexpr (ACT == SIGMOID) return v * (S(1) - v);
        if constexpr (ACT == ELU) return v > S(0) ? S(1) : v + S(1);
        if constexpr (ACT == SELU) return v > S(0) ? S(SELU_SCALE) : v + S(SELU_SCALE * SELU_ALPHA);
        if constexpr (ACT == SOFTPLUS) return -expm1(-v);
        return S(1);
    }

    static SGR_DEVICE S second_of_value(S v) {
        if constexpr (ACT == TANH) return S(-2) * v * (S(1) - v * v);
        if constexpr (ACT == SIGMOID) return v * (S(1) - v) * (S(1) - S(2) * v);
        if constexpr (ACT == ELU) return v >= S(0) ? S(0) : v + S(1);
        if constexpr (ACT == SELU) return v >= S(0) ? S(0) : v + S(SELU_SCALE * SELU_ALPHA);
        if constexpr (ACT == SOFTPLUS) return -expm1(-v) * exp(-v);
        return S(0);
    }
};

template <class T, int ACT, int ORDER> struct BiasAct {
    using S = compute_t<T>;
    static constexpr int V = 16 / sizeof(T);  // elements per access
    static constexpr int ROUNDS = 2;          // accesses per thread and tensor, all under way before the first is used
    static constexpr int THREADS = 128;
    static constexpr int PHASES = 1;
    static constexpr int64_t PER_BLOCK = int64_t{THREADS} * V * ROUNDS;
    struct Shared {};

    static SGR_DEVICE void fetch(const void* tensor, int64_t i, const BiasActParams& p, Pack<T, V>& out) {
        const T* at = static_cast<const T*>(tensor) + i;
        if (p.is_aligned && i + V <= p.numel) {
            out = load(reinterpret_cast<const Pack<T, V>*>(at));
            return;
        }
        SGR_UNROLL
        for (int k = 0; k < V; k++) out.v[k] = i + k < p.numel ? load(at + k) : T{};
    }

    static SGR_DEVICE int64_t bias_index(int64_t i, const BiasActParams& p) {
        if (p.is_wide) return i / p.bias_step % p.num_bias;
        const uint32_t row = p.by_step.quotient(static_cast<uint32_t>(i));
        return row - p.by_num.quotient(row) * p.by_num.divisor;
    }

    static SGR_DEVICE void fetch_bias(int64_t i, const BiasActParams& p, Pack<T, V>& out) {
        const T* b = static_cast<const T*>(p.b);
        if (p.bias_step % V == 0) {  // the whole pack lies within one step
            const T one = load(b + bias_index(i, p));
            SGR_UNROLL
            for (int k = 0; k < V; k++) out.v[k] = one;
        } else if (p.bias_step == 1 && p.num_bias % V == 0 && p.is_aligned_b) {
            out = load(reinterpret_cast<const Pack<T, V>*>(b + bias_index(i, p)));
        } else {
            SGR_UNROLL
            for (int k = 0; k < V; k++) out.v[k] = i + k < p.numel ? load(b + bias_index(i + k, p)) : T{};
        }
    }

    // A parameter in the type of the arithmetic; the doubles would cost GPUs that have few units for them.
    static SGR_DEVICE S number(double wide, float single) {
        if constexpr (sizeof(S) == sizeof(double)) return wide;
        return single;
    }

    static SGR_DEVICE S element(S x, S b, S ref, S dy, const BiasActParams& p) {
        using A = Activation<ACT, S>;
        const S alpha = number(p.alpha, p.alpha32), gain = number(p.gain, p.gain32), clamp = number(p.clamp, p.clamp32);
        if constexpr (ORDER == 0) {
            S y = gain * A::value(x + b, alpha);
            if (p.is_clamped) y = y > clamp ? clamp : (y < -clamp ? -clamp : y);  // NaN stays
            return y;
        } else {
            S slope;
            bool is_clipped = false;
            if (p.xref) {
                const S u = ref + b, v = A::value(u, alpha);
                slope = ORDER == 1 ? A::first(u, v, alpha) : A::second(u, v);
                if (p.is_clamped) is_clipped = !(gain * v <= clamp && gain * v >= -clamp);
            } else {
                const S v = ref * number(p.inverse_gain, p.inverse_gain32);
                slope = ORDER == 1 ? A::first_of_value(v, alpha) : A::second_of_value(v);
                if (p.is_clamped) is_clipped = !(ref < clamp && ref > -clamp);
            }
            const S product = x * (gain * slope);
            return is_clipped ? S(0) : (ORDER == 1 ? product : product * dy);
        }
    }

    template <int I> static SGR_DEVICE void phase(const BiasActParams& p, Shared&, int64_t block, int thread) {
        Pack<T, V> x[ROUNDS], b[ROUNDS], ref[ROUNDS], dy[ROUNDS];
        const int64_t start = block * PER_BLOCK + int64_t{thread} * V;
        const void* reference = p.xref ? p.xref : p.yref;
        SGR_UNROLL
        for (int r = 0; r < ROUNDS; r++) {
            const int64_t i = start + int64_t{r} * THREADS * V;
            if (i >= p.numel) continue;
            fetch(p.x, i, p, x[r]);
            if (ORDER > 0 && reference) fetch(reference, i, p, ref[r]);
            if (ORDER > 1) fetch(p.dy, i, p, dy[r]);
            if (p.b && (ORDER == 0 || p.xref)) fetch_bias(i, p, b[r]);
        }
        SGR_UNROLL
        for (int r = 0; r < ROUNDS; r++) {
            const int64_t i = start + int64_t{r} * THREADS * V;
            if (i >= p.numel) continue;
            Pack<T, V> y;
            SGR_UNROLL
            for (int k = 0; k < V; k++) {
                const S bias = p.b && (ORDER == 0 || p.xref) ? widen(b[r].v[k]) : S(0);
                const S known = ORDER > 0 && reference ? widen(ref[r].v[k]) : S(0);
                y.v[k] = narrow<T>(element(widen(x[r].v[k]), bias, known, ORDER > 1 ? widen(dy[r].v[k]) : S(0), p));
            }
            T* out = static_cast<T*>(p.y) + i;
            if (p.is_aligned && i + V <= p.numel) {
                store(reinterpret_cast<Pack<T, V>*>(out), y);
            } else {
                SGR_UNROLL
                for (int k = 0; k < V; k++)
                    if (i + k < p.numel) store(out + k, y.v[k]);
            }
        }
    }
};

// Check a call and fill in what the kernel needs. Returns null, or what is wrong.
inline const char* bias_act_prepare(BiasActParams& p) {
    if (p.act < LINEAR || p.act > SWISH) return "the activation is unknown, wanted 1 to 9";
    if (p.order < 0 || p.order > 2) return "order is wrong, wanted 0, 1 or 2";
    if (p.clamp != p.clamp) return "clamp is not a number";
    if (p.order == 2 && !p.dy) return "order 2 needs dy, the gradient that order 1 was given";
    const bool needs_reference = p.order > 0 && (p.act != LINEAR || p.clamp >= 0);
    if (needs_reference && !p.xref && !p.yref) return "this derivative needs xref or yref";
    if (p.order > 0 && !p.xref && p.act == SWISH) return "the derivatives of swish need xref";
    if (p.order > 0 && !p.xref && p.act == LRELU && p.alpha < 0) return "lrelu of negative slope needs xref";
    if (p.b && (p.bias_step < 1 || p.num_bias < 1)) return "bias step and size are not positive";
    p.inverse_gain = p.gain != 0 ? 1 / p.gain : 0;  // with gain 0 every derivative is 0
    p.alpha32 = static_cast<float>(p.alpha);
    p.gain32 = static_cast<float>(p.gain);
    p.clamp32 = static_cast<float>(p.clamp);
    p.inverse_gain32 = static_cast<float>(p.inverse_gain);
    p.is_clamped = p.clamp >= 0;
    p.is_wide = p.numel >= (int64_t{1} << 31) || p.bias_step >= (int64_t{1} << 31);
    if (!p.is_wide && p.b) {
        p.by_step = Divider(static_cast<uint32_t>(p.bias_step));
        p.by_num = Divider(static_cast<uint32_t>(p.num_bias));
    }
    const auto misaligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 != 0; };
    p.is_aligned = 1;
    for (const void* q : {p.x, static_cast<const void*>(p.y), p.xref, p.yref, p.dy}) p.is_aligned &= !misaligned(q);
    p.is_aligned_b = !misaligned(p.b);
    return nullptr;
}

// Call launch(kernel, number of blocks) with the kernel for this call.
template <class T, int ORDER, class Launch> int bias_act_choose_act(const BiasActParams& p, Launch&& launch) {
    const int64_t blocks = ceil_div(p.numel, BiasAct<T, LINEAR, ORDER>::PER_BLOCK);
    switch (p.act) {
        case RELU: return launch(BiasAct<T, RELU, ORDER>{}, blocks);
        case LRELU: return launch(BiasAct<T, LRELU, ORDER>{}, blocks);
        case TANH: return launch(BiasAct<T, TANH, ORDER>{}, blocks);
        case SIGMOID: return launch(BiasAct<T, SIGMOID, ORDER>{}, blocks);
        case ELU: return launch(BiasAct<T, ELU, ORDER>{}, blocks);
        case SELU: return launch(BiasAct<T, SELU, ORDER>{}, blocks);
        case SOFTPLUS: return launch(BiasAct<T, SOFTPLUS, ORDER>{}, blocks);
        case SWISH: return launch(BiasAct<T, SWISH, ORDER>{}, blocks);
        default: return launch(BiasAct<T, LINEAR, ORDER>{}, blocks);
    }
}

template <class T, class Launch> int bias_act_choose_order(const BiasActParams& p, Launch&& launch) {
    if (p.order == 0) return bias_act_choose_act<T, 0>(p, launch);
    if (p.order == 1) return bias_act_choose_act<T, 1>(p, launch);
    return bias_act_choose_act<T, 2>(p, launch);
}

template <class Launch> int bias_act_choose(const BiasActParams& p, Launch&& launch) {
    switch (p.dtype) {
        case FLOAT16: return bias_act_choose_order<Half>(p, launch);
        case BFLOAT16: return bias_act_choose_order<Bfloat>(p, launch);
        case FLOAT64: return bias_act_choose_order<double>(p, launch);
        default: return bias_act_choose_order<float>(p, launch);
    }
}

// In bias_act.cu: run on a CUDA stream. Returns a cudaError_t.
int bias_act_launch(const BiasActParams& p, void* stream);

}  // namespace sgr
