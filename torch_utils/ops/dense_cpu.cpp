// Small matrix products for the CPU: fully connected layers of few samples, and the demodulation of their styles.
//
// Definitions, schemas, shape functions and the choice are in dense.py, formulas of gradients in derivatives_cpu.cpp;
// here are only the numbers, float32 or float64. Weights are read, and their gradients written, once. Every sum is made
// by one thread in one order, so results do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t SAMPLES = 8;            // at a time: their sums are in registers
constexpr int64_t GRAIN = int64_t(1) << 15;  // products that are worth a thread

template <class T> constexpr int LANES = 64 / sizeof(T);
template <class T> struct Vector {
    typedef T type __attribute__((vector_size(64)));
};
template <class T> using Vec = typename Vector<T>::type;

template <class T> inline Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class T> inline void store(T* p, Vec<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> inline T sum(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < LANES<T>; i++) total += v[i];
    return total;
}

// Samples and rows of weights, one after the other in memory; samples may have gaps between them.
template <class T> struct Rows {
    const T* data;
    int64_t step;
    const T* operator[](int64_t i) const { return data + i * step; }
};

// f(first, end) for all of [0, num), by all threads; each takes `cost` products.
template <class F> void shared(int64_t num, int64_t cost, F f) {
    at::parallel_for(0, num, std::max<int64_t>(1, GRAIN / std::max<int64_t>(cost, 1)), f);
}

// out(m, n, sum over i of x[n][i] * w[m][i]) for N samples and M rows of weights, which share what is read of samples
template <int N, int M, class T, class F> void dots(Rows<T> x, Rows<T> w, int64_t size, F out) {
    Vec<T> sums[M][N] = {};
    int64_t i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) {
        Vec<T> factors[M];
        for (int m = 0; m < M; m++) factors[m] = load(w[m] + i);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const Vec<T> sample = load(x[n] + i);
            for (int m = 0; m < M; m++) sums[m][n] += sample * factors[m];
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            T total = sum<T>(sums[m][n]);
            for (int64_t k = i; k < size; k++) total += x[n][k] * w[m][k];
            out(m, n, total);
        }
}

// to[n][i] = sum over o of g[n][o] * w[o][i], for N samples and i in [first, end)
template <int N, class T> void combine(Rows<T> g, const T* w, int64_t num, int64_t size, int64_t first, int64_t end, T* to) {
    int64_t i = first;
    for (; i + 2 * LANES<T> <= end; i += 2 * LANES<T>) {
        Vec<T> a[N] = {}, b[N] = {};
        for (int64_t o = 0; o < num; o++) {
            const Vec<T> u = load(w + o * size + i), v = load(w + o * size + i + LANES<T>);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) a[n] += u * g[n][o], b[n] += v * g[n][o];
        }
        for (int n = 0; n < N; n++) store(to + n * size + i, a[n]), store(to + n * size + i + LANES<T>, b[n]);
    }
    for (; i < end; i++)
        for (int n = 0; n < N; n++) {
            T total = 0;
            for (int64_t o = 0; o < num; o++) total += w[o * size + i] * g[n][o];
            to[n * size + i] = total;
        }
}

// to[m][i] += sum over n of g[m * step + n] * x[n][i], for N samples and M rows
template <int N, int M, class T> void accumulate(const T* g, int64_t step, Rows<T> x, int64_t size, T* to) {
    int64_t i = 0;
    for (; i + LANES<T> <= size; i += LANES<T>) {
        Vec<T> totals[M];
        for (int m = 0; m < M; m++) totals[m] = load(to + m * size + i);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            const Vec<T> sample = load(x[n] + i);
            for (int m = 0; m < M; m++) totals[m] += sample * g[m * step + n];
        }
        for (int m = 0; m < M; m++) store(to + m * size + i, totals[m]);
    }
    for (; i < size; i++)
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) to[m * size + i] += g[m * step + n] * x[n][i];
}

// f.operator()<N>(first sample) for all samples, N at a time.
template <class F> void by_samples(int64_t num, F f) {
    int64_t n = 0;
    for (; n + SAMPLES <= num; n += SAMPLES) f.template operator()<SAMPLES>(n);
    for (; n + 4 <= num; n += 4) f.template operator()<4>(n);
    for (; n < num; n++) f.template operator()<1>(n);
}

// f.operator()<M>(first row) for all rows from begin to end, two at a time.
template <class F> void by_rows(int64_t begin, int64_t end, F f) {
    int64_t o = begin;
    for (; o + 2 <= end; o += 2) f.template operator()<2>(o);
    if (o < end) f.template operator()<1>(o);
}

// dx[n][i] = sum over o of g[n][o] * w[o][i]
template <class T> void product(const T* g, const T* w, int64_t num, int64_t outs, int64_t size, T* dx) {
    constexpr int64_t COLUMNS = 4 * LANES<T>;
    shared((size + COLUMNS - 1) / COLUMNS, num * outs * COLUMNS, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; c++)  // whole blocks: what a thread's share is changes no sum
            by_samples(num, [&]<int N>(int64_t n) {
                combine<N>(Rows<T>{g + n * outs, outs}, w, outs, size, c * COLUMNS, std::min((c + 1) * COLUMNS, size), dx + n * size);
            });
    });
}

// ---- gain * leaky_relu(weight_gain * x w^T + bias_gain * b)

template <class T> void forward(const Tensor& x, const Tensor& w, const T* b, T weight_gain, T bias_gain, T alpha, T gain, Tensor& y) {
    const int64_t num = x.size(0), size = x.size(1), outs = w.size(0);
    const Rows<T> in{x.const_data_ptr<T>(), x.stride(0)};
    const T* rows = w.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    shared(outs, num * size, [&](int64_t begin, int64_t end) {
        by_rows(begin, end, [&]<int M>(int64_t o) {
            by_samples(num, [&]<int N>(int64_t n) {
                dots<N, M>(Rows<T>{in[n], in.step}, Rows<T>{rows + o * size, size}, size, [&](int m, int k, T total) {
                    const T u = weight_gain * total + (b ? bias_gain * b[o + m] : T(0));
                    to[(n + k) * outs + o + m] = gain * (u > 0 ? u : alpha * u);
                });
            });
        });
    });
}

template <class T>
void backward(const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& w, T weight_gain, T bias_gain, T alpha, T gain, T* dx, T* dw,
              T* db) {
    const int64_t num = x.size(0), size = x.size(1), outs = w.size(0);
    const T *grad = dy.const_data_ptr<T>(), *result = y.const_data_ptr<T>();
    std::vector<T> du(num * outs), columns(num * outs);  // times the product's gain; [N, O] and [O, N]
    for (int64_t n = 0; n < num; n++)
        for (int64_t o = 0; o < outs; o++) {
            const T slope = result[n * outs + o] > 0 ? gain : gain * alpha;
            du[n * outs + o] = columns[o * num + n] = weight_gain * slope * grad[n * outs + o];
        }
    if (db)
        for (int64_t o = 0; o < outs; o++) {
            T total = 0;
            for (int64_t n = 0; n < num; n++) total += (result[n * outs + o] > 0 ? gain : gain * alpha) * grad[n * outs + o];
            db[o] = bias_gain * total;
        }
    if (dw) {
        const Rows<T> in{x.const_data_ptr<T>(), x.stride(0)};
        shared(outs, num * size, [&](int64_t begin, int64_t end) {
            std::fill(dw + begin * size, dw + end * size, T(0));
            by_rows(begin, end, [&]<int M>(int64_t o) {
                by_samples(num, [&]<int N>(int64_t n) {
                    accumulate<N, M>(columns.data() + o * num + n, num, Rows<T>{in[n], in.step}, size, dw + o * size);
                });
            });
        });
    }
    if (dx) product(du.data(), w.const_data_ptr<T>(), num, outs, size, dx);
}

void check_type(const Tensor& w) {
    TORCH_CHECK_VALUE(w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble, "the weight is ", w.scalar_type(),
                      ", wanted float32 or float64");
}

void check(const Tensor& x, const Tensor& w, const Optional& bias) {
    const auto kind = w.scalar_type();
    const bool fits = x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && x.scalar_type() == kind;
    TORCH_CHECK_VALUE(fits, "x is ", x.scalar_type(), " ", x.sizes(), ", the weight ", kind, " ", w.sizes(), "; wanted [N, I] and [O, I] of one type");
    TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0) && bias->scalar_type() == kind), "the bias is ", bias->scalar_type(),
                      " ", bias->sizes(), ", wanted one number for each row of the weight ", kind, " ", w.sizes());
    check_type(w);
}

// A gradient has the shape and type of what it is of.
void check_gradient(const Tensor& gradient, const Tensor& of) {
    TORCH_CHECK_VALUE(gradient.sizes() == of.sizes() && gradient.scalar_type() == of.scalar_type(), "the gradient is ", gradient.scalar_type(), " ",
                      gradient.sizes(), ", wanted ", of.scalar_type(), " ", of.sizes());
}

Tensor dense(const Tensor& x, const Tensor& weight, const Optional& bias, double weight_gain, double bias_gain, double alpha, double gain) {
    check(x, weight, bias);
    const Tensor in = x.stride(1) == 1 ? x : x.contiguous(), w = weight.contiguous(), b = bias ? bias->contiguous() : Tensor();
    Tensor y = at::empty({x.size(0), w.size(0)}, x.options());
    if (w.scalar_type() == at::kDouble) forward<double>(in, w, bias ? b.const_data_ptr<double>() : nullptr, weight_gain, bias_gain, alpha, gain, y);
    else forward<float>(in, w, bias ? b.const_data_ptr<float>() : nullptr, weight_gain, bias_gain, alpha, gain, y);
    return y;
}

template <class T> T* pointer(const Tensor& t) { return t.numel() ? t.mutable_data_ptr<T>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> dense_grad(const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& weight, double weight_gain,
                                              double bias_gain, double alpha, double gain, bool of_x, bool of_weight, bool of_bias) {
    check(x, weight, std::nullopt);
    const int64_t num = x.size(0), size = x.size(1), outs = weight.size(0);
    check_gradient(dy, y);
    TORCH_CHECK_VALUE(y.sizes() == at::IntArrayRef({num, outs}) && y.scalar_type() == x.scalar_type(), "the result is ", y.scalar_type(), " ", y.sizes(),
                      ", wanted [", num, ", ", outs, "] of ", x.scalar_type());
    const Tensor in = x.stride(1) == 1 ? x : x.contiguous(), w = weight.contiguous(), grad = dy.contiguous(), result = y.contiguous();
    Tensor dx = at::empty({of_x ? num : 0, size}, x.options()), dw = at::empty({of_weight ? outs : 0, size}, x.options());
    Tensor db = at::empty({of_bias ? outs : 0}, x.options());
    const auto run = [&]<class T>(T) {
        backward<T>(grad, in, result, w, weight_gain, bias_gain, alpha, gain, pointer<T>(dx), pointer<T>(dw), pointer<T>(db));
    };
    if (x.scalar_type() == at::kDouble) run(0.0);
    else run(0.0f);
    return {dx, dw, db};
}

// ---- 1 / sqrt(sum over i, k of (w[o][i][k] s[n][i])^2 + 1e-8), and the sum over k of w^2, [O, I]

constexpr double EPSILON = 1e-8;

template <class T> void demodulate(const T* s, const T* w, int64_t num, int64_t outs, int64_t size, int64_t taps, T* scales, T* energy) {
    std::vector<T> squares(num * size);
    for (int64_t i = 0; i < num * size; i++) squares[i] = s[i] * s[i];
    shared(outs, size * (taps + num), [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++) {
            const T* from = w + o * size * taps;
            T* to = energy + o * size;
            const auto add = [&](int64_t count) {
                for (int64_t i = 0; i < size; i++) {
                    T total = 0;
                    for (int64_t k = 0; k < count; k++) total += from[i * count + k] * from[i * count + k];
                    to[i] = total;
                }
            };
            if (taps == 9) add(9);
            else add(taps);
            by_samples(num, [&]<int N>(int64_t n) {
                dots<N, 1>(Rows<T>{squares.data() + n * size, size}, Rows<T>{to, size}, size,
                           [&](int, int k, T total) { scales[(n + k) * outs + o] = 1 / std::sqrt(total + T(EPSILON)); });
            });
        }
    });
}

template <class T>
void demodulate_backward(const T* grad, const T* s, const T* w, const T* scales, const T* energy, int64_t num, int64_t outs, int64_t size,
                         int64_t taps, T* ds, T* dw) {
    std::vector<T> q(num * outs), columns(num * outs);  // twice the gradient to the sum under the root, [N, O] and [O, N]
    for (int64_t n = 0; n < num; n++)
        for (int64_t o = 0; o < outs; o++) {
            const T r = scales[n * outs + o];
            q[n * outs + o] = columns[o * num + n] = -grad[n * outs + o] * r * r * r;
        }
    if (dw) {
        std::vector<T> squares(num * size);
        for (int64_t i = 0; i < num * size; i++) squares[i] = s[i] * s[i];
        shared(outs, size * (taps + num), [&](int64_t begin, int64_t end) {
            std::vector<T> factor(size);
            for (int64_t o = begin; o < end; o++) {
                std::fill(factor.begin(), factor.end(), T(0));
                by_samples(num, [&]<int N>(int64_t n) {
                    accumulate<N, 1>(columns.data() + o * num + n, num, Rows<T>{squares.data() + n * size, size}, size, factor.data());
                });
                const T* from = w + o * size * taps;
                T* to = dw + o * size * taps;
                const auto scale = [&](int64_t count) {
                    for (int64_t i = 0; i < size; i++)
                        for (int64_t k = 0; k < count; k++) to[i * count + k] = from[i * count + k] * factor[i];
                };
                if (taps == 9) scale(9);
                else scale(taps);
            }
        });
    }
    if (!ds) return;
    product(q.data(), energy, num, outs, size, ds);
    for (int64_t i = 0; i < num * size; i++) ds[i] *= s[i];
}

void check_styles(const Tensor& styles, const Tensor& w) {
    const bool fits = styles.dim() == 2 && w.dim() == 4 && styles.size(1) == w.size(1) && styles.scalar_type() == w.scalar_type();
    TORCH_CHECK_VALUE(fits, "styles are ", styles.scalar_type(), " ", styles.sizes(), ", the weight ", w.scalar_type(), " ", w.sizes(),
                      "; wanted [N, I] and [O, I, k, k] of one type");
    check_type(w);
}

std::tuple<Tensor, Tensor> demodulation(const Tensor& styles, const Tensor& weight) {
    check_styles(styles, weight);
    const Tensor s = styles.contiguous(), w = weight.contiguous();
    const int64_t num = s.size(0), size = s.size(1), outs = w.size(0), taps = w.size(2) * w.size(3);
    Tensor scales = at::empty({num, outs}, s.options()), energy = at::empty({outs, size}, s.options());
    const auto run = [&]<class T>(T) {
        demodulate(s.const_data_ptr<T>(), w.const_data_ptr<T>(), num, outs, size, taps, scales.mutable_data_ptr<T>(), energy.mutable_data_ptr<T>());
    };
    if (s.scalar_type() == at::kDouble) run(0.0);
    else run(0.0f);
    return {scales, energy};
}

std::tuple<Tensor, Tensor> demodulation_grad(const Tensor& grad, const Tensor& styles, const Tensor& weight, const Tensor& scales,
                                             const Tensor& energy, bool of_styles, bool of_weight) {
    check_styles(styles, weight);
    check_gradient(grad, scales);
    const Tensor g = grad.contiguous(), s = styles.contiguous(), w = weight.contiguous(), r = scales.contiguous(), e = energy.contiguous();
    const int64_t num = s.size(0), size = s.size(1), outs = w.size(0), taps = w.size(2) * w.size(3);
    Tensor ds = at::empty({of_styles ? num : 0, size}, s.options());
    Tensor dw = at::empty({of_weight ? outs : 0, size, w.size(2), w.size(3)}, s.options());
    const auto run = [&]<class T>(T) {
        demodulate_backward(g.const_data_ptr<T>(), s.const_data_ptr<T>(), w.const_data_ptr<T>(), r.const_data_ptr<T>(), e.const_data_ptr<T>(), num,
                            outs, size, taps, pointer<T>(ds), pointer<T>(dw));
    };
    if (s.scalar_type() == at::kDouble) run(0.0);
    else run(0.0f);
    return {ds, dw};
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, CPU, m) {
    m.impl("dense", &dense);
    m.impl("dense_grad", &dense_grad);
    m.impl("demodulation", &demodulation);
    m.impl("demodulation_grad", &demodulation_grad);
}
