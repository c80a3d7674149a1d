// The fake-quant kernels, compiled once per path by foreach_isa.h.
#include "cpu/common/ranges.h"
#include "cpu/common/walk.h"

template <typename V>
struct Bounds {
  V low, high;
  explicit Bounds(const Quantizer<typename V::Scalar>& q) : low(V::set1(q.quant_min)), high(V::set1(q.quant_max)) {}
};

// Which values count as inside the range, where the gradient passes.
enum class Inside {
  rounded,  // those whose rounded code is, bounds included
  open,     // those that are before rounding, bounds excluded, as in LSQ's paper
  closed    // those that are before rounding, bounds included
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
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const V z = p.zero_point(i), steps = V::load(x + i) * p.inv(i);
    const V q = round(steps) + z;
    if constexpr (kMask) bits->add(counts_inside<inside_of(kLsq)>(steps, q, z, b).bits(), 16);
    ((min(b.high, max(b.low, q)) - z) * p.scale(i)).store(y + i);
  }
  if (const int64_t tail = n - i; tail > 0) {
    const V z = p.zero_point(i, tail), steps = V::load(x + i, tail) * p.inv(i, tail);
    const V q = round(steps) + z;
    if constexpr (kMask) {
      const uint32_t in = counts_inside<inside_of(kLsq)>(steps, q, z, b).bits();
      bits->add(in & ((1u << tail) - 1), static_cast<int>(tail));
    }
    ((min(b.high, max(b.low, q)) - z) * p.scale(i, tail)).store(y + i, tail);
  }
}

template <bool kLsq = false, typename S>
void forward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* x, S* y,
             uint8_t* mask) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(quantizer);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
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
void backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad, const S* x,
              S* dx) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(quantizer);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) {
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
    const int64_t end = std::min(last * 1024, numel);
    int64_t i = first * 1024;
    for (; i + 16 <= end; i += 16) {
      const auto m = V::Mask::from_bits(static_cast<uint16_t>(mask[i / 8] | mask[i / 8 + 1] << 8));
      select(m, V::load(grad + i), zero<V>()).store(dx + i);
    }
    if (const int64_t tail = end - i; tail > 0) {
      const int high = tail > 8 ? mask[i / 8 + 1] << 8 : 0;
      const auto m = V::Mask::from_bits(static_cast<uint16_t>(mask[i / 8] | high));
      select(m, V::load(grad + i, tail), zero<V>()).store(dx + i, tail);
    }
  });
}

// What an element adds to dx and to the sums, as in LSQ. `along(at, n)` makes the terms of elements [at, at + n), which
// are then called 16 lanes at a time from element i on. Select, never multiply, so that an infinite dy outside the
// range does not become NaN.
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

// Sums of the learnable backward; dx is written on the way. Terms are added in fp32 over at most 64 vectors, then in
// fp64: exact enough that the fp32 result is right to its last bits, at no cost.
template <typename S, typename Terms>
struct LearnableOp {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  struct Partial {
    double scale, zero_point;
  };
  const Quantizer<T>& quantizer;
  const View& view;
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
    const Bounds<V> b(quantizer);
    const Uniform<V> p(quantizer.of(channel));
    double scale_sum[16] = {}, zero_point_sum[16] = {};
    auto terms = all_terms.along(at, n);
    V d, ds, dz;
    int64_t i = 0;
    while (i + 16 <= n) {
      const int64_t stop = std::min(i + 1024, n);
      V scale_acc = zero<V>(), zero_point_acc = zero<V>();
      for (; i + 16 <= stop; i += 16) {
        terms(at + i, V::load(grad + at + i), V::load(x + at + i), p.inv_, p.scale_, p.zero_point_, b, d, ds, dz);
        d.store(dx + at + i);
        scale_acc = scale_acc + ds;
        zero_point_acc = zero_point_acc + dz;
      }
      add_lanes(scale_sum, scale_acc);
      add_lanes(zero_point_sum, zero_point_acc);
    }
    if (const int64_t tail = n - i; tail > 0) {
      // Lanes beyond the tail have dy = 0 and x = 0: they add nothing, unless a parameter is NaN, when all is.
      terms(at + i, V::load(grad + at + i, tail), V::load(x + at + i, tail), p.inv_, p.scale_, p.zero_point_, b, d, ds,
            dz);
      d.store(dx + at + i, tail);
      add_lanes(scale_sum, ds);
      add_lanes(zero_point_sum, dz);
    }
    return {tree_sum(scale_sum), tree_sum(zero_point_sum)};
  }

  void column(int64_t at, int64_t row, int64_t rows, int64_t n, Partial* lanes) const {
    const Bounds<V> b(quantizer);
    Expanded<T> expanded;
    expanded.fill(quantizer, view, at % row, n);
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
void learnable_backward(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* grad,
                        const S* x, S* dx, double grad_factor, double* dscale, double* dzero_point) {
  using Terms = LearnedTerms<typename VecOf<S>::type, inside_of(kLsq)>;
  reduce_channels(view, numel, LearnableOp<S, Terms>{quantizer, view, grad, x, dx, grad_factor, dscale, dzero_point});
}

// A symmetric range that these very values gave: |x|/scale exceeds quant_max by 3 roundings at most, so that none is
// clipped, and the zero point is 0. Adding it still turns -0 into 0, as everywhere.
template <typename V, typename S>
inline void symmetric_stretch(const S* x, S* y, int64_t n, V inv, V scale) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) ((round(V::load(x + i) * inv) + zero<V>()) * scale).store(y + i);
  if (const int64_t tail = n - i; tail > 0)
    ((round(V::load(x + i, tail) * inv) + zero<V>()) * scale).store(y + i, tail);
}

// Each row of `length` elements gives its own scale while it is in cache, then is quantized with it.
template <typename S>
void dynamic_forward(int64_t rows, int64_t length, const QparamsRule& rule, const S* x, S* y, Arithmetic<S>* scale,
                     int32_t* zero_point, uint8_t* mask) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  const Bounds<V> b(Quantizer<T>{static_cast<T>(rule.quant_min), static_cast<T>(rule.quant_max), {}, {}});
  // Sixteen rows at a time, which begin at a whole byte of the mask.
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, (rows + 15) / 16, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first * 16; block < std::min(last * 16, rows); block += 16) {
      const int64_t count = std::min<int64_t>(16, rows - block);
      const RowParams<T> params = row_params(x + block * length, count, length, rule);
      std::memcpy(scale + block, params.scale, count * sizeof(T));
      for (int64_t r = 0; r < count; ++r) zero_point[block + r] = static_cast<int32_t>(params.zero_point[r]);
      if (!y) continue;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (block + r) * length;
        const Uniform<V> p(params[r]);
        if (mask) {
          BitWriter bits(mask, at);
          forward_stretch<V, S, true>(x + at, y + at, length, p, b, &bits);
          bits.finish();
        } else if (rule.symmetric && rule.middle == 0) {
          symmetric_stretch(x + at, y + at, length, p.inv_, p.scale_);
        } else {
          forward_stretch<V, S, false>(x + at, y + at, length, p, b, nullptr);
        }
      }
    }
  });
}
