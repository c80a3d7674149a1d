// SwiGLU's product fused with dynamic quantization on the CPU; the kernels are in silu_mul_quantize_kernels.h.
#include <memory>

#include "cpu/common/activation.h"
#include "cpu/common/dynamic_rows.h"

#define QK_BODY "cpu/silu_mul_quantize_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

void check(const Tensor& gate, const Tensor& up) {
  check_floating("gate", gate);
  QK_CHECK(up.scalar_type() == gate.scalar_type(), "up: got ", dtype_name(up.scalar_type()),
           "; accepted: gate's dtype, ", dtype_name(gate.scalar_type()));
  QK_CHECK(shape_of(up) == shape_of(gate), "up: got shape ", shape_of(up), "; accepted: gate's shape ", shape_of(gate));
  QK_CHECK(device_of(up) == device_of(gate), "up: got a tensor on ", device_name(device_of(up)),
           "; accepted: gate's device, ", device_name(device_of(gate)));
}

std::tuple<Tensor, Tensor, Tensor> quantized(const Tensor& gate_any, const Tensor& up_any, int64_t group_size,
                                             int64_t quant_min, int64_t quant_max, bool symmetric, bool codes) {
  check(gate_any, up_any);
  check_group_size(gate_any, group_size);
  const Tensor gate = to_contiguous(gate_any), up = to_contiguous(up_any);
  const int64_t numel = gate.numel();
  return quantized_rows(
      gate, group_size, quant_min, quant_max, symmetric, codes,
      [&](auto tag, const QparamsRule& rule, int64_t groups, auto* out, auto* scale, int32_t* zero_point) {
        using S = decltype(tag);
        const bool whole = group_size == 0;
        const Units units{whole ? numel : groups, whole || !groups ? 1 : numel / groups, 1, whole};
        const S *g = static_cast<const S*>(gate.const_data_ptr()), *u = static_cast<const S*>(up.const_data_ptr());
        QK_DISPATCH_ISA(silu_mul(units, rule, g, u, out, scale, zero_point));
      });
}

std::tuple<Tensor, Tensor, Tensor> silu_mul_fake_quantize_dynamic_forward(const Tensor& gate, const Tensor& up,
                                                                          int64_t group_size, int64_t quant_min,
                                                                          int64_t quant_max, bool symmetric) {
  return quantized(gate, up, group_size, quant_min, quant_max, symmetric, false);
}

std::tuple<Tensor, Tensor, Tensor> silu_mul_quantize_dynamic(const Tensor& gate, const Tensor& up, int64_t group_size,
                                                             int64_t quant_min, int64_t quant_max, bool symmetric) {
  return quantized(gate, up, group_size, quant_min, quant_max, symmetric, true);
}

std::tuple<Tensor, Tensor> silu_mul_fake_quantize_dynamic_backward(const Tensor& grad_any, const Tensor& gate_any,
                                                                   const Tensor& up_any, std::optional<Tensor> scale,
                                                                   std::optional<Tensor> zero_point, int64_t quant_min,
                                                                   int64_t quant_max) {
  check(gate_any, up_any);
  check_grad(grad_any, gate_any);
  const Tensor grad = to_contiguous(grad_any), gate = to_contiguous(gate_any), up = to_contiguous(up_any);
  Tensor dgate = empty(to_vector(gate.sizes()), gate.scalar_type());
  Tensor dup = empty(to_vector(gate.sizes()), gate.scalar_type());
  const int64_t numel = gate.numel();
  dispatch_floating("gate", gate, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const S *dy = static_cast<const S*>(grad.const_data_ptr()), *g = static_cast<const S*>(gate.const_data_ptr()),
            *u = static_cast<const S*>(up.const_data_ptr());
    S *dg = static_cast<S*>(dgate.mutable_data_ptr()), *du = static_cast<S*>(dup.mutable_data_ptr());
    if (scale) {
      const auto q = qparams<T>(gate, *scale, zero_point, quant_min, quant_max);
      if (numel == 0) return;
      const IndexedRuns runs = indexed_runs(gate, *scale);
      QK_DISPATCH_ISA(silu_mul_backward<true>(runs, q, numel, dy, g, u, dg, du));
    } else if (numel) {
      const IndexedRuns runs{one_run(gate), {}};
      QK_DISPATCH_ISA(silu_mul_backward<false>(runs, Qparams<T>{}, numel, dy, g, u, dg, du));
    }
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("silu_mul_fake_quantize_dynamic_forward", TORCH_BOX(&silu_mul_fake_quantize_dynamic_forward));
  m.impl("silu_mul_quantize_dynamic", TORCH_BOX(&silu_mul_quantize_dynamic));
  m.impl("silu_mul_fake_quantize_dynamic_backward", TORCH_BOX(&silu_mul_fake_quantize_dynamic_backward));
}

}  // namespace qkernels
