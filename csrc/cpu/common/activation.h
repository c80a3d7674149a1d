// The constants of the activation functions: those of reference/activation.py, which says what they mean.
#pragma once

#include <iterator>

namespace qkernels {

enum class Activation : int {
  none,
  relu,
  gelu,
  silu,
  sigmoid,
  tanh,
  clamp,
  leaky_relu,
  hardswish,
  hardsigmoid,
  gelu_tanh
};

template <typename T>
struct ExpConstants {
  static constexpr float low = -87.25f, high = 88.75f, log2e = 1.4426950216293335f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -0.00021219444170128554f;
  static constexpr float coefficients[] = {0.001381422160193324f,
                                           0.00836889911442995f,
                                           0.04166840389370918f,
                                           0.1666651964187622f,
                                           0.4999999403953552f,
                                           1,
                                           1};
};
template <>
struct ExpConstants<double> {
  static constexpr double low = -708.25, high = 710, log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.6931471806019545, ln2_low = -4.2009150726810846e-11;
  static constexpr double coefficients[] = {
      1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
      1. / 720,        1. / 120,       1. / 24,       1. / 6,       1. / 2,      1,          1};
};

struct GeluConstants {
  static constexpr float sqrt_half = 0.7071067690849304f, step = 0.3984375f;
  static constexpr float coefficients[] = {-0.10470201075077057f, 0.377718985080719f,   -0.22054575383663177f,
                                           0.2596719563007355f,   0.07092434912919998f, 0.11693238466978073f};
};

struct GeluTanhConstants {
  static constexpr float first = 1.5957691669464111f, third = 0.07135481387376785f;
};

}  // namespace qkernels
