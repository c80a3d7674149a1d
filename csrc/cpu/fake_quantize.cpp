// Fake quantization on the CPU: checks and memory layout here, the kernels in fake_quantize_kernels.h.
#include "cpu/common/granularity.h"
#include "cpu/common/observe.h"

#define QK_BODY "cpu/fake_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

#include "cpu/common/dynamic.h"
#include "cpu/common/gradient.h"

namespace qkernels {
namespace {

// Builds the call's Quantizer from tensors or from numbers.
struct TensorParams {
  const Tensor& scale;
  const std::optional<Tensor>& zero_point;
  View view(const Tensor& x) const { return view_of(x, scale); }
  template <typename T>
  Quantizer<T> make(const Tensor& x, int64_t quant_min, int64_t quant_max) const {
    return quantizer<T>(x, scale, zero_point, quant_min, quant_max);
  }
};

struct ScalarParams {
  double scale;
  int64_t zero_point;
  View view(const Tensor& x) const { return {one_run(x), {}}; }
  template <typename T>
  Quantizer<T> make(const Tensor&, int64_t quant_min, int64_t quant_max) const {
    return quantizer<T>(scale, zero_point, quant_min, quant_max);
  }
};

template <typename Params>
void run_forward(const Tensor& x_any, const Params& params, int64_t quant_min, int64_t quant_max, const Tensor& y,
                 const Tensor* mask, bool lsq = false) {
  const Tensor x = in_layout_of(x_any, y);
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = params.template make<Arithmetic<S>>(x_any, quant_min, quant_max);
    if (numel == 0) return;
    const View view = params.view(x);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    uint8_t* bits = mask ? static_cast<uint8_t*>(mask->mutable_data_ptr()) : nullptr;
    if (lsq) {
      QK_DISPATCH_ISA(forward<true>(view, q, numel, in, out, bits));
    } else {
      QK_DISPATCH_ISA(forward(view, q, numel, in, out, bits));
    }
  });
}

template <typename Params>
Tensor forward_with(const Tensor& x, const Params& params, int64_t quant_min, int64_t quant_max) {
  check_floating("x", x);
  Tensor y = empty_dense_like(x);
  run_forward(x, params, quant_min, quant_max, y, nullptr);
  return y;
}

template <typename Params>
std::tuple<Tensor, Tensor> forward_mask_with(const Tensor& x, const Params& params, int64_t quant_min,
                                             int64_t quant_max, bool lsq = false) {
  check_floating("x", x);
  Tensor y = empty_dense_like(x), mask = empty_mask(x.numel(), x);
  run_forward(x, params, quant_min, quant_max, y, &mask, lsq);
  return {y, mask};
}

template <typename Params>
Tensor backward_with(const Tensor& grad_any, const Tensor& x_any, const Params& params, int64_t quant_min,
                     int64_t quant_max, bool lsq = false) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = params.template make<Arithmetic<S>>(x, quant_min, quant_max);
    if (numel == 0) return;
    const View view = params.view(x);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    if (lsq) {
      QK_DISPATCH_ISA(backward<true>(view, q, numel, dy, in, out));
    } else {
      QK_DISPATCH_ISA(backward(view, q, numel, dy, in, out));
    }
  });
  return dx;
}

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                             int64_t quant_max) {
  return forward_with(x, TensorParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_forward_scalar(const Tensor& x, double scale, int64_t zero_point, int64_t quant_min,
                                    int64_t quant_max) {
  return forward_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask(const Tensor& x, const Tensor& scale,
                                                      std::optional<Tensor> zero_point, int64_t quant_min,
                                                      int64_t quant_max, bool lsq) {
  return forward_mask_with(x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask_scalar(const Tensor& x, double scale, int64_t zero_point,
                                                             int64_t quant_min, int64_t quant_max) {
  return forward_mask_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                              std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max, bool lsq) {
  return backward_with(grad, x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

Tensor fake_quantize_backward_scalar(const Tensor& grad, const Tensor& x, double scale, int64_t zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  return backward_with(grad, x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward_mask(const Tensor& grad_any, const Tensor& mask) {
  check_floating("grad", grad_any);
  const Tensor grad = to_dense(grad_any);
  const int64_t numel = grad.numel();
  check_mask(mask, grad);
  Tensor dx = empty_strided(grad.sizes(), grad.strides(), grad.scalar_type());
  if (numel == 0) return dx;
  const uint8_t* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_floating("grad", grad, [&](auto tag) {
    using S = decltype(tag);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(backward_mask(numel, dy, bits, out));
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learnable_backward(const Tensor& grad_any, const Tensor& x_any,
                                                                    const Tensor& scale,
                                                                    std::optional<Tensor> zero_point, int64_t quant_min,
                                                                    int64_t quant_max, double grad_factor, bool lsq) {
  return learned(
      grad_any, x_any, scale, zero_point, quant_min, quant_max,
      [&](const auto& view, const auto& q, int64_t numel, const auto* dy, const auto* in, auto* out, double* dscale,
          double* dzero_point) {
        if (lsq) {
          QK_DISPATCH_ISA(learnable_backward<true>(view, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        } else {
          QK_DISPATCH_ISA(learnable_backward(view, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        }
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_dynamic_forward(const Tensor& x, int64_t group_size,
                                                                         int64_t quant_min, int64_t quant_max,
                                                                         bool symmetric) {
  check_group_size(x, group_size);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  auto qparams = empty_qparams(x, group_size);  // no structured binding: C++17 lets no lambda capture one
  Tensor &scale = std::get<0>(qparams), &zero_point = std::get<1>(qparams);
  const int64_t numel = x.numel();
  Tensor y = empty_dense_like(x), mask = empty_mask(symmetric ? 0 : numel, x);
  // Rows in one pass where they lie in order; else the ranges first, and y in x's own memory order after.
  const bool one_pass = group_size != 0 && x.is_contiguous();
  const Tensor rows = group_size == 0 ? to_dense(x) : to_contiguous(x);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    auto* s = static_cast<Arithmetic<S>*>(scale.mutable_data_ptr());
    auto* z = static_cast<int32_t*>(zero_point.mutable_data_ptr());
    if (group_size == 0) return whole_tensor_qparams<S>(rows, rule, s, z);
    const int64_t count = scale.numel();
    const int64_t length = count ? numel / count : 0;
    const S* in = static_cast<const S*>(rows.const_data_ptr());
    S* out = one_pass ? static_cast<S*>(y.mutable_data_ptr()) : nullptr;
    uint8_t* bits = one_pass && !symmetric ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    QK_DISPATCH_ISA(dynamic_forward(count, length, rule, in, out, s, z, bits));
  });
  if (!one_pass) {
    const std::optional<Tensor> zero_points = zero_point;
    run_forward(x, TensorParams{scale, zero_points}, quant_min, quant_max, y, symmetric ? nullptr : &mask);
  }
  return {y, scale, zero_point, mask};
}

bool is_set(const Tensor& flag) {
  bool set = false;
  for_each_value<double>(flag, [&](int64_t, double value) { set = value != 0; });
  return set;
}

// Minimum and maximum in fp32 of the elements that share each scale, NaN where they hold one. x is not empty.
struct Ranges {
  std::vector<float> low, high;

  Ranges(const Tensor& x, const Tensor& scale) : low(scale.numel()), high(scale.numel()) {
    const Tensor dense = to_dense(x);
    const View view = view_of(dense, scale);
    dispatch_floating("x", dense, [&](auto tag) {
      using S = decltype(tag);
      std::vector<Arithmetic<S>> lo(low.size()), hi(high.size());
      const S* in = static_cast<const S*>(dense.const_data_ptr());
      QK_DISPATCH_ISA(range(view, dense.numel(), in, lo.data(), hi.data()));
      std::copy(lo.begin(), lo.end(), low.begin());
      std::copy(hi.begin(), hi.end(), high.begin());
    });
  }
};

std::tuple<Tensor, Tensor> observe_fake_quantize(const Tensor& x, const Tensor& observer_on,
                                                 const Tensor& fake_quant_on, const Tensor& running_min,
                                                 const Tensor& running_max, const Tensor& scale,
                                                 const Tensor& zero_point, double averaging_const, int64_t quant_min,
                                                 int64_t quant_max, double symmetric_steps,
                                                 int64_t symmetric_zero_point) {
  check_floating("x", x);
  check_range(quant_min, quant_max);
  const Device device = device_of(x);
  check_statistics(running_min, running_max, scale, zero_point, x, device);
  check_flag("observer_on", observer_on, device);
  check_flag("fake_quant_on", fake_quant_on, device);
  const int64_t numel = x.numel();
  if (is_set(observer_on) && numel) {
    const auto rule = QparamsRule::observed(quant_min, quant_max, symmetric_steps, symmetric_zero_point);
    const Ranges ranges(x, scale);
    observe(ranges.low, ranges.high, static_cast<float>(averaging_const), rule, running_min, running_max, scale,
            zero_point);
  }
  if (is_set(fake_quant_on)) return fake_quantize_forward_mask(x, scale, zero_point, quant_min, quant_max, false);
  Tensor y = empty_dense_like(x), mask = empty_mask(numel, x);
  torch::stable::copy_(y, x);
  if (numel) std::memset(mask.mutable_data_ptr(), 0xff, mask.numel());
  return {y, mask};
}

void check_followed(const Tensor& scale, const std::optional<Tensor>& zero_point, double up, double down,
                    const Tensor& x) {
  check_scale(scale, zero_point, x);
  QK_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), "scale: got ",
           dtype_name(scale.scalar_type()), " of shape ", shape_of(scale), "; accepted: contiguous torch.float32");
  const std::pair<const char*, double> parts[] = {{"up", up}, {"down", down}};
  for (const auto& [name, part] : parts) QK_CHECK(0 <= part && part <= 1, name, ": got ", part, "; accepted: 0 to 1");
  if (!zero_point) return;
  const ScalarType dtype = zero_point->scalar_type();
  const bool whole = (up == 0 || up == 1) && (down == 0 || down == 1);
  QK_CHECK((is_floating(dtype) || (dtype == ScalarType::Int && whole)) && zero_point->is_contiguous() &&
               zero_point->numel() == scale.numel(),
           "zero_point: got ", dtype_name(dtype), " of shape ", shape_of(*zero_point), " with up ", up, " and down ",
           down, "; accepted: contiguous, of scale's shape ", shape_of(scale),
           " and a floating dtype, or torch.int32 where up and down are 0 or 1");
}

// As the reference: a channel of zeros alone, or whose range is not finite, keeps what it has.
void follow_range(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                  int64_t quant_max, bool symmetric, double up, double down) {
  check_floating("x", x);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  check_followed(scale, zero_point, up, down, x);
  if (x.numel() == 0) return;
  const Ranges ranges(x, scale);
  const int64_t channels = scale.numel();
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  std::vector<float> parts(channels), zero_points(channels);
  const auto moved = [](float from, float to, float part) { return part == 1 ? to : from + part * (to - from); };
  for (int64_t c = 0; c < channels; ++c) {
    const float low = ranges.low[c], high = ranges.high[c];
    if (!std::isfinite(low) || !std::isfinite(high) || (low == 0 && high == 0)) continue;
    const auto chosen = choose_qparams<float>(low, high, rule);
    parts[c] = static_cast<float>(chosen.scale > scales[c] ? up : down);
    zero_points[c] = chosen.zero_point;
    if (parts[c] != 0) scales[c] = moved(scales[c], chosen.scale, parts[c]);
  }
  if (!zero_point) return;
  const auto move_all = [&](auto* to) {
    using Z = std::remove_pointer_t<decltype(to)>;
    for (int64_t c = 0; c < channels; ++c) {
      if (parts[c] == 0) continue;
      to[c] = from_float<Z>(moved(static_cast<float>(to_float(to[c])), zero_points[c], parts[c]));
    }
  };
  if (zero_point->scalar_type() == ScalarType::Int) {
    move_all(static_cast<int32_t*>(zero_point->mutable_data_ptr()));
  } else {
    dispatch_floating("zero_point", *zero_point,
                      [&](auto tag) { move_all(static_cast<decltype(tag)*>(zero_point->mutable_data_ptr())); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_forward.scalar", TORCH_BOX(&fake_quantize_forward_scalar));
  m.impl("fake_quantize_forward_mask", TORCH_BOX(&fake_quantize_forward_mask));
  m.impl("fake_quantize_forward_mask.scalar", TORCH_BOX(&fake_quantize_forward_mask_scalar));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fake_quantize_backward.scalar", TORCH_BOX(&fake_quantize_backward_scalar));
  m.impl("fake_quantize_backward_mask", TORCH_BOX(&fake_quantize_backward_mask));
  m.impl("fake_quantize_learnable_backward", TORCH_BOX(&fake_quantize_learnable_backward));
  m.impl("fake_quantize_dynamic_forward", TORCH_BOX(&fake_quantize_dynamic_forward));
  m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize));
  m.impl("follow_range", TORCH_BOX(&follow_range));
}

}  // namespace qkernels
