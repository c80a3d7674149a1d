// Gradients of learned scales and zero points, for the op of one tensor and for the op of many tensors.
#pragma once

#include "reduce.cuh"

namespace qkernels {

template <typename S, bool kLsq, int kElements = kVector<S>>
struct LearnableOp {
  using T = Arithmetic<S>;
  using Total = double;
  static constexpr int kWidth = kElements;
  static constexpr bool kQuantizes = true;
  struct Loaded {
    Vec<S, kWidth> grad, x;
  };
  const S *grad, *x;
  S* dx;
  T low, high;
  double grad_factor;
  RealOutput dscale, dzero_point;

  // By columns each element of a vector has two sums and three parameters of its own, which take five registers. So
  // vectors of a half type have four elements there, instead of eight.
  auto of_columns() const {
    constexpr int kNarrow = std::min(kElements, 4);
    return LearnableOp<S, kLsq, kNarrow>{grad, x, dx, low, high, grad_factor, dscale, dzero_point};
  }

  static __device__ __forceinline__ Pair<T> identity() { return {0, 0}; }
  template <typename U>
  static __device__ __forceinline__ Pair<U> merge(Pair<U> p, Pair<U> q) {
    return {p.a + q.a, p.b + q.b};
  }
  __device__ __forceinline__ bool wanted() const { return true; }
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int first, int last) const {
    return {qkernels::load<kWhole, kWidth>(grad + at, first, last),
            qkernels::load<kWhole, kWidth>(x + at, first, last)};
  }
  // dx is selected and not multiplied: an infinite dy outside the range must not become NaN.
  template <bool kWhole, typename P>
  __device__ __forceinline__ void terms(int64_t at, int first, int last, const Loaded& in, P params,
                                        Pair<T> (&out)[kWidth]) const {
    Vec<S, kWidth> d;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Params<T>& p = params(k);
      const T dy = widen(in.grad, k), steps = widen(in.x, k) * p.inv;
      const T q = round_even(steps) + p.zero_point;
      const bool inside = counts_inside(steps, q, p.zero_point, low, high, kLsq);
      d.v[k] = inside ? in.grad.v[k] : S{};
      out[k].a = dy * ((clamp(q, low, high) - p.zero_point) - (inside ? steps : T{0}));
      out[k].b = inside ? T{0} : -dy * p.scale;
      if (!kWhole && (k < first || k >= last)) out[k] = identity();
    }
    store<kWhole>(dx + at, d, first, last);
  }
  __device__ __forceinline__ void result(int64_t channel, Pair<double> sum) const {
    dscale.set(channel, sum.a * grad_factor);
    dzero_point.set(channel, sum.b * grad_factor);
  }
};

// Calls f with `lsq` as a compile-time constant.
template <typename F>
void with_convention(bool lsq, F f) {
  if (lsq) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

}  // namespace qkernels
