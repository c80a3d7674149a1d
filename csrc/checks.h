// Checks of arguments, which the ops of all devices share, and dispatch on dtypes.
#pragma once

#include <limits>

#include "element.h"
#include "tensor.h"

namespace qkernels {

inline void check_granularity(const char* name, const Tensor& param, const Tensor& x) {
  if (param.numel() == 1) return;
  bool divides = param.dim() == x.dim();
  for (int64_t i = 0; divides && i < x.dim(); ++i) {
    const int64_t p = param.sizes()[i], n = x.sizes()[i];
    divides = p == n || (p != 0 && n % p == 0);
  }
  QK_CHECK(divides, name, ": got shape ", shape_of(param), "; accepted: one element, or ", x.dim(),
           " dims that each divide x's shape ", shape_of(x));
}

inline void check_range(int64_t quant_min, int64_t quant_max) {
  constexpr int64_t exact = int64_t{1} << 24;
  QK_CHECK(quant_min <= quant_max, "quant_min: got ", quant_min, ", above quant_max ", quant_max,
           "; accepted: at most quant_max");
  QK_CHECK(-exact <= quant_min && quant_max <= exact, "quant_min, quant_max: got ", quant_min, ", ", quant_max,
           "; accepted: ", -exact, " to ", exact, ", the integers that fp32 holds exactly");
}

// In these checks `device` is the device of x.
inline void check_param(const char* name, const Tensor& param, const Tensor& x, Device device) {
  check_device(name, param, device);
  check_granularity(name, param, x);
}

inline void check_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& x, Device device) {
  check_param("scale", scale, x, device);
  QK_CHECK(is_floating(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: a floating dtype");
  if (!zero_point) return;
  check_param("zero_point", *zero_point, x, device);
  QK_CHECK(zero_point->numel() == 1 || zero_point->numel() == scale.numel(), "zero_point: got shape ",
           shape_of(*zero_point), "; accepted: one element or scale's shape ", shape_of(scale));
}

inline void check_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& x) {
  check_scale(scale, zero_point, x, device_of(x));
}

inline void check_zero_point(int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  QK_CHECK(quant_min <= zero_point && zero_point <= quant_max, "zero_point: got ", zero_point,
           "; accepted: quant_min to quant_max, ", quant_min, " to ", quant_max);
}

inline void check_grad(const Tensor& grad, const Tensor& x, Device device) {
  check_device("grad", grad, device);
  QK_CHECK(grad.scalar_type() == x.scalar_type(), "grad: got ", dtype_name(grad.scalar_type()),
           "; accepted: x's dtype, ", dtype_name(x.scalar_type()));
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = grad.sizes()[i] == x.sizes()[i];
  QK_CHECK(same, "grad: got shape ", shape_of(grad), "; accepted: x's shape ", shape_of(x));
}

inline void check_grad(const Tensor& grad, const Tensor& x) { check_grad(grad, x, device_of(x)); }

inline Tensor empty_mask(int64_t numel, Device device) { return empty({(numel + 7) / 8}, ScalarType::Byte, device); }

inline Tensor empty_mask(int64_t numel, const Tensor& x) { return empty_mask(numel, device_of(x)); }

// `device` is the device of grad.
inline void check_mask(const Tensor& mask, const Tensor& grad, Device device) {
  check_device("mask", mask, device);
  QK_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == (grad.numel() + 7) / 8,
           "mask: got ", dtype_name(mask.scalar_type()), " of shape ", shape_of(mask),
           "; accepted: contiguous torch.uint8, one bit for each of grad's ", grad.numel(), " elements");
}

inline void check_mask(const Tensor& mask, const Tensor& grad) { check_mask(mask, grad, device_of(grad)); }

inline void check_group_size(const Tensor& x, int64_t group_size) {
  check_floating("x", x);
  if (group_size == 0) return;
  QK_CHECK(x.dim() > 0, "x: got 0 dims; accepted: at least 1, or group_size None");
  const int64_t last = x.sizes()[x.dim() - 1];
  QK_CHECK(group_size == -1 || (group_size > 0 && last % group_size == 0), "group_size: got ", group_size,
           "; accepted: -1 (a row), None (the whole tensor), or a divisor of x's last dim ", last);
}

// Checks the statistics that an observer keeps and changes in place.
inline void check_statistics(const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
                             const Tensor& zero_point, const Tensor& x, Device device) {
  const std::pair<const char*, const Tensor*> stats[] = {
      {"running_min", &running_min}, {"running_max", &running_max}, {"scale", &scale}};
  for (const auto& [name, stat] : stats) {
    check_param(name, *stat, x, device);
    QK_CHECK(stat->scalar_type() == ScalarType::Float && stat->is_contiguous() && stat->numel() == scale.numel(), name,
             ": got ", dtype_name(stat->scalar_type()), " of shape ", shape_of(*stat),
             "; accepted: contiguous torch.float32 of one shape for all statistics");
  }
  check_param("zero_point", zero_point, x, device);
  const ScalarType dtype = zero_point.scalar_type();
  QK_CHECK((dtype == ScalarType::Int || dtype == ScalarType::Long) && zero_point.is_contiguous() &&
               zero_point.numel() == scale.numel(),
           "zero_point: got ", dtype_name(dtype), " of shape ", shape_of(zero_point),
           "; accepted: contiguous torch.int32 or torch.int64 of scale's shape ", shape_of(scale));
}

inline void check_flag(const char* name, const Tensor& flag, Device device) {
  check_device(name, flag, device);
  QK_CHECK(flag.numel() == 1, name, ": got shape ", shape_of(flag), "; accepted: one element, on x's device");
}

// Calls f with a value of x's storage type.
template <typename F>
void dispatch_floating(const char* name, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default:
      fail(name, ": got ", dtype_name(dtype),
           "; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16");
  }
}

template <typename F>
void dispatch_floating(const char* name, const Tensor& x, F f) {
  dispatch_floating(name, x.scalar_type(), f);
}

// Calls f with a value of the integer type that a tensor of codes holds.
template <typename F>
void dispatch_integer(const char* name, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Int: return f(int32_t{});
    default: fail(name, ": got ", dtype_name(dtype), "; accepted: torch.int8, torch.uint8, torch.int32");
  }
}

// Checks that type I holds all codes of the range.
template <typename I>
void check_codes_hold(ScalarType dtype, int64_t quant_min, int64_t quant_max) {
  using Limits = std::numeric_limits<I>;
  QK_CHECK(Limits::min() <= quant_min && quant_max <= Limits::max(), "quant_min, quant_max: got ", quant_min, ", ",
           quant_max, "; accepted: what ", dtype_name(dtype), " holds, ", int64_t{Limits::min()}, " to ",
           int64_t{Limits::max()});
}

}  // namespace qkernels
