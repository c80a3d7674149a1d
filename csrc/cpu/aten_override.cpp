// aten's fake-quantize ops on the CPU while qk.override_torch() is in force: the kernels of aten_fake_quantize.cpp sit
// in the dispatcher under aten's names, and take its calls without any Python.
#include <array>
#include <memory>

#include "cpu/aten_fake_quantize.h"

namespace qkernels {
namespace {

Tensor multiply(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// aten's own backward is a product, which autograd can differentiate again. This function is called above autograd too,
// where tensors may be fakes. So it calls an op of this library, which every layer below handles.
Tensor cachemask_backward(const Tensor& grad, const Tensor& mask) {
  QK_CHECK(mask.scalar_type() == ScalarType::Bool, "mask: got ", dtype_name(mask.scalar_type()),
           "; accepted: torch.bool");
  if (!aoti_torch_grad_mode_is_enabled()) {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(grad), torch::stable::detail::from(mask)};
    if (!torch_call_dispatcher("qkernels::fake_quantize_backward_bytes", "", stack.data(), TORCH_ABI_VERSION))
      return torch::stable::detail::to<Tensor>(stack[0]);
  }
  return multiply(grad, mask);  // any dtypes and shapes that torch multiplies
}

template <typename R>
struct Results {
  static constexpr size_t count = 1;
  static R of(StableIValue* stack) { return torch::stable::detail::to<R>(stack[0]); }
};
template <>
struct Results<Masked> {
  static constexpr size_t count = 2;
  static Masked of(StableIValue* stack) { return {Results<Tensor>::of(stack), Results<Tensor>::of(stack + 1)}; }
};
template <>
struct Results<Gradients> {
  static constexpr size_t count = 3;
  static Gradients of(StableIValue* stack) {
    return {Results<Tensor>::of(stack), Results<Tensor>::of(stack + 1), Results<Tensor>::of(stack + 2)};
  }
};

// Calls the kernel. Where it refuses, calls torch's own op, which Python keeps in the namespace qkernels_torch; where
// that refuses too, raises the kernel's error. A std::invalid_argument of the kernel is raised in any case.
template <auto kernel, typename F = decltype(kernel)>
struct OrTorchs;
template <auto kernel, typename R, typename... Args>
struct OrTorchs<kernel, R (*)(Args...)> {
  static inline const char* name;

  static R call(Args... args) {
    try {
      return kernel(args...);
    } catch (const std::runtime_error&) {
      std::array<StableIValue, std::max(sizeof...(Args), Results<R>::count)> stack{
          torch::stable::detail::from(args)...};
      const std::string op = std::string("qkernels_torch::") + name;
      if (torch_call_dispatcher(op.c_str(), "", stack.data(), TORCH_ABI_VERSION)) throw;
      return Results<R>::of(stack.data());
    }
  }
};

using torch::stable::detail::StableLibrary;

struct AtenOverride {
  StableLibrary cpu{StableLibrary::Kind::IMPL, "aten", "CPU", __FILE__, __LINE__};
  StableLibrary autograd{StableLibrary::Kind::IMPL, "aten", "AutogradCPU", __FILE__, __LINE__};

  AtenOverride() {
    reroute<&aten::per_tensor_cachemask>("fake_quantize_per_tensor_affine_cachemask");
    reroute<&aten::per_tensor_cachemask_tensor_qparams>("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams");
    reroute<&aten::per_channel_cachemask>("fake_quantize_per_channel_affine_cachemask");
    reroute<&aten::learnable_per_tensor>("_fake_quantize_learnable_per_tensor_affine");
    reroute<&aten::learnable_per_tensor_backward>("_fake_quantize_learnable_per_tensor_affine_backward");
    reroute<&aten::learnable_per_channel>("_fake_quantize_learnable_per_channel_affine");
    reroute<&aten::learnable_per_channel_backward>("_fake_quantize_learnable_per_channel_affine_backward");
    reroute<&aten::fused_moving_avg_obs>("_fused_moving_avg_obs_fq_helper");
    autograd.impl("fake_quantize_per_tensor_affine_cachemask_backward", TORCH_BOX(&cachemask_backward));
    autograd.impl("fake_quantize_per_channel_affine_cachemask_backward", TORCH_BOX(&cachemask_backward));
  }

  template <auto kernel>
  void reroute(const char* name) {
    OrTorchs<kernel>::name = name;
    cpu.impl(name, TORCH_BOX(&OrTorchs<kernel>::call));
  }
};

std::unique_ptr<AtenOverride> aten_override;

}  // namespace
}  // namespace qkernels

// Puts the kernels under aten's names into the dispatcher, or takes them out; 0 where that worked.
extern "C" __attribute__((visibility("default"))) int qkernels_override_aten(int on) {
  using namespace qkernels;
  try {
    aten_override = on ? std::make_unique<AtenOverride>() : nullptr;
    return 0;
  } catch (...) {
    return 1;
  }
}
