// RMSNorm fused with dynamic quantization.
#include "cpu/common/dynamic_rows_kernels.h"
#include "cpu/common/row_sum.h"
#include "cpu/rms_norm_quantize.h"

namespace qkernels::QK_NAMESPACE {

// `weight` holds a value for each element of a row.
template <typename S, typename O>
void rms_norm(const Units& units, const QparamsRule& rule, const S* x, const Arithmetic<S>* weight, Arithmetic<S> eps,
              O* out, Arithmetic<S>* scale, int32_t* zero_point, Arithmetic<S>* rstd) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  quantize_units<V>(units, rule, out, scale, zero_point, [&](int64_t first, int64_t count, T* values) {
    for (int64_t row = first; row < first + count; ++row, values += units.length) {
      const S* in = x + row * units.length;
      Sum<V> squares;
      for_each_16(units.length, [&](int64_t i, auto... tail) {
        const V v = V::load(in + i, tail...);
        squares.add(v * v);
      });
      const T mean = static_cast<T>(squares.total()) / static_cast<T>(units.length);
      rstd[row] = 1 / std::sqrt(mean + eps);
      const V r = V::set1(rstd[row]);
      for_each_16(units.length, [&](int64_t i, auto... tail) {
        (V::load(in + i, tail...) * r * V::load(weight + i, tail...)).store(values + i, tail...);
      });
    }
  });
}

// kClipped: a value that the qparams clip gets no gradient. dweight, if not null, gets the sums over each block of
// kSummedRows rows.
template <bool kClipped, typename S>
void rms_norm_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t rows, int64_t length,
                       const S* grad, const S* x, const Arithmetic<S>* weight, const Arithmetic<S>* rstd, S* dx,
                       Arithmetic<S>* dweight) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  const int64_t step = std::min(runs.inner, length);  // a run divides a row, or a row divides a run
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / (kSummedRows * length));
  const int64_t blocks = (rows + kSummedRows - 1) / kSummedRows;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kSummedRows; row < std::min(last * kSummedRows, rows); ++row) {
      const int64_t at = row * length;
      const V r = V::set1(rstd[row]);
      // Calls f(i, n, gradient of n * weight, gradient of n, tail...) along the row, where n is the normalized x.
      const auto each = [&](auto f) {
        for (int64_t from = 0; from < length; from += step) {
          const Uniform<V> p(qparams.of(runs.channel((at + from) / runs.inner % runs.period)));
          for_each_16(step, [&](int64_t within, auto... tail) {
            const int64_t i = from + within;
            const V n = V::load(x + at + i, tail...) * r, w = V::load(weight + i, tail...);
            V dy = V::load(grad + at + i, tail...);
            if constexpr (kClipped)
              dy = select(inside(round(n * w * p.inv_) + p.zero_point_, b.low, b.high), dy, zero<V>());
            f(i, n, dy, dy * w, tail...);
          });
        }
      };
      T* sums = dweight ? dweight + row / kSummedRows * length : nullptr;
      Sum<V> dot;
      each([&](int64_t i, V n, V dy, V u, auto... tail) {
        dot.add(u * n);
        if (sums) (V::load(sums + i, tail...) + dy * n).store(sums + i, tail...);
      });
      const V mean = V::set1(static_cast<T>(dot.total()) / static_cast<T>(length));
      each([&](int64_t i, V n, V, V u, auto... tail) { ((u - n * mean) * r).store(dx + at + i, tail...); });
    }
  });
}

}  // namespace qkernels::QK_NAMESPACE
