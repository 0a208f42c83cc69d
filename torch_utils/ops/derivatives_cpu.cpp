// What torch's autograd does with the operators of a CPU: the formulas alone, every number comes from an operator.
//
// In C++ because a call through a formula in Python takes 50 to 120 microseconds, of which a training step makes two
// hundred: a tenth of a small network's. Operators without a formula here have one in their Python file.

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

// The operator of that name, to be called with these arguments.
template <class Signature> c10::TypedOperatorHandle<Signature> find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>();
}

bool learns(const Tensor& t) { return t.defined() && t.requires_grad(); }
bool learns(const Optional& t) { return t && learns(*t); }

// Whether autograd has to remember a call with these tensors.
template <class... T> bool is_recorded(const T&... tensors) { return at::GradMode::is_enabled() && (learns(tensors) || ...); }

// Call an operator's numbers, or let it be recorded if that is on.
template <class Op, class... T> auto plain(const Op& op, T&&... args) {
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(std::forward<T>(args)...);
}
template <class Op, class... T> auto recorded(const Op& op, T&&... args) {
    if (at::GradMode::is_enabled()) return op.call(std::forward<T>(args)...);
    return plain(op, std::forward<T>(args)...);
}

Optional optional(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }

// Which of the inputs the running backward pass wants a gradient of. Autograd counts those that were given.
template <size_t N> std::array<bool, N> wanted(const AutogradContext& ctx, const std::array<bool, N>& was_given) {
    std::array<bool, N> out{};
    for (size_t i = 0, edge = 0; i < N; i++)
        if (was_given[i]) out[i] = ctx.needs_input_grad(edge++);
    return out;
}

// ---- Convolutions: three operators, each bilinear, whose adjoints are the other two

auto conv2d_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t)>("stylegan_rooted::conv2d");
    return op;
}
auto input_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, SymInt, SymInt, int64_t, int64_t, int64_t, int64_t)>("stylegan_rooted::conv2d_input");
    return op;
}
auto weight_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t)>("stylegan_rooted::conv2d_weight");
    return op;
}

struct Setting {
    int64_t stride, pad_y, pad_x, own;

    void keep(AutogradContext* ctx) const { ctx->saved_data["setting"] = std::vector<int64_t>{stride, pad_y, pad_x, own}; }
    static Setting kept(AutogradContext* ctx) {
        const std::vector<int64_t> v = ctx->saved_data["setting"].toIntVector();
        return {v[0], v[1], v[2], v[3]};
    }
    Tensor conv2d(const Tensor& x, const Tensor& w) const { return recorded(conv2d_op(), x, w, stride, pad_y, pad_x, own); }
    Tensor input(const Tensor& dy, const Tensor& w, const Tensor& like) const {
        return recorded(input_op(), dy, w, like.sym_size(2), like.sym_size(3), stride, pad_y, pad_x, own);
    }
    Tensor weight(const Tensor& x, const Tensor& dy) const { return recorded(weight_op(), x, dy, stride, pad_y, pad_x, own); }
};

struct Conv2d : torch::autograd::Function<Conv2d> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
        ctx->save_for_backward({x, w});
        Setting{stride, pad_y, pad_x, own}.keep(ctx);
        return plain(conv2d_op(), x, w, stride, pad_y, pad_x, own);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_x, of_w] = wanted<2>(*ctx, {true, true});
        const Setting s = Setting::kept(ctx);
        return {of_x ? s.input(grads[0], in[1], in[0]) : Tensor(), of_w ? s.weight(in[0], grads[0]) : Tensor(), {}, {}, {}, {}};
    }
};

struct Conv2dInput : torch::autograd::Function<Conv2dInput> {
    static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& w, SymInt h, SymInt wide, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
        ctx->save_for_backward({dy, w});
        Setting{stride, pad_y, pad_x, own}.keep(ctx);
        return plain(input_op(), dy, w, std::move(h), std::move(wide), stride, pad_y, pad_x, own);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_dy, of_w] = wanted<2>(*ctx, {true, true});
        const Setting s = Setting::kept(ctx);
        return {of_dy ? s.conv2d(grads[0], in[1]) : Tensor(), of_w ? s.weight(grads[0], in[0]) : Tensor(), {}, {}, {}, {}, {}, {}};
    }
};

struct Conv2dWeight : torch::autograd::Function<Conv2dWeight> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& dy, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
        ctx->save_for_backward({x, dy});
        Setting{stride, pad_y, pad_x, own}.keep(ctx);
        return plain(weight_op(), x, dy, stride, pad_y, pad_x, own);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_x, of_dy] = wanted<2>(*ctx, {true, true});
        const Setting s = Setting::kept(ctx);
        return {of_x ? s.input(in[1], grads[0], in[0]) : Tensor(), of_dy ? s.conv2d(in[0], grads[0]) : Tensor(), {}, {}, {}, {}};
    }
};

Tensor conv2d(const Tensor& x, const Tensor& w, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    if (!is_recorded(x, w)) return plain(conv2d_op(), x, w, stride, pad_y, pad_x, own);
    return Conv2d::apply(x, w, stride, pad_y, pad_x, own);
}

Tensor conv2d_input(const Tensor& dy, const Tensor& w, SymInt h, SymInt wide, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    if (!is_recorded(dy, w)) return plain(input_op(), dy, w, std::move(h), std::move(wide), stride, pad_y, pad_x, own);
    return Conv2dInput::apply(dy, w, std::move(h), std::move(wide), stride, pad_y, pad_x, own);
}

Tensor conv2d_weight(const Tensor& x, const Tensor& dy, int64_t stride, int64_t pad_y, int64_t pad_x, int64_t own) {
    if (!is_recorded(x, dy)) return plain(weight_op(), x, dy, stride, pad_y, pad_x, own);
    return Conv2dWeight::apply(x, dy, stride, pad_y, pad_x, own);
}

Tensor conv2d_prepare(const Tensor& w, bool transposed) {
    static const auto op = find<Tensor(const Tensor&, bool)>("stylegan_rooted::conv2d_prepare");
    TORCH_CHECK(!is_recorded(w), "prepared convolutions have no gradient; use conv2d");
    return plain(op, w, transposed);
}

Tensor conv2d_prepared(const Tensor& x, const Tensor& prepared, int64_t channels, bool transposed, const Optional& styles,
                       const Optional& scale, const Optional& noise, const Optional& strength, const Optional& bias, double alpha,
                       double gain, double clamp) {
    using Signature = Tensor(const Tensor&, const Tensor&, int64_t, bool, const Optional&, const Optional&, const Optional&,
                             const Optional&, const Optional&, double, double, double);
    static const auto op = find<Signature>("stylegan_rooted::conv2d_prepared");
    TORCH_CHECK(!is_recorded(x, prepared, styles, scale, noise, strength, bias), "prepared convolutions have no gradient; use conv2d");
    return plain(op, x, prepared, channels, transposed, styles, scale, noise, strength, bias, alpha, gain, clamp);
}

// ---- What follows a convolution

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Seconds = std::tuple<Tensor, Tensor, Tensor>;

auto epilogue_op() {
    static const auto op = find<Tensor(const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, double, double,
                                       double, bool)>("stylegan_rooted::epilogue");
    return op;
}
auto grad_op(bool from_result) {
    using Op = Grads(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&, double, double, double, bool);
    static const auto of_input = find<Op>("stylegan_rooted::epilogue_grad"), of_result = find<Op>("stylegan_rooted::epilogue_result_grad");
    return from_result ? of_result : of_input;
}
auto second_op() {
    static const auto op = find<Seconds(const Tensor&, const Optional&, const Optional&, const Optional&, const Tensor&, const Tensor&,
                                        const Optional&, const Optional&, const Optional&, const Optional&, double, double, double)>(
        "stylegan_rooted::epilogue_grad_grad");
    return op;
}

// Parameters of a call, as they are saved: what was not given is undefined.
struct Parameters {
    Tensor scale, noise, strength, bias;
    double alpha, gain, clamp;

    Parameters(const Optional& scale, const Optional& noise, const Optional& strength, const Optional& bias, double alpha, double gain, double clamp)
        : scale(scale.value_or(Tensor())), noise(noise.value_or(Tensor())), strength(strength.value_or(Tensor())),
          bias(bias.value_or(Tensor())), alpha(alpha), gain(gain), clamp(clamp) {}

    // With some images before them.
    void keep(AutogradContext* ctx, variable_list images) const {
        images.insert(images.end(), {scale, noise, strength, bias});
        ctx->save_for_backward(std::move(images));
        ctx->saved_data["settings"] = std::vector<double>{alpha, gain, clamp};
    }
    static Parameters kept(AutogradContext* ctx, const variable_list& saved) {
        const auto s = ctx->saved_data["settings"].toDoubleVector();
        const size_t n = saved.size();
        return {optional(saved[n - 4]), optional(saved[n - 3]), optional(saved[n - 2]), optional(saved[n - 1]), s[0], s[1], s[2]};
    }
    Grads grads(const Tensor& dy, const Tensor& images, bool from_result, bool with_sums) const {
        return recorded(grad_op(from_result), dy, images, optional(scale), optional(noise), optional(strength), optional(bias), alpha, gain,
                        clamp, with_sums);
    }
    // The x that the operator without a clamp made y of; differentiable.
    Tensor input_of(const Tensor& y) const {
        Tensor u = y.to(y.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
        u = u * at::where(u > 0, at::full_like(u, 1 / gain), at::full_like(u, 1 / (gain * alpha)));
        if (noise.defined()) u = u - noise * strength;
        if (bias.defined()) u = u - bias.unsqueeze(-1).unsqueeze(-1);
        if (scale.defined()) u = u / scale.unsqueeze(-1).unsqueeze(-1);
        return u.to(y.scalar_type());
    }
};

struct Epilogue : torch::autograd::Function<Epilogue> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength,
                          const Optional& bias, double alpha, double gain, double clamp, bool keeps_input) {
        const Tensor y = plain(epilogue_op(), x, scale, noise, strength, bias, alpha, gain, clamp, keeps_input);
        const Parameters p(scale, noise, strength, bias, alpha, gain, clamp);
        // The result tells the gradient all that x would, and what comes next keeps it anyway, so x is free. Not so at a
        // clamp, which hides what was larger, nor where there is no more than a scale: it may be 0.
        const bool has_result = clamp < 0 && (!p.scale.defined() || (alpha != 1 && !keeps_input));
        p.keep(ctx, {has_result ? y : x});
        ctx->saved_data["has_result"] = has_result;
        return y;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& given) {
        const variable_list in = ctx->get_saved_variables();
        Parameters p = Parameters::kept(ctx, in);
        const auto [of_x, of_scale, of_noise, of_strength, of_bias] =
            wanted<5>(*ctx, {true, p.scale.defined(), p.noise.defined(), p.strength.defined(), p.bias.defined()});
        const bool has_result = ctx->saved_data["has_result"].toBool(), with_sums = of_scale || of_strength || of_bias;
        const Tensor strength = p.strength, none;
        Grads grads;
        if (has_result && !p.scale.defined()) {  // images are asked for their slope alone, and y has the sign of what had it
            if (strength.defined()) p.strength = at::zeros_like(strength);
            p.bias = none;
            grads = p.grads(given[0], in[0].detach(), false, with_sums);
        } else if (has_result && !at::GradMode::is_enabled()) {
            grads = p.grads(given[0], in[0], true, with_sums);
        } else {
            grads = p.grads(given[0], has_result ? p.input_of(in[0]) : in[0], false, with_sums);
        }
        const auto& [dx, dscale, dstrength, dbias] = grads;
        return {of_x ? dx : none, of_scale ? dscale : none, none, of_strength ? dstrength.reshape_symint(strength.sym_sizes()) : none,
                of_bias ? dbias : none, none, none, none, none};
    }
};

struct EpilogueGrad : torch::autograd::Function<EpilogueGrad> {
    static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Optional& scale, const Optional& noise,
                                 const Optional& strength, const Optional& bias, double alpha, double gain, double clamp, bool with_sums) {
        const Parameters p(scale, noise, strength, bias, alpha, gain, clamp);
        p.keep(ctx, {p.scale.defined() ? dy : Tensor(), x});  // linear in dy: only for the scale's sake
        ctx->set_materialize_grads(false);
        const auto [dx, dscale, dstrength, dbias] = plain(grad_op(false), dy, x, scale, noise, strength, bias, alpha, gain, clamp, with_sums);
        return {dx, dscale, dstrength, dbias};
    }
    // The activation is piecewise linear, so the gradient is linear in dy, x and scale each.
    static variable_list backward(AutogradContext* ctx, const variable_list& given) {
        variable_list out(10);
        if (!given[0].defined() && !given[1].defined() && !given[2].defined() && !given[3].defined()) return out;
        const variable_list in = ctx->get_saved_variables();
        const Parameters p = Parameters::kept(ctx, in);
        const Tensor x = in[1], dy = p.scale.defined() ? in[0] : x.detach();  // any images: what they are for is not asked for
        if (!p.scale.defined() && given[0].defined() && !given[2].defined() && !given[3].defined()) {
            // R1's case, a product with the slope, is its own adjoint: fewer passes and images than the general way.
            out[0] = std::get<0>(p.grads(given[0], x.detach(), false, false));
            return out;
        }
        const Optional ddscale = p.scale.defined() ? optional(given[1]) : std::nullopt;
        const auto [of_dy, of_x, of_scale, of_noise, of_strength, of_bias] =
            wanted<6>(*ctx, {true, true, p.scale.defined(), p.noise.defined(), p.strength.defined(), p.bias.defined()});
        const auto [ddy, by_x, dscale] = recorded(
            second_op(), given[0].defined() ? given[0] : at::zeros_like(x), ddscale, optional(given[2]), optional(given[3]), dy, x,
            optional(p.scale), optional(p.noise), optional(p.strength), optional(p.bias), p.alpha, p.gain, p.clamp);
        if (of_dy) out[0] = ddy;
        if (of_x && ddscale) out[1] = by_x;
        if (of_scale) out[2] = dscale;
        return out;
    }
};

Tensor epilogue(const Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength, const Optional& bias,
                double alpha, double gain, double clamp, bool keeps_input) {
    if (!is_recorded(x, scale, strength, bias)) return plain(epilogue_op(), x, scale, noise, strength, bias, alpha, gain, clamp, keeps_input);
    return Epilogue::apply(x, scale, noise, strength, bias, alpha, gain, clamp, keeps_input);
}

Grads epilogue_grad(const Tensor& dy, const Tensor& x, const Optional& scale, const Optional& noise, const Optional& strength,
                    const Optional& bias, double alpha, double gain, double clamp, bool with_sums) {
    if (!is_recorded(dy, x, scale)) return plain(grad_op(false), dy, x, scale, noise, strength, bias, alpha, gain, clamp, with_sums);
    const variable_list out = EpilogueGrad::apply(dy, x, scale, noise, strength, bias, alpha, gain, clamp, with_sums);
    return {out[0], out[1], out[2], out[3]};
}

// ---- Products per pixel with a few colours: three operators, each bilinear, whose adjoints are the other two

auto few_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("stylegan_rooted::colours_few");
    return op;
}
auto many_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, at::ScalarType)>("stylegan_rooted::colours_many");
    return op;
}
auto kernels_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("stylegan_rooted::colours_kernels");
    return op;
}

struct ColoursFew : torch::autograd::Function<ColoursFew> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& kernels) {
        ctx->save_for_backward({x, kernels});
        return plain(few_op(), x, kernels);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_x, of_kernels] = wanted<2>(*ctx, {true, true});
        return {of_x ? recorded(many_op(), grads[0], in[1], in[0].scalar_type()) : Tensor(),
                of_kernels ? recorded(kernels_op(), in[0], grads[0]) : Tensor()};
    }
};

struct ColoursMany : torch::autograd::Function<ColoursMany> {
    static Tensor forward(AutogradContext* ctx, const Tensor& y, const Tensor& kernels, at::ScalarType type) {
        ctx->save_for_backward({y, kernels});
        return plain(many_op(), y, kernels, type);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_y, of_kernels] = wanted<2>(*ctx, {true, true});
        return {of_y ? recorded(few_op(), grads[0], in[1]) : Tensor(), of_kernels ? recorded(kernels_op(), grads[0], in[0]) : Tensor(), {}};
    }
};

struct ColoursKernels : torch::autograd::Function<ColoursKernels> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y) {
        ctx->save_for_backward({x, y});
        return plain(kernels_op(), x, y);
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const auto [of_x, of_y] = wanted<2>(*ctx, {true, true});
        return {of_x ? recorded(many_op(), in[1], grads[0], in[0].scalar_type()) : Tensor(), of_y ? recorded(few_op(), in[0], grads[0]) : Tensor()};
    }
};

Tensor colours_few(const Tensor& x, const Tensor& kernels) {
    return is_recorded(x, kernels) ? ColoursFew::apply(x, kernels) : plain(few_op(), x, kernels);
}
Tensor colours_many(const Tensor& y, const Tensor& kernels, at::ScalarType type) {
    return is_recorded(y, kernels) ? ColoursMany::apply(y, kernels, type) : plain(many_op(), y, kernels, type);
}
Tensor colours_kernels(const Tensor& x, const Tensor& y) {
    return is_recorded(x, y) ? ColoursKernels::apply(x, y) : plain(kernels_op(), x, y);
}

// ---- Resampling with a filter: the adjoint is another one

auto upfirdn2d_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, int64_t, int64_t, SymInt, SymInt, SymInt, SymInt, bool,
                                       double)>("stylegan_rooted::upfirdn2d");
    return op;
}

struct Upfirdn2d : torch::autograd::Function<Upfirdn2d> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y,
                          SymInt x0, SymInt x1, SymInt y0, SymInt y1, bool flip_filter, double gain) {
        const Tensor y = plain(upfirdn2d_op(), x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain);
        ctx->save_for_backward({f});
        ctx->saved_data["factors"] = std::vector<int64_t>{down_x, down_y, up_x, up_y};
        const int64_t fw = f.size(-1), fh = f.size(0);
        ctx->saved_data["x0"] = fw - x0 - 1;
        ctx->saved_data["x1"] = x.sym_size(3) * up_x - y.sym_size(3) * down_x + x0 - up_x + 1;
        ctx->saved_data["y0"] = fh - y0 - 1;
        ctx->saved_data["y1"] = x.sym_size(2) * up_y - y.sym_size(2) * down_y + y0 - up_y + 1;
        ctx->saved_data["is_flipped"] = !flip_filter;
        ctx->saved_data["gain"] = gain;
        return y;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        variable_list out(12);
        auto& kept = ctx->saved_data;
        const auto factors = kept["factors"].toIntVector();
        if (ctx->needs_input_grad(0))
            out[0] = recorded(upfirdn2d_op(), grads[0], ctx->get_saved_variables()[0], factors[0], factors[1], factors[2], factors[3],
                              kept["x0"].toSymInt(), kept["x1"].toSymInt(), kept["y0"].toSymInt(), kept["y1"].toSymInt(),
                              kept["is_flipped"].toBool(), kept["gain"].toDouble());
        return out;
    }
};

Tensor upfirdn2d(const Tensor& x, const Tensor& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y, SymInt x0, SymInt x1,
                 SymInt y0, SymInt y1, bool flip_filter, double gain) {
    if (!is_recorded(x)) return plain(upfirdn2d_op(), x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain);
    return Upfirdn2d::apply(x, f, up_x, up_y, down_x, down_y, x0, x1, y0, y1, flip_filter, gain);
}

// ---- Small products: a gradient at once where no gradient of it is wanted, else in operators that torch derives

auto dense_op() {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, const Optional&, double, double, double, double)>("stylegan_rooted::dense");
    return op;
}
auto dense_grad_op() {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, double, double,
                                                                   double, bool, bool, bool)>("stylegan_rooted::dense_grad");
    return op;
}
auto demodulation_op() {
    static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&)>("stylegan_rooted::demodulation");
    return op;
}
auto demodulation_grad_op() {
    static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool)>(
        "stylegan_rooted::demodulation_grad");
    return op;
}

struct Dense : torch::autograd::Function<Dense> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Optional& bias, double weight_gain, double bias_gain,
                          double alpha, double gain) {
        const Tensor y = plain(dense_op(), x, weight, bias, weight_gain, bias_gain, alpha, gain);
        ctx->save_for_backward({x, weight, y});
        ctx->saved_data["settings"] = std::vector<double>{weight_gain, bias_gain, alpha, gain};
        ctx->saved_data["has_bias"] = bias.has_value();
        return y;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const Tensor &x = in[0], &weight = in[1], &y = in[2], none;
        const auto s = ctx->saved_data["settings"].toDoubleVector();
        const auto [of_x, of_weight, of_bias] = wanted<3>(*ctx, {true, true, ctx->saved_data["has_bias"].toBool()});
        variable_list out(7);
        if (!at::GradMode::is_enabled()) {
            const auto [dx, dw, db] = plain(dense_grad_op(), grads[0], x, y, weight, s[0], s[1], s[2], s[3], of_x, of_weight, of_bias);
            out[0] = of_x ? dx : none, out[1] = of_weight ? dw : none, out[2] = of_bias ? db : none;
            return out;
        }
        Tensor du = s[2] == 1 ? grads[0] : at::leaky_relu_backward(grads[0], y.detach(), s[2], true);
        if (s[3] != 1) du = du * s[3];
        if (of_x) out[0] = (du * s[0]).mm(weight);
        if (of_weight) out[1] = (du * s[0]).t().mm(x);
        if (of_bias) out[2] = du.sum(0) * s[1];
        return out;
    }
};

Tensor dense(const Tensor& x, const Tensor& weight, const Optional& bias, double weight_gain, double bias_gain, double alpha, double gain) {
    if (!is_recorded(x, weight, bias)) return plain(dense_op(), x, weight, bias, weight_gain, bias_gain, alpha, gain);
    return Dense::apply(x, weight, bias, weight_gain, bias_gain, alpha, gain);
}

struct Demodulation : torch::autograd::Function<Demodulation> {
    static variable_list forward(AutogradContext* ctx, const Tensor& styles, const Tensor& weight) {
        const auto [scales, energy] = plain(demodulation_op(), styles, weight);
        ctx->mark_non_differentiable({energy});
        ctx->save_for_backward({styles, weight, scales, energy});
        return {scales, energy};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list in = ctx->get_saved_variables();
        const Tensor &styles = in[0], &weight = in[1], &scales = in[2], none;
        const auto [of_styles, of_weight] = wanted<2>(*ctx, {true, true});
        if (!at::GradMode::is_enabled()) {
            const auto [ds, dw] = plain(demodulation_grad_op(), grads[0], styles, weight, scales, in[3], of_styles, of_weight);
            return {of_styles ? ds : none, of_weight ? dw : none};
        }
        const Tensor q = grads[0] * scales.pow(3).neg();  // twice the gradient to the sum under the root
        return {of_styles ? styles * q.mm(weight.square().sum({2, 3})) : none,
                of_weight ? weight * q.t().mm(styles.square()).unsqueeze(-1).unsqueeze(-1) : none};
    }
};

std::tuple<Tensor, Tensor> demodulation(const Tensor& styles, const Tensor& weight) {
    if (!is_recorded(styles, weight)) return plain(demodulation_op(), styles, weight);
    const variable_list out = Demodulation::apply(styles, weight);
    return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(stylegan_rooted, AutogradCPU, m) {
    m.impl("dense", &dense);
    m.impl("demodulation", &demodulation);
    m.impl("conv2d", &conv2d);
    m.impl("conv2d_input", &conv2d_input);
    m.impl("conv2d_weight", &conv2d_weight);
    m.impl("conv2d_prepare", &conv2d_prepare);
    m.impl("conv2d_prepared", &conv2d_prepared);
    m.impl("epilogue", &epilogue);
    m.impl("epilogue_grad", &epilogue_grad);
    m.impl("colours_few", &colours_few);
    m.impl("colours_many", &colours_many);
    m.impl("colours_kernels", &colours_kernels);
    m.impl("upfirdn2d", &upfirdn2d);
}
