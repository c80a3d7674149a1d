// Granularity as kernels take it: x in memory order, cut into runs of elements that share one element of scale.
#pragma once

#include "tensor.h"

namespace qkernels {

// One level of x's memory order: `size` steps, each of which goes on by `stride` elements of scale. With stride 0 all
// steps have the same element of scale.
struct Factor {
  int64_t size, stride;
};

// x in memory order is a sequence of runs. A run is `inner` elements of one channel, i.e. of one element of scale.
struct Runs {
  int64_t channels = 1;  // elements of scale
  int64_t count = 1;     // of runs
  int64_t period = 1;    // runs after which the pattern of channels repeats
  int64_t inner = 0;     // elements of a run
  // The levels of a period, from the outermost. Their steps are the digits of a run's number in its period.
  std::vector<Factor> factors;

  bool in_order() const { return factors.size() <= 1; }  // the channel is the run's number in its period
};

// All of x is one channel.
inline Runs one_run(const Tensor& x) {
  Runs runs;
  runs.inner = x.numel();
  return runs;
}

// x is dense, in any memory order. scale has any shape that divides x's.
inline Runs runs_of(const Tensor& x, const Tensor& scale) {
  Runs runs = one_run(x);
  runs.channels = scale.numel();
  const int64_t numel = x.numel();
  if (runs.channels == 1 || numel == 0) return runs;

  // A dim of size n = s·b, where each of s elements of scale holds for b steps, makes two levels.
  std::vector<int64_t> scale_stride(scale.dim());
  int64_t step = 1;
  for (int64_t i = scale.dim(); i-- > 0;) {
    scale_stride[i] = step;
    step *= scale.sizes()[i];
  }
  std::vector<Factor>& factors = runs.factors;
  const auto push = [&](int64_t size, int64_t stride) {
    if (size == 1) return;
    if (!factors.empty() && factors.back().stride == size * stride) {
      factors.back() = {factors.back().size * size, stride};
    } else {
      factors.push_back({size, stride});
    }
  };
  for (int64_t d : storage_order(x)) {
    const int64_t s = scale.sizes()[d];
    if (s > 1) push(s, scale_stride[d]);
    push(x.sizes()[d] / s, 0);
  }
  runs.inner = 1;
  if (factors.back().stride == 0) {
    runs.inner = factors.back().size;
    factors.pop_back();
  }
  runs.count = numel / runs.inner;
  runs.period = runs.count;
  if (factors.front().stride == 0) {
    runs.period /= factors.front().size;
    factors.erase(factors.begin());
  }
  return runs;
}

}  // namespace qkernels
