// RMSNorm fused with dynamic quantization on the CPU; the kernels are in rms_norm_quantize_kernels.h.
#include <memory>

#include "cpu/common/dynamic_rows.h"
#include "cpu/common/gradient.h"
#include "cpu/rms_norm_quantize.h"

#define QK_BODY "cpu/rms_norm_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

void check(const Tensor& x, const std::optional<Tensor>& weight, int64_t group_size) {
  check_group_size(x, group_size);
  QK_CHECK(x.dim() > 0, "x: got 0 dims; accepted: at least 1, the last of which is normalised");
  if (!weight) return;
  const int64_t length = x.sizes()[x.dim() - 1];
  check_floating("weight", *weight);
  QK_CHECK(weight->dim() == 1 && weight->numel() == length, "weight: got shape ", shape_of(*weight),
           "; accepted: x's last dim, [", length, "]");
  check_device("weight", *weight, device_of(x));
}

// rstd is what the forward op gave of x.
void check_rstd(const Tensor& rstd, const Tensor& x) {
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t dims = x.dim();
  bool fits = rstd.scalar_type() == dtype && rstd.dim() == dims && rstd.size(dims - 1) == 1;
  for (int64_t i = 0; fits && i + 1 < dims; ++i) fits = rstd.size(i) == x.size(i);
  std::string shape = "[";
  for (int64_t i = 0; i + 1 < dims; ++i) shape += std::to_string(x.size(i)) + ", ";
  QK_CHECK(fits, "rstd: got ", dtype_name(rstd.scalar_type()), " of shape ", shape_of(rstd),
           "; accepted: what the forward op gave, ", dtype_name(dtype), " of shape ", shape, "1]");
  check_device("rstd", rstd, device_of(x));
}

// Without a weight all values are 1, which changes no bit.
template <typename T>
std::vector<T> values_of(const std::optional<Tensor>& weight, int64_t length) {
  std::vector<T> values(length, 1);
  if (weight)
    for_each_value<T>(*weight, [&](int64_t i, T value) {
      values[i] = value == value ? value : static_cast<T>(NAN);  // a canonical NaN, which the bf16 store relies on
    });
  return values;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalized(const Tensor& x_any, const std::optional<Tensor>& weight,
                                                      double eps, int64_t group_size, int64_t quant_min,
                                                      int64_t quant_max, bool symmetric, bool codes) {
  check(x_any, weight, group_size);
  const Tensor x = to_contiguous(x_any);
  auto shape = to_vector(x.sizes());
  const int64_t length = std::exchange(shape.back(), 1);
  const Tensor rstd = empty(shape, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  const int64_t rows = rstd.numel();
  const auto [out, scale, zero_point] =
      quantized_rows(x, group_size, quant_min, quant_max, symmetric, codes,
                     [&](auto tag, const QparamsRule& rule, int64_t groups, auto* y, auto* s, int32_t* z) {
                       using S = decltype(tag);
                       using T = Arithmetic<S>;
                       const Units units{rows, length, rows ? groups / rows : 0, group_size == 0};
                       const std::vector<T> w = values_of<T>(weight, length);
                       const S* in = static_cast<const S*>(x.const_data_ptr());
                       T* r = static_cast<T*>(rstd.mutable_data_ptr());
                       QK_DISPATCH_ISA(rms_norm(units, rule, in, w.data(), static_cast<T>(eps), y, s, z, r));
                     });
  return {out, scale, zero_point, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_fake_quantize_dynamic_forward(const Tensor& x,
                                                                                  std::optional<Tensor> weight,
                                                                                  double eps, int64_t group_size,
                                                                                  int64_t quant_min, int64_t quant_max,
                                                                                  bool symmetric) {
  return normalized(x, weight, eps, group_size, quant_min, quant_max, symmetric, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_quantize_dynamic(const Tensor& x, std::optional<Tensor> weight,
                                                                     double eps, int64_t group_size, int64_t quant_min,
                                                                     int64_t quant_max, bool symmetric) {
  return normalized(x, weight, eps, group_size, quant_min, quant_max, symmetric, true);
}

std::tuple<Tensor, Tensor> rms_norm_fake_quantize_dynamic_backward(const Tensor& grad_any, const Tensor& x_any,
                                                                   std::optional<Tensor> weight, const Tensor& rstd_any,
                                                                   std::optional<Tensor> scale,
                                                                   std::optional<Tensor> zero_point, int64_t quant_min,
                                                                   int64_t quant_max, bool weight_grad) {
  check(x_any, weight, 0);
  check_grad(grad_any, x_any);
  check_rstd(rstd_any, x_any);
  const Tensor grad = to_contiguous(grad_any), x = to_contiguous(x_any), rstd = to_contiguous(rstd_any);
  const int64_t length = x.sizes()[x.dim() - 1], numel = x.numel(), rows = length ? numel / length : 0;
  weight_grad = weight_grad && weight;
  Tensor dx = empty(to_vector(x.sizes()), x.scalar_type());
  std::vector<double> dweight(weight_grad ? length : 0);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const auto q = scale ? qparams<T>(x, *scale, zero_point, quant_min, quant_max) : Qparams<T>{0, 0, {}, {}};
    if (numel == 0) return;
    const IndexedRuns runs = scale ? indexed_runs(x, *scale) : IndexedRuns{one_run(x), {}};
    const std::vector<T> w = values_of<T>(weight, length);
    std::vector<T> sums(weight_grad ? (rows + kSummedRows - 1) / kSummedRows * length : 0);
    const S *dy = static_cast<const S*>(grad.const_data_ptr()), *in = static_cast<const S*>(x.const_data_ptr());
    const T* r = static_cast<const T*>(rstd.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    T* s = weight_grad ? sums.data() : nullptr;
    if (scale) {
      QK_DISPATCH_ISA(rms_norm_backward<true>(runs, q, rows, length, dy, in, w.data(), r, out, s));
    } else {
      QK_DISPATCH_ISA(rms_norm_backward<false>(runs, q, rows, length, dy, in, w.data(), r, out, s));
    }
    for (size_t i = 0; i < sums.size(); i += length)
      for (int64_t j = 0; j < length; ++j) dweight[j] += static_cast<double>(sums[i + j]);
  });
  if (!weight_grad) return {dx, empty({0}, rstd.scalar_type())};
  return {dx, from_double(dweight, *weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("rms_norm_fake_quantize_dynamic_forward", TORCH_BOX(&rms_norm_fake_quantize_dynamic_forward));
  m.impl("rms_norm_quantize_dynamic", TORCH_BOX(&rms_norm_quantize_dynamic));
  m.impl("rms_norm_fake_quantize_dynamic_backward", TORCH_BOX(&rms_norm_fake_quantize_dynamic_backward));
}

}  // namespace qkernels
