// bias_act and upfirdn2d of CUDA tensors: checks, layouts, stream. Schemas, shape functions and gradients are in
// bias_act.py and upfirdn2d.py, for these and for the implementations of native_cpu.cpp; here are only the numbers.
//
// With SGR_HOST_EMULATION defined the same code serves CPU tensors, for tests without a GPU.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "bias_act_kernel.h"
#include "upfirdn2d_kernel.h"

#if defined(SGR_HOST_EMULATION)
#define SGR_DISPATCH_KEY CPU
#else
#define SGR_DISPATCH_KEY CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using at::Tensor;

#if defined(SGR_HOST_EMULATION)
struct DeviceGuard {
    explicit DeviceGuard(at::Device) {}
};
void* current_stream(at::Device) { return nullptr; }
void check_launch(int error) { TORCH_CHECK(error == 0, "the emulated kernel failed"); }
bool is_on_device(const Tensor& t) { return t.is_cpu(); }
#else
using DeviceGuard = c10::cuda::CUDAGuard;
void* current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }
void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }
bool is_on_device(const Tensor& t) { return t.is_cuda(); }
#endif

int dtype_code(const Tensor& t, const char* op) {
    switch (t.scalar_type()) {
        case at::kFloat: return sgr::FLOAT32;
        case at::kHalf: return sgr::FLOAT16;
        case at::kBFloat16: return sgr::BFLOAT16;
        case at::kDouble: return sgr::FLOAT64;
        default: break;
    }
    TORCH_CHECK_VALUE(false, op, ": x is ", t.scalar_type(), ", wanted float32, float16, bfloat16 or float64");
}

// `t` with the strides of `like`; itself if it has them.
Tensor laid_out_as(const Tensor& t, const Tensor& like, const char* name) {
    TORCH_CHECK_VALUE(t.sizes() == like.sizes(), "bias_act: ", name, " has shape ", t.sizes(), ", but x has ", like.sizes());
    TORCH_CHECK_VALUE(t.scalar_type() == like.scalar_type() && t.device() == like.device(), "bias_act: ", name, " is ",
        t.scalar_type(), " on ", t.device(), ", but x is ", like.scalar_type(), " on ", like.device());
    if (t.strides() == like.strides()) return t;
    return at::empty_like(like).copy_(t);
}

// Channels-last where x is that and nothing else; the shape functions say the same.
at::MemoryFormat layout_of(const Tensor& x) {
    const bool is_last = x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
    return is_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor bias_act(
    const Tensor& x_given, const std::optional<Tensor>& b_given, const std::optional<Tensor>& xref_given,
    const std::optional<Tensor>& yref_given, const std::optional<Tensor>& dy_given, int64_t order, int64_t dim,
    int64_t act, double alpha, double gain, double clamp) {
    TORCH_CHECK_VALUE(is_on_device(x_given), "bias_act: x is on ", x_given.device(), ", wanted a CUDA tensor");
    const DeviceGuard guard(x_given.device());
    const Tensor x = x_given.contiguous(layout_of(x_given));
    const Tensor y = at::empty_like(x);
    sgr::BiasActParams p{};
    p.dtype = dtype_code(x, "bias_act");
    p.numel = x.numel();
    p.act = static_cast<int>(act);
    p.order = static_cast<int>(order);
    p.alpha = alpha;
    p.gain = gain;
    p.clamp = clamp;
    Tensor b, xref, yref, dy;
    if (b_given) {
        TORCH_CHECK_VALUE(dim >= 0 && dim < x.dim(), "bias_act: dim is ", dim, ", wanted 0 to ", x.dim() - 1);
        TORCH_CHECK_VALUE(b_given->dim() == 1 && b_given->size(0) == x.size(dim), "bias_act: b has shape ",
            b_given->sizes(), ", wanted one value for each index of axis ", dim, " of x ", x.sizes());
        TORCH_CHECK_VALUE(b_given->scalar_type() == x.scalar_type() && b_given->device() == x.device(), "bias_act: b is ",
            b_given->scalar_type(), " on ", b_given->device(), ", but x is ", x.scalar_type(), " on ", x.device());
        b = b_given->contiguous();
        p.num_bias = x.size(dim);
        // The stride of an axis of one element means nothing; any step past the end gives index 0.
        p.bias_step = p.num_bias > 1 ? x.stride(dim) : std::max<int64_t>(p.numel, 1);
        p.b = b.const_data_ptr();
    }
    if (xref_given) p.xref = (xref = laid_out_as(*xref_given, x, "xref")).const_data_ptr();
    if (yref_given) p.yref = (yref = laid_out_as(*yref_given, x, "yref")).const_data_ptr();
    if (dy_given) p.dy = (dy = laid_out_as(*dy_given, x, "dy")).const_data_ptr();
    if (p.numel == 0) return y;
    p.x = x.const_data_ptr();
    p.y = y.mutable_data_ptr();
    const char* problem = sgr::bias_act_prepare(p);
    TORCH_CHECK_VALUE(!problem, "bias_act: ", problem);
    check_launch(sgr::bias_act_launch(p, current_stream(x.device())));
    return y;
}

void set_strides(int64_t (&to)[4], const Tensor& t) {
    for (int axis = 0; axis < 4; axis++) to[axis] = t.stride(axis);
}

Tensor run_upfirdn2d(sgr::UpfirdnParams p, const Tensor& x, at::ScalarType dtype, const char* op) {
    const char* problem = sgr::upfirdn2d_prepare(p);
    TORCH_CHECK_VALUE(!problem, "upfirdn2d: ", problem, " (image ", p.h, " x ", p.w, ", filter ", p.fh, " x ", p.fw, ", up ",
        p.upy, ", ", p.upx, ", down ", p.downy, ", ", p.downx, ", padding x ", p.padx0, ", ", p.padx1, ", y ", p.pady0,
        ", ", p.pady1, ")");
    const at::MemoryFormat format = layout_of(x);
    const Tensor y = at::empty({p.n, p.c, p.out_h, p.out_w}, x.options().dtype(dtype), format);
    if (y.numel() == 0) return y;
    p.x = x.const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.x_dtype = dtype_code(x, op);
    p.y_dtype = dtype_code(y, op);
    p.is_channels_inner = format == at::MemoryFormat::ChannelsLast;
    set_strides(p.x_stride, x);
    set_strides(p.y_stride, y);
    check_launch(sgr::upfirdn2d_launch(p, current_stream(x.device())));
    return y;
}

Tensor upfirdn2d(
    const Tensor& x, const Tensor& f, int64_t upx, int64_t upy, int64_t downx, int64_t downy, int64_t padx0,
    int64_t padx1, int64_t pady0, int64_t pady1, bool flip, double gain) {
    TORCH_CHECK_VALUE(is_on_device(x), "upfirdn2d: x is on ", x.device(), ", wanted a CUDA tensor");
    TORCH_CHECK_VALUE(x.dim() == 4, "upfirdn2d: x has shape ", x.sizes(), ", wanted [N, C, H, W]");
    TORCH_CHECK_VALUE(f.dim() == 1 || f.dim() == 2, "upfirdn2d: the filter has shape ", f.sizes(),
        ", wanted [taps] or [fh, fw]");
    TORCH_CHECK_VALUE(f.scalar_type() == at::kFloat && f.device() == x.device(), "upfirdn2d: the filter is ", f.scalar_type(),
        " on ", f.device(), ", wanted float32 on ", x.device());
    constexpr int64_t limit = std::numeric_limits<int32_t>::max();
    for (const int64_t v : {upx, upy, downx, downy, padx0, padx1, pady0, pady1})
        TORCH_CHECK_VALUE(v >= -limit && v <= limit, "upfirdn2d: ", v, " is out of range for a factor or padding");
    const DeviceGuard guard(x.device());
    sgr::UpfirdnParams p{};
    p.n = x.size(0), p.c = x.size(1), p.h = x.size(2), p.w = x.size(3);
    p.upx = static_cast<int>(upx), p.upy = static_cast<int>(upy);
    p.downx = static_cast<int>(downx), p.downy = static_cast<int>(downy);
    p.padx0 = static_cast<int>(padx0), p.padx1 = static_cast<int>(padx1);
    p.pady0 = static_cast<int>(pady0), p.pady1 = static_cast<int>(pady1);
    p.flip = flip;
    p.gain = gain;
    const auto taps = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, sgr::MAX_TAPS + 1)); };
    p.fx = f.const_data_ptr<float>();
    p.f_stride_x = f.stride(-1);
    p.fw = taps(f.size(-1));
    p.fh = taps(f.size(0));
    const at::ScalarType dtype = x.scalar_type();
    p.x_dtype = dtype_code(x, "upfirdn2d");
    if (f.dim() == 2) {
        p.f_stride_y = f.stride(0);
        return run_upfirdn2d(p, x, dtype, "upfirdn2d");
    }
    if (sgr::upfirdn2d_is_fused(p)) {
        p.fy = p.fx;
        return run_upfirdn2d(p, x, dtype, "upfirdn2d");
    }
    // Along x, then along y; the middle of 16-bit images is float32.
    const at::ScalarType middle = dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype;
    sgr::UpfirdnParams along_x = p, along_y = p;
    const double root = std::sqrt(std::abs(gain));  // one half of the gain each, rounded as in the reference
    along_x.gain = std::copysign(root, gain);
    along_x.fh = along_x.upy = along_x.downy = 1;
    along_x.pady0 = along_x.pady1 = 0;
    const Tensor half = run_upfirdn2d(along_x, x, middle, "upfirdn2d");
    along_y.w = half.size(3);
    along_y.fw = along_y.upx = along_y.downx = 1;
    along_y.padx0 = along_y.padx1 = 0;
    along_y.f_stride_x = 0;
    along_y.f_stride_y = f.stride(0);
    along_y.gain = root;
    return run_upfirdn2d(along_y, half, dtype, "upfirdn2d");
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, SGR_DISPATCH_KEY, m) {
    m.impl("bias_act", &bias_act);
    m.impl("upfirdn2d", &upfirdn2d);
}
