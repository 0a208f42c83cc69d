// 3x3 convolutions for the CPU where they beat torch's: Winograd's at stride 1 and 2, forward, transposed and to weights;
// gradients to weights of few tiles at stride 2 by products alone.
//
// Schemas, shape functions and the choice between these and torch's own are in conv2d_cpu.py, formulas of gradients in
// derivatives_cpu.cpp; here are only the numbers. Images and their gradients are channels-last, float32 or bfloat16;
// arithmetic is float32, results are rounded once.
//
// Sources: Winograd, "Arithmetic Complexity of Computations", 1980; Lavin, Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2016 (arXiv:1509.09308). The sample points 0, +-1/sqrt(2), +-sqrt(2), infinity are ours: with the
// usual 0, +-1, +-2, infinity rounding errors are twice as large (tests/test_conv2d_cpu.py has the bound). Those of stride 2,
// 0, +-0.7, +-1.7, have a fifth less than the former without infinity.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

// ---- Vectors

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 14, COLS = 2;  // 28 sums in 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6, COLS = 2;  // 12 sums in 16 registers
#else
constexpr int LANES = 4, ROWS = 6, COLS = 4;  // 24 sums in 32 registers
#endif
constexpr int64_t PANEL = LANES * COLS;  // columns of a product that are made at once

typedef float Vec __attribute__((vector_size(LANES * sizeof(float))));

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t channels) {  // whole panels, and rows that don't fall into the same cache set
    return ceil_div(channels, PANEL) * PANEL + LANES;
}

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

struct Bfloat {
    uint16_t bits;
};
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

inline Vec load(const Bfloat* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, Words) << 16);
}
// To the nearest, ties to even.
inline void store(Bfloat* p, Vec v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    const Words u = (Words)v, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const Words is_nan = (Words)((u & 0x7fffffffu) > 0x7f800000u);  // all bits or none
    const Halves h = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), Halves);
#endif
    std::memcpy(p, &h, sizeof h);
}
inline float widen(float v) { return v; }
inline float widen(Bfloat v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }

template <class T> inline T narrow(float v) { return v; }
template <> inline Bfloat narrow<Bfloat>(float v) {
    Bfloat all[LANES];
    store(all, Vec{} + v);
    return all[0];
}

// The first `num` lanes; 0 in the others.
template <class T> inline Vec load(const T* p, int64_t num) {
    if (num >= LANES) return load(p);
    T part[LANES] = {};
    if (num > 0) std::memcpy(part, p, num * sizeof(T));
    return load(part);
}
template <class T> inline void store(T* p, Vec v, int64_t num) {
    if (num >= LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    if (num > 0) std::memcpy(p, part, num * sizeof(T));
}

template <class T> const T* data(const at::Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* data(at::Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// ---- Products

// A sum of products of matrices: c[m][n] (+)= sum over the terms and over k of a(m, k) * b[k][n].
struct Term {
    const float* a;
    const float* b;
};
struct Product {
    int64_t depth;         // number of k in a term
    int64_t a_step;        // from one k to the next; or, for TALL ones, from one m to the next: then k is contiguous
    int64_t b_step;        // from one k to the next
    int64_t c_step;        // from one m to the next
    bool is_added;         // to what c holds
};

// M rows by PANEL columns, in registers. TALL: a(m, k) = a[m * a_step + k], else a(m, k) = a[k * a_step + m].
template <int M, bool TALL> void product(const Product& p, const Term* terms, int64_t num_terms, float* c) {
    Vec sum[M][COLS];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) sum[m][j] = p.is_added ? load(c + m * p.c_step + j * LANES) : Vec{};
    for (int64_t t = 0; t < num_terms; t++) {
        const float* b = terms[t].b;
        // Five rows are within reach of one pointer and the step's multiples 1, 2, 3, 4.
        const int64_t step = p.a_step, step3 = 3 * p.a_step;
        const float* a[3] = {terms[t].a, terms[t].a + 5 * step, terms[t].a + 10 * step};
        for (int64_t k = 0; k < p.depth; k++) {
            Vec right[COLS];
#pragma GCC unroll 4
            for (int j = 0; j < COLS; j++) right[j] = load(b + j * LANES);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                const float left = TALL ? a[m / 5][m % 5 == 3 ? step3 : m % 5 * step] : a[0][m];
#pragma GCC unroll 4
                for (int j = 0; j < COLS; j++) sum[m][j] += right[j] * left;
            }
            b += p.b_step;
            if (TALL) a[0]++, a[1]++, a[2]++;
            else a[0] += step;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) store(c + m * p.c_step + j * LANES, sum[m][j]);
}

template <bool TALL, int M = ROWS>
void product(int64_t rows, const Product& p, const Term* terms, int64_t num_terms, float* c) {
    if constexpr (M > 0) {
        if (rows == M) return product<M, TALL>(p, terms, num_terms, c);
        return product<TALL, M - 1>(rows, p, terms, num_terms, c);
    }
}

// `total` things in blocks of nearly equal size, none larger than `most`.
struct Blocks {
    int64_t total, num, size;
    Blocks(int64_t total, int64_t most) : total(total), num(ceil_div(total, most)), size(ceil_div(total, num)) {
        num = ceil_div(total, size);
    }
    int64_t start(int64_t i) const { return i * size; }
    int64_t len(int64_t i) const { return std::min(size, total - i * size); }
};

// ---- Winograd's F(4x4, 3x3): 4x4 outputs from 6x6 inputs by 6x6 products

constexpr int64_t TILE = 4, KERNEL = 3, POINTS = TILE + KERNEL - 1, PLANES = POINTS * POINTS;
constexpr int64_t FINITE = POINTS - 1, STRIDED = 2 * TILE + 1, TAPS = KERNEL * KERNEL, PARITIES = 4;
constexpr int64_t BUDGET = 12 << 20;  // bytes of transformed tiles at a time: they should stay in the last-level cache
constexpr int64_t GRAD_BUDGET = 4 << 20;  // the same for a kernel's gradient, of which both sides are read over and over
constexpr int64_t LOCAL = 4 << 20;    // bytes of a block and the kernel up to which a block is better done by one thread

// Transforms of a row or column by the sample points 0, P, -P, Q, -Q and, at stride 1 alone, infinity.
template <bool WITH_INFINITY> struct Line {
    static constexpr float P = WITH_INFINITY ? 0.70710678118654752f : 0.7f, P2 = WITH_INFINITY ? 0.5f : 0.49f, P3 = P * P2;
    static constexpr float Q = WITH_INFINITY ? 1.41421356237309505f : 1.7f, Q2 = WITH_INFINITY ? 2.0f : 2.89f, Q3 = Q * Q2;
    static constexpr float PQ = P2 * Q2, SUM = P2 + Q2;
    static constexpr float NP = 1 / (2 * P2 * (P2 - Q2)), NQ = 1 / (2 * Q2 * (Q2 - P2)), NZ = 1 / PQ;
    static constexpr float ONE_P = NP * P, ONE_Q = NQ * Q;

    // Five samples of a row or column of the image, transformed, at the finite points.
    static void window(const Vec* d, int step, Vec* out, int out_step) {
        const Vec a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step];
        const Vec even_p = f - Q2 * c, odd_p = P * (e - Q2 * b), even_q = f - P2 * c, odd_q = Q * (e - P2 * b);
        out[0] = PQ * a - SUM * c + f;
        out[out_step] = even_p + odd_p;
        out[2 * out_step] = even_p - odd_p;
        out[3 * out_step] = even_q + odd_q;
        out[4 * out_step] = even_q - odd_q;
    }

    // Six samples: the point at infinity as well.
    static void image(const Vec* d, int step, Vec* out, int out_step) {
        const Vec last = d[5 * step] - SUM * d[3 * step] + PQ * d[step];
        window(d, step, out, out_step);
        out[5 * out_step] = last;
    }

    // Nine samples, for stride 2: every other one from the first on as a window, then the four between them, which have one
    // tap and need nothing of the point at 0.
    static void strided(const Vec* d, int step, Vec* out, int out_step) {
        window(d, 2 * step, out, out_step);
        const Vec a = d[step], b = d[3 * step], c = d[5 * step], e = d[7 * step];
        const Vec even_p = e - Q2 * b, odd_p = P * (c - Q2 * a), even_q = e - P2 * b, odd_q = Q * (c - P2 * a);
        out[5 * out_step] = ONE_P * (even_p + odd_p);
        out[6 * out_step] = ONE_P * (odd_p - even_p);
        out[7 * out_step] = ONE_Q * (even_q + odd_q);
        out[8 * out_step] = ONE_Q * (odd_q - even_q);
    }

    // Sums at the finite points to four outputs.
    static void finite_result(const Vec* m, int step, Vec* y, int y_step) {
        const Vec sp = m[step] + m[2 * step], dp = m[step] - m[2 * step];
        const Vec sq = m[3 * step] + m[4 * step], dq = m[3 * step] - m[4 * step];
        y[0] = m[0] + sp + sq;
        y[y_step] = P * dp + Q * dq;
        y[2 * y_step] = P2 * sp + Q2 * sq;
        y[3 * y_step] = P3 * dp + Q3 * dq;
    }

    // The same with one tap: nothing at 0, and the factors that the kernel lacks.
    static void odd_result(const Vec* m, int step, Vec* y, int y_step) {
        const Vec sp = ONE_P * (m[step] - m[2 * step]), dp = ONE_P * (m[step] + m[2 * step]);
        const Vec sq = ONE_Q * (m[3 * step] - m[4 * step]), dq = ONE_Q * (m[3 * step] + m[4 * step]);
        y[0] = sp + sq;
        y[y_step] = P * dp + Q * dq;
        y[2 * y_step] = P2 * sp + Q2 * sq;
        y[3 * y_step] = P3 * dp + Q3 * dq;
    }

    // Six sums to four outputs.
    static void result(const Vec* m, int step, Vec* y, int y_step) {
        finite_result(m, step, y, y_step);
        y[3 * y_step] += m[5 * step];
    }

    // The adjoint of finite_result: four gradients to five.
    static void finite_grad(const Vec* y, int step, Vec* z, int z_step) {
        const Vec a = y[0], b = y[step], c = y[2 * step], d = y[3 * step];
        const Vec even_p = a + P2 * c, odd_p = P * b + P3 * d, even_q = a + Q2 * c, odd_q = Q * b + Q3 * d;
        z[0] = a;
        z[z_step] = even_p + odd_p;
        z[2 * z_step] = even_p - odd_p;
        z[3 * z_step] = even_q + odd_q;
        z[4 * z_step] = even_q - odd_q;
    }

    // Of result: to six.
    static void grad(const Vec* y, int step, Vec* z, int z_step) {
        finite_grad(y, step, z, z_step);
        z[5 * z_step] = y[3 * step];
    }

    // Three taps to six.
    static void kernel(const Vec* w, int step, Vec* u, int u_step) {
        const Vec a = w[0], b = w[step], c = w[2 * step];
        const Vec even_p = NP * (a + P2 * c), odd_p = (NP * P) * b, even_q = NQ * (a + Q2 * c), odd_q = (NQ * Q) * b;
        u[0] = NZ * a;
        u[u_step] = even_p + odd_p;
        u[2 * u_step] = even_p - odd_p;
        u[3 * u_step] = even_q + odd_q;
        u[4 * u_step] = even_q - odd_q;
        u[5 * u_step] = c;
    }

    // For stride 2: the outer two taps to five, the one between them as it is.
    static void strided_kernel(const Vec* w, int step, Vec* u, int u_step) {
        const Vec a = w[0], c = w[2 * step];
        u[0] = NZ * a;
        u[u_step] = NP * (a + P * c);
        u[2 * u_step] = NP * (a - P * c);
        u[3 * u_step] = NQ * (a + Q * c);
        u[4 * u_step] = NQ * (a - Q * c);
        u[5 * u_step] = w[step];
    }

    // The adjoint of kernel: six gradients to three.
    static void kernel_grad(const Vec* u, int step, Vec* w, int w_step) {
        const Vec sp = NP * (u[step] + u[2 * step]), dp = (NP * P) * (u[step] - u[2 * step]);
        const Vec sq = NQ * (u[3 * step] + u[4 * step]), dq = (NQ * Q) * (u[3 * step] - u[4 * step]);
        w[0] = NZ * u[0] + sp + sq;
        w[w_step] = dp + dq;
        w[2 * w_step] = P2 * sp + Q2 * sq + u[5 * step];
    }

    // Of strided_kernel.
    static void strided_kernel_grad(const Vec* u, int step, Vec* w, int w_step) {
        w[0] = NZ * u[0] + NP * (u[step] + u[2 * step]) + NQ * (u[3 * step] + u[4 * step]);
        w[w_step] = u[5 * step];
        w[2 * w_step] = (NP * P) * (u[step] - u[2 * step]) + (NQ * Q) * (u[3 * step] - u[4 * step]);
    }
};
using Unit = Line<true>;    // stride 1
using Double = Line<false>;  // stride 2

// Images [N, H, W, C], channels-last and dense.
struct Images {
    int64_t n, h, w, c;
    explicit Images(const at::Tensor& t) : n(t.size(0)), h(t.size(2)), w(t.size(3)), c(t.size(1)) {}
};

using Place = std::array<int64_t, 3>;  // image, row, column: where a tile begins

// Tiles of an image, and where they lie.
struct Tiles {
    int64_t rows, cols, total;
    Tiles(int64_t n, int64_t h, int64_t w) : rows(ceil_div(h, TILE)), cols(ceil_div(w, TILE)), total(n * rows * cols) {}
    Place place(int64_t t) const {
        return {t / (rows * cols), t / cols % rows * TILE, t % cols * TILE};
    }
};

// Transformed tiles: blocks of up to ROWS tiles, each [planes][tiles of the block][padded channels].
struct Transformed {
    float* data;
    int64_t step, size;  // from tile to tile, from block to block
    Transformed(float* data, int64_t channels, int64_t block, int64_t planes)
        : data(data), step(padded(channels)), size(planes * block * padded(channels)) {}
    float* plane(int64_t block, int64_t p, int64_t block_len) const { return data + block * size + p * block_len * step; }
};

// SIZE x SIZE pixels from row y, column x on, `num` channels of them from c on; 0 outside of the image.
template <int SIZE, class T> inline void read(const T* image, const Images& s, int64_t y, int64_t x, int64_t c, Vec* out) {
    const int64_t num = s.c - c;
    const bool is_inside = y >= 0 && x >= 0 && y + SIZE <= s.h && x + SIZE <= s.w && num >= LANES;
    const T* corner = image + (y * s.w + x) * s.c + c;
    if (is_inside) {
        for (int i = 0; i < SIZE; i++)
            for (int j = 0; j < SIZE; j++) out[i * SIZE + j] = load(corner + (i * s.w + j) * s.c);
        return;
    }
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
            const bool is_there = y + i >= 0 && y + i < s.h && x + j >= 0 && x + j < s.w;
            out[i * SIZE + j] = is_there ? load(corner + (i * s.w + j) * s.c, num) : Vec{};
        }
}

// What a layer does to images around its convolution, in the same pass: x * style before it; after it
// u = y * scale + noise * strength + bias, and clip(gain * (u > 0 ? u : alpha * u)). As in epilogue_cpu.cpp.
struct Layer {
    const float *style = nullptr, *scale = nullptr, *bias = nullptr, *noise = nullptr;  // per image and channel; channel; pixel
    int64_t noise_step = 0;  // between two images
    float strength = 0, alpha = 1, gain = 1, clamp = -1;

    Vec finished(Vec y, int64_t image, int64_t pixel, const Images& s, int64_t c) const {
        const float add = noise ? noise[image * noise_step + pixel] * strength : 0;
        const Vec u = y * load(scale + image * s.c + c, s.c - c) + (load(bias + c, s.c - c) + add);
        Vec out = (u > 0 ? u : u * alpha) * gain;
        if (clamp >= 0) out = out > clamp ? Vec{} + clamp : out, out = out < -clamp ? Vec{} - clamp : out;
        return out;
    }
};

// Samples of an image times its style.
inline void modulate(Vec* d, int num, const Layer& layer, int64_t image, const Images& s, int64_t c) {
    if (!layer.style || c >= s.c) return;
    const Vec style = load(layer.style + image * s.c + c, s.c - c);
    for (int i = 0; i < num; i++) d[i] *= style;
}

// SIZE x SIZE samples from row `y`, column `x` of image `n` on -> as many planes, by the transform of a line.
template <int SIZE, auto LINE, class T>
void transform_image(const T* xs, const Images& s, int64_t n, int64_t y, int64_t x, float* out, int64_t plane_step, int64_t channels,
                     const Layer& layer = {}) {
    const T* image = xs + n * s.h * s.w * s.c;
    for (int64_t c = 0; c < channels; c += LANES) {
        Vec d[SIZE * SIZE], half[SIZE * SIZE];
        read<SIZE>(image, s, y, x, c, d);
        modulate(d, SIZE * SIZE, layer, n, s, c);
        for (int j = 0; j < SIZE; j++) LINE(d + j, SIZE, half + j, SIZE);
        for (int i = 0; i < SIZE; i++) LINE(half + i * SIZE, 1, d + i * SIZE, 1);
        for (int p = 0; p < SIZE * SIZE; p++) store(out + p * plane_step + c, d[p]);
    }
}

// Gradients of a tile -> SIZE x SIZE planes.
template <int SIZE, auto LINE, class T>
void transform_grad(const T* dy, const Images& s, const Place& at, float* out, int64_t plane_step) {
    const T* image = dy + at[0] * s.h * s.w * s.c;
    for (int64_t c = 0; c < s.c; c += LANES) {
        Vec d[TILE * TILE], half[SIZE * TILE], z[SIZE * SIZE];
        read<TILE>(image, s, at[1], at[2], c, d);
        for (int j = 0; j < TILE; j++) LINE(d + j, TILE, half + j, TILE);
        for (int i = 0; i < SIZE; i++) LINE(half + i * TILE, 1, z + i * SIZE, 1);
        for (int p = 0; p < SIZE * SIZE; p++) store(out + p * plane_step + c, z[p]);
    }
}

// SIZE x SIZE planes -> a tile of results.
template <int SIZE, auto LINE, class T>
void transform_result(const float* in, int64_t plane_step, T* y, const Images& s, const Place& at, const Layer& layer) {
    T* corner = y + ((at[0] * s.h + at[1]) * s.w + at[2]) * s.c;
    const int64_t rows = std::min(TILE, s.h - at[1]), cols = std::min(TILE, s.w - at[2]);
    for (int64_t c = 0; c < s.c; c += LANES) {
        Vec m[SIZE * SIZE], half[TILE * SIZE], out[TILE * TILE];
        for (int p = 0; p < SIZE * SIZE; p++) m[p] = load(in + p * plane_step + c);
        for (int j = 0; j < SIZE; j++) LINE(m + j, SIZE, half + j, SIZE);
        for (int i = 0; i < TILE; i++) LINE(half + i * SIZE, 1, out + i * TILE, 1);
        if (layer.bias)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < cols; j++)
                    out[i * TILE + j] = layer.finished(out[i * TILE + j], at[0], (at[1] + i) * s.w + at[2] + j, s, c);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j++) store(corner + (i * s.w + j) * s.c + c, out[i * TILE + j], s.c - c);
    }
}

// A kernel [outer][inner][3][3] by its steps; rotated by 180 degrees or not.
template <class T> struct Kernel {
    const T* data;
    int64_t outer, inner, outer_step, inner_step, y_step, x_step;
    bool is_rotated;

    // Of [O, I, 3, 3], as a forward convolution needs it (I inside, O outside), or exchanged for gradients, which at
    // stride 1 are convolutions with rotated kernels.
    Kernel(const at::Tensor& w, bool for_grad) : data(static_cast<const T*>(w.const_data_ptr())), is_rotated(for_grad) {
        outer = w.size(for_grad), inner = w.size(!for_grad), outer_step = w.stride(for_grad), inner_step = w.stride(!for_grad);
        y_step = w.stride(2), x_step = w.stride(3);
    }

    // Tap `tap` of LANES outer channels from `o` on; 0 where there is none.
    Vec tap(int64_t o, int64_t i, int tap) const {
        const int at = is_rotated ? 8 - tap : tap;
        const T* from = data + o * outer_step + i * inner_step + at / 3 * y_step + at % 3 * x_step;
        Vec v{};
        if (outer - o >= LANES) {  // known lanes become one vector in registers
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; lane++) v[lane] = widen(from[lane * outer_step]);
            return v;
        }
        for (int64_t lane = 0; lane < outer - o; lane++) v[lane] = widen(from[lane * outer_step]);
        return v;
    }
};

at::Tensor scratch(int64_t size) { return at::empty({size}, at::kFloat); }

// -> [PLANES][panels of outer][inner][PANEL]; if asked for the taps themselves behind them, [TAPS] in place of [PLANES].
template <auto LINE, class T> at::Tensor transformed(const Kernel<T>& w, bool with_taps = false) {
    const int64_t panels = ceil_div(w.outer, PANEL), plane_step = panels * w.inner * PANEL;
    at::Tensor all = scratch((PLANES + (with_taps ? TAPS : 0)) * plane_step);
    float* out = all.data_ptr<float>();
    at::parallel_for(0, panels * w.inner, 16, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; item++) {
            const int64_t panel = item / w.inner, i = item % w.inner;
            for (int64_t col = 0; col < PANEL; col += LANES) {
                float* to = out + item * PANEL + col;
                Vec g[TAPS], half[POINTS * KERNEL], u[PLANES];
                for (int k = 0; k < TAPS; k++) g[k] = w.tap(panel * PANEL + col, i, k);
                for (int j = 0; j < KERNEL; j++) LINE(g + j, KERNEL, half + j, KERNEL);
                for (int r = 0; r < POINTS; r++) LINE(half + r * KERNEL, 1, u + r * POINTS, 1);
                for (int p = 0; p < PLANES; p++) store(to + p * plane_step, u[p]);
                for (int k = 0; with_taps && k < TAPS; k++) store(to + (PLANES + k) * plane_step, g[k]);
            }
        }
    });
    return all;
}

// ---- Between the transforms: planes of results are sums of products of planes of images and of the kernel

struct Factors {
    int64_t image, kernel, result;  // planes
};
using Group = std::vector<Factors>;

struct Scheme {
    int64_t images, results;                  // number of planes
    std::vector<Group> by_result, by_kernel;  // what makes one plane of results; what makes one plane of the kernel's gradient

    Scheme(int64_t images, int64_t results, const Group& all)
        : images(images), results(results), by_result(grouped(all, &Factors::result)), by_kernel(grouped(all, &Factors::kernel)) {}

    static std::vector<Group> grouped(const Group& all, int64_t Factors::*key) {
        std::vector<Group> out;
        for (const Factors& f : all) {
            const auto same = std::find_if(out.begin(), out.end(), [&](const Group& group) { return group[0].*key == f.*key; });
            if (same == out.end()) out.push_back({f});
            else same->push_back(f);
        }
        return out;
    }
};

// Calls `work` for each group and each of so many repetitions, every thread with as many products as the others.
template <class Work> void share_out(const std::vector<Group>& groups, int64_t repetitions, const Work& work) {
    int64_t total = 0;
    for (const Group& group : groups) total += static_cast<int64_t>(group.size()) * repetitions;
    at::parallel_for(0, total, 1, [&](int64_t begin, int64_t end) {
        int64_t at = 0;
        for (const Group& group : groups)
            for (int64_t i = 0; i < repetitions; i++, at += static_cast<int64_t>(group.size()))
                if (at >= begin && at < end) work(group, i);
    });
}

// At stride 1 planes belong together one by one.
const Scheme& scheme() {
    static const Scheme all(PLANES, PLANES, [] {
        Group out;
        for (int64_t p = 0; p < PLANES; p++) out.push_back({p, p, p});
        return out;
    }());
    return all;
}

// At stride 2 an output is a sum over the two parities of samples, along each axis: y[i] = (w0 x[2i] + w2 x[2i+2]) + w1
// x[2i+1]. The first sum is Winograd's F(4, 2) with the five finite points, the other has four points in common with it;
// its kernel is w1 at all of them. So 36 planes of the kernel take part in 81 products, which have 25 planes of sums.
// The transposed convolution is the same with images and results exchanged.
template <bool TRANSPOSED> const Scheme& strided_scheme() {
    static const Scheme all(TRANSPOSED ? FINITE * FINITE : STRIDED * STRIDED, TRANSPOSED ? STRIDED * STRIDED : FINITE * FINITE, [] {
        const auto kernel = [](int64_t i) { return std::min(i, FINITE); };
        const auto point = [](int64_t i) { return i < FINITE ? i : i - TILE; };
        Group out;
        for (int64_t i = 0; i < STRIDED; i++)
            for (int64_t j = 0; j < STRIDED; j++) {
                const int64_t one = i * STRIDED + j, other = point(i) * FINITE + point(j);
                out.push_back({TRANSPOSED ? other : one, kernel(i) * POINTS + kernel(j), TRANSPOSED ? one : other});
            }
        std::stable_sort(out.begin(), out.end(), [](const Factors& a, const Factors& b) { return a.kernel < b.kernel; });
        return out;
    }());
    return all;
}

// How many blocks of tiles to have transformed at a time: what `bytes` suffice for, but a few.
int64_t blocks_at_once(const Blocks& blocks, int64_t floats_per_tile, int64_t bytes) {
    return std::clamp<int64_t>(bytes / (4 * blocks.size * floats_per_tile), std::min<int64_t>(8, blocks.num), blocks.num);
}

// Images of `inner` channels to results of `outer`, with a transformed kernel. `transform` writes a tile's planes,
// `finish` reads them.
template <class Transform, class Finish>
void winograd(const Scheme& scheme, const Tiles& tiles, int64_t inner, int64_t outer, const float* us, const Transform& transform,
              const Finish& finish) {
    const Blocks blocks(tiles.total, ROWS);
    const int64_t panels = ceil_div(outer, PANEL), per_tile = scheme.images * padded(inner) + scheme.results * padded(outer);
    const auto multiply = [&](int64_t first, int64_t num, const Group& group, int64_t panel, const Transformed& left, const Transformed& result) {
        for (int64_t b = 0; b < num; b++) {
            const int64_t len = blocks.len(first + b);
            Term terms[PARITIES];
            for (size_t i = 0; i < group.size(); i++)
                terms[i] = {left.plane(b, group[i].image, len), us + (group[i].kernel * panels + panel) * inner * PANEL};
            product<true>(len, {inner, left.step, PANEL, result.step, false}, terms, static_cast<int64_t>(group.size()),
                          result.plane(b, group[0].result, len) + panel * PANEL);
        }
    };
    const auto each = [&](int64_t first, int64_t t, const Transformed& planes, const auto& work) {
        const int64_t b = t / blocks.size, len = blocks.len(b);
        work(tiles.place(t), planes.plane(b - first, 0, len) + t % blocks.size * planes.step, len * planes.step);
    };

    // Few channels: a thread takes a block from image to image, so that transformed tiles stay in its core's own cache.
    const int64_t bytes = static_cast<int64_t>(sizeof(float)) * (blocks.size * per_tile + PLANES * panels * PANEL * inner);
    if (bytes <= LOCAL && blocks.num >= 4 * at::get_num_threads()) {  // fewer are hard to share out
        const at::Tensor own = scratch(at::get_num_threads() * blocks.size * per_tile);
        at::parallel_for(0, blocks.num, 1, [&](int64_t begin, int64_t end) {
            float* start = own.data_ptr<float>() + at::get_thread_num() * blocks.size * per_tile;
            const Transformed left(start, inner, blocks.size, scheme.images), result(start + left.size, outer, blocks.size, scheme.results);
            for (int64_t b = begin; b < end; b++) {
                const int64_t first = blocks.start(b), last = first + blocks.len(b);
                for (int64_t t = first; t < last; t++) each(b, t, left, transform);
                for (const Group& group : scheme.by_result)
                    for (int64_t panel = 0; panel < panels; panel++) multiply(b, 1, group, panel, left, result);
                for (int64_t t = first; t < last; t++) each(b, t, result, finish);
            }
        });
        return;
    }

    const int64_t at_once = blocks_at_once(blocks, per_tile, BUDGET);
    const at::Tensor v = scratch(at_once * scheme.images * blocks.size * padded(inner));
    const at::Tensor m = scratch(at_once * scheme.results * blocks.size * padded(outer));
    const Transformed left(v.data_ptr<float>(), inner, blocks.size, scheme.images), result(m.data_ptr<float>(), outer, blocks.size, scheme.results);
    for (int64_t first = 0; first < blocks.num; first += at_once) {
        const int64_t num = std::min(at_once, blocks.num - first), start = blocks.start(first);
        const int64_t end_tile = std::min(blocks.start(first + num), tiles.total);
        at::parallel_for(start, end_tile, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) each(first, t, left, transform);
        });
        share_out(scheme.by_result, panels, [&](const Group& group, int64_t panel) { multiply(first, num, group, panel, left, result); });
        at::parallel_for(start, end_tile, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) each(first, t, result, finish);
        });
    }
}

// The kernel's gradient, [O, I, 3, 3], of images and gradients as `of_image` and `of_grad` transform a tile of them.
template <auto LINE, class T, class OfImage, class OfGrad>
void winograd_kernel_grad(const Scheme& scheme, const Tiles& tiles, const OfImage& of_image, const OfGrad& of_grad, at::Tensor& dw) {
    const int64_t outer = dw.size(0), inner = dw.size(1), panels = ceil_div(inner, PANEL);
    const Blocks blocks(tiles.total, ROWS), rows(outer, ROWS);
    const int64_t at_once = blocks_at_once(blocks, scheme.images * padded(inner) + scheme.results * padded(outer), GRAD_BUDGET);
    const int64_t du_step = panels * PANEL, du_plane = outer * du_step;
    const at::Tensor du = scratch(PLANES * du_plane);
    const at::Tensor v = scratch(at_once * scheme.images * blocks.size * padded(inner));
    const at::Tensor z = scratch(at_once * scheme.results * blocks.size * padded(outer));
    const Transformed right(v.data_ptr<float>(), inner, blocks.size, scheme.images), left(z.data_ptr<float>(), outer, blocks.size, scheme.results);
    float* dus = du.data_ptr<float>();
    for (int64_t first = 0; first < blocks.num; first += at_once) {
        const int64_t num = std::min(at_once, blocks.num - first), start = blocks.start(first);
        at::parallel_for(start, std::min(blocks.start(first + num), tiles.total), 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) {
                const int64_t b = t / blocks.size, len = blocks.len(b), row = t % blocks.size;
                of_image(tiles.place(t), right.plane(b - first, 0, len) + row * right.step, len * right.step, panels * PANEL);
                of_grad(tiles.place(t), left.plane(b - first, 0, len) + row * left.step, len * left.step);
            }
        });
        share_out(scheme.by_kernel, rows.num, [&](const Group& group, int64_t row) {
            const int64_t last = blocks.len(first + num - 1), num_last = static_cast<int64_t>(group.size());
            std::vector<Term> terms;
            for (int64_t panel = 0; panel < panels; panel++) {
                terms.clear();
                for (int64_t b = 0; b < num; b++)
                    for (const Factors& f : group) {
                        const int64_t len = blocks.len(first + b);
                        terms.push_back({left.plane(b, f.result, len) + rows.start(row), right.plane(b, f.image, len) + panel * PANEL});
                    }
                float* c = dus + group[0].kernel * du_plane + rows.start(row) * du_step + panel * PANEL;
                const int64_t num_first = (num - 1) * num_last;
                Product todo{blocks.size, left.step, right.step, du_step, first > 0};
                product<false>(rows.len(row), todo, terms.data(), num_first, c);
                todo.depth = last, todo.is_added = first > 0 || num > 1;  // the last block may be smaller
                product<false>(rows.len(row), todo, terms.data() + num_first, num_last, c);
            }
        });
    }
    T* dws = data<T>(dw);
    at::parallel_for(0, outer, 4, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++)
            for (int64_t i = 0; i < inner; i += LANES) {
                Vec u[PLANES], half[KERNEL * POINTS], g[TAPS];
                for (int p = 0; p < PLANES; p++) u[p] = load(dus + p * du_plane + o * du_step + i);
                for (int j = 0; j < POINTS; j++) LINE(u + j, POINTS, half + j, POINTS);
                for (int k = 0; k < KERNEL; k++) LINE(half + k * POINTS, 1, g + k * KERNEL, 1);
                for (int64_t lane = 0; lane < std::min<int64_t>(LANES, inner - i); lane++)
                    for (int k = 0; k < TAPS; k++) dws[(o * inner + i + lane) * TAPS + k] = narrow<T>(g[k][lane]);
            }
    });
}

// ---- Stride 1; y has its size, which tells the padding on the far sides

template <class T>
void winograd(const at::Tensor& x, const at::Tensor& u, int64_t pad_y, int64_t pad_x, at::Tensor& y, const Layer& layer = {}) {
    const Images in(x), out(y);
    const T* xs = data<T>(x);
    T* ys = data<T>(y);
    winograd(scheme(), Tiles(out.n, out.h, out.w), in.c, out.c, u.const_data_ptr<float>(),
             [&](const Place& at, float* to, int64_t plane_step) {
                 transform_image<POINTS, Unit::image>(xs, in, at[0], at[1] - pad_y, at[2] - pad_x, to, plane_step, in.c, layer);
             },
             [&](const Place& at, const float* from, int64_t plane_step) {
                 transform_result<POINTS, Unit::result>(from, plane_step, ys, out, at, layer);
             });
}

template <class T> void winograd_kernel_grad(const at::Tensor& x, const at::Tensor& dy, int64_t pad_y, int64_t pad_x, at::Tensor& dw) {
    const Images in(x), out(dy);
    const T *xs = data<T>(x), *dys = data<T>(dy);
    winograd_kernel_grad<Unit::kernel_grad, T>(
        scheme(), Tiles(out.n, out.h, out.w),
        [&](const Place& at, float* to, int64_t plane_step, int64_t channels) {
            transform_image<POINTS, Unit::image>(xs, in, at[0], at[1] - pad_y, at[2] - pad_x, to, plane_step, channels);
        },
        [&](const Place& at, float* to, int64_t plane_step) { transform_grad<POINTS, Unit::grad>(dys, out, at, to, plane_step); }, dw);
}

// ---- Stride 2, without padding

void winograd_strided(const at::Tensor& x, const at::Tensor& u, at::Tensor& y) {
    const Images in(x), out(y);
    const float* xs = data<float>(x);
    float* ys = data<float>(y);
    winograd(strided_scheme<false>(), Tiles(out.n, out.h, out.w), in.c, out.c, u.const_data_ptr<float>(),
             [&](const Place& at, float* to, int64_t plane_step) {
                 transform_image<STRIDED, Double::strided>(xs, in, at[0], 2 * at[1], 2 * at[2], to, plane_step, in.c);
             },
             [&](const Place& at, const float* from, int64_t plane_step) {
                 transform_result<FINITE, Double::finite_result>(from, plane_step, ys, out, at, {});
             });
}

void winograd_strided_kernel_grad(const at::Tensor& x, const at::Tensor& dy, at::Tensor& dw) {
    const Images in(x), out(dy);
    const float *xs = data<float>(x), *dys = data<float>(dy);
    winograd_kernel_grad<Double::strided_kernel_grad, float>(
        strided_scheme<false>(), Tiles(out.n, out.h, out.w),
        [&](const Place& at, float* to, int64_t plane_step, int64_t channels) {
            transform_image<STRIDED, Double::strided>(xs, in, at[0], 2 * at[1], 2 * at[2], to, plane_step, channels);
        },
        [&](const Place& at, float* to, int64_t plane_step) { transform_grad<FINITE, Double::finite_grad>(dys, out, at, to, plane_step); }, dw);
}

// One parity of a tile of the transposed convolution, LANES channels from c on; `at` is of the h x w images that went in.
template <int ODD_ROW, int ODD_COL>
void transform_parity(const float* in, int64_t plane_step, float* y, const Images& s, const Place& at, int64_t h, int64_t w, int64_t c) {
    constexpr int SIZE = FINITE;
    Vec m[SIZE * SIZE], half[TILE * SIZE], out[TILE * TILE];
    for (int i = ODD_ROW; i < SIZE; i++)
        for (int j = ODD_COL; j < SIZE; j++) m[i * SIZE + j] = load(in + ((i + ODD_ROW * TILE) * STRIDED + j + ODD_COL * TILE) * plane_step);
    for (int j = ODD_COL; j < SIZE; j++) (ODD_ROW ? Double::odd_result : Double::finite_result)(m + j, SIZE, half + j, SIZE);
    for (int i = 0; i < TILE; i++) (ODD_COL ? Double::odd_result : Double::finite_result)(half + i * SIZE, 1, out + i * TILE, 1);
    float* corner = y + ((at[0] * s.h + 2 * at[1] + ODD_ROW) * s.w + 2 * at[2] + ODD_COL) * s.c + c;
    const int64_t rows = std::min(TILE, h - at[1]), cols = std::min(TILE, w - at[2]);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) store(corner + (i * s.w + j) * 2 * s.c, out[i * TILE + j], s.c - c);
}

void transform_parities(const float* in, int64_t plane_step, float* y, const Images& s, const Place& at, int64_t h, int64_t w) {
    for (int64_t c = 0; c < s.c; c += LANES) {
        transform_parity<0, 0>(in + c, plane_step, y, s, at, h, w, c);
        transform_parity<0, 1>(in + c, plane_step, y, s, at, h, w, c);
        transform_parity<1, 0>(in + c, plane_step, y, s, at, h, w, c);
        transform_parity<1, 1>(in + c, plane_step, y, s, at, h, w, c);
    }
}

// The last row (or column) of a transposed convolution has even results alone across it: products with three taps,
// straight from the last row (or column) of the images. `taps` are those of the rotated kernel.
void parity_border(const at::Tensor& x, const float* taps, at::Tensor& y, bool is_row, const Layer& layer) {
    const Images in(x), out(y);
    const int64_t len = is_row ? in.w : in.h, panels = ceil_div(out.c, PANEL), wide = padded(out.c), tap_step = panels * in.c * PANEL;
    const int first = is_row ? 2 : 6, tap_stride = is_row ? -1 : -3;  // taps (2, k) or (k, 2) from behind
    const float* xs = data<float>(x);
    float* ys = data<float>(y);
    at::parallel_for(0, in.n, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> line((len + 2) * in.c, 0.0f), sums((2 * len + 1) * wide);  // zeros before and after
        for (int64_t n = begin; n < end; n++) {
            for (int64_t i = 0; i < len; i++) {
                const int64_t at = is_row ? (n * in.h + in.h - 1) * in.w + i : (n * in.h + i) * in.w + in.w - 1;
                for (int64_t c = 0; c < in.c; c++)
                    line[(i + 1) * in.c + c] = xs[at * in.c + c] * (layer.style ? layer.style[n * in.c + c] : 1.0f);
            }
            for (int64_t panel = 0; panel < panels; panel++) {
                const auto tap = [&](int k) { return taps + (first + k * tap_stride) * tap_step + panel * in.c * PANEL; };
                const Blocks even(len + 1, ROWS), odd(len, ROWS);
                const Product todo{in.c, in.c, PANEL, 2 * wide, false};
                for (int64_t b = 0; b < even.num; b++) {
                    const float* from = line.data() + even.start(b) * in.c;
                    const Term terms[2] = {{from + in.c, tap(0)}, {from, tap(2)}};
                    product<true>(even.len(b), todo, terms, 2, sums.data() + 2 * even.start(b) * wide + panel * PANEL);
                }
                for (int64_t b = 0; b < odd.num; b++) {
                    const Term term{line.data() + (odd.start(b) + 1) * in.c, tap(1)};
                    product<true>(odd.len(b), todo, &term, 1, sums.data() + (2 * odd.start(b) + 1) * wide + panel * PANEL);
                }
            }
            for (int64_t i = 0; i < 2 * len + 1; i++) {
                const int64_t at = is_row ? (n * out.h + out.h - 1) * out.w + i : (n * out.h + i) * out.w + out.w - 1;
                std::copy_n(sums.data() + i * wide, out.c, ys + at * out.c);
            }
        }
    });
}

// From x [N, I, H, W] to y [N, O, 2H + 1, 2W + 1]; the kernel has its taps behind it.
void winograd_transposed(const at::Tensor& x, const at::Tensor& u, at::Tensor& y, const Layer& layer = {}) {
    const Images in(x), out(y);
    const float *xs = data<float>(x), *us = u.const_data_ptr<float>();
    float* ys = data<float>(y);
    winograd(strided_scheme<true>(), Tiles(in.n, in.h, in.w), in.c, out.c, us,
             [&](const Place& at, float* to, int64_t plane_step) {
                 transform_image<FINITE, Double::window>(xs, in, at[0], at[1] - 1, at[2] - 1, to, plane_step, in.c, layer);
             },
             [&](const Place& at, const float* from, int64_t plane_step) { transform_parities(from, plane_step, ys, out, at, in.h, in.w); });
    const float* taps = us + PLANES * ceil_div(out.c, PANEL) * PANEL * in.c;
    parity_border(x, taps, y, true, layer);
    parity_border(x, taps, y, false, layer);
}

// The kernel of [O, I, 3, 3] for it, from O to I channels.
at::Tensor transformed_for_transposed(const at::Tensor& w) { return transformed<Double::strided_kernel>(Kernel<float>(w, true), true); }

// ---- Gradients to weights at stride 2 for few tiles or channels: a product per tap, straight from the images

constexpr int64_t PAIRED = 1024;  // pixels that are laid out in pairs at a time

// [9 taps][outer][wide] -> [outer][inner][3][3]
template <class T> void write_kernel_grad(const float* sums, int64_t outer, int64_t inner, int64_t wide, at::Tensor& dw) {
    T* out = data<T>(dw);
    at::parallel_for(0, outer, 4, [&](int64_t begin, int64_t end) {
        for (int64_t o = begin; o < end; o++)
            for (int64_t i = 0; i < inner; i++)
                for (int64_t k = 0; k < 9; k++) out[(o * inner + i) * 9 + k] = narrow<T>(sums[(k * outer + o) * wide + i]);
    });
}

void strided_kernel_grad(const at::Tensor& images, const at::Tensor& dy, at::Tensor& dw) {
    const int64_t channels = images.size(1), panels = ceil_div(channels, PANEL), wide = panels * PANEL;
    at::Tensor x = images;
    if (channels < wide) x = at::constant_pad_nd(images, {0, 0, 0, 0, 0, wide - channels}).contiguous(at::MemoryFormat::ChannelsLast);
    const Images in(x), out(dy);
    const Blocks rows(out.c, ROWS);
    const at::Tensor sums = scratch(9 * out.c * wide);
    const float *xs = x.const_data_ptr<float>(), *dys = dy.const_data_ptr<float>();
    float* to = sums.data_ptr<float>();
    const int64_t lines = out.n * out.h, group = std::max<int64_t>(1, 256 / out.w);
    at::parallel_for(0, 9 * rows.num, 1, [&](int64_t begin, int64_t end) {
        std::vector<Term> terms(group);
        for (int64_t start = 0; start < lines; start += group) {
            const int64_t num = std::min(group, lines - start);
            for (int64_t item = begin; item < end; item++) {
                const int64_t tap = item / rows.num, row = item % rows.num;
                for (int64_t panel = 0; panel < panels; panel++) {
                    for (int64_t i = 0; i < num; i++) {
                        const int64_t line = start + i;
                        terms[i] = {dys + line * out.w * out.c + rows.start(row),
                                    xs + ((line / out.h * in.h + line % out.h * 2 + tap / 3) * in.w + tap % 3) * in.c + panel * PANEL};
                    }
                    product<false>(rows.len(row), {out.w, out.c, 2 * in.c, wide, start > 0}, terms.data(), num,
                                   to + (tap * out.c + rows.start(row)) * wide + panel * PANEL);
                }
            }
        }
    });
    write_kernel_grad<float>(to, out.c, channels, wide, dw);
}

// ---- The same for bfloat16: products of pairs, of which processors with such an instruction make twice as many

// Two neighbours along the sum's axis, the first in the lower half.
inline Vec add_pairs(Vec sum, Words pairs, uint32_t factor) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(factor));
#else
    sum += (Vec)(pairs << 16) * std::bit_cast<float>(factor << 16);
    return sum + (Vec)(pairs & 0xffff0000u) * std::bit_cast<float>(factor & 0xffff0000u);
#endif
}

struct PairTerm {
    const uint32_t* a;
    const uint32_t* b;
};

// c[m][n] (+)= sum over the terms and over pairs k of a[k][m] * b[k][n]; M rows by PANEL columns.
template <int M> void pair_product(const Product& p, const PairTerm* terms, int64_t num_terms, float* c) {
    Vec sum[M][COLS];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) sum[m][j] = p.is_added ? load(c + m * p.c_step + j * LANES) : Vec{};
    for (int64_t t = 0; t < num_terms; t++) {
        const uint32_t *a = terms[t].a, *b = terms[t].b;
        for (int64_t k = 0; k < p.depth; k++) {
            Words right[COLS];
            std::memcpy(right, b, sizeof right);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int j = 0; j < COLS; j++) sum[m][j] = add_pairs(sum[m][j], right[j], a[m]);
            a += p.a_step;
            b += p.b_step;
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int j = 0; j < COLS; j++) store(c + m * p.c_step + j * LANES, sum[m][j]);
}

template <int M = ROWS> void pair_product(int64_t rows, const Product& p, const PairTerm* terms, int64_t num_terms, float* c) {
    if constexpr (M > 0) {
        if (rows == M) return pair_product<M>(p, terms, num_terms, c);
        return pair_product<M - 1>(rows, p, terms, num_terms, c);
    }
}

// Pixels first, first + step, ... of a line in pairs, each [wide] with zeros behind the channels; `num` pixels in all.
void pair_up(const Bfloat* line, int64_t first, int64_t step, int64_t num, int64_t channels, int64_t wide, uint32_t* out) {
    for (int64_t k = 0; k < num; k += 2) {
        const Bfloat* a = line + (first + k * step) * channels;
        const Bfloat* b = a + step * channels;
        uint32_t* to = out + k / 2 * wide;
        const bool is_pair = k + 1 < num;
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; c++) to[c] = a[c].bits | (is_pair ? static_cast<uint32_t>(b[c].bits) << 16 : 0u);
        std::fill(to + channels, to + wide, 0u);
    }
}

void strided_kernel_grad_bfloat(const at::Tensor& x, const at::Tensor& dy, at::Tensor& dw) {
    const Images in(x), out(dy);
    const int64_t panels = ceil_div(in.c, PANEL), wide = panels * PANEL, pairs = ceil_div(out.w, 2);
    const Blocks rows(out.c, ROWS);
    const int64_t lines = out.n * out.h, group = std::clamp<int64_t>(PAIRED / out.w, 1, lines);
    const at::Tensor sums = scratch(9 * out.c * wide);
    at::Tensor left = at::empty({group * pairs * out.c}, at::kInt), right = at::empty({9 * group * pairs * wide}, at::kInt);
    uint32_t *ls = data<uint32_t>(left), *rs = data<uint32_t>(right);
    const Bfloat *xs = data<Bfloat>(x), *dys = data<Bfloat>(dy);
    float* to = sums.data_ptr<float>();
    for (int64_t start = 0; start < lines; start += group) {
        const int64_t num = std::min(group, lines - start);
        at::parallel_for(0, num * 4, 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t i = item / 4, ky = item % 4, line = start + i;
                if (ky == 3) {
                    pair_up(dys + line * out.w * out.c, 0, 1, out.w, out.c, out.c, ls + i * pairs * out.c);
                    continue;
                }
                const Bfloat* from = xs + (line / out.h * in.h + line % out.h * 2 + ky) * in.w * in.c;
                for (int64_t kx = 0; kx < 3; kx++) pair_up(from, kx, 2, out.w, in.c, wide, rs + ((ky * 3 + kx) * group + i) * pairs * wide);
            }
        });
        at::parallel_for(0, 9 * rows.num, 1, [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; item++) {
                const int64_t tap = item / rows.num, row = item % rows.num;
                for (int64_t panel = 0; panel < panels; panel++) {
                    const PairTerm term{ls + rows.start(row), rs + tap * group * pairs * wide + panel * PANEL};
                    pair_product(rows.len(row), {num * pairs, out.c, wide, wide, start > 0}, &term, 1,
                                 to + (tap * out.c + rows.start(row)) * wide + panel * PANEL);
                }
            }
        });
    }
    write_kernel_grad<Bfloat>(to, out.c, in.c, wide, dw);
}

// ---- Operators

void check(const at::Tensor& image, const char* name) {
    const bool is_known = image.scalar_type() == at::kFloat || image.scalar_type() == at::kBFloat16;
    TORCH_CHECK_VALUE(image.dim() == 4 && is_known && image.device().is_cpu(), name, " is ", image.scalar_type(), " ",
                      image.sizes(), ", wanted float32 or bfloat16 [N, C, H, W] on the CPU");
}

// Whether both are float32; or both are bfloat16.
bool check_same(const at::Tensor& image, const at::Tensor& other) {
    check(other, "the other operand");
    TORCH_CHECK_VALUE(image.scalar_type() == other.scalar_type(), "operands are ", image.scalar_type(), " and ",
                      other.scalar_type(), ", wanted the same type");
    return image.scalar_type() == at::kFloat;
}

void check_setting(int64_t stride, int64_t pad_y, int64_t pad_x) {
    TORCH_CHECK_VALUE((stride == 1 && std::min(pad_y, pad_x) >= 0 && std::max(pad_y, pad_x) <= 2) || (stride == 2 && pad_y == 0 && pad_x == 0),
                      "stride ", stride, " with padding ", pad_y, ", ", pad_x, "; wanted stride 1 and at most 2, or stride 2 and none");
}

int64_t size_after(int64_t size, int64_t stride, int64_t pad) { return size + 2 * pad < 3 ? 0 : (size + 2 * pad - 3) / stride + 1; }

void check_sizes(int64_t h, int64_t w, const at::Tensor& dy, int64_t stride, int64_t pad_y, int64_t pad_x) {
    TORCH_CHECK_VALUE(dy.size(2) > 0 && dy.size(3) > 0 && dy.size(2) == size_after(h, stride, pad_y) && dy.size(3) == size_after(w, stride, pad_x),
                      "gradients ", dy.sizes(), " don't fit images of ", h, "x", w, ", wanted ", size_after(h, stride, pad_y), "x",
                      size_after(w, stride, pad_x));
}

at::Tensor last(const at::Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// torch's own gradient to the images (0) or the weights (1). Weights had better be contiguous: at stride 2 its gradient to
// the images takes five times as long with channels-last ones.
at::Tensor torch_grad(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, int64_t stride, int64_t pad_y, int64_t pad_x, int which) {
    const auto grads = at::convolution_backward(dy, x, w, c10::nullopt, {stride, stride}, {pad_y, pad_x}, {1, 1}, false, {0, 0}, 1,
                                                {which == 0, which == 1, false});
    return which ? std::get<1>(grads).contiguous() : last(std::get<0>(grads));
}

// `own` says for each of the three operators whether our code does it.
constexpr int64_t OWN_CONV = 1, OWN_INPUT = 2, OWN_WEIGHT = 4;

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& w, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    check(x, "x"), check_setting(stride, pad_y, pad_x);
    const bool is_float = check_same(x, w);
    TORCH_CHECK_VALUE(w.size(1) == x.size(1) && w.size(2) == 3 && w.size(3) == 3, "weights ", w.sizes(),
                      " don't fit images ", x.sizes(), ", wanted [O, ", x.size(1), ", 3, 3]");
    const int64_t h = size_after(x.size(2), stride, pad_y), wide = size_after(x.size(3), stride, pad_x);
    TORCH_CHECK_VALUE(h > 0 && wide > 0, "images ", x.sizes(), " are smaller than the kernel; give more padding");
    if (!(own & OWN_CONV) || (stride == 2 && !is_float)) return last(at::conv2d(last(x), w.contiguous(), {}, {stride, stride}, {pad_y, pad_x}));
    at::Tensor y = at::empty({x.size(0), w.size(0), h, wide}, x.options(), at::MemoryFormat::ChannelsLast);
    if (y.numel() == 0) return y;
    if (stride == 2) winograd_strided(last(x), transformed<Double::strided_kernel>(Kernel<float>(w, false)), y);
    else if (is_float) winograd<float>(last(x), transformed<Unit::kernel>(Kernel<float>(w, false)), pad_y, pad_x, y);
    else winograd<Bfloat>(last(x), transformed<Unit::kernel>(Kernel<Bfloat>(w, false)), pad_y, pad_x, y);
    return y;
}

at::Tensor conv2d_input(const at::Tensor& dy, const at::Tensor& w, int64_t h, int64_t wide, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    check(dy, "dy"), check_setting(stride, pad_y, pad_x);
    const bool is_float = check_same(dy, w);
    TORCH_CHECK_VALUE(w.size(0) == dy.size(1) && w.size(2) == 3 && w.size(3) == 3, "weights ", w.sizes(),
                      " don't fit gradients ", dy.sizes(), ", wanted [", dy.size(1), ", I, 3, 3]");
    check_sizes(h, wide, dy, stride, pad_y, pad_x);
    at::Tensor dx = at::empty({dy.size(0), w.size(1), h, wide}, dy.options(), at::MemoryFormat::ChannelsLast);
    if (dx.numel() == 0) return dx;
    const bool is_exact = h == 2 * dy.size(2) + 1 && wide == 2 * dy.size(3) + 1;
    if (!(own & OWN_INPUT) || (stride == 2 && !(is_exact && is_float))) return torch_grad(last(dy), dx, w.contiguous(), stride, pad_y, pad_x, 0);
    if (stride == 2) return winograd_transposed(last(dy), transformed_for_transposed(w), dx), dx;
    if (is_float) winograd<float>(last(dy), transformed<Unit::kernel>(Kernel<float>(w, true)), 2 - pad_y, 2 - pad_x, dx);
    else winograd<Bfloat>(last(dy), transformed<Unit::kernel>(Kernel<Bfloat>(w, true)), 2 - pad_y, 2 - pad_x, dx);
    return dx;
}

// At stride 2 transforms for a gradient to weights pay with many tiles only, as with the others (`conv2d_cpu.pays`).
bool has_many_tiles(const at::Tensor& x, const at::Tensor& dy) {
    const int64_t channels = std::min(x.size(1), dy.size(1));
    return channels >= 64 && Tiles(dy.size(0), dy.size(2), dy.size(3)).total >= 128;
}

at::Tensor conv2d_weight(const at::Tensor& x, const at::Tensor& dy, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    check(x, "x"), check_setting(stride, pad_y, pad_x);
    const bool is_float = check_same(x, dy);
    TORCH_CHECK_VALUE(x.size(0) == dy.size(0), "images ", x.sizes(), " and gradients ", dy.sizes(), " differ in number");
    check_sizes(x.size(2), x.size(3), dy, stride, pad_y, pad_x);
    at::Tensor dw = at::empty({dy.size(1), x.size(1), 3, 3}, x.options());
    if (x.numel() == 0 || dw.numel() == 0) return dw.zero_();
    if (!(own & OWN_WEIGHT)) return torch_grad(last(dy), last(x), dw, stride, pad_y, pad_x, 1);
    if (stride == 1 && is_float) winograd_kernel_grad<float>(last(x), last(dy), pad_y, pad_x, dw);
    else if (stride == 1) winograd_kernel_grad<Bfloat>(last(x), last(dy), pad_y, pad_x, dw);
    else if (is_float) (has_many_tiles(x, dy) ? winograd_strided_kernel_grad : strided_kernel_grad)(last(x), last(dy), dw);
    else strided_kernel_grad_bfloat(last(x), last(dy), dw);
    return dw;
}

// For weights that stay: transformed once. Those of a transposed convolution of stride 2 are [I, O, 3, 3].
at::Tensor conv2d_prepare(const at::Tensor& w, bool transposed) {
    check(w, "w");
    TORCH_CHECK_VALUE(w.size(2) == 3 && w.size(3) == 3, "weights ", w.sizes(), ", wanted [O, I, 3, 3]");
    if (transposed) {
        TORCH_CHECK_VALUE(w.scalar_type() == at::kFloat, "weights are ", w.scalar_type(), ", wanted float32 for a transposed convolution");
        return transformed_for_transposed(w);
    }
    return w.scalar_type() == at::kFloat ? transformed<Unit::kernel>(Kernel<float>(w, false)) : transformed<Unit::kernel>(Kernel<Bfloat>(w, false));
}

using Optional = std::optional<at::Tensor>;

// Parameters of a layer are float32 and dense, `numel` values each.
const float* parameter(const Optional& t, const char* name, int64_t numel) {
    if (!t || !t->defined()) return nullptr;
    TORCH_CHECK_VALUE(t->scalar_type() == at::kFloat && t->is_contiguous() && t->numel() == numel, name, " is ", t->scalar_type(), " ",
                      t->sizes(), ", wanted ", numel, " contiguous values of float32");
    return t->const_data_ptr<float>();
}

// With the weights that u was made of, which give `channels` channels: `conv2d` of stride 1 and padding 1, or a
// transposed convolution of stride 2 without padding; of images times styles [N, I]. With a bias [O] and scales [N, O]
// what `epilogue` does follows; it can't behind a transposed convolution.
at::Tensor conv2d_prepared(const at::Tensor& x, const at::Tensor& u, int64_t channels, bool transposed, const Optional& styles,
                           const Optional& scale, const Optional& noise, const Optional& strength, const Optional& bias,
                           double alpha, double gain, double clamp) {
    check(x, "x");
    TORCH_CHECK_VALUE(u.scalar_type() == at::kFloat && u.is_contiguous() && channels > 0 &&
                          u.numel() == (PLANES + (transposed ? TAPS : 0)) * ceil_div(channels, PANEL) * PANEL * x.size(1),
                      "prepared weights don't fit images ", x.sizes(), ", wanted those of [", channels, ", ", x.size(1), ", 3, 3]");
    TORCH_CHECK_VALUE(!transposed || x.scalar_type() == at::kFloat, "x is ", x.scalar_type(), ", wanted float32 for a transposed convolution");
    const int64_t h = transposed ? 2 * x.size(2) + 1 : x.size(2), w = transposed ? 2 * x.size(3) + 1 : x.size(3);
    at::Tensor y = at::empty({x.size(0), channels, h, w}, x.options(), at::MemoryFormat::ChannelsLast);
    if (x.numel() == 0) return y.zero_();
    Layer layer{parameter(styles, "styles", x.size(0) * x.size(1)), parameter(scale, "scale", x.size(0) * channels), parameter(bias, "bias", channels)};
    TORCH_CHECK_VALUE(!layer.scale == !layer.bias && !(transposed && layer.bias), "wanted scale and bias together, and not behind a transposed convolution");
    if (layer.bias && noise && noise->defined()) {
        const bool is_each = noise->numel() != h * w;
        layer.noise = parameter(noise, "noise", (is_each ? x.size(0) : 1) * h * w), layer.noise_step = is_each ? h * w : 0;
        const float* value = parameter(strength, "strength", 1);
        TORCH_CHECK_VALUE(value, "noise without a strength; wanted both");
        layer.strength = *value;
    }
    layer.alpha = static_cast<float>(alpha), layer.gain = static_cast<float>(gain), layer.clamp = static_cast<float>(clamp);
    if (transposed) winograd_transposed(last(x), u, y, layer);
    else if (x.scalar_type() == at::kFloat) winograd<float>(last(x), u, 1, 1, y, layer);
    else winograd<Bfloat>(last(x), u, 1, 1, y, layer);
    return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, CPU, m) {
    m.impl("conv2d_prepare", &conv2d_prepare);
    m.impl("conv2d_prepared", &conv2d_prepared);
    m.impl("conv2d", &conv2d);
    m.impl("conv2d_input", &conv2d_input);
    m.impl("conv2d_weight", &conv2d_weight);
}
