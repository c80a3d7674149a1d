// Fake quantization with torch's own arithmetic and byte masks.
#include "cpu/aten_fake_quantize.h"
#include "cpu/fake_quantize_learnable_kernels.h"

namespace qkernels::QK_NAMESPACE {

// A byte per element, 0 or 1: torch.bool.
inline void store_bytes(uint16_t bits, uint8_t* p) {
#if QK_PATH == QK_PATH_AVX512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(bits, 1));
#elif QK_PATH == QK_PATH_AVX2
  const uint64_t low = _pdep_u64(bits & 0xff, 0x0101010101010101), high = _pdep_u64(bits >> 8, 0x0101010101010101);
  std::memcpy(p, &low, 8);
  std::memcpy(p + 8, &high, 8);
#else
  for (int i = 0; i < 16; ++i) p[i] = bits >> i & 1;
#endif
}

inline void store_bytes(uint16_t bits, uint8_t* p, int64_t n) {
  uint8_t bytes[16];
  store_bytes(bits, bytes);
  std::memcpy(p, bytes, n);
}

template <typename V>
inline typename V::Mask load_bytes(const uint8_t* p) {
#if QK_PATH == QK_PATH_AVX512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return V::Mask::from_bits(static_cast<uint16_t>(_mm_test_epi8_mask(bytes, bytes)));
#elif QK_PATH == QK_PATH_AVX2
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return V::Mask::from_bits(~static_cast<uint16_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()))));
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return V::Mask::from_bits(static_cast<uint16_t>(bits));
#endif
}

template <typename V>
inline typename V::Mask load_bytes(const uint8_t* p, int64_t n) {
  uint8_t bytes[16] = {};
  std::memcpy(bytes, p, n);
  return load_bytes<V>(bytes);
}

template <typename V, typename S, typename P>
inline void bytes_stretch(const S* x, S* y, uint8_t* mask, int64_t n, const P& p, Bounds<V> b) {
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const V z = p.zero_point(i, tail...);
    const V q = round(V::load(x + i, tail...) * p.inv(i, tail...)) + z;
    store_bytes(inside(q, b.low, b.high).bits(), mask + i, tail...);
    ((min(b.high, max(b.low, q)) - z) * p.scale(i, tail...)).store(y + i, tail...);
  });
}

// For fp32 and half inputs with integer zero points and ranges within 2**24, where fp32 arithmetic gives torch's bits.
template <typename S>
void aten_forward(const IndexedRuns& runs, const Qparams<float>& qparams, int64_t numel, const S* x, S* y,
                  uint8_t* mask) {
  const Bounds<F32> b(qparams);
  for_each_stretch<F32>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    bytes_stretch<F32, S>(x + at, y + at, mask + at, n, p, b);
  });
}

// For all other inputs: element by element, in the types that torch computes in.
template <typename S>
void aten_forward_exact(const IndexedRuns& runs, const Qparams<float>& qparams, const AtenRule& rule, int64_t numel,
                        const S* x, S* y, uint8_t* mask) {
  using T = Arithmetic<S>;
  torch::stable::parallel_for(0, numel, kGrain / 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto p = qparams.of(runs.channels == 1 ? 0 : runs.channel(i / runs.inner % runs.period));
      const T value = static_cast<T>(to_float(x[i])), inv = p.inv, z = p.zero_point;
      T q;
      if (rule.rounds_after) {
        // torch's AVX2 and AVX-512 code computes this product and sum by one fused multiply-add, and rounds the result
        // in fp32. Adding 0 turns −0 into 0, which torch's conversion to integers does.
        const float sum = std::is_same_v<T, double> ? static_cast<float>(__builtin_fma(value, inv, z))
                                                    : __builtin_fmaf(value, inv, z);
        q = __builtin_rintf(sum) + 0.0f;
      } else {
        q = z + __builtin_rint(value * inv);
      }
      mask[i] = static_cast<T>(rule.quant_min) <= q && q <= static_cast<T>(rule.quant_max);
      double clamped = q;  // the comparisons keep a NaN
      if (clamped < rule.quant_min) clamped = rule.quant_min;
      if (clamped > rule.quant_max) clamped = rule.quant_max;
      const double steps = clamped - z;
      if (rule.float_product) {
        y[i] = from_float<S>(static_cast<T>(static_cast<float>(steps) * p.scale));
      } else {
        y[i] = from_float<S>(static_cast<T>(steps * p.scale));
      }
    }
  });
}

template <typename S>
void backward_bytes(int64_t numel, const S* grad, const uint8_t* mask, S* dx) {
  using V = typename VecOf<S>::type;
  torch::stable::parallel_for(0, (numel + 1023) / 1024, kGrain / 1024, [&](int64_t first, int64_t last) {
    const int64_t at = first * 1024;
    for_each_16(std::min(last * 1024, numel) - at, [&](int64_t i, auto... tail) {
      i += at;
      select(load_bytes<V>(mask + i, tail...), V::load(grad + i, tail...), zero<V>()).store(dx + i, tail...);
    });
  });
}

}  // namespace qkernels::QK_NAMESPACE
