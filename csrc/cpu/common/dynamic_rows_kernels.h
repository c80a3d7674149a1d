// Dynamic quantization of values that a fused op computes. The values stay in the arithmetic type until they are
// quantized, in a buffer that fits the cache.
#include <memory>

#include "cpu/common/dynamic_rows.h"
#include "cpu/common/ranges_kernels.h"
#include "cpu/fake_quantize_kernels.h"

namespace qkernels::QK_NAMESPACE {

constexpr int64_t kValues = 4096;  // elements of the buffer; a longer unit has a buffer of its length

// O is the storage type of fake-quantized values, or int8_t for codes.
template <typename V, typename O>
inline void quantize_values(const typename V::Scalar* values, O* out, int64_t n, const Uniform<V>& p,
                            const Bounds<V>& b) {
  for_each_16(n, [&](int64_t i, auto... tail) {
    V q = min(b.high, max(b.low, round(V::load(values + i, tail...) * p.inv_) + p.zero_point_));
    if constexpr (std::is_same_v<O, int8_t>) {
      q = select(is_nan(q), p.zero_point_, q);  // no integer is NaN: a NaN becomes the zero point
    } else {
      q = (q - p.zero_point_) * p.scale_;
    }
    q.store(out + i, tail...);
  });
}

// Calls f(first unit, count) for all units, in parallel. A call gets as many units as the buffer holds.
template <typename F>
void in_blocks(const Units& units, F f) {
  const int64_t at_once = std::max<int64_t>(1, kValues / std::max<int64_t>(units.length, 1));
  const int64_t grain = std::max<int64_t>(1, kGrain / 2 / std::max<int64_t>(at_once * units.length, 1));
  torch::stable::parallel_for(0, (units.count + at_once - 1) / at_once, grain, [&](int64_t first, int64_t last) {
    for (int64_t at = first * at_once; at < std::min(last * at_once, units.count); at += at_once)
      f(at, std::min(at_once, units.count - at));
  });
}

// Quantizes all units. fill(first unit, count, values) computes the values of some.
template <typename V, typename O, typename F>
void quantize_units(const Units& units, const QparamsRule& rule, O* out, typename V::Scalar* scale, int32_t* zero_point,
                    F fill) {
  using T = typename V::Scalar;
  const Bounds<V> b(Qparams<T>{static_cast<T>(rule.quant_min), static_cast<T>(rule.quant_max), {}, {}});
  if (units.whole) {  // one range for all, so all values are kept until it is known
    const IndexedRuns all{{1, 1, 1, units.count * units.length, {}}, {}};
    const std::unique_ptr<T[]> values(new T[all.inner]);
    in_blocks(units, [&](int64_t first, int64_t count) { fill(first, count, &values[first * units.length]); });
    T low = 0, high = 0;
    if (all.inner) range(all, all.inner, values.get(), &low, &high);
    const auto chosen = choose_qparams<T>(low, high, rule);
    *scale = chosen.scale;
    *zero_point = static_cast<int32_t>(chosen.zero_point);
    const Uniform<V> p({1 / chosen.scale, chosen.scale, chosen.zero_point});
    in_blocks(units, [&](int64_t first, int64_t count) {
      const int64_t at = first * units.length;
      quantize_values(&values[at], out + at, count * units.length, p, b);
    });
    return;
  }
  const int64_t length = units.groups ? units.length / units.groups : 0;
  in_blocks(units, [&](int64_t first, int64_t count) {
    static thread_local std::vector<T> values;
    values.resize(count * units.length);
    fill(first, count, values.data());
    const int64_t begin = first * units.groups, end = begin + count * units.groups;
    for (int64_t g = begin; g < end; g += 16) {
      const int64_t n = std::min<int64_t>(16, end - g);
      const T* v = values.data() + (g - begin) * length;
      const RowParams<T> params = row_params(v, n, length, rule);
      std::memcpy(scale + g, params.scale, n * sizeof(T));
      for (int64_t r = 0; r < n; ++r) {
        zero_point[g + r] = static_cast<int32_t>(params.zero_point[r]);
        quantize_values(v + r * length, out + (g + r) * length, length, Uniform<V>(params[r]), b);
      }
    }
  });
}

}  // namespace qkernels::QK_NAMESPACE
