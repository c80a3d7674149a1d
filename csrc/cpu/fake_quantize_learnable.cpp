// Gradients of learned scales and zero points (LSQ, LSQ+) and of the straight-through variants, on the CPU. The kernels
// are in fake_quantize_learnable_kernels.h.
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/fake_quantize_learnable_kernels.h"
#include "cpu/common/foreach_isa.h"

#include "cpu/common/gradient.h"

namespace qkernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learnable_backward(const Tensor& grad_any, const Tensor& x_any,
                                                                    const Tensor& scale,
                                                                    std::optional<Tensor> zero_point, int64_t quant_min,
                                                                    int64_t quant_max, double grad_factor, bool lsq) {
  return learned(
      grad_any, x_any, scale, zero_point, quant_min, quant_max,
      [&](const auto& runs, const auto& q, int64_t numel, const auto* dy, const auto* in, auto* out, double* dscale,
          double* dzero_point) {
        if (lsq) {
          QK_DISPATCH_ISA(learnable_backward<true>(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        } else {
          QK_DISPATCH_ISA(learnable_backward(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        }
      });
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_straight_through_backward(
    const Tensor& grad, const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
    int64_t quant_max, const Text& straight_through, double ewgs_delta, double grad_factor) {
  const bool pass = straight_through == "pass", pact = straight_through == "pact", ewgs = straight_through == "ewgs";
  QK_CHECK(pass || pact || ewgs, "straight_through: got '", straight_through, "'; accepted: pass, pact, ewgs");
  QK_CHECK(ewgs_delta >= 0 && std::isfinite(ewgs_delta), "ewgs_delta: got ", ewgs_delta,
           "; accepted: finite, at least 0");
  return learned(
      grad, x, scale, zero_point, quant_min, quant_max,
      [&](const auto& runs, const auto& q, int64_t numel, const auto* dy, const auto* in, auto* out, double* dscale,
          double* dzero_point) {
        if (pass) QK_DISPATCH_ISA(pass_backward(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        if (pact) QK_DISPATCH_ISA(pact_backward(runs, q, numel, dy, in, out, grad_factor, dscale, dzero_point));
        if (ewgs)
          QK_DISPATCH_ISA(ewgs_backward(runs, q, numel, dy, in, out, ewgs_delta, grad_factor, dscale, dzero_point));
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize_learnable_backward", TORCH_BOX(&fake_quantize_learnable_backward));
  m.impl("fake_quantize_straight_through_backward", TORCH_BOX(&fake_quantize_straight_through_backward));
}

}  // namespace qkernels
