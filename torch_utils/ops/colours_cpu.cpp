// Products per pixel between features of many channels and a few colours, in one pass over memory.
//
// The definition, schemas, shape functions and the choice are in colours.py, formulas of gradients in
// derivatives_cpu.cpp; here are only the numbers. Features are channels-last [N, C, H, W], float32, float64 or bfloat16;
// colours [N, O, H, W] are contiguous and, like the kernels [N, O, C], float32 (float64 with float64). Sums over pixels
// are made per block and then over the blocks, so they don't depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "elements_cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;  // pixels that a thread takes at a time
constexpr int64_t CHUNK = 64;   // channels whose sums fit the registers, three colours of them
constexpr int64_t MOST = 4;     // colours

// What the products have in common: sizes, and blocks of pixels of one image.
struct Shape {
    int64_t num, colours, channels, pixels, blocks;

    Shape(const at::Tensor& features, int64_t colours)
        : num(features.size(0)), colours(colours), channels(features.size(1)), pixels(features.size(2) * features.size(3)),
          blocks((pixels + BLOCK - 1) / BLOCK) {}

    // f(image, first pixel, end, index of the block) for all blocks, by all threads.
    template <class F> void for_blocks(F f) const {
        const int64_t grain = std::max<int64_t>(1, (1 << 14) / (BLOCK * channels));
        at::parallel_for(0, num * blocks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                const int64_t first = i % blocks * BLOCK;
                f(i / blocks, first, std::min(first + BLOCK, pixels), i);
            }
        });
    }
};

// x[n][p][c] = sum over o of k[n][o][c] * y[n][o][p]
template <int O, class T> void many(const Shape& s, const compute_t<T>* y, const compute_t<T>* k, T* x) {
    using A = compute_t<T>;
    s.for_blocks([&](int64_t n, int64_t first, int64_t end, int64_t) {
        const A* kernel = k + n * O * s.channels;
        for (int64_t p = first; p < end; p++) {
            A colour[O];
            for (int o = 0; o < O; o++) colour[o] = y[(n * O + o) * s.pixels + p];
            T* __restrict to = x + (n * s.pixels + p) * s.channels;
#pragma GCC ivdep
            for (int64_t c = 0; c < s.channels; c++) {
                A sum = 0;
#pragma GCC unroll 4
                for (int o = 0; o < O; o++) sum += kernel[o * s.channels + c] * colour[o];
                to[c] = narrow<T>(sum);
            }
        }
    });
}

// k[n][o][c] = sum over p of y[n][o][p] * x[n][p][c]
template <int O, class T> void kernels(const Shape& s, const T* x, const compute_t<T>* y, compute_t<T>* k) {
    using A = compute_t<T>;
    const int64_t size = O * s.channels;
    std::vector<A> sums(s.num * s.blocks * size);
    s.for_blocks([&](int64_t n, int64_t first, int64_t end, int64_t block) {
        for (int64_t start = 0; start < s.channels; start += CHUNK) {
            const int64_t num = std::min(CHUNK, s.channels - start);
            A sum[O][CHUNK] = {};
            const auto add = [&](int64_t len) {
                for (int64_t p = first; p < end; p++) {
                    const T* from = x + (n * s.pixels + p) * s.channels + start;
#pragma GCC unroll 4
                    for (int o = 0; o < O; o++) {
                        const A colour = y[(n * O + o) * s.pixels + p];
                        A* __restrict to = sum[o];
#pragma GCC ivdep
                        for (int64_t c = 0; c < len; c++) to[c] += colour * widen(from[c]);
                    }
                }
            };
            if (num == CHUNK) add(CHUNK);
            else add(num);
            for (int o = 0; o < O; o++) std::copy(sum[o], sum[o] + num, sums.data() + block * size + o * s.channels + start);
        }
    });
    for (int64_t n = 0; n < s.num; n++)
        for (int64_t i = 0; i < size; i++) {
            double total = 0;
            for (int64_t b = 0; b < s.blocks; b++) total += sums[(n * s.blocks + b) * size + i];
            k[n * size + i] = static_cast<A>(total);
        }
}

at::ScalarType kind_of(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

at::Tensor last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

void check(const at::Tensor& features, const at::Tensor* colours, const at::Tensor* kernels) {
    TORCH_CHECK_VALUE(features.dim() == 4, "features are ", features.sizes(), ", wanted [N, C, H, W]");
    const auto kind = kind_of(features.scalar_type());
    if (colours)
        TORCH_CHECK_VALUE(colours->dim() == 4 && colours->scalar_type() == kind && colours->size(0) == features.size(0) && colours->size(1) <= MOST &&
                              colours->size(1) > 0 && colours->sizes().slice(2) == features.sizes().slice(2),
                          "colours are ", colours->scalar_type(), " ", colours->sizes(), ", wanted ", kind, " [N, 1 to ", MOST, ", H, W] of features ", features.sizes());
    if (kernels)
        TORCH_CHECK_VALUE(kernels->dim() == 3 && kernels->scalar_type() == kind && kernels->size(0) == features.size(0) && kernels->size(1) <= MOST &&
                              kernels->size(1) > 0 && kernels->size(2) == features.size(1),
                          "kernels are ", kernels->scalar_type(), " ", kernels->sizes(), ", wanted ", kind, " [N, 1 to ", MOST, ", C] of features ", features.sizes());
}

// f(number of colours, type of the elements of the features), both known to the compiler.
template <class F> void dispatch(int64_t colours, at::ScalarType type, F f) {
    const auto with = [&](auto element) {
        switch (colours) {
            case 1: return f(std::integral_constant<int, 1>{}, element);
            case 2: return f(std::integral_constant<int, 2>{}, element);
            case 3: return f(std::integral_constant<int, 3>{}, element);
            default: return f(std::integral_constant<int, 4>{}, element);
        }
    };
    switch (type) {
        case at::kFloat: return with(float{});
        case at::kDouble: return with(double{});
        case at::kBFloat16: return with(Bfloat{});
        default: TORCH_CHECK_VALUE(false, "features are ", type, ", wanted float32, float64 or bfloat16");
    }
}

template <class T> T* data(const at::Tensor& t) { return static_cast<T*>(t.data_ptr()); }

at::Tensor colours_few(const at::Tensor& features, const at::Tensor& kernels) {
    check(features, nullptr, &kernels);
    const at::Tensor x = last(features).permute({0, 2, 3, 1}).flatten(1, 2);  // [N, H * W, C]
    const at::Tensor y = at::bmm(kernels.to(x.scalar_type()), x.transpose(1, 2));  // sums along channels are what it is good at
    return y.to(kernels.scalar_type()).view({y.size(0), y.size(1), features.size(2), features.size(3)});
}

at::Tensor colours_many(const at::Tensor& colours, const at::Tensor& kernels_in, at::ScalarType type) {
    TORCH_CHECK_VALUE(colours.dim() == 4 && kernels_in.dim() == 3, "colours ", colours.sizes(), " and kernels ", kernels_in.sizes(),
                      ", wanted [N, O, H, W] and [N, O, C]");
    at::Tensor x = at::empty({colours.size(0), kernels_in.size(2), colours.size(2), colours.size(3)}, colours.options().dtype(type),
                             at::MemoryFormat::ChannelsLast);
    check(x, &colours, &kernels_in);
    TORCH_CHECK_VALUE(colours.size(1) == kernels_in.size(1), "colours ", colours.sizes(), " differ in number from kernels ", kernels_in.sizes());
    if (x.numel() == 0) return x;
    const at::Tensor y = colours.contiguous(), k = kernels_in.contiguous();
    const Shape s(x, k.size(1));
    dispatch(s.colours, type, [&](auto o, auto element) {
        using T = decltype(element);
        many<o, T>(s, data<compute_t<T>>(y), data<compute_t<T>>(k), data<T>(x));
    });
    return x;
}

at::Tensor colours_kernels(const at::Tensor& features, const at::Tensor& colours) {
    check(features, &colours, nullptr);
    const at::Tensor x = last(features), y = colours.contiguous();
    const Shape s(x, y.size(1));
    at::Tensor k = at::empty({s.num, s.colours, s.channels}, y.options());
    if (k.numel() == 0) return k;
    dispatch(s.colours, x.scalar_type(), [&](auto o, auto element) {
        using T = decltype(element);
        kernels<o, T>(s, data<T>(x), data<compute_t<T>>(y), data<compute_t<T>>(k));
    });
    return k;
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, CPU, m) {
    m.impl("colours_few", &colours_few);
    m.impl("colours_many", &colours_many);
    m.impl("colours_kernels", &colours_kernels);
}
