// Fake and real quantization with ranges that x itself gives.
#include "cpu/common/ranges_kernels.h"
#include "cpu/fake_quantize_kernels.h"
#include "cpu/quantize_kernels.h"

namespace qkernels::QK_NAMESPACE {

// Quantizes by a symmetric range that x itself gave. Its zero point is 0, and no value is clipped, since |x|/scale
// exceeds quant_max by 3 roundings at most. Adding 0 turns -0 into 0, as adding the zero point does elsewhere.
template <typename V, typename S>
inline void symmetric_stretch(const S* x, S* y, int64_t n, V inv, V scale) {
  for_each_16(n, [&](int64_t i, auto... tail) {
    ((round(V::load(x + i, tail...) * inv) + zero<V>()) * scale).store(y + i, tail...);
  });
}

// Each row of `length` elements is read for its scale, and then quantized with it while it is in cache.
template <typename S>
void dynamic_forward(int64_t rows, int64_t length, const QparamsRule& rule, const S* x, S* y, Arithmetic<S>* scale,
                     int32_t* zero_point, uint8_t* mask) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  const Bounds<V> b(Qparams<T>{static_cast<T>(rule.quant_min), static_cast<T>(rule.quant_max), {}, {}});
  // Tasks take sixteen rows at a time, which begin at a whole byte of the mask.
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

// Each row of `length` elements is read for its scale, and then quantized with it while it is in cache.
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

}  // namespace qkernels::QK_NAMESPACE
