// Pools, and moves of channels within a pixel.
#ifndef QK_PROGRAM_POOL
#define QK_PROGRAM_POOL

#include "cpu/int8_program/pointwise_kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

template <typename Visit>
inline void for_each_pixel(const Window& window, const Visit& visit) {
  for (int64_t d = 0; d < window.d; ++d)
    for (int64_t h = 0; h < window.h; ++h)
      for (int64_t w = 0; w < window.w; ++w) visit(d * window.stride_d + h * window.stride_h + w * window.stride_w);
}

void max_codes(const uint8_t* x, const Window& window, int64_t channels, uint8_t lowest, uint8_t* out) {
  int64_t c = 0;
#if QK_PATH == QK_PATH_AVX512VNNI
  for (; c < channels; c += 64) {
    const __mmask64 inside = channels - c >= 64 ? ~__mmask64{0} : (__mmask64{1} << (channels - c)) - 1;
    __m512i best = _mm512_set1_epi8(static_cast<char>(lowest));
    for_each_pixel(window, [&](int64_t at) QK_INLINE {
      best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(inside, x + c + at));
    });
    _mm512_mask_storeu_epi8(out + c, inside, best);
  }
#elif QK_PATH == QK_PATH_AVX2
  for (; c + 32 <= channels; c += 32) {
    __m256i best = _mm256_set1_epi8(static_cast<char>(lowest));
    for_each_pixel(window, [&](int64_t at) QK_INLINE {
      best = _mm256_max_epu8(best, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c + at)));
    });
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), best);
  }
#endif
  for (; c < channels; ++c) {
    uint8_t best = lowest;
    for_each_pixel(window, [&](int64_t at) { best = std::max(best, x[c + at]); });
    out[c] = best;
  }
}

void max_floats(const float* x, const Window& window, int64_t channels, float* out) {
  for_each_16(channels, [&](int64_t c, auto... tail) QK_INLINE {
    F32 best = F32::set1(-std::numeric_limits<float>::infinity());
    for_each_pixel(window, [&](int64_t at) QK_INLINE {
      const F32 larger = max(best, F32::load(x + c + at, tail...));
      best = select(is_nan(best), best, larger);  // max() keeps a NaN of its second argument alone
    });
    best.store(out + c, tail...);
  });
}

void average(const Operand& x, const Window& window, bool by_rows, int64_t channels, const float (&divisors)[3],
             float* out) {
  for_each_16(channels, [&](int64_t c, auto... tail) QK_INLINE {
    F32 sum = zero<F32>(), row = zero<F32>();
    int64_t left = window.w;  // pixels until the row ends
    for_each_pixel(window, [&](int64_t at) QK_INLINE {
      const F32 v = load_operand(x, c + at, tail...);
      if (!by_rows) {
        sum = sum + v;
        return;
      }
      row = row + v;
      if (--left == 0) {
        sum = sum + row;
        row = zero<F32>();
        left = window.w;
      }
    });
    for (float divisor : divisors)
      if (divisor != 1) sum = sum / F32::set1(divisor);
    sum.store(out + c, tail...);
  });
}

void blend(const Operand& x, const Blend& b, int64_t channels, float* out) {
  const auto mixed = [](F32 low, F32 high, float share)
                         QK_INLINE { return low * F32::set1(1 - share) + high * F32::set1(share); };
  for_each_16(channels, [&](int64_t c, auto... tail) QK_INLINE {
    const auto row = [&](int64_t at) QK_INLINE {
      const F32 low = load_operand(x, c + at, tail...);
      return b.share_w == 0 ? low : mixed(low, load_operand(x, c + at + b.offset_w, tail...), b.share_w);
    };
    const auto plane = [&](int64_t at) QK_INLINE {
      return b.share_h == 0 ? row(at) : mixed(row(at), row(at + b.offset_h), b.share_h);
    };
    const F32 v = b.share_d == 0 ? plane(0) : mixed(plane(0), plane(b.offset_d), b.share_d);
    v.store(out + c, tail...);
  });
}

template <typename T>
inline void shuffle_elements(const T* x, int64_t groups, int64_t channels, T* out) {
  const int64_t size = channels / groups;
  for (int64_t j = 0; j < size; ++j)
    for (int64_t i = 0; i < groups; ++i) out[j * groups + i] = x[i * size + j];
}

void shuffle(const void* x, int64_t element, int64_t groups, int64_t channels, void* out) {
  if (element == 4) return shuffle_elements(static_cast<const float*>(x), groups, channels, static_cast<float*>(out));
  const uint8_t* from = static_cast<const uint8_t*>(x);
  uint8_t* to = static_cast<uint8_t*>(out);
  int64_t j = 0;
#if QK_PATH != QK_PATH_SCALAR
  const int64_t half = channels / 2;
  for (; groups == 2 && j + 16 <= half; j += 16) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + half + j));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * j), _mm_unpacklo_epi8(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * j + 16), _mm_unpackhi_epi8(a, b));
  }
#endif
  const int64_t size = channels / groups;
  for (; j < size; ++j)
    for (int64_t i = 0; i < groups; ++i) to[j * groups + i] = from[i * size + j];
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
