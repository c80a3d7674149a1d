// The activation functions on vectors of vec.h; their constants are in activation.h.
#ifndef QK_ACTIVATION_KERNELS
#define QK_ACTIVATION_KERNELS

#include "cpu/common/activation.h"
#include "cpu/common/vec.h"

namespace qkernels::QK_NAMESPACE {

// 2**n for a whole number n. n lies between the exponent of the smallest normal number and that of infinity. A NaN
// gives some finite number.
template <typename T>
inline Lanes<T> power_of_two(Lanes<T> n) {
  using I = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1, kBias = std::numeric_limits<T>::max_exponent - 1;
  I bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = (n.v[i] == n.v[i] ? static_cast<I>(n.v[i]) + kBias : kBias) << kMantissa;
  std::memcpy(n.v, bits, sizeof bits);
  return n;
}
#if QK_PATH == QK_PATH_AVX2
inline __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F32 power_of_two(F32 n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
#elif QK_PATH != QK_PATH_SCALAR
inline F32 power_of_two(F32 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
#endif

// These functions take the steps of reference/activation.py, and round after each as it does.

// e**x is (fraction + 1) * power.
template <typename V>
struct Exponential {
  V fraction, power;
};

template <typename V>
inline Exponential<V> split_exponential(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  x = min(V::set1(C::high), max(V::set1(C::low), x));
  const V n = round(x * V::set1(C::log2e));
  const V r = x - n * V::set1(C::ln2_high) - n * V::set1(C::ln2_low);
  V p = V::set1(C::coefficients[0]);
  for (size_t i = 1; i + 1 < std::size(C::coefficients); ++i) p = p * r + V::set1(C::coefficients[i]);
  return {p * r, power_of_two(n)};
}

template <typename V>
inline V exponential(V x) {
  const auto [fraction, power] = split_exponential(x);
  return (fraction + V::set1(1)) * power;
}

// e**(-2|x|) - 1, and with it tanh(|x|) = -t / (2 + t).
template <typename V>
inline V tanh_term(V x) {
  const auto [fraction, power] = split_exponential(max_abs(zero<V>(), x) * V::set1(-2));
  return fraction * power + (power - V::set1(1));
}

template <typename V>
inline V with_sign_of(V x, V magnitude) {
  const auto positive = inside(x, zero<V>(), V::set1(std::numeric_limits<float>::infinity()));
  return select(positive, magnitude, zero<V>() - magnitude);
}

template <typename V>
inline V tanh(V x) {
  const V t = tanh_term(x);
  return with_sign_of(x, (zero<V>() - t) / (t + V::set1(2)));
}

// x * sigmoid(gate) and tanh(x) * sigmoid(gate) by one division each.
template <typename V>
inline V times_sigmoid(V x, V gate) {
  return x / (V::set1(1) + exponential(zero<V>() - gate));
}

template <typename V>
inline V tanh_times_sigmoid(V x, V gate) {
  const V t = tanh_term(x);
  const V below = (t + V::set1(2)) * (V::set1(1) + exponential(zero<V>() - gate));
  return with_sign_of(x, (zero<V>() - t) / below);
}

template <typename V>
inline V sigmoid(V x) {
  const V one = V::set1(1);
  return one / (one + exponential(zero<V>() - x));
}

template <typename V>
inline V gelu(V x) {
  using C = GeluConstants;
  const V one = V::set1(1);
  const V z = max_abs(zero<V>(), x) * V::set1(C::sqrt_half);
  const V t = one / (one + z * V::set1(C::step));
  V tail = V::set1(C::coefficients[0]);
  for (size_t i = 1; i < std::size(C::coefficients); ++i) tail = tail * t + V::set1(C::coefficients[i]);
  tail = tail * t * exponential(zero<V>() - z * z);
  const auto positive = inside(x, zero<V>(), V::set1(std::numeric_limits<float>::infinity()));
  return x * select(positive, one - tail, tail);
}

template <typename V>
inline V gelu_tanh(V x) {
  using C = GeluTanhConstants;
  return times_sigmoid(x, x * (x * x * V::set1(C::third) + V::set1(C::first)));
}

template <typename V>
inline V hardsigmoid(V x) {
  const V six = V::set1(6);
  return min(six, max(zero<V>(), x + V::set1(3))) / six;
}

template <typename V>
inline V hardswish(V x) {
  const V six = V::set1(6);
  return x * min(six, max(zero<V>(), x + V::set1(3))) / six;
}

template <typename V>
inline V leaky_relu(V x, float slope) {
  const V infinity = V::set1(std::numeric_limits<float>::infinity());
  return select(between(x, zero<V>(), infinity) | inside(x, infinity, infinity), x, x * V::set1(slope));
}

// low and high are those of an ActivationStep.
template <typename V>
inline V activate(V x, Activation activation, float low = 0, float high = 0) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return max(zero<V>(), x);
    case Activation::gelu: return gelu(x);
    case Activation::silu: return x * sigmoid(x);
    case Activation::sigmoid: return sigmoid(x);
    case Activation::tanh: return tanh(x);
    case Activation::clamp: return min(V::set1(high), max(V::set1(low), x));
    case Activation::leaky_relu: return leaky_relu(x, low);
    case Activation::hardswish: return hardswish(x);
    case Activation::hardsigmoid: return hardsigmoid(x);
    case Activation::gelu_tanh: return gelu_tanh(x);
  }
  return x;
}

}  // namespace qkernels::QK_NAMESPACE

#endif
