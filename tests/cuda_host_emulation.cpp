// Runs the device code of torch_utils/ops on the host: a block's threads one after the other, phase by phase.
//
// Built as a shared library it is called through ctypes (tests/test_cuda_sources.py). Every access to device memory is
// checked against the range of a tensor, every access to shared memory against its array, every output element must be
// written exactly once, and shared memory starts as NaN, so that a cell read before it is written shows in the result.
// Threads run in either direction: a phase in which one thread reads what another writes gives two different results.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

struct Range {
    const char *begin, *end;
};

struct Watch {
    std::vector<Range> readable;
    Range writable{nullptr, nullptr};
    std::vector<uint8_t> written;  // per byte of the output; empty = too large to count
    std::string problem;

    void complain(const char* what, int64_t value) {
        if (problem.empty()) problem = std::string(what) + " " + std::to_string(value);
    }
    bool read(const void* pointer, size_t bytes) {
        const char* p = static_cast<const char*>(pointer);
        for (const Range& r : readable)
            if (p >= r.begin && p + bytes <= r.end) {
                if (reinterpret_cast<uintptr_t>(p) % bytes) complain("misaligned read of bytes:", bytes);
                return true;
            }
        complain("read outside of every tensor, bytes:", bytes);
        return false;
    }
    bool write(const void* pointer, size_t bytes) {
        const char* p = static_cast<const char*>(pointer);
        if (p < writable.begin || p + bytes > writable.end) {
            complain("write outside of the output, bytes:", bytes);
            return false;
        }
        if (reinterpret_cast<uintptr_t>(p) % bytes) complain("misaligned write of bytes:", bytes);
        for (size_t i = p - writable.begin; !written.empty() && bytes--; i++)
            if (written[i]++) complain("written twice, byte", i);
        return true;
    }
    void shared(int64_t index, int64_t size) {
        if (index < 0 || index >= size) complain("outside of shared memory, cell", index);
    }
};

Watch watch;

}  // namespace

#define SGR_MAY_READ(pointer, bytes) watch.read(pointer, bytes)
#define SGR_MAY_WRITE(pointer, bytes) watch.write(pointer, bytes)
#define SGR_CHECK_SHARED(index, size) watch.shared(index, size)

#include "../torch_utils/ops/bias_act_kernel.h"
#include "../torch_utils/ops/upfirdn2d_kernel.h"

namespace {

std::string last_kernel;
int64_t last_blocks;

template <class K, int I, class P>
void run_phase(const P& p, typename K::Shared& shared, int64_t block, bool is_backward) {
    for (int t = 0; t < K::THREADS; t++)
        K::template phase<I>(p, shared, block, is_backward ? K::THREADS - 1 - t : t);
    if constexpr (I + 1 < K::PHASES) run_phase<K, I + 1>(p, shared, block, is_backward);
}

// Blocks in [first, last), counted from the end where negative; last = 0: to the end.
template <class K, class P> int run_blocks(const P& p, int64_t blocks, int64_t first, int64_t last, bool is_backward) {
    static typename K::Shared shared;
    last_kernel = __PRETTY_FUNCTION__;
    last_blocks = blocks;
    first = first < 0 ? std::max<int64_t>(blocks + first, 0) : first;
    last = last <= 0 ? blocks + last : last;
    for (int64_t b = first; b < last && watch.problem.empty(); b++) {
        memset(static_cast<void*>(&shared), 0xff, sizeof(shared));  // NaN, as float and as double
        run_phase<K, 0>(p, shared, b, is_backward);
    }
    return 0;
}

constexpr int64_t SIZE_OF[] = {4, 2, 2, 8};

void watch_output(const void* y, int64_t bytes) {
    watch.writable = {static_cast<const char*>(y), static_cast<const char*>(y) + bytes};
    watch.written.assign(bytes < (int64_t{1} << 28) ? bytes : 0, 0);
}

void watch_input(const void* x, int64_t bytes) {
    if (x) watch.readable.push_back({static_cast<const char*>(x), static_cast<const char*>(x) + bytes});
}

// Null if all went well and every element of a dense output was written.
const char* verdict(bool is_whole) {
    if (is_whole)
        for (size_t i = 0; i < watch.written.size(); i++)
            if (!watch.written[i]) watch.complain("never written, byte", i);
    return watch.problem.empty() ? nullptr : watch.problem.c_str();
}

int64_t extent(const int64_t* sizes, const int64_t* strides) {
    int64_t last = 0;
    for (int i = 0; i < 4; i++) last += (sizes[i] - 1) * strides[i];
    return last + 1;
}

}  // namespace

extern "C" {

const char* emulated_kernel() { return last_kernel.c_str(); }
int64_t emulated_blocks() { return last_blocks; }

// The 16-bit conversions of the host, for a test of their own.
uint16_t emulated_narrow(float v, int dtype) {
    return dtype == sgr::FLOAT16 ? sgr::narrow<sgr::Half>(v).bits : sgr::narrow<sgr::Bfloat>(v).bits;
}
float emulated_widen(uint16_t v, int dtype) {
    return dtype == sgr::FLOAT16 ? sgr::widen(sgr::Half{v}) : sgr::widen(sgr::Bfloat{v});
}
uint32_t emulated_quotient(uint32_t n, uint32_t d) { return sgr::Divider(d).quotient(n); }

const char* emulate_bias_act(
    const void* x, const void* b, const void* xref, const void* yref, const void* dy, void* y, int dtype, int64_t numel,
    int64_t bias_step, int64_t num_bias, int act, int order, double alpha, double gain, double clamp, int64_t first,
    int64_t last, int is_backward) {
    sgr::BiasActParams p{};
    p.x = x, p.b = b, p.xref = xref, p.yref = yref, p.dy = dy, p.y = y;
    p.dtype = dtype, p.numel = numel, p.bias_step = bias_step, p.num_bias = num_bias;
    p.act = act, p.order = order, p.alpha = alpha, p.gain = gain, p.clamp = clamp;
    watch = Watch{};
    for (const void* tensor : {x, xref, yref, dy}) watch_input(tensor, numel * SIZE_OF[dtype]);
    watch_input(b, num_bias * SIZE_OF[dtype]);
    watch_output(y, numel * SIZE_OF[dtype]);
    if (const char* error = sgr::bias_act_prepare(p)) return error;
    sgr::bias_act_choose(p, [&](auto kernel, int64_t blocks) {
        return run_blocks<decltype(kernel)>(p, blocks, first, last, is_backward);
    });
    return verdict(first == 0 && last == 0);
}

// The size of the result of a call; null, or what is wrong with it.
// ints: n c h w | fw fh | upx upy downx downy | padx0 padx1 pady0 pady1 | flip
const char* emulate_upfirdn2d(
    const void* x, const float* fx, const float* fy, void* y, int x_dtype, int y_dtype, const int64_t* ints,
    const int64_t* x_strides, const int64_t* y_strides, const int64_t* f_strides, double gain, int is_channels_inner,
    int64_t* out_size, int64_t first, int64_t last, int is_backward) {
    sgr::UpfirdnParams p{};
    p.x = x, p.fx = fx, p.fy = fy, p.y = y, p.x_dtype = x_dtype, p.y_dtype = y_dtype;
    p.n = ints[0], p.c = ints[1], p.h = ints[2], p.w = ints[3];
    p.fw = ints[4], p.fh = ints[5], p.upx = ints[6], p.upy = ints[7], p.downx = ints[8], p.downy = ints[9];
    p.padx0 = ints[10], p.padx1 = ints[11], p.pady0 = ints[12], p.pady1 = ints[13], p.flip = ints[14];
    p.gain = gain, p.is_channels_inner = is_channels_inner;
    if (const char* error = sgr::upfirdn2d_prepare(p)) return error;
    out_size[0] = p.out_h, out_size[1] = p.out_w;
    if (!y) return nullptr;
    const int64_t x_sizes[] = {p.n, p.c, p.h, p.w}, y_sizes[] = {p.n, p.c, p.out_h, p.out_w};
    for (int i = 0; i < 4; i++) p.x_stride[i] = x_strides[i], p.y_stride[i] = y_strides[i];
    p.f_stride_y = f_strides[0], p.f_stride_x = f_strides[1];
    watch = Watch{};
    watch_input(x, extent(x_sizes, x_strides) * SIZE_OF[x_dtype]);
    const int64_t taps = fy ? (p.fw - 1) * p.f_stride_x + 1 : (p.fw - 1) * p.f_stride_x + (p.fh - 1) * p.f_stride_y + 1;
    watch_input(fx, taps * 4);
    watch_input(fy, taps * 4);
    watch_output(y, extent(y_sizes, y_strides) * SIZE_OF[y_dtype]);
    if (fy && !sgr::upfirdn2d_is_fused(p)) return "no fused kernel for this separable filter";
    sgr::upfirdn2d_choose(p, [&](auto kernel, const sgr::UpfirdnParams& planned, int64_t blocks) {
        return run_blocks<decltype(kernel)>(planned, blocks, first, last, is_backward);
    });
    return verdict(first == 0 && last == 0);
}

}  // extern "C"

#if defined(SGR_HOST_EMULATION)
// The binding (cuda_ops.cpp) linked against these runs on CPU tensors.
namespace sgr {

int bias_act_launch(const BiasActParams& p, void*) {
    watch = Watch{};
    for (const void* tensor : {p.x, p.xref, p.yref, p.dy}) watch_input(tensor, p.numel * SIZE_OF[p.dtype]);
    watch_input(p.b, p.num_bias * SIZE_OF[p.dtype]);
    watch_output(p.y, p.numel * SIZE_OF[p.dtype]);
    bias_act_choose(p, [&](auto kernel, int64_t blocks) {
        return run_blocks<decltype(kernel)>(p, blocks, 0, 0, false);
    });
    const char* problem = verdict(true);
    if (problem) fprintf(stderr, "bias_act: %s\n", problem);
    return problem != nullptr;
}

int upfirdn2d_launch(const UpfirdnParams& p, void*) {
    const int64_t x_sizes[] = {p.n, p.c, p.h, p.w}, y_sizes[] = {p.n, p.c, p.out_h, p.out_w};
    watch = Watch{};
    watch_input(p.x, extent(x_sizes, p.x_stride) * SIZE_OF[p.x_dtype]);
    watch_input(p.fx, int64_t{MAX_TAPS} * MAX_TAPS * 4);
    watch_input(p.fy, int64_t{MAX_TAPS} * MAX_TAPS * 4);
    watch_output(p.y, extent(y_sizes, p.y_stride) * SIZE_OF[p.y_dtype]);
    upfirdn2d_choose(p, [&](auto kernel, const UpfirdnParams& planned, int64_t blocks) {
        return run_blocks<decltype(kernel)>(planned, blocks, 0, 0, false);
    });
    const char* problem = verdict(true);
    if (problem) fprintf(stderr, "upfirdn2d: %s\n", problem);
    return problem != nullptr;
}

}  // namespace sgr
#endif
