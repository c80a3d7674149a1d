// The integer types that hold codes: what quantize, dequantize and quantize_stochastic share.
#pragma once

#include <limits>

#include "tensor.h"

namespace qkernels {

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

template <typename I>
void check_codes(int64_t quant_min, int64_t quant_max, ScalarType dtype) {
  using Limits = std::numeric_limits<I>;
  QK_CHECK(Limits::min() <= quant_min && quant_max <= Limits::max(), "quant_min, quant_max: got ", quant_min, ", ",
           quant_max, "; accepted: what ", dtype_name(dtype), " holds, ", int64_t{Limits::min()}, " to ",
           int64_t{Limits::max()});
}

}  // namespace qkernels
