// Ranges of values, and the scale and zero point that a range gives.
#ifndef QK_RANGES_KERNELS
#define QK_RANGES_KERNELS

#include "cpu/common/reduce.h"

namespace qkernels::QK_NAMESPACE {

// The minimum and the maximum of each channel; NaN where the channel holds one.
template <typename S>
struct RangeOp {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  struct Partial {
    T low, high;
  };
  const S* x;
  T *low, *high;

  static Partial identity() { return {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)}; }
  static void merge(Partial& into, const Partial& from) {
    if (from.low < into.low || from.low != from.low) into.low = from.low;
    if (from.high > into.high || from.high != from.high) into.high = from.high;
  }
  void result(int64_t channel, const Partial& p) const {
    low[channel] = p.low;
    high[channel] = p.high;
  }
  Partial piece(int64_t at, int64_t n, int64_t) const {
    V lo = V::set1(static_cast<T>(INFINITY)), hi = V::set1(static_cast<T>(-INFINITY));
    auto nan = is_nan(lo);
    Partial rest = identity();
    for_each_16(n, [&](int64_t i, auto... tail) {
      if constexpr (sizeof...(tail) == 0) {
        const V v = V::load(x + at + i);
        lo = min(lo, v);
        hi = max(hi, v);
        nan = nan | is_nan(v);
      } else {
        for (; i < n; ++i) {
          const T v = static_cast<T>(to_float(x[at + i]));
          merge(rest, {v, v});
        }
      }
    });
    Partial p = nan.bits() ? Partial{static_cast<T>(NAN), static_cast<T>(NAN)} : Partial{lane_min(lo), lane_max(hi)};
    merge(p, rest);
    return p;
  }
  void column(int64_t at, int64_t row, int64_t rows, int64_t n, Partial* lanes) const {
    V lo = V::set1(static_cast<T>(INFINITY)), hi = V::set1(static_cast<T>(-INFINITY));
    auto nan = is_nan(lo);
    for (int64_t r = 0; r < rows; ++r) {
      const V v = V::load(x + at + r * row, n);
      lo = min(lo, v);
      hi = max(hi, v);
      nan = nan | is_nan(v);
    }
    T lo_lane[16], hi_lane[16];
    lo.store(lo_lane);
    hi.store(hi_lane);
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] = {lo_lane[i], hi_lane[i]};
      if (nan.bits() >> i & 1) lanes[i] = {static_cast<T>(NAN), static_cast<T>(NAN)};
    }
  }
};

template <typename S>
void range(const IndexedRuns& runs, int64_t numel, const S* x, Arithmetic<S>* low, Arithmetic<S>* high) {
  reduce_channels(runs, numel, RangeOp<S>{x, low, high});
}

// Limits the high ends of ranges as choose_qparams does; see Reach.
template <typename V>
inline V within_reach(V high) {
  const V top = V::set1(Reach<typename V::Scalar>::top), last = V::set1(Reach<typename V::Scalar>::last);
  return select(inside(high, top, last), top, high);
}

// The parameters of up to 16 rows, each from the range of its row. They are computed for 16 rows at a time, because a
// division for one row costs as much as for 16: with groups of 32 elements it would cost three times as much as all
// else.
template <typename T>
struct RowParams {
  T inv[16], scale[16], zero_point[16];
  typename Qparams<T>::Params operator[](int64_t row) const { return {inv[row], scale[row], zero_point[row]}; }
};

template <typename S>
RowParams<Arithmetic<S>> row_params(const S* x, int64_t rows, int64_t length, const QparamsRule& rule) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  T low[16] = {}, high[16] = {};
  for (int64_t r = 0; r < rows; ++r, x += length) {
    if (!rule.symmetric) {
      const typename RangeOp<S>::Partial p = RangeOp<S>{x, nullptr, nullptr}.piece(0, length, 0);
      low[r] = p.low;
      high[r] = p.high;
      continue;
    }
    V acc = zero<V>();
    for_each_16(length, [&](int64_t i, auto... tail) QK_INLINE { acc = max_abs(acc, V::load(x + i, tail...)); });
    high[r] = lane_max_abs(acc);
  }
  // As choose_qparams, lane by lane. min and max keep a NaN in their second operand.
  const V floor = V::set1(static_cast<T>(rule.floor));
  V scale, zero_point;
  if (rule.symmetric) {
    scale = max(floor, within_reach(V::load(high)) / V::set1(static_cast<T>(rule.steps)));
    zero_point = V::set1(static_cast<T>(rule.middle));
  } else {
    const V quant_min = V::set1(static_cast<T>(rule.quant_min)), quant_max = V::set1(static_cast<T>(rule.quant_max));
    const V bottom = min(zero<V>(), V::load(low)), hi = within_reach(max(zero<V>(), V::load(high)));
    const V lo = zero<V>() - within_reach(zero<V>() - bottom);
    const V half = V::set1(static_cast<T>(0.5));
    scale = max(floor, (hi * half - lo * half) / ((quant_max - quant_min) * half));
    zero_point = min(quant_max, max(quant_min - round(lo / scale), quant_min));
  }
  RowParams<T> params;
  (V::set1(1) / scale).store(params.inv);
  scale.store(params.scale);
  zero_point.store(params.zero_point);
  return params;
}

}  // namespace qkernels::QK_NAMESPACE

#endif
