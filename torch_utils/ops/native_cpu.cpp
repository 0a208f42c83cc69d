// upfirdn2d and bias_act for the CPU: one pass over memory, threads from ATen, loops that the compiler vectorises.
//
// The schemas, shape functions and gradients are in upfirdn2d.py and bias_act.py; here are only the numbers. Arithmetic
// is float32 for float32 and bfloat16 images, float64 for float64. Images are NCHW or channels-last as they come.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements_cpu.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MAX_TAPS = 32;      // per axis of a filter
constexpr int64_t GRAIN = 16384;      // elements that are worth a thread of their own
constexpr int64_t STRIP = 2048;       // samples of a strip's row
constexpr int64_t FEW_CHANNELS = 16;  // below, a pixel's channels don't fill a vector register

// Zeros that start at a cache line: wide loads of channels-last pixels then touch one line each, not two.
template <class A> class Buffer {
  public:
    void resize(int64_t size) {
        storage_.assign(size + LINE, A(0));
        const auto address = reinterpret_cast<uintptr_t>(storage_.data()) / sizeof(A);
        data_ = storage_.data() + (LINE - address % LINE) % LINE;
    }
    A* data() { return data_; }

  private:
    static constexpr int64_t LINE = 64 / sizeof(A);
    std::vector<A> storage_;
    A* data_ = nullptr;
};

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// ---- upfirdn2d

// out[i] (+)= sum over m of taps[m] * from[m][i]: all the arithmetic of a filter. `num` such sums of `len` neighbours
// are made, out_step apart in out and in_step apart in from.
struct Span {
    int64_t len, num = 1, out_step = 0, in_step = 0;
};

template <int N, class Out, class In, class A>
void weighted_sum_of(Out* out, const In* const* from, const A* taps, const Span& span) {
    std::array<const In*, N> p;
    std::array<A, N> t;
    for (int m = 0; m < N; m++) p[m] = from[m], t[m] = taps[m];
    for (int64_t j = 0; j < span.num; j++) {
        Out* __restrict to = out + j * span.out_step;
#pragma GCC ivdep
        for (int64_t i = 0; i < span.len; i++) {
            A sum = 0;
#pragma GCC unroll 32
            for (int m = 0; m < N; m++) sum += t[m] * widen(p[m][i]);
            to[i] = narrow<Out>(sum);
        }
        for (int m = 0; m < N; m++) p[m] += span.in_step;
    }
}

template <bool ADD, class Out, class In, class A>
void weighted_sum(Out* out, const In* const* from, const A* taps, int64_t n, const Span& span) {
    if constexpr (!ADD && std::is_same_v<A, float>) {  // what networks and their augmentation use
        switch (n) {
            case 1: return weighted_sum_of<1>(out, from, taps, span);
            case 2: return weighted_sum_of<2>(out, from, taps, span);
            case 3: return weighted_sum_of<3>(out, from, taps, span);
            case 4: return weighted_sum_of<4>(out, from, taps, span);
            case 6: return weighted_sum_of<6>(out, from, taps, span);
            case 12: return weighted_sum_of<12>(out, from, taps, span);
        }
    }
    constexpr int64_t BLOCK = 128;
    A sum[BLOCK];
    for (int64_t j = 0; j < span.num; j++) {
        for (int64_t start = 0; start < span.len; start += BLOCK) {
            const int64_t size = std::min(BLOCK, span.len - start);
            Out* __restrict to = out + j * span.out_step + start;
            for (int64_t i = 0; i < size; i++) sum[i] = ADD ? static_cast<A>(widen(to[i])) : A(0);
            for (int64_t m = 0; m < n; m++) {
                const In* p = from[m] + j * span.in_step + start;
                const A tap = taps[m];
#pragma GCC ivdep
                for (int64_t i = 0; i < size; i++) sum[i] += tap * widen(p[i]);
            }
            for (int64_t i = 0; i < size; i++) to[i] = narrow<Out>(sum[i]);
        }
    }
}

// The taps that meet samples, not inserted zeros, at one place of an axis: tap first + m * up meets sample start + m.
struct Meeting {
    int64_t first, start, count;
};

struct Axis {
    int64_t up, down, pad, in, out, taps;

    Meeting meeting(int64_t o) const {
        const int64_t s = o * down - pad;  // place in the zero-inserted image
        const int64_t start = -floor_div(-s, up), first = start * up - s;
        return {first, start, first < taps ? (taps - first + up - 1) / up : 0};
    }
    // The same without samples outside the image.
    Meeting inside(int64_t o) const {
        Meeting m = meeting(o);
        const int64_t skip = std::max<int64_t>(0, -m.start), end = std::min(m.start + m.count, in);
        return {m.first + skip * up, m.start + skip, std::max<int64_t>(0, end - m.start - skip)};
    }
};

// Every `period`-th output meets the same taps, `stride` samples further on.
struct Columns {
    int64_t period, stride, low, high;  // samples [low, high) are needed
    std::vector<Meeting> phases;

    explicit Columns(const Axis& x) {
        const int64_t g = std::gcd(x.up, x.down);
        period = x.up / g, stride = x.down / g, low = INT64_MAX, high = INT64_MIN;
        for (int64_t p = 0; p < std::min(period, x.out); p++) {
            const Meeting m = x.meeting(p);
            phases.push_back(m);
            if (m.count == 0) continue;
            low = std::min(low, m.start);
            high = std::max(high, m.start + stride * ((x.out - p - 1) / period) + m.count);
        }
        if (low > high) low = high = 0;
    }
};

struct Problem {
    Axis x, y;
    int64_t planes, step;           // step: scalars per pixel, 1 for NCHW, C for channels-last
    bool is_separable;
    std::vector<double> along_x, along_y;  // correlation taps of a separable filter, gain included
    std::vector<double> whole;             // [y.taps][x.taps] of one that is not
};

template <class T> class Rows {
    using A = compute_t<T>;

  public:
    Rows(const Problem& p, const Columns& columns)
        : p_(p), columns_(columns), sum_size_(p.x.out * p.step) {
        row_.resize((columns.high - columns.low) * p.step);
        if (p.is_separable) fold(p.along_x);
        if (!p.is_separable) sum_.resize(sum_size_), whole_.assign(p.whole.begin(), p.whole.end());
        along_y_.assign(p.along_y.begin(), p.along_y.end());
        is_scattered_ = p.step < FEW_CHANNELS && (columns.period > 1 || columns.stride > 1);
        if (is_scattered_) {
            comb_len_ = ((columns.high - columns.low + columns.stride - 1) / columns.stride + 1) * p.step;
            if (columns.stride > 1) comb_.resize(comb_len_ * columns.stride);
            if (columns.period > 1) phase_.resize((p.x.out / columns.period + 1) * p.step);
        }
    }

    // Output row o of one plane.
    void compute(const T* plane, int64_t o, T* out) {
        const Meeting rows = p_.y.inside(o);
        if (p_.is_separable) {
            gather(plane, rows.start, along_y_.data() + rows.first, rows.count);
            if (rows.count) return across<false>(out, taps_x_);
            std::fill(out, out + p_.x.out * p_.step, T{});
            return;
        }
        std::fill(sum_.data(), sum_.data() + sum_size_, A(0));
        const A one = 1;
        for (int64_t m = 0; m < rows.count; m++) {
            gather(plane, rows.start + m, &one, 1);
            const A* taps = whole_.data() + (rows.first + m * p_.y.up) * p_.x.taps;
            fold(std::vector<double>(taps, taps + p_.x.taps));
            across<true>(sum_.data(), taps_x_);
        }
        for (int64_t i = 0; i < sum_size_; i++) out[i] = narrow<T>(sum_.data()[i]);
    }

  private:
    // Taps in the order in which each phase meets them.
    void fold(const std::vector<double>& taps) {
        taps_x_.resize(columns_.phases.size());
        for (size_t i = 0; i < taps_x_.size(); i++) {
            const Meeting& m = columns_.phases[i];
            taps_x_[i].resize(m.count);
            for (int64_t k = 0; k < m.count; k++) taps_x_[i][k] = static_cast<A>(taps[m.first + k * p_.x.up]);
        }
    }

    // Weighted sum of image rows into row_, whose samples outside the image stay 0.
    void gather(const T* plane, int64_t start, const A* taps, int64_t count) {
        const int64_t a = std::max<int64_t>(columns_.low, 0), b = std::min(columns_.high, p_.x.in);
        if (a >= b || count <= 0) return;
        std::array<const T*, MAX_TAPS> from;
        std::array<A, MAX_TAPS> weight;
        for (int64_t m = 0; m < count; m++) {
            from[m] = plane + ((start + m) * p_.x.in + a) * p_.step;
            weight[m] = taps[m * p_.y.up];
        }
        weighted_sum<false>(row_.data() + (a - columns_.low) * p_.step, from.data(), weight.data(), count,
                            {(b - a) * p_.step});
    }

    // Filter row_ along x.
    template <bool ADD, class Out> void across(Out* out, const std::vector<std::vector<A>>& taps) {
        const int64_t step = p_.step, period = columns_.period, stride = columns_.stride;
        if (is_scattered_ && stride > 1) comb();
        for (size_t phase = 0; phase < columns_.phases.size(); phase++) {
            const Meeting& m = columns_.phases[phase];
            const int64_t base = m.start - columns_.low, num = (p_.x.out - phase - 1) / period + 1;
            std::array<const A*, MAX_TAPS> from;
            if (!is_scattered_ && (period > 1 || stride > 1)) {  // pixel by pixel
                for (int64_t k = 0; k < m.count; k++) from[k] = row_.data() + (base + k) * step;
                weighted_sum<ADD>(out + phase * step, from.data(), taps[phase].data(), m.count,
                                  {step, num, period * step, stride * step});
                continue;
            }
            for (int64_t k = 0; k < m.count; k++)
                from[k] = stride > 1 ? comb_.data() + (base + k) % stride * comb_len_ + (base + k) / stride * step
                                     : row_.data() + (base + k) * step;
            if (period == 1) {
                weighted_sum<ADD>(out, from.data(), taps[phase].data(), m.count, {num * step});
                continue;
            }
            weighted_sum<false>(phase_.data(), from.data(), taps[phase].data(), m.count, {num * step});
            for (int64_t c = 0; c < step; c++) {
                Out* to = out + phase * step + c;
                const A* values = phase_.data() + c;
                for (int64_t j = 0; j < num; j++) {
                    const A before = ADD ? static_cast<A>(widen(to[j * period * step])) : A(0);
                    to[j * period * step] = narrow<Out>(before + values[j * step]);
                }
            }
        }
    }

    // Lay every stride-th sample of row_ side by side.
    void comb() {
        const int64_t step = p_.step, stride = columns_.stride, size = columns_.high - columns_.low;
        for (int64_t r = 0; r < stride; r++)
            for (int64_t c = 0; c < step; c++) {
                A* to = comb_.data() + r * comb_len_ + c;
                const A* values = row_.data() + r * step + c;
                const int64_t num = size > r ? (size - r - 1) / stride + 1 : 0;
                for (int64_t j = 0; j < num; j++) to[j * step] = values[j * stride * step];
            }
    }

    const Problem& p_;
    const Columns& columns_;
    int64_t sum_size_, comb_len_ = 0;
    bool is_scattered_ = false;
    Buffer<A> row_, comb_, phase_, sum_;
    std::vector<A> whole_, along_y_;
    std::vector<std::vector<A>> taps_x_;
};

// ---- Filters of four taps along x on channels-last images: the columns that the outputs share stay in registers

constexpr int64_t LANES = 16;
typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Vec load(const Bfloat* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Words) << 16);
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline void store(Bfloat* p, Vec v) {  // as `narrow`
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    const Words u = (Words)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Words is_nan = (Words)((u & 0x7fffffffu) > 0x7f800000u);
    const Halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Halves);
#endif
    std::memcpy(p, &h, sizeof h);
}

template <class T> bool slides(const Problem& p) {
    return !std::is_same_v<T, double> && p.is_separable && p.x.taps == 4 && p.y.taps <= 4 && p.x.up == 1 && p.y.up == 1 &&
           p.x.down <= 2 && p.step % LANES == 0;
}

// One output row from NY rows of the image; GROUP vectors of channels at a time, so that memory is read in long runs.
template <int DOWN, int NY, int GROUP, class T> void slide(const Problem& p, const T* const* rows, const float* along_y, T* out) {
    const float t0 = p.along_x[0], t1 = p.along_x[1], t2 = p.along_x[2], t3 = p.along_x[3];
    std::array<float, NY> ty;
    std::copy(along_y, along_y + NY, ty.begin());
    // Outputs [inner, outer) need no column outside of the image.
    const int64_t inner = std::clamp<int64_t>((p.x.pad + DOWN - 1) / DOWN, 0, p.x.out);
    const int64_t outer = std::clamp<int64_t>(floor_div(p.x.in - 4 + p.x.pad, DOWN) + 1, inner, p.x.out);
    for (int64_t c = 0; c < p.step; c += GROUP * LANES) {
        const auto column = [&](int64_t x) {
            std::array<Vec, GROUP> sum;
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; g++) {
                sum[g] = ty[0] * load(rows[0] + x * p.step + c + g * LANES);
#pragma GCC unroll 4
                for (int m = 1; m < NY; m++) sum[g] += ty[m] * load(rows[m] + x * p.step + c + g * LANES);
            }
            return sum;
        };
        const auto checked = [&](int64_t x) { return x >= 0 && x < p.x.in ? column(x) : std::array<Vec, GROUP>{}; };
        const auto run = [&](int64_t first, int64_t last, const auto& next) {
            if (first >= last) return;
            int64_t x = first * DOWN - p.x.pad;
            std::array<Vec, GROUP> a = next(x), b = next(x + 1), d{};
            if (DOWN == 1) d = next(x + 2);
            for (int64_t o = first; o < last; o++, x += DOWN) {
                if (DOWN == 2) d = next(x + 2);
                const std::array<Vec, GROUP> e = next(x + 3);
#pragma GCC unroll 4
                for (int g = 0; g < GROUP; g++)
                    store(out + o * p.step + c + g * LANES, t0 * a[g] + t1 * b[g] + t2 * d[g] + t3 * e[g]);
                if (DOWN == 1) a = b, b = d, d = e;
                else a = d, b = e;
            }
        };
        run(0, inner, checked);
        run(inner, outer, column);
        run(outer, p.x.out, checked);
    }
}

template <class T> void slide_row(const Problem& p, const T* plane, int64_t o, T* out) {
    const Meeting found = p.y.inside(o);
    std::array<const T*, 4> rows;
    std::array<float, 4> taps;
    for (int64_t m = 0; m < found.count; m++) {
        rows[m] = plane + (found.start + m) * p.x.in * p.step;
        taps[m] = static_cast<float>(p.along_y[found.first + m]);
    }
    const auto with = [&](auto down, auto group) {
        switch (found.count) {
            case 1: return slide<down, 1, group>(p, rows.data(), taps.data(), out);
            case 2: return slide<down, 2, group>(p, rows.data(), taps.data(), out);
            case 3: return slide<down, 3, group>(p, rows.data(), taps.data(), out);
            case 4: return slide<down, 4, group>(p, rows.data(), taps.data(), out);
            default: std::fill(out, out + p.x.out * p.step, T{});
        }
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, 4> four;
    const bool is_wide = p.step % (4 * LANES) == 0;
    if (p.x.down == 1) is_wide ? with(one, four) : with(one, one);
    else is_wide ? with(two, four) : with(two, one);
}

// Output columns [first, first + num) of a problem, as a problem of its own.
Problem strip_of(Problem p, int64_t first, int64_t num) {
    p.x.pad -= first * p.x.down, p.x.out = num;
    return p;
}

// What follows a filter in a generator's layer, done to a row while it is in the cache; see epilogue_cpu.cpp.
struct Finish {
    const float *scale = nullptr, *bias = nullptr, *noise = nullptr;  // per image and channel, channel, pixel; no scale: nothing
    int64_t noise_step = 0;                                           // between two images
    float strength = 0, alpha = 1, gain = 1, clamp = -1;

    template <class T> void row(const Problem& p, int64_t image, int64_t o, T* out) const {
        const int64_t channels = p.step, whole = channels / LANES * LANES;
        const float *factor = scale + image * channels, *level = noise ? noise + image * noise_step + o * p.x.out : nullptr;
        for (int64_t x = 0; x < p.x.out; x++, out += channels) {
            const float add = level ? level[x] * strength : 0;
            for (int64_t c = 0; c < whole; c += LANES) store(out + c, done(load(out + c), load(factor + c), load(bias + c) + add));
            if (whole == channels) continue;
            T in[LANES] = {};
            float some[2][LANES] = {};
            const int64_t num = channels - whole;
            std::copy_n(out + whole, num, in), std::copy_n(factor + whole, num, some[0]), std::copy_n(bias + whole, num, some[1]);
            store(in, done(load(in), load(some[0]), load(some[1]) + add));
            std::copy_n(in, num, out + whole);
        }
    }

    Vec done(Vec y, Vec factor, Vec offset) const {
        const Vec u = y * factor + offset;
        Vec out = (u > 0 ? u : u * alpha) * gain;
        if (clamp >= 0) out = out > clamp ? Vec{} + clamp : out, out = out < -clamp ? Vec{} - clamp : out;
        return out;
    }
};

template <class T> void run_upfirdn2d(const Problem& p, const T* in, T* out, const Finish& finish) {
    const int64_t row_out = p.x.out * p.step, plane_in = p.x.in * p.y.in * p.step;
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, row_out));
    if constexpr (!std::is_same_v<T, double>)
        if (slides<T>(p))
            return at::parallel_for(0, p.planes * p.y.out, grain, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    slide_row(p, in + i / p.y.out * plane_in, i % p.y.out, out + i * row_out);
                    if constexpr (!std::is_same_v<T, double>)
                        if (finish.scale) finish.row(p, i / p.y.out, i % p.y.out, out + i * row_out);
                }
            });
    // In strips so narrow that the rows which several outputs share are still in the first-level cache.
    const int64_t ideal = STRIP * p.x.up / (p.x.down * p.step), most = p.step < FEW_CHANNELS ? p.x.out : std::max<int64_t>(4, ideal);
    const int64_t num = (p.x.out + most - 1) / most, width = (p.x.out + num - 1) / num;
    at::parallel_for(0, p.planes * p.y.out, grain, [&](int64_t begin, int64_t end) {
        for (int64_t first = 0; first < p.x.out; first += width) {
            const Problem strip = strip_of(p, first, std::min(width, p.x.out - first));
            const Columns columns(strip.x);
            Rows<T> rows(strip, columns);
            for (int64_t i = begin; i < end; i++)
                rows.compute(in + i / p.y.out * plane_in, i % p.y.out, out + i * row_out + first * p.step);
        }
        if constexpr (!std::is_same_v<T, double>)
            for (int64_t i = begin; finish.scale && i < end; i++) finish.row(p, i / p.y.out, i % p.y.out, out + i * row_out);
    });
}

// Split a filter that is an outer product, to float32 precision, into its factors.
bool split(const std::vector<double>& whole, int64_t rows, int64_t cols, std::vector<double>& y, std::vector<double>& x) {
    int64_t peak = 0;
    for (int64_t i = 0; i < rows * cols; i++)
        if (std::abs(whole[i]) > std::abs(whole[peak])) peak = i;
    const double top = whole[peak];
    if (top == 0 || !std::isfinite(top)) return false;
    y.resize(rows), x.resize(cols);
    for (int64_t i = 0; i < rows; i++) y[i] = whole[i * cols + peak % cols];
    for (int64_t j = 0; j < cols; j++) x[j] = whole[peak / cols * cols + j] / top;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++)
            if (!(std::abs(y[i] * x[j] - whole[i * cols + j]) <= 1e-7 * std::abs(top))) return false;
    return true;
}

at::Tensor resampled(const at::Tensor& x, const at::Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x,
                     int64_t down_y, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip_filter,
                     double gain, const Finish& finish) {
    TORCH_CHECK_VALUE(x.dim() == 4, "x has ", x.dim(), " axes, wanted [N, C, H, W]");
    TORCH_CHECK_VALUE(f.device().is_cpu() && f.scalar_type() == at::kFloat && (f.dim() == 1 || f.dim() == 2) &&
                          f.numel() > 0 && f.size(0) <= MAX_TAPS && f.size(-1) <= MAX_TAPS,
                      "the filter is ", f.scalar_type(), " ", f.sizes(), ", wanted float32 on the CPU, [taps] or [fh, fw], at most ",
                      MAX_TAPS, " along each axis");
    TORCH_CHECK_VALUE(up_x >= 1 && up_y >= 1 && down_x >= 1 && down_y >= 1, "up and down factors must be >= 1");
    const bool is_last = !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor image = is_last ? x : x.contiguous();
    const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), fw = f.size(-1), fh = f.size(0);
    const int64_t grown_x = w * up_x + pad_x0 + pad_x1, grown_y = h * up_y + pad_y0 + pad_y1;
    TORCH_CHECK_VALUE(grown_x >= fw && grown_y >= fh, "the padded image ", grown_y, "x", grown_x,
                      " is smaller than the filter ", fh, "x", fw, "; give more padding");

    Problem p;
    p.x = {up_x, down_x, pad_x0, w, (grown_x - fw) / down_x + 1, fw};
    p.y = {up_y, down_y, pad_y0, h, (grown_y - fh) / down_y + 1, fh};
    p.planes = is_last ? n : n * c;
    p.step = is_last ? c : 1;
    const at::Tensor taps = f.contiguous();
    std::vector<double> values(taps.data_ptr<float>(), taps.data_ptr<float>() + taps.numel());
    if (!flip_filter) std::reverse(values.begin(), values.end());
    const bool is_double = x.scalar_type() == at::kDouble;
    p.is_separable = f.dim() == 1 || (!is_double && split(values, fh, fw, p.along_y, p.along_x));
    // The gain goes to the taps as in the reference, rounding to float32 included.
    const auto scaled = [](std::vector<double> v, double factor) {
        for (double& tap : v) tap = static_cast<float>(tap) * static_cast<float>(factor);
        return v;
    };
    if (f.dim() == 1) {
        const double root = std::sqrt(std::abs(gain));
        p.along_x = scaled(values, std::copysign(root, gain)), p.along_y = scaled(values, root);
    } else if (p.is_separable) {
        for (double& tap : p.along_y) tap *= gain;
    } else {
        p.whole = scaled(values, gain);
    }

    at::Tensor y = at::empty({n, c, p.y.out, p.x.out}, x.options(), is_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
    if (y.numel() == 0) return y;
    switch (x.scalar_type()) {
        case at::kFloat: run_upfirdn2d(p, image.data_ptr<float>(), y.data_ptr<float>(), finish); break;
        case at::kDouble: run_upfirdn2d(p, image.data_ptr<double>(), y.data_ptr<double>(), finish); break;
        case at::kBFloat16:
            run_upfirdn2d(p, reinterpret_cast<const Bfloat*>(image.data_ptr()), reinterpret_cast<Bfloat*>(y.data_ptr()), finish);
            break;
        default: TORCH_CHECK_VALUE(false, "images are ", x.scalar_type(), ", wanted float32, float64 or bfloat16");
    }
    return y;
}

at::Tensor upfirdn2d(const at::Tensor& x, const at::Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x,
                     int64_t down_y, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip_filter,
                     double gain) {
    return resampled(x, f, up_x, up_y, down_x, down_y, pad_x0, pad_x1, pad_y0, pad_y1, flip_filter, gain, {});
}

using Optional = std::optional<at::Tensor>;

// A filter of channels-last images without resampling, and what `epilogue` does, row by row. No gradient.
at::Tensor filter_epilogue(const at::Tensor& x, const at::Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1,
                           double gain, const at::Tensor& scale, const Optional& noise, const Optional& strength,
                           const at::Tensor& bias, double alpha, double act_gain, double clamp) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.scalar_type() != at::kDouble, "x is ", x.scalar_type(), " ", x.sizes(), ", wanted float32 or bfloat16 [N, C, H, W]");
    const int64_t n = x.size(0), c = x.size(1), h = x.size(2) + pad_y0 + pad_y1 - f.size(0) + 1, w = x.size(3) + pad_x0 + pad_x1 - f.size(-1) + 1;
    const auto parameter = [](const at::Tensor& t, const char* name, int64_t numel) {
        TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == numel, name, " is ", t.scalar_type(), " ", t.sizes(),
                          ", wanted ", numel, " contiguous values of float32");
        return t.const_data_ptr<float>();
    };
    Finish finish{parameter(scale, "scale", n * c), parameter(bias, "bias", c)};
    if (noise && noise->defined()) {
        const bool is_each = noise->numel() != h * w;
        TORCH_CHECK_VALUE(strength && strength->defined(), "noise without a strength; wanted both");
        finish.noise = parameter(*noise, "noise", (is_each ? n : 1) * h * w), finish.noise_step = is_each ? h * w : 0;
        finish.strength = *parameter(*strength, "strength", 1);
    }
    finish.alpha = static_cast<float>(alpha), finish.gain = static_cast<float>(act_gain), finish.clamp = static_cast<float>(clamp);
    TORCH_CHECK_VALUE(!x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast), "x has strides ", x.strides(), ", wanted channels-last");
    return resampled(x, f, 1, 1, 1, 1, pad_x0, pad_x1, pad_y0, pad_y1, false, gain, finish);
}

// ---- bias_act, piecewise linear activations

enum Act : int64_t { LINEAR = 1, RELU = 2, LRELU = 3 };  // linear runs as lrelu with alpha 1

template <class A> struct Settings {
    A alpha, gain, clamp;  // clamp < 0: none
    bool is_clamped, by_value;
};

template <int ACT, class A> inline A slope_at(A u, A alpha) {
    if constexpr (ACT == RELU) return u > A(0) ? A(1) : A(0);
    return u > A(0) ? A(1) : alpha;
}

template <int ACT, class A> inline A value_at(A u, A alpha) {
    if constexpr (ACT == RELU) return u <= A(0) ? A(0) : u;  // NaN stays
    return u > A(0) ? u : u * alpha;
}

// Order 0: y from x. Order 1: x times the slope at ref; ref is the input (+ b), or without a clamp also the result.
template <int ACT, int ORDER, bool CLAMP, class A> inline A element(A x, A ref, A b, const Settings<A>& s) {
    if constexpr (ORDER == 0) {
        A y = value_at<ACT>(x + b, s.alpha) * s.gain;
        if constexpr (CLAMP) y = y > s.clamp ? s.clamp : (y < -s.clamp ? -s.clamp : y);
        return y;
    }
    const A u = CLAMP ? ref + b : ref, dx = x * (slope_at<ACT>(u, s.alpha) * s.gain);
    if constexpr (CLAMP) return std::abs(value_at<ACT>(u, s.alpha) * s.gain) <= s.clamp ? dx : A(0);
    return dx;
}

template <int ACT, int ORDER, bool CLAMP, class T>
void run_bias_act(const T* x, const T* ref, const T* b, T* y, int64_t numel, int64_t inner, int64_t channels,
                  const Settings<compute_t<T>>& s) {
    using A = compute_t<T>;
    // One value of b for `inner` neighbours, or neighbours with a bias each: then b is repeated to fill registers.
    std::vector<A> table(b ? channels : 1, A(0));
    if (b)
        for (int64_t c = 0; c < channels; c++) table[c] = widen(b[c]);
    if (!b) inner = std::clamp<int64_t>(numel, 1, GRAIN), channels = 1;
    const bool is_last = b && inner == 1;
    if (is_last) {
        const int64_t copies = std::max<int64_t>(1, 1024 / channels);
        table.resize(channels * copies);
        for (int64_t i = channels; i < channels * copies; i++) table[i] = table[i - channels];
    }
    const int64_t size = is_last ? static_cast<int64_t>(table.size()) : inner, num = (numel + size - 1) / size;
    at::parallel_for(0, num, std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t start = row * size, len = std::min(size, numel - start);
            const T* from = x + start;
            const T* known = ORDER ? ref + start : nullptr;
            T* __restrict to = y + start;
            if (is_last) {
                const A* bias = table.data();
#pragma GCC ivdep
                for (int64_t i = 0; i < len; i++)
                    to[i] = narrow<T>(element<ACT, ORDER, CLAMP, A>(widen(from[i]), ORDER ? widen(known[i]) : A(0), bias[i], s));
            } else {
                const A bias = table[row % channels];
#pragma GCC ivdep
                for (int64_t i = 0; i < len; i++)
                    to[i] = narrow<T>(element<ACT, ORDER, CLAMP, A>(widen(from[i]), ORDER ? widen(known[i]) : A(0), bias, s));
            }
        }
    });
}

template <class T, int ACT> void choose(const T* x, const T* ref, const T* b, T* y, int64_t order, int64_t numel,
                                        int64_t inner, int64_t channels, const Settings<compute_t<T>>& s) {
    if (order == 0 && !s.is_clamped) return run_bias_act<ACT, 0, false>(x, ref, b, y, numel, inner, channels, s);
    if (order == 0) return run_bias_act<ACT, 0, true>(x, ref, b, y, numel, inner, channels, s);
    if (s.is_clamped) return run_bias_act<ACT, 1, true>(x, ref, b, y, numel, inner, channels, s);
    // Without a clamp the sign of the input is all that counts, and input + b is not needed where the result is given.
    if (s.by_value || !b) return run_bias_act<ACT, 1, false>(x, ref, static_cast<const T*>(nullptr), y, numel, inner, channels, s);
    Settings<compute_t<T>> open = s;
    open.clamp = std::numeric_limits<compute_t<T>>::infinity();
    return run_bias_act<ACT, 1, true>(x, ref, b, y, numel, inner, channels, open);
}

template <class T> void choose_act(const at::Tensor& x, const at::Tensor& ref, const at::Tensor& b, at::Tensor& y,
                                   int64_t order, int64_t act, int64_t inner, double alpha, double gain, double clamp,
                                   bool by_value) {
    const auto data = [](const at::Tensor& t) { return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr; };
    using A = compute_t<T>;
    const Settings<A> s{act == LINEAR ? A(1) : static_cast<A>(alpha), static_cast<A>(gain), static_cast<A>(clamp), clamp >= 0, by_value};
    const int64_t channels = b.defined() ? b.numel() : 1;
    const T* r = ref.defined() ? data(ref) : data(x);  // linear without a clamp looks at none
    if (act == RELU) return choose<T, RELU>(data(x), r, data(b), data(y), order, x.numel(), inner, channels, s);
    return choose<T, LRELU>(data(x), r, data(b), data(y), order, x.numel(), inner, channels, s);
}

at::Tensor bias_act(const at::Tensor& x, const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& xref,
                    const std::optional<at::Tensor>& yref, const std::optional<at::Tensor>& /*dy: for curvature*/,
                    int64_t order, int64_t dim, int64_t act, double alpha,
                    double gain, double clamp) {
    TORCH_CHECK_VALUE(act == LINEAR || act == RELU || act == LRELU,
                      "activation ", act, " has no CPU kernel, wanted 1 (linear), 2 (relu) or 3 (lrelu)");
    TORCH_CHECK_VALUE(order == 0 || order == 1, "order is ", order, ", wanted 0 or 1: there is no curvature");
    const bool is_last = x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
    const auto format = is_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const at::Tensor in = x.contiguous(format);
    at::Tensor ref, bias;
    const bool by_value = !(xref && xref->defined());
    if (order) {
        ref = by_value ? (yref ? *yref : at::Tensor()) : *xref;
        TORCH_CHECK_VALUE(ref.defined() || (act == LINEAR && clamp < 0), "the slope needs xref or yref");
        TORCH_CHECK_VALUE(!by_value || clamp < 0, "with a clamp the slope needs xref");
        if (ref.defined()) {
            TORCH_CHECK_VALUE(ref.sizes() == x.sizes() && ref.scalar_type() == x.scalar_type(), "xref or yref differs from x in shape or type");
            ref = ref.contiguous(format);
        }
    }
    int64_t inner = 1;
    if (b && b->defined()) {
        TORCH_CHECK_VALUE(dim >= 0 && dim < x.dim() && b->dim() == 1 && b->size(0) == x.size(dim) && b->scalar_type() == x.scalar_type(),
                          "bias ", b->sizes(), " does not fit axis ", dim, " of x ", x.sizes());
        bias = b->contiguous();
        if (is_last) inner = dim == 1 ? 1 : dim == 3 ? x.size(1) : dim == 2 ? x.size(1) * x.size(3) : x[0].numel();
        else for (int64_t i = dim + 1; i < x.dim(); i++) inner *= x.size(i);
    }
    at::Tensor y = at::empty(x.sizes(), x.options(), format);
    if (y.numel() == 0) return y;
    switch (x.scalar_type()) {
        case at::kFloat: choose_act<float>(in, ref, bias, y, order, act, inner, alpha, gain, clamp, by_value); break;
        case at::kDouble: choose_act<double>(in, ref, bias, y, order, act, inner, alpha, gain, clamp, by_value); break;
        case at::kBFloat16: choose_act<Bfloat>(in, ref, bias, y, order, act, inner, alpha, gain, clamp, by_value); break;
        default: TORCH_CHECK_VALUE(false, "x is ", x.scalar_type(), ", wanted float32, float64 or bfloat16");
    }
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, CPU, m) {
    m.impl("upfirdn2d", &upfirdn2d);
    m.impl("filter_epilogue", &filter_epilogue);
    m.impl("bias_act", &bias_act);
}
