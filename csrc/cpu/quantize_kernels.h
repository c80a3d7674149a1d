// The quantize and dequantize kernels, compiled once per path by foreach_isa.h.
#include "cpu/common/ranges.h"
#include "cpu/common/walk.h"

template <typename V, typename S, typename I, typename P>
inline void quantize_stretch(const S* x, I* q, int64_t n, const P& p, V low, V high) {
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t count = std::min<int64_t>(16, n - i);
    const bool full = count == 16;
    const V z = full ? p.zero_point(i) : p.zero_point(i, count);
    const V steps = round((full ? V::load(x + i) : V::load(x + i, count)) * (full ? p.inv(i) : p.inv(i, count)));
    V code = min(high, max(low, steps + z));
    code = select(is_nan(code), z, code);  // no integer is NaN: it becomes the code of zero
    if (full) {
      code.store(q + i);
    } else {
      code.store(q + i, count);
    }
  }
}

template <typename S, typename I>
void quantize(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const S* x, I* q) {
  using V = typename VecOf<S>::type;
  const V low = V::set1(quantizer.quant_min), high = V::set1(quantizer.quant_max);
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    quantize_stretch<V>(x + at, q + at, n, p, low, high);
  });
}

template <typename S, typename I>
void dequantize(const View& view, const Quantizer<Arithmetic<S>>& quantizer, int64_t numel, const I* q, S* y) {
  using V = typename VecOf<S>::type;
  for_each_stretch<V>(view, quantizer, numel, [&](int64_t at, int64_t n, const auto& p) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) ((V::load(q + at + i) - p.zero_point(i)) * p.scale(i)).store(y + at + i);
    if (const int64_t tail = n - i; tail > 0)
      ((V::load(q + at + i, tail) - p.zero_point(i, tail)) * p.scale(i, tail)).store(y + at + i, tail);
  });
}

// Each row of `length` elements gives its own scale while it is in cache, then is quantized with it.
template <typename S>
void quantize_dynamic(int64_t rows, int64_t length, const QparamsRule& rule, const S* x, int8_t* q,
                      Arithmetic<S>* scale, int32_t* zero_point) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  const V low = V::set1(rule.quant_min), high = V::set1(rule.quant_max);
  const int64_t grain = std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, (rows + 15) / 16, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first * 16; block < std::min(last * 16, rows); block += 16) {
      const int64_t count = std::min<int64_t>(16, rows - block);
      const RowParams<T> params = row_params(x + block * length, count, length, rule);
      std::memcpy(scale + block, params.scale, count * sizeof(T));
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (block + r) * length;
        zero_point[block + r] = static_cast<int32_t>(params.zero_point[r]);
        quantize_stretch<V>(x + at, q + at, length, Uniform<V>(params[r]), low, high);
      }
    }
  });
}
