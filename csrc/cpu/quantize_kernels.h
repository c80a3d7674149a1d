// Quantization to integers, and back.
#ifndef QK_QUANTIZE_KERNELS
#define QK_QUANTIZE_KERNELS

#include "cpu/common/sweep.h"

namespace qkernels::QK_NAMESPACE {

template <typename V, typename S, typename I, typename P>
inline void quantize_stretch(const S* x, I* q, int64_t n, const P& p, V low, V high) {
  for_each_16(n, [&](int64_t i, auto... tail) {
    const V z = p.zero_point(i, tail...), steps = round(V::load(x + i, tail...) * p.inv(i, tail...));
    V code = min(high, max(low, steps + z));
    code = select(is_nan(code), z, code);  // no integer is NaN: a NaN becomes the zero point
    code.store(q + i, tail...);
  });
}

template <typename S, typename I>
void quantize(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x, I* q) {
  using V = typename VecOf<S>::type;
  const V low = V::set1(qparams.quant_min), high = V::set1(qparams.quant_max);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    quantize_stretch<V>(x + at, q + at, n, p, low, high);
  });
}

template <typename S, typename I>
void dequantize(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const I* q, S* y) {
  using V = typename VecOf<S>::type;
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) {
      ((V::load(q + at + i, tail...) - p.zero_point(i, tail...)) * p.scale(i, tail...)).store(y + at + i, tail...);
    });
  });
}

}  // namespace qkernels::QK_NAMESPACE

#endif
