// Fake quantization, element by element.
#ifndef QK_FAKE_QUANTIZE_KERNELS
#define QK_FAKE_QUANTIZE_KERNELS

#include "cpu/common/sweep.h"

namespace qkernels::QK_NAMESPACE {

template <typename V>
struct Bounds {
  V low, high;
  explicit Bounds(const Qparams<typename V::Scalar>& q) : low(V::set1(q.quant_min)), high(V::set1(q.quant_max)) {}
};

// Which values count as inside the range: for these the gradient passes.
enum class Inside {
  rounded,  // the rounded code lies in the range, bounds included
  open,     // the value before rounding does, bounds excluded, as in LSQ's paper
  closed    // the value before rounding does, bounds included
};

// `steps` are x/scale, and q is their rounded code before the clamp.
template <Inside kInside, typename V>
inline typename V::Mask counts_inside(V steps, V q, V z, const Bounds<V>& b) {
  if constexpr (kInside == Inside::rounded) {
    return inside(q, b.low, b.high);
  } else if constexpr (kInside == Inside::open) {
    return between(steps, b.low - z, b.high - z);
  } else {
    return inside(steps, b.low - z, b.high - z);
  }
}

constexpr Inside inside_of(bool lsq) { return lsq ? Inside::open : Inside::rounded; }

template <typename V, typename S, bool kMask, bool kLsq = false, typename P>
inline void forward_stretch(const S* x, S* y, int64_t n, const P& p, Bounds<V> b, BitWriter* bits) {
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const V z = p.zero_point(i, tail...), steps = V::load(x + i, tail...) * p.inv(i, tail...);
    const V q = round(steps) + z;
    if constexpr (kMask)
      bits->add(bits_of(counts_inside<inside_of(kLsq)>(steps, q, z, b).bits(), tail...), lanes_of(tail...));
    ((min(b.high, max(b.low, q)) - z) * p.scale(i, tail...)).store(y + i, tail...);
  });
}

template <bool kLsq = false, typename S>
void forward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x, S* y,
             uint8_t* mask) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    if (mask) {
      BitWriter bits(mask, at);
      forward_stretch<V, S, true, kLsq>(x + at, y + at, n, p, b, &bits);
      bits.finish();
    } else {
      forward_stretch<V, S, false>(x + at, y + at, n, p, b, nullptr);
    }
  });
}

template <bool kLsq = false, typename S>
void backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad, const S* x,
              S* dx) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
      const V z = p.zero_point(i, tail...), steps = V::load(x + at + i, tail...) * p.inv(i, tail...);
      const auto in = counts_inside<inside_of(kLsq)>(steps, round(steps) + z, z, b);
      select(in, V::load(grad + at + i, tail...), zero<V>()).store(dx + at + i, tail...);
    });
  });
}

template <typename S>
void backward_mask(int64_t numel, const S* grad, const uint8_t* mask, S* dx) {
  using V = typename VecOf<S>::type;
  torch::stable::parallel_for(0, (numel + 1023) / 1024, kGrain / 1024, [&](int64_t first, int64_t last) {
    const int64_t at = first * 1024, end = std::min(last * 1024, numel);
    for_each_16(end - at, [&](int64_t i, auto... tail) {
      i += at;
      const int high = lanes_of(tail...) > 8 ? mask[i / 8 + 1] << 8 : 0;
      const auto m = V::Mask::from_bits(static_cast<uint16_t>(mask[i / 8] | high));
      select(m, V::load(grad + i, tail...), zero<V>()).store(dx + i, tail...);
    });
  });
}

}  // namespace qkernels::QK_NAMESPACE

#endif
