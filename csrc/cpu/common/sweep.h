// How kernels visit the elements of x for a scale of any granularity, and which parameters each element has.
#ifndef QK_SWEEP
#define QK_SWEEP

#include "cpu/common/qparams.h"
#include "cpu/common/vec.h"

namespace qkernels::QK_NAMESPACE {

// A run shorter than this would waste lanes of a vector. The parameters of such runs are laid out element by element.
constexpr int64_t kShortRun = 16;
constexpr int64_t kPattern = 1024;

// All elements of a run have the same parameters.
template <typename V>
struct Uniform {
  V inv_, scale_, zero_point_;
  explicit Uniform(const typename Qparams<typename V::Scalar>::Params& p)
      : inv_(V::set1(p.inv)), scale_(V::set1(p.scale)), zero_point_(V::set1(p.zero_point)) {}
  V inv(int64_t) const { return inv_; }
  V scale(int64_t) const { return scale_; }
  V zero_point(int64_t) const { return zero_point_; }
  V inv(int64_t, int64_t) const { return inv_; }
  V scale(int64_t, int64_t) const { return scale_; }
  V zero_point(int64_t, int64_t) const { return zero_point_; }
};

// Each element has parameters of its own.
template <typename V>
struct PerElement {
  const typename V::Scalar *inv_, *scale_, *zero_point_;
  V inv(int64_t i) const { return V::load(inv_ + i); }
  V scale(int64_t i) const { return V::load(scale_ + i); }
  V zero_point(int64_t i) const { return V::load(zero_point_ + i); }
  V inv(int64_t i, int64_t n) const { return V::load(inv_ + i, n); }
  V scale(int64_t i, int64_t n) const { return V::load(scale_ + i, n); }
  V zero_point(int64_t i, int64_t n) const { return V::load(zero_point_ + i, n); }
};

// The parameters of each element, for at most kPattern elements of short runs.
template <typename T>
struct Expanded {
  T inv[kPattern], scale[kPattern], zero_point[kPattern];

  void fill(const Qparams<T>& q, const IndexedRuns& runs, int64_t at, int64_t n) {
    int64_t run = at / runs.inner % runs.period, within = at % runs.inner;
    const auto* p = &q.of(runs.channel(run));
    for (int64_t i = 0; i < n; ++i) {
      inv[i] = p->inv;
      scale[i] = p->scale;
      zero_point[i] = p->zero_point;
      if (++within == runs.inner && i + 1 < n) {
        within = 0;
        if (++run == runs.period) run = 0;
        p = &q.of(runs.channel(run));
      }
    }
  }
  template <typename V>
  PerElement<V> from(int64_t i) const {
    return {inv + i, scale + i, zero_point + i};
  }
};

// Calls f(first element, count, parameters) for stretches that cover x, in parallel. Tasks begin at multiples of 1024
// elements, so that two threads never write one byte of a mask.
template <typename V, typename F>
void for_each_stretch(const IndexedRuns& runs, const Qparams<typename V::Scalar>& q, int64_t numel, F f) {
  using T = typename V::Scalar;
  constexpr int64_t kBlock = 1024;
  const int64_t row = runs.period * runs.inner;
  const bool is_short = runs.inner < kShortRun && runs.channels > 1;
  // A row here is one period. Rows shorter than kPattern are laid out several times, so that stretches are long even
  // where rows are short.
  const int64_t repeated = row <= kPattern ? kPattern / std::max<int64_t>(row, 1) * row : 0;
  torch::stable::parallel_for(0, (numel + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t first, int64_t last) {
    int64_t at = first * kBlock;
    const int64_t end = std::min(last * kBlock, numel);
    if (!is_short) {
      int64_t run = at / runs.inner;
      int64_t in_period = run % runs.period;
      while (at < end) {
        const int64_t n = std::min((run + 1) * runs.inner, end) - at;
        f(at, n, Uniform<V>(q.of(runs.channel(in_period))));
        at += n;
        ++run;
        if (++in_period == runs.period) in_period = 0;
      }
    } else {
      Expanded<T> params;
      if (repeated) params.fill(q, runs, 0, repeated);
      while (at < end) {
        const int64_t from = repeated ? at % repeated : 0;
        const int64_t n = std::min((repeated ? repeated : kPattern) - from, end - at);
        if (!repeated) params.fill(q, runs, at, n);
        f(at, n, params.template from<V>(from));
        at += n;
      }
    }
  });
}

// Writes one bit per element, low bit first. add() takes 16 elements, or the last few of a stretch.
class BitWriter {
 public:
  BitWriter(uint8_t* bytes, int64_t element) : out_(bytes ? bytes + element / 8 : nullptr), fill_(element % 8) {
    // A stretch may begin inside a byte. The stretch before it, of the same task, has written the byte's lower bits.
    if (fill_ && bytes) held_ = *out_ & ((1u << fill_) - 1);
  }
  void add(uint32_t bits, int n) {
    held_ |= bits << fill_;
    fill_ += n;
    while (fill_ >= 8) {
      *out_++ = static_cast<uint8_t>(held_);
      held_ >>= 8;
      fill_ -= 8;
    }
  }
  void finish() {
    if (fill_) *out_ = static_cast<uint8_t>(held_);
  }

 private:
  uint8_t* out_;
  uint32_t held_ = 0;
  int fill_;
};

}  // namespace qkernels::QK_NAMESPACE

#endif
