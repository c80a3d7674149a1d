// Storage types of tensors, and their conversion to and from the arithmetic type with one rounding, half to even.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace qkernels {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(Half h) { return c10::detail::fp16_ieee_to_fp32_value(h.bits); }
inline float to_float(BFloat16 b) {
  const uint32_t u = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
template <typename T>
inline T to_float(T value) {
  return value;
}

template <typename S, typename T>
inline S from_float(T value) {
  if constexpr (std::is_same_v<S, Half>) {
    return {c10::detail::fp16_ieee_from_fp32_value(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const float f = static_cast<float>(value);
    uint32_t u;
    std::memcpy(&u, &f, sizeof u);
    return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
  } else {
    return static_cast<S>(value);
  }
}

// The type that elements of a storage type are computed in.
template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace qkernels
