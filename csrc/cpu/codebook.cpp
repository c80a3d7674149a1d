// Non-uniform quantization on the CPU: checks and memory layout. The kernels are in codebook_kernels.h.
#include "cpu/codebook.h"
#include "cpu/common/gradient.h"

#define QK_BODY "cpu/codebook_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

// The levels as given; all NaN where one is not finite.
template <typename T>
Codebook<T> levels_of(const Tensor& codebook) {
  Codebook<T> c;
  c.size = codebook.numel();
  while (int64_t{1} << c.bits < c.size) ++c.bits;
  std::fill(c.level, c.level + kMaxLevels, static_cast<T>(NAN));
  bool finite = true;
  for_each_value<T>(codebook, [&](int64_t i, T value) {
    c.level[i] = value;
    finite = finite && std::isfinite(value);
  });
  if (!finite) std::fill(c.level, c.level + c.size, static_cast<T>(NAN));
  return c;
}

template <typename T>
Codebook<T> ascending(const Tensor& codebook) {
  Codebook<T> c = levels_of<T>(codebook);
  std::iota(c.order, c.order + kMaxLevels, 0);
  c.ordered = std::is_sorted(c.level, c.level + c.size);
  if (!c.ordered) {
    const std::vector<T> given(c.level, c.level + c.size);
    std::stable_sort(c.order, c.order + c.size, [&](uint8_t a, uint8_t b) { return given[a] < given[b]; });
    for (int64_t i = 0; i < c.size; ++i) c.level[i] = given[c.order[i]];
  }
  std::fill(c.tree, c.tree + kMaxLevels, static_cast<T>(INFINITY));
  const T half = static_cast<T>(0.5);
  for (int depth = 0; depth < c.bits; ++depth) {
    for (int64_t p = 0; p < int64_t{1} << depth; ++p) {
      const int64_t i = ((2 * p + 1) << (c.bits - 1 - depth)) - 1;
      const T midpoint = i + 1 < c.size ? c.level[i] * half + c.level[i + 1] * half : static_cast<T>(INFINITY);
      if (midpoint == midpoint) c.tree[(int64_t{1} << depth) + p] = midpoint;
    }
  }
  return c;
}

void check_codebook(const Tensor& codebook) {
  QK_CHECK(is_floating(codebook.scalar_type()), "codebook: got ", dtype_name(codebook.scalar_type()),
           "; accepted: a floating dtype");
  QK_CHECK(codebook.dim() == 1 && 2 <= codebook.numel() && codebook.numel() <= kMaxLevels, "codebook: got shape ",
           shape_of(codebook), "; accepted: one dim of 2 to 256 levels");
  QK_CHECK(codebook.is_cpu(), "codebook: got a tensor on another device; accepted: x's device, cpu");
}

// Checks everything, then calls f(a value of x's storage type, codebook, scales) unless x is empty.
template <typename F>
void with_levels(const Tensor& x, const Tensor& scale, const Tensor& codebook, F f) {
  check_cpu("x", x);
  dispatch_floating("x", x, [&](auto tag) {
    using T = Arithmetic<decltype(tag)>;
    const auto scales = unclamped_qparams<T>(x, scale, std::nullopt);
    check_codebook(codebook);
    if (x.numel()) f(tag, ascending<T>(codebook), scales);
  });
}

std::tuple<Tensor, Tensor> forward_with(const Tensor& x_any, const Tensor& scale, const Tensor& codebook, bool masked) {
  check_floating("x", x_any);
  Tensor y = empty_dense_like(x_any);
  Tensor mask = masked ? empty_mask(x_any.numel(), x_any) : empty({0}, ScalarType::Byte);
  const Tensor x = in_layout_of(x_any, y);
  with_levels(x, scale, codebook, [&](auto tag, const auto& levels, const auto& scales) {
    using S = decltype(tag);
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    uint8_t* bits = masked ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
    QK_DISPATCH_ISA(forward(runs, scales, levels, x.numel(), in, out, bits));
  });
  return {y, mask};
}

Tensor fake_quantize_codebook_forward(const Tensor& x, const Tensor& scale, const Tensor& codebook) {
  return std::get<0>(forward_with(x, scale, codebook, false));
}

std::tuple<Tensor, Tensor> fake_quantize_codebook_forward_mask(const Tensor& x, const Tensor& scale,
                                                               const Tensor& codebook) {
  return forward_with(x, scale, codebook, true);
}

Tensor fake_quantize_codebook_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& scale,
                                       const Tensor& codebook) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  with_levels(x, scale, codebook, [&](auto tag, const auto& levels, const auto& scales) {
    using S = decltype(tag);
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    QK_DISPATCH_ISA(backward(runs, scales, levels, x.numel(), dy, in, out));
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_codebook_learnable_backward(const Tensor& grad_any,
                                                                             const Tensor& x_any, const Tensor& scale,
                                                                             const Tensor& codebook, double grad_factor,
                                                                             bool learn_codebook) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type());
  std::vector<double> dscale(scale.numel()), dcodebook;
  with_levels(x, scale, codebook, [&](auto tag, const auto& levels, const auto& scales) {
    using S = decltype(tag);
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* dy = static_cast<const S*>(grad.const_data_ptr());
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(dx.mutable_data_ptr());
    std::vector<double> dlevels(learn_codebook ? levels.size : 0);
    QK_DISPATCH_ISA(learnable_backward(runs, scales, levels, x.numel(), dy, in, out, dscale, dlevels));
    dcodebook.resize(dlevels.size());
    for (size_t i = 0; i < dlevels.size(); ++i) dcodebook[levels.order[i]] = dlevels[i] * grad_factor;
  });
  for (double& value : dscale) value *= grad_factor;
  if (!learn_codebook) return {dx, from_double(dscale, scale), empty({0}, codebook.scalar_type())};
  dcodebook.resize(codebook.numel());
  return {dx, from_double(dscale, scale), from_double(dcodebook, codebook)};
}

Tensor quantize_codebook(const Tensor& x_any, const Tensor& scale, const Tensor& codebook) {
  check_floating("x", x_any);
  const Tensor x = to_dense(x_any);
  Tensor codes = empty_strided(x.sizes(), x.strides(), ScalarType::Byte);
  with_levels(x, scale, codebook, [&](auto tag, const auto& levels, const auto& scales) {
    using S = decltype(tag);
    const IndexedRuns runs = indexed_runs(x, scale);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    uint8_t* out = static_cast<uint8_t*>(codes.mutable_data_ptr());
    QK_DISPATCH_ISA(quantize(runs, scales, levels, x.numel(), in, out));
  });
  return codes;
}

Tensor dequantize_codebook(const Tensor& codes_any, const Tensor& scale, const Tensor& codebook, ScalarType dtype) {
  QK_CHECK(codes_any.scalar_type() == ScalarType::Byte, "codes: got ", dtype_name(codes_any.scalar_type()),
           "; accepted: torch.uint8");
  QK_CHECK(is_floating(dtype), "dtype: got ", dtype_name(dtype), "; accepted: a floating dtype");
  check_cpu("codes", codes_any);
  const Tensor codes = to_dense(codes_any);
  Tensor y = empty_strided(codes.sizes(), codes.strides(), dtype);
  dispatch_floating("dtype", y, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const auto scales = unclamped_qparams<T>(codes, scale, std::nullopt);
    check_codebook(codebook);
    if (codes.numel() == 0) return;
    const auto levels = levels_of<T>(codebook);
    const IndexedRuns runs = indexed_runs(codes, scale);
    const uint8_t* in = static_cast<const uint8_t*>(codes.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    QK_DISPATCH_ISA(dequantize(runs, scales, levels, codes.numel(), in, out));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_codebook_forward", TORCH_BOX(&fake_quantize_codebook_forward));
  m.impl("fake_quantize_codebook_forward_mask", TORCH_BOX(&fake_quantize_codebook_forward_mask));
  m.impl("fake_quantize_codebook_backward", TORCH_BOX(&fake_quantize_codebook_backward));
  m.impl("fake_quantize_codebook_learnable_backward", TORCH_BOX(&fake_quantize_codebook_learnable_backward));
  m.impl("quantize_codebook", TORCH_BOX(&quantize_codebook));
  m.impl("dequantize_codebook", TORCH_BOX(&dequantize_codebook));
}

}  // namespace qkernels
