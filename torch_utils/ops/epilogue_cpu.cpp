// What follows a convolution, in one pass over memory, with its first and second derivatives.
//
// The definition, schemas and shape functions are in epilogue.py, formulas of gradients in derivatives_cpu.cpp; here are
// only the numbers. Images are channels-last; arithmetic and all parameters are float32 for float32 and bfloat16 images,
// float64 for float64. Sums are made per block of pixels and then over the blocks, so they don't depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1 << 14;  // elements: fits the second-level cache with all that belongs to it
constexpr int64_t FEW_CHANNELS = 16;  // below, a pixel's channels don't fill a vector register

using Optional = std::optional<at::Tensor>;

// u = x * scale + noise * strength + bias;  y = clip(gain * (u > 0 ? u : alpha * u)).
struct Settings {
    double alpha, gain, clamp;  // clamp < 0: none
};

// A batch of images as rows of `width` values that have parameters of their own: `repeat` pixels where channels are few.
template <class T> struct Batch {
    using A = compute_t<T>;
    int64_t num, pixels, channels, repeat, width, rows_per_block, blocks;  // blocks: per image
    at::Tensor noise, strength;
    std::vector<A> scale, bias;  // [num][width], [width]
    int64_t noise_step = 0;      // between the noise of two images

    Batch(const at::Tensor& x, const Optional& scale_in, const Optional& noise_in, const Optional& strength_in,
          const Optional& bias_in)
        : num(x.size(0)), pixels(x.size(2) * x.size(3)), channels(x.size(1)) {
        const auto type = c10::CppTypeToScalarType<A>::value;
        const auto check = [&](const Optional& t, const char* name, c10::IntArrayRef shape) {
            TORCH_CHECK_VALUE(t->sizes() == shape && t->scalar_type() == type && t->device().is_cpu(), name, " is ",
                              t->scalar_type(), " ", t->sizes(), ", wanted ", type, " ", shape);
        };
        const bool has_noise = noise_in && noise_in->defined();
        // Pixels share rows only where none has something of its own.
        repeat = !has_noise && channels < FEW_CHANNELS ? std::max<int64_t>(1, std::min<int64_t>(pixels, 256 / channels)) : 1;
        while (pixels % repeat) repeat--;
        width = repeat * channels;
        rows_per_block = std::max<int64_t>(1, BLOCK / width);
        blocks = (rows() + rows_per_block - 1) / rows_per_block;
        scale.assign(num * width, A(1)), bias.assign(width, A(0));
        if (scale_in && scale_in->defined()) {
            check(scale_in, "scale", {num, channels});
            const at::Tensor t = scale_in->contiguous();
            for (int64_t n = 0; n < num; n++)
                for (int64_t i = 0; i < width; i++) scale[n * width + i] = t.data_ptr<A>()[n * channels + i % channels];
        }
        if (bias_in && bias_in->defined()) {
            check(bias_in, "bias", {channels});
            const at::Tensor t = bias_in->contiguous();
            for (int64_t i = 0; i < width; i++) bias[i] = t.data_ptr<A>()[i % channels];
        }
        if (has_noise) {
            TORCH_CHECK_VALUE(noise_in->scalar_type() == type && (noise_in->numel() == pixels || noise_in->numel() == num * pixels),
                              "noise is ", noise_in->scalar_type(), " ", noise_in->sizes(), ", wanted one value per pixel");
            noise = noise_in->contiguous();
            noise_step = noise.numel() == pixels ? 0 : pixels;
            TORCH_CHECK_VALUE(strength_in && strength_in->defined() && strength_in->numel() == 1 && strength_in->scalar_type() == type,
                              "noise needs a strength, one number");
            strength = *strength_in;
        }
    }

    int64_t rows() const { return pixels / repeat; }
    const A* noise_of(int64_t n) const { return noise.defined() ? noise.data_ptr<A>() + n * noise_step : nullptr; }
    A amount() const { return noise.defined() ? *strength.data_ptr<A>() : A(0); }

    // f(image, first row, end, index of the block) for all blocks, by all threads.
    template <class F> void for_blocks(F f) const {
        const int64_t grain = std::max<int64_t>(1, BLOCK / std::max<int64_t>(1, rows_per_block * width));
        at::parallel_for(0, num * blocks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t n = i / blocks, first = i % blocks * rows_per_block;
                f(n, first, std::min(first + rows_per_block, rows()), i);
            }
        });
    }

    // Sums [num or 1][channels] of what the blocks summed, sums [num * blocks][width].
    at::Tensor total(const std::vector<A>& sums, bool per_image) const {
        std::vector<double> out((per_image ? num : 1) * channels, 0.0);
        for (int64_t i = 0; i < num * blocks; i++) {
            double* to = out.data() + (per_image ? i / blocks * channels : 0);
            for (int64_t j = 0; j < width; j += channels)
                for (int64_t c = 0; c < channels; c++) to[c] += sums[i * width + j + c];
        }
        const auto type = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
        at::Tensor t = per_image ? at::empty({num, channels}, type) : at::empty({channels}, type);
        std::copy(out.begin(), out.end(), t.template data_ptr<A>());
        return t;
    }
};

template <bool CLAMP, class A> inline A value(A u, A alpha, A gain, A clamp) {
    const A y = (u > A(0) ? u : u * alpha) * gain;
    if constexpr (CLAMP) return y > clamp ? clamp : (y < -clamp ? -clamp : y);
    return y;
}

template <bool CLAMP, class A> inline A slope(A u, A alpha, A gain, A clamp) {
    const A s = u > A(0) ? gain : gain * alpha;
    if constexpr (CLAMP) return std::abs(s * u) <= clamp ? s : A(0);
    return s;
}

template <bool CLAMP, class T> void forward_of(const Batch<T>& b, const Settings& s, const T* x, T* y) {
    using A = compute_t<T>;
    const A alpha = static_cast<A>(s.alpha), gain = static_cast<A>(s.gain), clamp = static_cast<A>(s.clamp), amount = b.amount();
    b.for_blocks([&](int64_t n, int64_t first, int64_t end, int64_t) {
        const A *scale = b.scale.data() + n * b.width, *bias = b.bias.data(), *noise = b.noise_of(n);
        for (int64_t row = first; row < end; row++) {
            const int64_t start = (n * b.rows() + row) * b.width;
            const A add = noise ? noise[row] * amount : A(0);
            const T* from = x + start;
            T* to = y + start;  // may be x itself
#pragma GCC ivdep
            for (int64_t i = 0; i < b.width; i++)
                to[i] = narrow<T>(value<CLAMP>(widen(from[i]) * scale[i] + (bias[i] + add), alpha, gain, clamp));
        }
    });
}

// RESULT: x is the forward's result instead, without a clamp; by_scale then gets sums of du * u instead of du * x.
template <bool CLAMP, bool SUMS, bool RESULT, class T>
void backward_of(const Batch<T>& b, const Settings& s, const T* dy, const T* x, T* dx, compute_t<T>* by_scale,
                 compute_t<T>* by_bias, compute_t<T>* by_noise) {
    using A = compute_t<T>;
    const A alpha = static_cast<A>(s.alpha), gain = static_cast<A>(s.gain), clamp = static_cast<A>(s.clamp), amount = b.amount();
    const A above = static_cast<A>(1 / s.gain), below = static_cast<A>(1 / (s.gain * s.alpha));
    b.for_blocks([&](int64_t n, int64_t first, int64_t end, int64_t block) {
        const A *scale = b.scale.data() + n * b.width, *bias = b.bias.data(), *noise = b.noise_of(n);
        A* __restrict sx = by_scale + (SUMS ? block * b.width : 0);
        A* __restrict sb = by_bias + (SUMS ? block * b.width : 0);
        A* __restrict sn = by_noise + (SUMS ? block * b.width : 0);
        for (int64_t row = first; row < end; row++) {
            const int64_t start = (n * b.rows() + row) * b.width;
            const A level = noise ? noise[row] : A(0), add = level * amount;
            const T *g = dy + start, *from = x + start;
            T* __restrict to = dx + start;
#pragma GCC ivdep
            for (int64_t i = 0; i < b.width; i++) {
                const A seen = widen(from[i]), v = RESULT ? seen * (seen > A(0) ? above : below) : seen;
                const A u = RESULT ? seen : v * scale[i] + (bias[i] + add);
                const A du = widen(g[i]) * slope<CLAMP>(u, alpha, gain, clamp);
                to[i] = narrow<T>(du * scale[i]);
                if constexpr (SUMS) sx[i] += du * v, sb[i] += du, sn[i] += du * level;
            }
        }
    });
}

// Cotangents: a of dx, p of dscale [num][width], q of dstrength, r of dbias [width].
template <bool CLAMP, class T>
void second_of(const Batch<T>& b, const Settings& s, const T* a, const std::vector<compute_t<T>>& p, compute_t<T> q,
               const std::vector<compute_t<T>>& r, const T* dy, const T* x, T* ddy, T* dx, compute_t<T>* by_scale) {
    using A = compute_t<T>;
    const A alpha = static_cast<A>(s.alpha), gain = static_cast<A>(s.gain), clamp = static_cast<A>(s.clamp), amount = b.amount();
    b.for_blocks([&](int64_t n, int64_t first, int64_t end, int64_t block) {
        const A *scale = b.scale.data() + n * b.width, *bias = b.bias.data(), *noise = b.noise_of(n);
        const A *pn = p.data() + n * b.width, *rn = r.data();
        A* __restrict sx = by_scale + block * b.width;
        for (int64_t row = first; row < end; row++) {
            const int64_t start = (n * b.rows() + row) * b.width;
            const A level = noise ? noise[row] : A(0), add = level * amount;
            const T *an = a + start, *g = dy + start, *from = x + start;
            T* __restrict to = ddy + start;
            T* __restrict back = dx + start;
#pragma GCC ivdep
            for (int64_t i = 0; i < b.width; i++) {
                const A v = widen(from[i]), m = slope<CLAMP>(v * scale[i] + (bias[i] + add), alpha, gain, clamp);
                const A du = m * widen(g[i]), w = widen(an[i]);
                to[i] = narrow<T>(m * (w * scale[i] + pn[i] * v + (q * level + rn[i])));
                back[i] = narrow<T>(du * pn[i]);
                sx[i] += w * du;
            }
        }
    });
}

at::Tensor as_images(const at::Tensor& x, const char* name, const at::Tensor* like = nullptr) {
    TORCH_CHECK_VALUE(x.dim() == 4, name, " has ", x.dim(), " axes, wanted [N, C, H, W]");
    TORCH_CHECK_VALUE(!like || (x.sizes() == like->sizes() && x.scalar_type() == like->scalar_type()), name, " is ",
                      x.scalar_type(), " ", x.sizes(), ", which differs from x");
    return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// f(type of the elements as they are in memory) for the types that have kernels.
template <class F> void dispatch(const at::Tensor& x, F f) {
    switch (x.scalar_type()) {
        case at::kFloat: return f(float{});
        case at::kDouble: return f(double{});
        case at::kBFloat16: return f(Bfloat{});
        default: TORCH_CHECK_VALUE(false, "x is ", x.scalar_type(), ", wanted float32, float64 or bfloat16");
    }
}

template <class T> T* data(const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); }

at::Tensor& run_forward(const at::Tensor& in, at::Tensor& y, const Optional& scale, const Optional& noise,
                        const Optional& strength, const Optional& bias, const Settings& s) {
    if (y.numel() == 0) return y;
    dispatch(in, [&](auto element) {
        using T = decltype(element);
        const Batch<T> b(in, scale, noise, strength, bias);
        if (s.clamp >= 0) return forward_of<true>(b, s, data<T>(in), data<T>(y));
        forward_of<false>(b, s, data<T>(in), data<T>(y));
    });
    return y;
}

at::Tensor epilogue(const at::Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength,
                    const Optional& bias, double alpha, double gain, double clamp, bool /*keeps_input: for the gradient*/) {
    const at::Tensor in = as_images(x, "x");
    at::Tensor y = at::empty(in.sizes(), in.options(), at::MemoryFormat::ChannelsLast);
    return run_forward(in, y, scale, noise, strength, bias, {alpha, gain, clamp});
}

at::Tensor& epilogue_(at::Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength,
                      const Optional& bias, double alpha, double gain, double clamp) {
    TORCH_CHECK_VALUE(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast), "x is not a channels-last [N, C, H, W]");
    return run_forward(x, x, scale, noise, strength, bias, {alpha, gain, clamp});
}

using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <bool RESULT>
Grads run_backward(const at::Tensor& dy, const at::Tensor& x, const Optional& scale, const Optional& noise,
                   const Optional& strength, const Optional& bias, const Settings& s, bool with_sums) {
    const at::Tensor in = as_images(x, "x"), g = as_images(dy, "dy", &x);
    at::Tensor dx = at::empty(in.sizes(), in.options(), at::MemoryFormat::ChannelsLast), dscale, dstrength, dbias;
    dispatch(in, [&](auto element) {
        using T = decltype(element);
        using A = compute_t<T>;
        const Batch<T> b(in, scale, noise, strength, bias);
        const int64_t size = with_sums ? b.num * b.blocks * b.width : 0;
        std::vector<A> sx(size, A(0)), sb(size, A(0)), sn(size, A(0));
        const auto run = [&](auto f) { f(b, s, data<T>(g), data<T>(in), data<T>(dx), sx.data(), sb.data(), sn.data()); };
        if (with_sums) run(s.clamp >= 0 ? backward_of<true, true, RESULT, T> : backward_of<false, true, RESULT, T>);
        else run(s.clamp >= 0 ? backward_of<true, false, RESULT, T> : backward_of<false, false, RESULT, T>);
        if (!with_sums) sx.assign(b.num * b.blocks * b.width, A(0)), sb = sx, sn = sx;
        dscale = b.total(sx, true), dbias = b.total(sb, false);
        double sum = 0;
        for (const A v : sn) sum += v;
        dstrength = at::empty({}, dbias.options());
        *dstrength.data_ptr<A>() = static_cast<A>(sum);
        if (!RESULT || !with_sums) return;
        // x = (u - noise * strength - bias) / scale, and the sums with u, with the noise and with 1 are known.
        const at::Tensor by_one = b.total(sb, true), by_noise = b.total(sn, true);
        A* to = dscale.data_ptr<A>();
        for (int64_t i = 0; i < b.num * b.channels; i++) {
            const int64_t n = i / b.channels, c = i % b.channels;
            to[i] = (to[i] - b.amount() * by_noise.data_ptr<A>()[i] - b.bias[c] * by_one.data_ptr<A>()[i]) / b.scale[n * b.width + c];
        }
    });
    return {dx, dscale, dstrength, dbias};
}

Grads epilogue_grad(const at::Tensor& dy, const at::Tensor& x, const Optional& scale, const Optional& noise,
                    const Optional& strength, const Optional& bias, double alpha, double gain, double clamp, bool with_sums) {
    return run_backward<false>(dy, x, scale, noise, strength, bias, {alpha, gain, clamp}, with_sums);
}

Grads epilogue_result_grad(const at::Tensor& dy, const at::Tensor& y, const Optional& scale, const Optional& noise,
                           const Optional& strength, const Optional& bias, double alpha, double gain, double clamp, bool with_sums) {
    TORCH_CHECK_VALUE(clamp < 0, "clamp is ", clamp, ", but a result tells of its input only where there is none");
    return run_backward<true>(dy, y, scale, noise, strength, bias, {alpha, gain, clamp}, with_sums);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> epilogue_grad_grad(
    const at::Tensor& ddx, const Optional& ddscale, const Optional& ddstrength, const Optional& ddbias,
    const at::Tensor& dy, const at::Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength,
    const Optional& bias, double alpha, double gain, double clamp) {
    const at::Tensor in = as_images(x, "x"), g = as_images(dy, "dy", &x), a = as_images(ddx, "ddx", &x);
    const Settings s{alpha, gain, clamp};
    at::Tensor ddy = at::empty(in.sizes(), in.options(), at::MemoryFormat::ChannelsLast);
    at::Tensor dx = at::empty(in.sizes(), in.options(), at::MemoryFormat::ChannelsLast), dscale;
    dispatch(in, [&](auto element) {
        using T = decltype(element);
        using A = compute_t<T>;
        const Batch<T> b(in, scale, noise, strength, bias);
        const auto given = [](const Optional& t) { return t && t->defined(); };
        std::vector<A> p(b.num * b.width, A(0)), r(b.width, A(0)), sums(b.num * b.blocks * b.width, A(0));
        if (given(ddscale)) {
            const at::Tensor t = ddscale->contiguous();
            for (int64_t n = 0; n < b.num; n++)
                for (int64_t i = 0; i < b.width; i++) p[n * b.width + i] = t.data_ptr<A>()[n * b.channels + i % b.channels];
        }
        if (given(ddbias)) {
            const at::Tensor t = ddbias->contiguous();
            for (int64_t i = 0; i < b.width; i++) r[i] = t.data_ptr<A>()[i % b.channels];
        }
        const A q = given(ddstrength) ? *ddstrength->data_ptr<A>() : A(0);
        (s.clamp >= 0 ? second_of<true, T> : second_of<false, T>)(b, s, data<T>(a), p, q, r, data<T>(g), data<T>(in),
                                                                 data<T>(ddy), data<T>(dx), sums.data());
        dscale = b.total(sums, true);
    });
    return {ddy, dx, dscale};
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, CPU, m) {
    m.impl("epilogue", &epilogue);
    m.impl("epilogue_", &epilogue_);
    m.impl("epilogue_grad", &epilogue_grad);
    m.impl("epilogue_result_grad", &epilogue_result_grad);
    m.impl("epilogue_grad_grad", &epilogue_grad_grad);
}
