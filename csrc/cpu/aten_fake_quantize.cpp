// torch's own fake-quantize ops on the CPU: aten's schemas and arithmetic on this library's kernels.
// aten_override.cpp puts them in aten's place.
#include "cpu/aten_fake_quantize.h"

#include "cpu/common/observe.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/aten_fake_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

constexpr int64_t kWholeTensor = INT64_MIN;  // in place of an axis

int64_t checked_axis(const Tensor& x, int64_t axis) {
  const int64_t dims = x.dim();
  QK_CHECK(-dims <= axis && axis < dims, "axis: got ", axis, "; accepted: ", -dims, " to ", dims - 1, ", x has ", dims,
           " dims");
  return axis < 0 ? axis + dims : axis;
}

void check_channels(const char* name, const Tensor& param, const Tensor& x, int64_t axis) {
  QK_CHECK(param.is_cpu(), name, ": got a tensor on another device; accepted: x's device, cpu");
  QK_CHECK(param.dim() == 1 && param.numel() == x.sizes()[axis], name, ": got shape ", shape_of(param),
           "; accepted: one value for each of x's ", x.sizes()[axis], " channels (dim ", axis, ")");
}

// x is dense.
IndexedRuns runs_of_axis(const Tensor& x, int64_t axis) {
  IndexedRuns runs;
  runs.inner = x.numel();
  if (axis == kWholeTensor || x.sizes()[axis] <= 1 || runs.inner == 0) return runs;
  runs.channels = runs.period = x.sizes()[axis];
  runs.count = runs.inner;
  runs.inner = x.strides()[axis];
  runs.count /= runs.inner;
  return runs;
}

// scale's reciprocal as in torch, but finite, so that a dead channel's 0/0 does not become NaN.
float reciprocal(float scale) {
  const float inv = 1.0f / scale;
  return std::isinf(inv) ? std::copysign(FLT_MAX, inv) : inv;
}

float canonical(float value) { return value != value ? NAN : value; }  // the bf16 store relies on that

void check_order(int64_t quant_min, int64_t quant_max) {
  QK_CHECK(quant_min <= quant_max, "quant_min: got ", quant_min, ", above quant_max ", quant_max,
           "; accepted: at most quant_max");
}

Qparams<float> qparams_of_range(int64_t quant_min, int64_t quant_max) {
  check_order(quant_min, quant_max);
  return {static_cast<float>(quant_min), static_cast<float>(quant_max), {}, {}};
}

Qparams<float> from_numbers(double scale, double zero_point, int64_t quant_min, int64_t quant_max) {
  auto q = qparams_of_range(quant_min, quant_max);
  const float s = canonical(static_cast<float>(scale));
  q.first = {reciprocal(s), s, static_cast<float>(zero_point)};
  return q;
}

// For a learned zero point, which torch rounds and clamps into the range.
enum class ZeroPoint { as_is, rounded };

Qparams<float> from_tensors(const Tensor& scale, const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                            ZeroPoint rule) {
  auto q = qparams_of_range(quant_min, quant_max);
  const int64_t channels = scale.numel();
  QK_CHECK(zero_point.numel() == channels, "zero_point: got shape ", shape_of(zero_point), "; accepted: scale's shape ",
           shape_of(scale));
  if (channels > 1) q.others.resize(channels);
  auto* params = channels > 1 ? q.others.data() : &q.first;
  for_each_value<float>(scale, [&](int64_t c, float value) {
    const float s = canonical(value);
    params[c] = {reciprocal(s), s, 0};
  });
  for_each_value<float>(zero_point, [&](int64_t c, float value) {
    if (rule == ZeroPoint::rounded) {
      value = std::nearbyint(value);
      value = value < q.quant_min ? q.quant_min : value > q.quant_max ? q.quant_max : value;
    }
    params[c].zero_point = canonical(value);
  });
  return q;
}

bool any_zero_point(const Qparams<float>& q) {
  if (q.others.empty()) return q.first.zero_point != 0;
  return std::any_of(q.others.begin(), q.others.end(), [](const auto& p) { return p.zero_point != 0; });
}

void check_one(const char* name, const Tensor& param) {
  QK_CHECK(param.is_cpu() && param.numel() == 1, name, ": got shape ", shape_of(param),
           "; accepted: one element, on x's device");
}

bool is_set(const char* name, const Tensor& flag) {
  check_one(name, flag);
  bool set = false;
  for_each_value<double>(flag, [&](int64_t, double value) { set = value != 0; });
  return set;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.sizes()[i] != b.sizes()[i]) return false;
  return true;
}

// Returns y and the bool mask. `axis` may be kWholeTensor. `rounds_after`: the zero points are floats, and not all 0.
Masked forward(const Tensor& x_any, const Qparams<float>& q, int64_t axis, int64_t quant_min, int64_t quant_max,
               bool rounds_after) {
  check_floating("x", x_any);
  Tensor y = empty_dense_like(x_any), mask = empty_strided(y.sizes(), y.strides(), ScalarType::Bool);
  const int64_t numel = x_any.numel();
  if (numel == 0) return {y, mask};
  const Tensor x = in_layout_of(x_any, y);
  const IndexedRuns runs = runs_of_axis(x, axis);
  constexpr int64_t exact = int64_t{1} << 24;
  const bool narrow = -exact <= quant_min && quant_max <= exact;
  for (int64_t c = 0; c < std::max<int64_t>(q.others.size(), 1); ++c)
    QK_CHECK(!(std::abs(q.of(c).zero_point) > (narrow ? exact : exact - 1)), "zero_point: got ", q.of(c).zero_point,
             "; accepted: the integers that fp32 holds exactly");
  const bool in_fp32 = !rounds_after && narrow;
  const AtenRule rule{static_cast<double>(quant_min), static_cast<double>(quant_max), rounds_after,
                      axis == kWholeTensor};
  auto* bytes = static_cast<uint8_t*>(mask.mutable_data_ptr());
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    if constexpr (!std::is_same_v<S, double>) {
      if (in_fp32) {
        QK_DISPATCH_ISA(aten_forward(runs, q, numel, in, out, bytes));
        return;
      }
    }
    QK_DISPATCH_ISA(aten_forward_exact(runs, q, rule, numel, in, out, bytes));
  });
  return {y, mask};
}

Masked unchanged(const Tensor& x) {
  Tensor y = empty_dense_like(x), mask = empty_strided(y.sizes(), y.strides(), ScalarType::Bool);
  torch::stable::copy_(y, x);
  if (x.numel()) std::memset(mask.mutable_data_ptr(), 1, x.numel());
  return {y, mask};
}

// A 1-d tensor of sums, in the dtype of `like`, or in fp32 where that dtype is not floating.
Tensor sums_like(const std::vector<double>& values, const Tensor& like) {
  const ScalarType dtype = is_floating(like.scalar_type()) ? like.scalar_type() : ScalarType::Float;
  Tensor out = empty({static_cast<int64_t>(values.size())}, dtype);
  dispatch_floating("scale", out, [&](auto tag) {
    using S = decltype(tag);
    S* p = static_cast<S*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) p[i] = from_float<S>(values[i]);
  });
  return out;
}

Gradients learnable_backward_of(const Tensor& grad_any, const Tensor& x_any, const Tensor& scale,
                                const Tensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                                double grad_factor) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::rounded);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  std::vector<double> dscale(scale.numel()), dzero_point(scale.numel());
  const int64_t numel = x.numel();
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    if (numel == 0) return;
    Qparams<T> wide{q.quant_min, q.quant_max, {}, {}};
    wide.first = {q.first.inv, q.first.scale, q.first.zero_point};
    for (const auto& p : q.others) wide.others.push_back({p.inv, p.scale, p.zero_point});
    const IndexedRuns runs = runs_of_axis(x, axis);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(learnable_backward(runs, wide, numel, dy, in, out, grad_factor, dscale.data(), dzero_point.data()));
  });
  return {dx, sums_like(dscale, scale), sums_like(dzero_point, zero_point)};
}

void resize_and_fill(Tensor& t, int64_t numel, double value) {
  const std::vector<int64_t> shape{numel};
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(IntHeaderOnlyArrayRef(shape.data(), shape.size())),
                                    torch::stable::detail::from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::resize_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
  torch::stable::fill_(t, value);
}

// The zero point that torch.ao's observers give a symmetric range: 0 for signed dtypes.
int64_t observers_middle(int64_t quant_min, int64_t quant_max) {
  if (quant_min < 0) return std::min<int64_t>(0, quant_max);
  if (quant_min == 0 && quant_max == UINT16_MAX) return 1 << 15;
  return (quant_min + quant_max) / 2;
}

}  // namespace

namespace aten {

Masked per_tensor_cachemask(const Tensor& x, double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  check_order(quant_min, quant_max);
  QK_CHECK(quant_min <= zero_point && zero_point <= quant_max, "`zero_point` must be between `quant_min` and ",
           "`quant_max`: got ", zero_point, "; accepted: ", quant_min, " to ", quant_max);
  return forward(x, from_numbers(scale, static_cast<double>(zero_point), quant_min, quant_max), kWholeTensor, quant_min,
                 quant_max, false);
}

Masked per_tensor_cachemask_tensor_qparams(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                                           const Tensor& enabled, int64_t quant_min, int64_t quant_max) {
  check_one("scale", scale);
  check_one("zero_point", zero_point);
  check_order(quant_min, quant_max);
  if (!is_set("fake_quant_enabled", enabled)) return unchanged(x);
  auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::as_is);
  q.first.zero_point = std::trunc(q.first.zero_point);  // torch reads it as an int32
  return forward(x, q, kWholeTensor, quant_min, quant_max, false);
}

Masked per_channel_cachemask(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                             int64_t quant_min, int64_t quant_max) {
  axis = checked_axis(x, axis);
  check_channels("scale", scale, x, axis);
  check_channels("zero_point", zero_point, x, axis);
  const auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::as_is);
  const bool is_float = is_floating(zero_point.scalar_type());
  for (int64_t c = 0; !is_float && c < scale.numel(); ++c)
    QK_CHECK(q.quant_min <= q.of(c).zero_point && q.of(c).zero_point <= q.quant_max, "`zero_point` must be between ",
             "`quant_min` and `quant_max`: got ", q.of(c).zero_point, "; accepted: ", quant_min, " to ", quant_max);
  // Adding zeros before rounding changes nothing, except that torch computes the sum in fp32.
  const bool rounds_after = is_float && (any_zero_point(q) || x.scalar_type() == ScalarType::Double);
  return forward(x, q, axis, quant_min, quant_max, rounds_after);
}

Tensor learnable_per_tensor(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
                            int64_t quant_max, double) {
  check_one("scale", scale);
  check_one("zero_point", zero_point);
  const auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::rounded);
  return std::get<0>(forward(x, q, kWholeTensor, quant_min, quant_max, false));
}

Tensor learnable_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                             int64_t quant_min, int64_t quant_max, double) {
  axis = checked_axis(x, axis);
  check_channels("scale", scale, x, axis);
  check_channels("zero_point", zero_point, x, axis);
  const auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::rounded);
  return std::get<0>(forward(x, q, axis, quant_min, quant_max, false));
}

Gradients learnable_per_tensor_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                        const Tensor& zero_point, int64_t quant_min, int64_t quant_max,
                                        double grad_factor) {
  check_one("scale", scale);
  check_one("zero_point", zero_point);
  return learnable_backward_of(grad, x, scale, zero_point, kWholeTensor, quant_min, quant_max, grad_factor);
}

Gradients learnable_per_channel_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, int64_t axis, int64_t quant_min, int64_t quant_max,
                                         double grad_factor) {
  axis = checked_axis(x, axis);
  check_channels("scale", scale, x, axis);
  check_channels("zero_point", zero_point, x, axis);
  return learnable_backward_of(grad, x, scale, zero_point, axis, quant_min, quant_max, grad_factor);
}

// As observe_fake_quantize, with torch's resizing of empty statistics and a byte mask.
Masked fused_moving_avg_obs(const Tensor& x, const Tensor& observer_on, const Tensor& fake_quant_on, Tensor running_min,
                            Tensor running_max, Tensor scale, Tensor zero_point, double averaging_const,
                            int64_t quant_min, int64_t quant_max, int64_t axis, bool per_row, bool symmetric) {
  check_floating("x", x);
  check_range(quant_min, quant_max);
  axis = per_row ? checked_axis(x, axis) : kWholeTensor;
  const int64_t channels = per_row ? x.sizes()[axis] : 1;
  struct Stat {
    const char* name;
    Tensor& tensor;
    double start;
  };
  Stat stats[] = {{"running_min", running_min, INFINITY},
                  {"running_max", running_max, -INFINITY},
                  {"scale", scale, 1},
                  {"zero_point", zero_point, 0}};
  const auto resizes = [&](const Stat& stat) {
    return per_row && stat.tensor.numel() <= 1 && stat.tensor.numel() != channels;
  };
  // Checks everything before it changes anything, because a call that does not fit goes to torch with its arguments as
  // they were.
  const bool observes = is_set("observer_on", observer_on), quantizes = is_set("fake_quant_on", fake_quant_on);
  for (const Stat& stat : stats) {
    const ScalarType dtype = stat.tensor.scalar_type();
    const bool is_zero_point = &stat.tensor == &zero_point;
    const bool right =
        is_zero_point ? dtype == ScalarType::Int || dtype == ScalarType::Long : dtype == ScalarType::Float;
    const bool fits = stat.tensor.numel() == channels || resizes(stat);
    if (observes && !fits && stat.tensor.numel() < channels)  // torch would write beyond its end
      throw std::invalid_argument(std::string(stat.name) + ": got shape " + shape_of(stat.tensor) +
                                  "; accepted: one element for each of " + std::to_string(channels) + " channels");
    QK_CHECK(right && stat.tensor.is_cpu() && stat.tensor.is_contiguous() && fits, stat.name, ": got ",
             dtype_name(dtype), " of shape ", shape_of(stat.tensor), "; accepted: contiguous ",
             is_zero_point ? "torch.int32 or torch.int64" : "torch.float32", " with ", channels, " elements");
  }
  for (Stat& stat : stats)
    if (resizes(stat)) resize_and_fill(stat.tensor, channels, stat.start);
  if (observes && x.numel()) {
    const Tensor dense = to_dense(x);
    const double steps = symmetric ? static_cast<double>(quant_max - quant_min) / 2 : 0;
    const auto rule = QparamsRule::observed(quant_min, quant_max, steps, observers_middle(quant_min, quant_max));
    const IndexedRuns runs = runs_of_axis(dense, axis);
    observe(ranges_of(dense, runs), static_cast<float>(averaging_const), rule, running_min, running_max, scale,
            zero_point);
  }
  if (!quantizes) return unchanged(x);
  const auto q = from_tensors(scale, zero_point, quant_min, quant_max, ZeroPoint::as_is);
  return forward(x, q, axis, quant_min, quant_max, false);
}

}  // namespace aten

namespace {

Tensor backward_bytes_of(const Tensor& grad_any, const Tensor& mask_any) {
  check_floating("grad", grad_any);
  check_cpu("mask", mask_any);
  QK_CHECK(mask_any.scalar_type() == ScalarType::Bool && same_shape(grad_any, mask_any), "mask: got ",
           dtype_name(mask_any.scalar_type()), " of shape ", shape_of(mask_any),
           "; accepted: torch.bool of grad's shape ", shape_of(grad_any));
  // dx has the layout of grad; or that of mask where grad is not dense, as the expanded gradient of a sum.
  const Tensor grad = is_dense(grad_any) ? grad_any : in_layout_of(grad_any, to_dense(mask_any));
  const Tensor mask = in_layout_of(mask_any, grad);
  Tensor dx = empty_strided(grad.sizes(), grad.strides(), grad.scalar_type());
  const int64_t numel = grad.numel();
  if (numel == 0) return dx;
  const auto* bytes = static_cast<const uint8_t*>(mask.const_data_ptr());
  dispatch_floating("grad", grad, [&](auto tag) {
    using S = decltype(tag);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(backward_bytes(numel, dy, bytes, out));
  });
  return dx;
}

// The per-channel drop-in: the arithmetic of fake_quantize.cpp, with [C] parameters, one for each channel of dim
// `axis`.

template <typename F>
void with_channels(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis, int64_t quant_min,
                   int64_t quant_max, F f) {
  check_range(quant_min, quant_max);
  check_channels("scale", scale, x, axis);
  check_channels("zero_point", zero_point, x, axis);
  QK_CHECK(is_floating(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: a floating dtype");
  dispatch_floating("x", x, [&](auto tag) {
    using T = Arithmetic<decltype(tag)>;
    f(tag, qparams_within(scale, zero_point, static_cast<T>(quant_min), static_cast<T>(quant_max)));
  });
}

Tensor channel_forward_into(const Tensor& x_any, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                            int64_t quant_min, int64_t quant_max, uint8_t* bits) {
  check_floating("x", x_any);
  axis = checked_axis(x_any, axis);
  Tensor y = empty_dense_like(x_any);
  const Tensor x = in_layout_of(x_any, y);
  with_channels(x, scale, zero_point, axis, quant_min, quant_max, [&](auto tag, const auto& q) {
    using S = decltype(tag);
    const int64_t numel = x.numel();
    if (numel == 0) return;
    const IndexedRuns runs = runs_of_axis(x, axis);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    QK_DISPATCH_ISA(forward(runs, q, numel, in, out, bits));
  });
  return y;
}

Tensor channel_forward(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis, int64_t quant_min,
                       int64_t quant_max) {
  return channel_forward_into(x, scale, zero_point, axis, quant_min, quant_max, nullptr);
}

Masked channel_forward_mask(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                            int64_t quant_min, int64_t quant_max) {
  Tensor mask = empty({(x.numel() + 7) / 8}, ScalarType::Byte);
  auto* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  return {channel_forward_into(x, scale, zero_point, axis, quant_min, quant_max, bits), mask};
}

Tensor channel_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& scale, const Tensor& zero_point,
                        int64_t axis, int64_t quant_min, int64_t quant_max) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  axis = checked_axis(x_any, axis);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  with_channels(x, scale, zero_point, axis, quant_min, quant_max, [&](auto tag, const auto& q) {
    using S = decltype(tag);
    const int64_t numel = x.numel();
    if (numel == 0) return;
    const IndexedRuns runs = runs_of_axis(x, axis);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(backward(runs, q, numel, dy, in, out));
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_backward_bytes", TORCH_BOX(&backward_bytes_of));
  m.impl("fake_quantize_forward.channel", TORCH_BOX(&channel_forward));
  m.impl("fake_quantize_forward_mask.channel", TORCH_BOX(&channel_forward_mask));
  m.impl("fake_quantize_backward.channel", TORCH_BOX(&channel_backward));
}

}  // namespace qkernels
