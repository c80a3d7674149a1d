// The kernels of SwiGLU's product fused with dynamic quantization, compiled once per path by foreach_isa.h.
#include "dynamic_rows_kernels.h"

// 2**n for a whole n from the smallest normal number's exponent to infinity's; a finite number for NaN.
template <typename T>
inline Lanes<T> power_of_two(Lanes<T> n) {
  using I = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1, kBias = std::numeric_limits<T>::max_exponent - 1;
  I bits[16];
  for (int i = 0; i < 16; ++i) bits[i] = (n.v[i] == n.v[i] ? static_cast<I>(n.v[i]) + kBias : kBias) << kMantissa;
  std::memcpy(n.v, bits, sizeof bits);
  return n;
}
#if QK_LEVEL == 1
inline __m256 power_of_two(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F32 power_of_two(F32 n) { return {power_of_two(n.lo), power_of_two(n.hi)}; }
#elif QK_LEVEL == 2
inline F32 power_of_two(F32 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
#endif

// The same steps, each rounded once, as reference/silu_mul_quantize.py, whose constants these are.
template <typename V>
inline V exponential(V x) {
  using T = typename V::Scalar;
  using C = ExpConstants<T>;
  x = min(V::set1(C::high), max(V::set1(C::low), x));
  const V n = round(x * V::set1(C::log2e));
  const V r = x - n * V::set1(C::ln2_high) - n * V::set1(C::ln2_low);
  V p = V::set1(C::coefficients[0]);
  for (size_t i = 1; i < std::size(C::coefficients); ++i) p = p * r + V::set1(C::coefficients[i]);
  return p * power_of_two(n);
}

template <typename V>
inline V sigmoid(V x) {
  const V one = V::set1(1);
  return one / (one + exponential(zero<V>() - x));
}

template <typename V>
inline V product(V gate, V up) {
  return gate * sigmoid(gate) * up;
}

template <typename S, typename O>
void silu_mul(const Units& units, const QparamsRule& rule, const S* gate, const S* up, O* out, Arithmetic<S>* scale,
              int32_t* zero_point) {
  using V = typename VecOf<S>::type;
  quantize_units<V>(units, rule, out, scale, zero_point, [&](int64_t first, int64_t count, Arithmetic<S>* values) {
    const S *g = gate + first * units.length, *u = up + first * units.length;
    for_each_16(count * units.length, [&](int64_t i, auto... tail) {
      product(V::load(g + i, tail...), V::load(u + i, tail...)).store(values + i, tail...);
    });
  });
}

// kClipped: the quantizer says where a value was clipped and gives no gradient.
template <bool kClipped, typename S>
void silu_mul_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                       const S* gate, const S* up, S* dgate, S* dup) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(quantizer);
  const V one = V::set1(1);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) {
      const V g = V::load(gate + at + i, tail...), u = V::load(up + at + i, tail...);
      const V s = sigmoid(g), silu = g * s;
      V dy = V::load(grad + at + i, tail...);
      if constexpr (kClipped) {
        const V q = round(silu * u * p.inv(i, tail...)) + p.zero_point(i, tail...);
        dy = select(inside(q, b.low, b.high), dy, zero<V>());
      }
      (dy * u * (s + silu * (one - s))).store(dgate + at + i, tail...);
      (dy * silu).store(dup + at + i, tail...);
    });
  });
}
