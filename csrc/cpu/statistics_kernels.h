// Histograms, and sums of quantization errors.
#include <mutex>

#include "cpu/common/reduce.h"

namespace qkernels::QK_NAMESPACE {

// The slot of a value: 0 below the range, 1 to bins inside it, bins + 1 above it, bins + 2 for NaN.
template <typename V>
struct Slots {
  using T = typename V::Scalar;
  V low, high, inv, last, above, nan, one, infinity;

  Slots(T low_, T high_, int64_t bins)
      : low(V::set1(low_)),
        high(V::set1(high_)),
        inv(V::set1(static_cast<T>(bins) / (high_ - low_))),
        last(V::set1(static_cast<T>(bins))),
        above(V::set1(static_cast<T>(bins + 1))),
        nan(V::set1(static_cast<T>(bins + 2))),
        one(V::set1(1)),
        infinity(V::set1(static_cast<T>(INFINITY))) {}

  V of(V x) const {
    V t = (x - low) * inv;
    t = select(is_nan(t), zero<V>(), t);  // 0·infinity, where low, high and x are equal
    const V rounded = round(t);
    const V floor = select(inside(rounded, zero<V>(), t), rounded, rounded - one);
    V slot = min(last, floor + one);
    slot = select(inside(x, zero<V>() - infinity, high), slot, above);
    slot = select(inside(x, low, infinity), slot, zero<V>());
    return select(is_nan(x), nan, slot);
  }
};

// Counts into two tables in turn, because an increment of a counter waits for the one before it where one value repeats
// (the zeros after a ReLU).
template <typename S>
void count_stretch(const S* x, int64_t n, const Slots<typename VecOf<S>::type>& slots, int64_t* even, int64_t* odd) {
  using V = typename VecOf<S>::type;
  for_each_16(n, [&](int64_t i, auto... tail) {
    int32_t slot[16];
    slots.of(V::load(x + i, tail...)).store(slot);
    for (int lane = 0; lane < lanes_of(tail...); ++lane) ++(lane % 2 ? odd : even)[slot[lane]];
  });
}

// counts is [channels][bins] and outside [channels][3]. `order` lists the runs of a period channel by channel; those of
// channel c begin at first[c]. Integer sums do not depend on the order of additions.
template <typename S>
void histogram(const IndexedRuns& runs, int64_t numel, const S* x, const Arithmetic<S>* low, const Arithmetic<S>* high,
               int64_t bins, const std::vector<int64_t>& order, const std::vector<int64_t>& first, int64_t* counts,
               int64_t* outside) {
  using V = typename VecOf<S>::type;
  const int64_t slots = bins + 3;
  const auto add = [&](int64_t channel, std::vector<int64_t>& table) {
    const int64_t *even = table.data(), *odd = even + slots;
    for (int64_t i = 0; i < bins; ++i) counts[channel * bins + i] += even[i + 1] + odd[i + 1];
    int64_t* rest = outside + 3 * channel;
    rest[0] += even[0] + odd[0];
    rest[1] += even[bins + 1] + odd[bins + 1];
    rest[2] += even[bins + 2] + odd[bins + 2];
    std::fill(table.begin(), table.end(), 0);
  };
  if (runs.channels == 1) {
    const Slots<V> where(low[0], high[0], bins);
    std::mutex adding;
    torch::stable::parallel_for(0, numel, std::max(kGrain, 8 * bins), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> table(2 * slots);
      count_stretch(x + begin, end - begin, where, table.data(), table.data() + slots);
      const std::lock_guard<std::mutex> lock(adding);
      add(0, table);
    });
    return;
  }
  const int64_t repeats = runs.count / runs.period;
  const int64_t grain = std::max<int64_t>(1, kGrain / (numel / runs.channels + bins));
  torch::stable::parallel_for(0, runs.channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> table(2 * slots);
    std::vector<S> gathered;
    for (int64_t channel = begin; channel < end; ++channel) {
      const Slots<V> where(low[channel], high[channel], bins);
      for (int64_t at = first[channel]; at < first[channel + 1]; ++at) {
        for (int64_t repeat = 0; repeat < repeats; ++repeat) {
          const S* run = x + (repeat * runs.period + order[at]) * runs.inner;
          if (runs.inner >= kPattern) {
            count_stretch(run, runs.inner, where, table.data(), table.data() + slots);
            continue;
          }
          gathered.insert(gathered.end(), run, run + runs.inner);  // short runs would waste a vector
          if (gathered.size() < kPattern) continue;
          count_stretch<S>(gathered.data(), gathered.size(), where, table.data(), table.data() + slots);
          gathered.clear();
        }
      }
      count_stretch<S>(gathered.data(), gathered.size(), where, table.data(), table.data() + slots);
      gathered.clear();
      add(channel, table);
    }
  });
}

// Sums the squared errors of every candidate while a piece of x is in cache. The qparams are those of
// [candidates][channels].
template <typename S>
struct ErrorsOp {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  using Partial = std::vector<double>;  // one sum for each candidate
  const Qparams<T>& qparams;
  const IndexedRuns& runs;
  const S* x;
  int64_t candidates;
  double* errors;

  static Partial identity() { return {}; }
  static void merge(Partial& into, const Partial& from) {
    if (into.empty()) {
      into = from;
    } else {
      for (size_t k = 0; k < into.size(); ++k) into[k] += from[k];
    }
  }
  void result(int64_t channel, const Partial& sums) const {
    for (int64_t k = 0; k < candidates; ++k) errors[k * runs.channels + channel] = sums.empty() ? 0 : sums[k];
  }

  static inline V square(V value, V inv, V scale, V z, const V& low, const V& high) {
    const V q = min(high, max(low, round(value * inv) + z));
    const V error = (q - z) * scale - value;
    return error * error;
  }

  Partial piece(int64_t at, int64_t n, int64_t channel) const {
    const V low = V::set1(qparams.quant_min), high = V::set1(qparams.quant_max);
    Partial sums(candidates);
    for (int64_t k = 0; k < candidates; ++k) {
      const Uniform<V> p(qparams.of(k * runs.channels + channel));
      double sum[16] = {};
      V acc = zero<V>();
      for_each_16_summed(
          n,
          [&](int64_t i, auto... tail) {
            // Lanes beyond the last element hold 0, whose error is 0, or NaN where a parameter makes all errors NaN.
            const V value = V::load(x + at + i, tail...);
            acc = acc + square(value, p.inv_, p.scale_, p.zero_point_, low, high);
          },
          [&] {
            add_lanes(sum, acc);
            acc = zero<V>();
          });
      sums[k] = tree_sum(sum);
    }
    return sums;
  }

  void column(int64_t at, int64_t row, int64_t rows, int64_t n, Partial* lanes) const {
    const V low = V::set1(qparams.quant_min), high = V::set1(qparams.quant_max);
    for (int64_t i = 0; i < n; ++i) lanes[i].resize(candidates);
    for (int64_t k = 0; k < candidates; ++k) {
      T inv[16] = {}, scale[16] = {}, zero_point[16] = {}, lane[16];
      for (int64_t i = 0; i < n; ++i) {
        const int64_t run = (at + i) % row / runs.inner;
        const auto& p = qparams.of(k * runs.channels + runs.channel(run));
        inv[i] = p.inv;
        scale[i] = p.scale;
        zero_point[i] = p.zero_point;
      }
      const V invs = V::load(inv), scales = V::load(scale), zero_points = V::load(zero_point);
      V acc = zero<V>();
      for (int64_t r = 0; r < rows; ++r) {
        const S* p = x + at + r * row;
        acc = acc + square(n == 16 ? V::load(p) : V::load(p, n), invs, scales, zero_points, low, high);
      }
      acc.store(lane);
      for (int64_t i = 0; i < n; ++i) lanes[i][k] = static_cast<double>(lane[i]);
    }
  }
};

template <typename S>
void quantization_errors(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x,
                         int64_t candidates, double* errors) {
  reduce_channels(runs, numel, ErrorsOp<S>{qparams, runs, x, candidates, errors});
}

}  // namespace qkernels::QK_NAMESPACE
