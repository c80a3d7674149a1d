// The range of each channel, for ops that take ranges from x itself.
#pragma once

#include "reduce.cuh"

namespace qkernels {

// An Op of reduce.cuh that finds the minimum and the maximum of each channel and calls then(channel, minimum, maximum).
template <typename S, typename Then>
struct RangeOp {
  using T = Arithmetic<S>;
  using Total = T;
  static constexpr int kWidth = kVector<S>;
  static constexpr bool kQuantizes = false;
  using Loaded = Vec<S, kWidth>;
  const S* x;
  Then then;

  RangeOp of_columns() const { return *this; }

  static __device__ __forceinline__ Pair<T> identity() { return {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)}; }
  template <typename U>
  static __device__ __forceinline__ Pair<U> merge(Pair<U> p, Pair<U> q) {
    return {nan_min(p.a, q.a), nan_max(p.b, q.b)};
  }
  __device__ __forceinline__ bool wanted() const { return then.wanted(); }
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int first, int last) const {
    return qkernels::load<kWhole, kWidth>(x + at, first, last);
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void terms(int64_t, int first, int last, const Loaded& in, P,
                                        Pair<T> (&out)[kWidth]) const {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const T value = widen(in, k);
      out[k] = kWhole || (k >= first && k < last) ? Pair<T>{value, value} : identity();
    }
  }
  __device__ void result(int64_t channel, Pair<T> range) const { then(channel, range.a, range.b); }
};

}  // namespace qkernels
