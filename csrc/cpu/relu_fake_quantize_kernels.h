// The kernels of ReLU fused with fake quantization, compiled once per path by foreach_isa.h.
#include "fake_quantize_kernels.h"

template <typename V>
inline V rectified(V v) {  // a NaN stays
  return max(zero<V>(), v);
}

template <typename V>
inline typename V::Mask is_positive(V v) {
  using T = typename V::Scalar;
  return inside(v, V::set1(std::numeric_limits<T>::denorm_min()), V::set1(static_cast<T>(INFINITY)));
}

// Where the gradient passes: q, the rounded value, is in the range, and v positive.
template <typename V>
inline typename V::Mask passes(V v, V q, const Bounds<V>& b) {
  return is_positive(select(inside(q, b.low, b.high), v, zero<V>()));
}

template <bool kMask, typename S>
void relu_forward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* x, S* y,
                  uint8_t* mask) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(quantizer);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    BitWriter bits(mask, at);
    const auto quantized = [&](V value, V inv, V scale, V z, int count) {
      const V q = round(rectified(value) * inv) + z;
      if constexpr (kMask) bits.add(passes(value, q, b).bits() & ((1u << count) - 1), count);
      return (min(b.high, max(b.low, q)) - z) * scale;
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      quantized(V::load(x + at + i), p.inv(i), p.scale(i), p.zero_point(i), 16).store(y + at + i);
    if (const int64_t tail = n - i; tail > 0)
      quantized(V::load(x + at + i, tail), p.inv(i, tail), p.scale(i, tail), p.zero_point(i, tail),
                static_cast<int>(tail))
          .store(y + at + i, tail);
    if constexpr (kMask) bits.finish();
  });
}

template <typename S>
void relu_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                   const S* x, S* dx) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(quantizer);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    const auto passed = [&](V dy, V value, V inv, V z) {
      return select(passes(value, round(rectified(value) * inv) + z, b), dy, zero<V>());
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      passed(V::load(grad + at + i), V::load(x + at + i), p.inv(i), p.zero_point(i)).store(dx + at + i);
    if (const int64_t tail = n - i; tail > 0)
      passed(V::load(grad + at + i, tail), V::load(x + at + i, tail), p.inv(i, tail), p.zero_point(i, tail))
          .store(dx + at + i, tail);
  });
}

template <typename V>
struct ReluTerms {
  LsqTerms<V> lsq;
  ReluTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    lsq(i, dy, rectified(value), inv, scale, z, b, dx, dscale, dzero_point);
    dx = select(is_positive(value), dx, zero<V>());
  }
};

template <typename S>
void relu_learnable_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                             const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = ReluTerms<typename VecOf<S>::type>;
  reduce_channels(view, numel, LearnableOp<S, Terms>{quantizer, view, grad, x, dx, grad_factor, dscale, dzero_point});
}
