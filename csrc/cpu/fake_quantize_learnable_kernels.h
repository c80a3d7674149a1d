// Gradients of learned scales and zero points: dx, and sums for each channel.
#ifndef QK_FAKE_QUANTIZE_LEARNABLE_KERNELS
#define QK_FAKE_QUANTIZE_LEARNABLE_KERNELS

#include "cpu/common/reduce.h"
#include "cpu/fake_quantize_kernels.h"

namespace qkernels::QK_NAMESPACE {

// Gives dx and the terms of LSQ, which are what each element adds to the sums. `along(at, n)` returns the terms for
// elements [at, at + n), and one call computes them for the 16 elements from i on. dx is selected and not multiplied:
// an infinite dy outside of the range must not become NaN.
template <typename V, Inside kInside = Inside::rounded>
struct LearnedTerms {
  LearnedTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    const V steps = value * inv;
    const V q = round(steps) + z;
    const auto in = counts_inside<kInside>(steps, q, z, b);
    dx = select(in, dy, zero<V>());
    dscale = dy * ((min(b.high, max(b.low, q)) - z) - select(in, steps, zero<V>()));
    dzero_point = select(in, zero<V>(), (zero<V>() - dy) * scale);
  }
};

// The sums of the learnable backward; also writes dx.
template <typename S, typename Terms>
struct LearnableOp {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  struct Partial {
    double scale, zero_point;
  };
  const Qparams<T>& qparams;
  const IndexedRuns& runs;
  const S *grad, *x;
  S* dx;
  double grad_factor;
  double *dscale, *dzero_point;
  Terms all_terms = {};

  static Partial identity() { return {0, 0}; }
  static void merge(Partial& into, const Partial& from) {
    into.scale += from.scale;
    into.zero_point += from.zero_point;
  }
  void result(int64_t channel, const Partial& p) const {
    dscale[channel] = p.scale * grad_factor;
    dzero_point[channel] = p.zero_point * grad_factor;
  }

  Partial piece(int64_t at, int64_t n, int64_t channel) const {
    const Bounds<V> b(qparams);
    const Uniform<V> p(qparams.of(channel));
    double scale_sum[16] = {}, zero_point_sum[16] = {};
    auto terms = all_terms.along(at, n);
    V scale_acc = zero<V>(), zero_point_acc = zero<V>(), d, ds, dz;
    for_each_16_summed(
        n,
        [&](int64_t k, auto... tail) {
          // Lanes beyond the last element have dy = 0 and x = 0: they add 0, or NaN where a parameter makes the sum
          // NaN.
          const int64_t i = at + k;
          terms(i, V::load(grad + i, tail...), V::load(x + i, tail...), p.inv_, p.scale_, p.zero_point_, b, d, ds, dz);
          d.store(dx + i, tail...);
          scale_acc = scale_acc + ds;
          zero_point_acc = zero_point_acc + dz;
        },
        [&] {
          add_lanes(scale_sum, scale_acc);
          add_lanes(zero_point_sum, zero_point_acc);
          scale_acc = zero_point_acc = zero<V>();
        });
    return {tree_sum(scale_sum), tree_sum(zero_point_sum)};
  }

  void column(int64_t at, int64_t row, int64_t rows, int64_t n, Partial* lanes) const {
    const Bounds<V> b(qparams);
    Expanded<T> expanded;
    expanded.fill(qparams, runs, at % row, n);
    const V inv = V::load(expanded.inv, n), scale = V::load(expanded.scale, n), z = V::load(expanded.zero_point, n);
    auto terms = all_terms.along(at, 16);
    V scale_acc = zero<V>(), zero_point_acc = zero<V>(), d, ds, dz;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = at + r * row;
      if (n == 16) {
        terms(i, V::load(grad + i), V::load(x + i), inv, scale, z, b, d, ds, dz);
        d.store(dx + i);
      } else {
        terms(i, V::load(grad + i, n), V::load(x + i, n), inv, scale, z, b, d, ds, dz);
        d.store(dx + i, n);
      }
      scale_acc = scale_acc + ds;
      zero_point_acc = zero_point_acc + dz;
    }
    T scale_lane[16], zero_point_lane[16];
    scale_acc.store(scale_lane);
    zero_point_acc.store(zero_point_lane);
    for (int64_t i = 0; i < n; ++i) lanes[i] = {scale_lane[i], zero_point_lane[i]};
  }
};

template <bool kLsq = false, typename S>
void learnable_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                        const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = LearnedTerms<typename VecOf<S>::type, inside_of(kLsq)>;
  reduce_channels(runs, numel, LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point});
}

// The straight-through variants: the same sums, with other terms.

template <typename V>
struct PassTerms {
  LearnedTerms<V> learned;
  PassTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    learned(i, dy, value, inv, scale, z, b, dx, dscale, dzero_point);
    dx = dy;
  }
};

// PACT. A value is clipped if, before rounding, it is below the range, at its upper end or above (alpha <= x in the
// paper).
template <typename V>
struct PactTerms {
  PactTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    using T = typename V::Scalar;
    const V steps = value * inv, bottom = b.low - z, top = b.high - z;
    const auto at_top = inside(steps, top, V::set1(static_cast<T>(INFINITY)));
    const auto in = inside(select(at_top, V::set1(static_cast<T>(NAN)), steps), bottom, top);
    dx = select(in, dy, zero<V>());
    dscale = select(in, zero<V>(), dy * (min(b.high, max(b.low, round(steps) + z)) - z));
    dzero_point = select(in, zero<V>(), (zero<V>() - dy) * scale);
  }
};

// EWGS. d is delta with the sign of dy. The gradient of rounding is 1 + d·(steps − rounded), and that of the scale
// follows from it. As in the paper, a value is clipped before it is rounded.
template <typename V>
struct EwgsTerms {
  typename V::Scalar delta;
  LearnedTerms<V, Inside::closed> learned = {};
  EwgsTerms along(int64_t, int64_t) const { return *this; }
  void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                  V& dzero_point) const {
    learned(i, dy, value, inv, scale, z, b, dx, dscale, dzero_point);
    const V one = V::set1(1), infinity = V::set1(static_cast<typename V::Scalar>(INFINITY));
    const V steps = value * inv, rounded = round(steps);
    const auto in = inside(steps, b.low - z, b.high - z);
    const V d = select(inside(dy, zero<V>(), infinity), V::set1(delta), V::set1(-delta));
    dx = select(in, dy * (one + d * (steps - rounded)), zero<V>());
    dscale = dscale * select(in, one + d * steps, one);
  }
};

template <typename S>
void pass_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                   const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = PassTerms<typename VecOf<S>::type>;
  reduce_channels(runs, numel, LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point});
}

template <typename S>
void pact_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                   const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = PactTerms<typename VecOf<S>::type>;
  reduce_channels(runs, numel, LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point});
}

template <typename S>
void ewgs_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                   const S* x, S* dx, double delta, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = EwgsTerms<typename VecOf<S>::type>;
  const Terms terms{static_cast<Arithmetic<S>>(delta)};
  reduce_channels(runs, numel,
                  LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point, terms});
}

}  // namespace qkernels::QK_NAMESPACE

#endif
