// Dynamic quantization of values that a fused op computes: they reach the quantizer in the arithmetic type, through a
// buffer that stays in cache. Compiled once per path by foreach_isa.h.
#include "fake_quantize_kernels.h"

constexpr int64_t kValues = 4096;  // elements in the buffer, where a unit is not longer

// O is the storage type of fake-quantized values, or int8_t for codes.
template <typename V, typename O>
inline void quantize_values(const typename V::Scalar* values, O* out, int64_t n,
                            const typename Quantizer<typename V::Scalar>::Params& params, const Bounds<V>& b) {
  const Uniform<V> p(params);
  const auto quantized = [&](V value) {
    const V q = min(b.high, max(b.low, round(value * p.inv_) + p.zero_point_));
    if constexpr (std::is_same_v<O, int8_t>) {
      return select(is_nan(q), p.zero_point_, q);  // no integer is NaN: it becomes the code of zero
    } else {
      return (q - p.zero_point_) * p.scale_;
    }
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) quantized(V::load(values + i)).store(out + i);
  if (const int64_t tail = n - i; tail > 0) quantized(V::load(values + i, tail)).store(out + i, tail);
}

inline int64_t units_at_once(const Units& u) { return std::max<int64_t>(1, kValues / std::max<int64_t>(u.length, 1)); }

// Calls f(first unit, count) for all units, as many at once as the buffer holds, in parallel.
template <typename F>
void in_blocks(const Units& u, F f) {
  const int64_t at_once = units_at_once(u), elements = std::max<int64_t>(at_once * u.length, 1);
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / elements);
  torch::stable::parallel_for(0, (u.units + at_once - 1) / at_once, grain, [&](int64_t first, int64_t last) {
    for (int64_t at = first * at_once; at < std::min(last * at_once, u.units); at += at_once)
      f(at, std::min(at_once, u.units - at));
  });
}

// fill(first unit, count, values) computes them.
template <typename V, typename O, typename F>
void quantize_groups(const Units& u, const QparamsRule& rule, O* out, typename V::Scalar* scale, int32_t* zero_point,
                     const F& fill) {
  using T = typename V::Scalar;
  const Bounds<V> b(Quantizer<T>{static_cast<T>(rule.quant_min), static_cast<T>(rule.quant_max), {}, {}});
  const int64_t per_unit = u.units ? u.groups / u.units : 0;
  in_blocks(u, [&](int64_t first, int64_t count) {
    static thread_local std::vector<T> values;
    values.resize(count * u.length);
    fill(first, count, values.data());
    const int64_t begin = first * per_unit, end = begin + count * per_unit;
    for (int64_t g = begin; g < end; g += 16) {
      const int64_t n = std::min<int64_t>(16, end - g);
      const T* v = values.data() + (g - begin) * u.group;
      const RowParams<T> params = row_params(v, n, u.group, rule);
      std::memcpy(scale + g, params.scale, n * sizeof(T));
      for (int64_t r = 0; r < n; ++r) {
        zero_point[g + r] = static_cast<int32_t>(params.zero_point[r]);
        quantize_values<V>(v + r * u.group, out + (g + r) * u.group, u.group, params[r], b);
      }
    }
  });
}

// One range for all: the values are kept until it is known.
template <typename V, typename O, typename F>
void quantize_whole(const Units& u, const QparamsRule& rule, O* out, typename V::Scalar* scale, int32_t* zero_point,
                    const F& fill) {
  using T = typename V::Scalar;
  const Bounds<V> b(Quantizer<T>{static_cast<T>(rule.quant_min), static_cast<T>(rule.quant_max), {}, {}});
  const int64_t numel = u.units * u.length;
  std::unique_ptr<T[]> values(new T[numel]);
  in_blocks(u, [&](int64_t first, int64_t count) { fill(first, count, &values[first * u.length]); });
  T low = 0, high = 0;
  View view;
  view.inner = numel;
  if (numel) range(view, numel, values.get(), &low, &high);
  const auto chosen = choose_qparams<T>(low, high, rule);
  *scale = chosen.scale;
  *zero_point = static_cast<int32_t>(chosen.zero_point);
  in_blocks(u, [&](int64_t first, int64_t count) {
    const int64_t at = first * u.length;
    quantize_values<V>(&values[at], out + at, count * u.length, {1 / chosen.scale, chosen.scale, chosen.zero_point}, b);
  });
}

template <typename V, typename O, typename F>
void quantize_units(const Units& u, bool whole, const QparamsRule& rule, O* out, typename V::Scalar* scale,
                    int32_t* zero_point, const F& fill) {
  if (whole) {
    quantize_whole<V>(u, rule, out, scale, zero_point, fill);
  } else {
    quantize_groups<V>(u, rule, out, scale, zero_point, fill);
  }
}
