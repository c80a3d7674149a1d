// SwiGLU's product fused with dynamic quantization.
#include "cpu/common/activation_kernels.h"
#include "cpu/common/dynamic_rows_kernels.h"

namespace qkernels::QK_NAMESPACE {

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

// kClipped: a value that the qparams clip gets no gradient.
template <bool kClipped, typename S>
void silu_mul_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                       const S* gate, const S* up, S* dgate, S* dup) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  const V one = V::set1(1);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
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

}  // namespace qkernels::QK_NAMESPACE
