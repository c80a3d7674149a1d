// The convolution tile of the avx512vnni path.
#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_epilogue.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// The 4 codes at p + I * step in every lane. Multiples of step that an address can hold leave few registers to compute.
template <int I>
inline __m512i broadcast_codes(const uint8_t* p, int64_t step, int64_t step3, int64_t step5) {
  const uint8_t* at = I == 0   ? p
                      : I == 1 ? p + step
                      : I == 2 ? p + step * 2
                      : I == 3 ? p + step3
                      : I == 4 ? p + step * 4
                      : I == 5 ? p + step5
                               : p + step3 * 2;
  int32_t group;
  std::memcpy(&group, at, 4);
  return _mm512_set1_epi32(group);
}

template <size_t... I, typename F>
inline __attribute__((always_inline)) void for_each_pixel(std::index_sequence<I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// Calls finish(sums[pixel][2]), which stay in registers.
template <int H, int Segments, typename Finish>
inline __attribute__((always_inline)) void multiply_tile(const TileInput& in, const int8_t* weights,
                                                         const int32_t* start, Finish finish) {
  // A dot product takes 4 cycles and two start in one, so that 8 sums must be in flight.
  constexpr int kPixels = H * Segments, kSteps = kPixels == 1 ? 4 : kPixels <= 3 ? 2 : 1;
  __m512i acc[kSteps][kPixels][2];
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      acc[0][i][h] = _mm512_load_si512(start + h * 16);
#pragma GCC unroll 4
      for (int s = 1; s < kSteps; ++s) acc[s][i][h] = _mm512_setzero_si512();
    }
  const int64_t step = in.step, step3 = in.step * 3, step5 = in.step * 5;
  const int8_t* w = weights;
  using First = std::integral_constant<int, 0>;
  using Second = std::integral_constant<int, 1>;
  using Both = std::integral_constant<int, 2>;
  const auto multiply = [&](auto s, auto halves, const uint8_t* p0, const uint8_t* p1) __attribute__((always_inline)) {
    constexpr int kAt = decltype(s)::value, kHalves = decltype(halves)::value;
    __m512i w0, w1;
    if constexpr (kHalves != 1) w0 = _mm512_loadu_si512(w + kAt * 128);
    if constexpr (kHalves != 0) w1 = _mm512_loadu_si512(w + kAt * 128 + 64);
    const auto add = [&](auto i, auto segment, const uint8_t* p) __attribute__((always_inline)) {
      constexpr int kPixel = decltype(segment)::value * H + decltype(i)::value;
      const __m512i codes = broadcast_codes<decltype(i)::value>(p + kAt * 4, step, step3, step5);
      if constexpr (kHalves != 1) acc[kAt][kPixel][0] = _mm512_dpbusd_epi32(acc[kAt][kPixel][0], codes, w0);
      if constexpr (kHalves != 0) acc[kAt][kPixel][1] = _mm512_dpbusd_epi32(acc[kAt][kPixel][1], codes, w1);
    };
    for_each_pixel(std::make_index_sequence<H>(), [&](auto i) __attribute__((always_inline)) { add(i, First(), p0); });
    if constexpr (Segments == 2)
      for_each_pixel(std::make_index_sequence<H>(),
                     [&](auto i) __attribute__((always_inline)) { add(i, Second(), p1); });
  };
  for (int64_t r = 0; r < in.runs; ++r) {
    const uint8_t* p0 = in.pixels[0] + in.offsets[r];
    const uint8_t* p1 = Segments == 2 ? in.pixels[1] + in.offsets[r] : p0;
    int64_t g = in.run_groups;
    if (in.channels <= 16) {
      for (; g > 0; --g, p0 += 4, p1 += 4, w += 128) multiply(First(), First(), p0, p1);
    } else if (in.first_half) {
      for (; g > in.run_groups - in.first_half; --g, p0 += 4, p1 += 4, w += 128) multiply(First(), First(), p0, p1);
      for (; g > 0; --g, p0 += 4, p1 += 4, w += 128) multiply(First(), Second(), p0, p1);
    }
    for (; g >= kSteps; g -= kSteps, p0 += kSteps * 4, p1 += kSteps * 4, w += kSteps * 128)
      for_each_pixel(std::make_index_sequence<kSteps>(),
                     [&](auto s) __attribute__((always_inline)) { multiply(s, Both(), p0, p1); });
    if constexpr (kSteps > 1)
      for (; g > 0; --g, p0 += 4, p1 += 4, w += 128) multiply(First(), Both(), p0, p1);
  }
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
      for (int s = 1; s < kSteps; ++s) acc[0][i][h] = _mm512_add_epi32(acc[0][i][h], acc[s][i][h]);
  // From here on the sums are other values to GCC, which would otherwise store them in the loop for want of registers
  // here.
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) __asm__ volatile("" : "+v"(acc[0][i][0]), "+v"(acc[0][i][1]));
  finish(acc[0]);
}

template <int H, int Segments>
void conv_tile(const TileInput& in, const int8_t* weights, const int32_t* start, int32_t* sums) {
  multiply_tile<H, Segments>(in, weights, start, [&](__m512i(&acc)[H * Segments][2]) __attribute__((always_inline)) {
#pragma GCC unroll 14
    for (int i = 0; i < H * Segments; ++i) {
      _mm512_store_si512(sums + i * kPanel, acc[i][0]);
      _mm512_store_si512(sums + i * kPanel + 16, acc[i][1]);
    }
  });
}

// Whole steps become codes of neighbouring channels: the steps of one pixel words, and the words of two pixels bytes.
class CodesOfSteps {
 public:
  CodesOfSteps(int16_t zero_point, uint8_t low, uint8_t high, uint32_t inside)
      : zero_point_(_mm512_set1_epi16(zero_point)),
        low_(_mm512_set1_epi8(static_cast<char>(low))),
        high_(_mm512_set1_epi8(static_cast<char>(high))),
        order_(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),
        inside_(inside) {}

  QK_INLINE __m512i words(__m512i first, __m512i second) const {
    return _mm512_adds_epi16(_mm512_packs_epi32(first, second), zero_point_);
  }
  // Of two pixels, one behind the other.
  QK_INLINE __m512i bytes(__m512i first, __m512i second) const {
    const __m512i codes = _mm512_permutexvar_epi32(order_, _mm512_packus_epi16(first, second));
    return _mm512_min_epu8(_mm512_max_epu8(codes, low_), high_);
  }
  QK_INLINE void store(__m256i codes, uint8_t* pixel) const { _mm256_mask_storeu_epi8(pixel, inside_, codes); }

 private:
  __m512i zero_point_, low_, high_;
  __m512i order_;  // packing two pixels leaves 4 channels of each half of each pixel in every 128 bits
  __mmask32 inside_;
};

// Codes straight from the sums of a panel's channels, where results are bounded and activations only clamp them: 8
// instructions for 16, and 6 more where codes of a residual are added.
template <bool kResidual>
class CodesOfSums {
 public:
  CodesOfSums(const PanelValues& panel, const ClampedCodes& to)
      : panel_(panel),
        of_steps_(to.zero_point, to.low, to.high, to.inside),
        in_scale_(_mm512_set1_ps(to.in_scale)),
        inverse_(_mm512_set1_ps(to.inverse)),
        residual_scale_(_mm512_set1_ps(to.residual_scale)),
        residual_zero_(_mm512_set1_ps(to.residual_zero)),
        inside_(to.inside) {}

  // Of one pixel, as words. `residual`: the codes of its channels.
  QK_INLINE __m512i words(__m512i first, __m512i second, const uint8_t* residual) const {
    __m256i codes = _mm256_setzero_si256();
    if constexpr (kResidual) codes = _mm256_maskz_loadu_epi8(inside_, residual);
    return of_steps_.words(steps(first, 0, _mm256_castsi256_si128(codes)),
                           steps(second, 16, _mm256_extracti128_si256(codes, 1)));
  }
  QK_INLINE __m512i bytes(__m512i first, __m512i second) const { return of_steps_.bytes(first, second); }
  QK_INLINE void store(__m256i codes, uint8_t* pixel) const { of_steps_.store(codes, pixel); }

 private:
  QK_INLINE __m512i steps(__m512i sum, int at, __m128i residual) const {
    __m512 v = _mm512_cvtepi32_ps(sum);
    v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_load_ps(panel_.scale + at)), in_scale_);
    v = _mm512_add_ps(v, _mm512_load_ps(panel_.bias + at));
    if constexpr (kResidual) {
      const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(residual));
      v = _mm512_add_ps(v, _mm512_mul_ps(_mm512_sub_ps(code, residual_zero_), residual_scale_));
    }
    return _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse_));
  }

  const PanelValues& panel_;
  CodesOfSteps of_steps_;
  __m512 in_scale_, inverse_, residual_scale_, residual_zero_;
  __mmask32 inside_;
};

// The sums of a tile, in registers, as codes.
template <int H, int Segments, bool kResidual>
QK_INLINE inline void store_codes(__m512i (&acc)[H * Segments][2], const PanelValues& panel, const ClampedCodes& to) {
  constexpr int kPixels = H * Segments;
  const CodesOfSums<kResidual> of(panel, to);
  for_each_pixel(std::make_index_sequence<(kPixels + 1) / 2>(), [&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * decltype(pair)::value, kSecond = std::min(kFirst + 1, kPixels - 1);
    const auto words = [&](auto pixel) __attribute__((always_inline)) {
      constexpr int kPixel = decltype(pixel)::value;
      const uint8_t* residual = kResidual ? to.residual[kPixel / H] + kPixel % H * to.residual_step : nullptr;
      return of.words(acc[kPixel][0], acc[kPixel][1], residual);
    };
    const __m512i codes =
        of.bytes(words(std::integral_constant<int, kFirst>()), words(std::integral_constant<int, kSecond>()));
    of.store(_mm512_castsi512_si256(codes), to.codes[kFirst / H] + kFirst % H * to.step);
    if constexpr (kFirst != kSecond)
      of.store(_mm512_extracti64x4_epi64(codes, 1), to.codes[kSecond / H] + kSecond % H * to.step);
  });
}

// The cache lines of a tile's pixels are asked for before it multiplies: rows of many channels lie too far apart for
// the CPU to foresee. (64 channels → 256 at 56², floats with a residual: 0.5 ms instead of 1.2.)
template <int H, int Segments, typename T>
QK_INLINE inline void prefetch_pixels(T* const (&first)[2], int64_t step) {
  if (!first[0]) return;
  for (int s = 0; s < Segments; ++s)
    for (int i = 0; i < H; ++i) {
      const char* line = reinterpret_cast<const char*>(first[s] + i * step);
      _mm_prefetch(line, _MM_HINT_T0);
      if (sizeof(T) * kPanel > 64) _mm_prefetch(line + 64, _MM_HINT_T0);
    }
}

template <int H, int Segments>
void conv_tile_codes(const TileInput& in, const int8_t* weights, const PanelValues& panel, const ClampedCodes& to) {
  prefetch_pixels<H, Segments>(to.residual, to.residual_step);
  multiply_tile<H, Segments>(in, weights, panel.start,
                             [&](__m512i(&acc)[H * Segments][2]) __attribute__((always_inline)) {
                               to.residual[0] ? store_codes<H, Segments, true>(acc, panel, to)
                                              : store_codes<H, Segments, false>(acc, panel, to);
                             });
}

// Floats straight from the sums of a panel's channels, where activations only clamp them, and their codes.
template <bool kResidual>
class FloatsOfSums {
 public:
  FloatsOfSums(const PanelValues& panel, const TileFloats& to)
      : panel_(panel),
        of_steps_(to.zero_point, to.code_low, to.code_high, to.inside),
        in_scale_(_mm512_set1_ps(to.in_scale)),
        low_(_mm512_set1_ps(to.low)),
        high_(_mm512_set1_ps(to.high)),
        inverse_(_mm512_set1_ps(to.inverse)),
        most_(_mm512_set1_ps(kMostSteps)),
        inside_{static_cast<__mmask16>(to.inside), static_cast<__mmask16>(to.inside >> 16)} {}

  // Of half of a pixel's channels.
  QK_INLINE __m512 value(__m512i sum, int half, const float* residual) const {
    __m512 v = _mm512_cvtepi32_ps(sum);
    v = _mm512_mul_ps(_mm512_mul_ps(v, _mm512_load_ps(panel_.scale + 16 * half)), in_scale_);
    v = _mm512_add_ps(v, _mm512_load_ps(panel_.bias + 16 * half));
    if constexpr (kResidual) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(inside_[half], residual + 16 * half));
    return _mm512_min_ps(high_, _mm512_max_ps(low_, v));  // a NaN stays
  }
  QK_INLINE void store(__m512 v, int half, float* pixel) const {
    _mm512_mask_storeu_ps(pixel + 16 * half, inside_[half], v);
  }
  // A NaN is no step, so that it becomes the zero point.
  QK_INLINE __m512i steps(__m512 v) const {
    const __m512 t = _mm512_mul_ps(v, inverse_);
    return _mm512_maskz_cvtps_epi32(_mm512_cmp_ps_mask(t, t, _CMP_ORD_Q), _mm512_min_ps(t, most_));
  }
  const CodesOfSteps& of_steps() const { return of_steps_; }

 private:
  const PanelValues& panel_;
  CodesOfSteps of_steps_;
  __m512 in_scale_, low_, high_, inverse_, most_;
  __mmask16 inside_[2];
};

template <int H, int Segments, bool kResidual>
QK_INLINE inline void store_floats(__m512i (&acc)[H * Segments][2], const PanelValues& panel, const TileFloats& to) {
  constexpr int kPixels = H * Segments;
  const FloatsOfSums<kResidual> of(panel, to);
  for_each_pixel(std::make_index_sequence<(kPixels + 1) / 2>(), [&](auto pair) __attribute__((always_inline)) {
    constexpr int kFirst = 2 * decltype(pair)::value, kSecond = std::min(kFirst + 1, kPixels - 1);
    __m512 v[2][2] = {};
    const auto values = [&](auto at, auto pixel) __attribute__((always_inline)) {
      constexpr int kAt = decltype(at)::value, kPixel = decltype(pixel)::value, kOf = kPixel / H;
      const float* residual = kResidual ? to.residual[kOf] + kPixel % H * to.residual_step : nullptr;
      v[kAt][0] = of.value(acc[kPixel][0], 0, residual);
      v[kAt][1] = of.value(acc[kPixel][1], 1, residual);
      if (!to.floats[0]) return;
      float* const floats = to.floats[kOf] + kPixel % H * to.floats_step;
      of.store(v[kAt][0], 0, floats);
      of.store(v[kAt][1], 1, floats);
    };
    values(std::integral_constant<int, 0>(), std::integral_constant<int, kFirst>());
    if constexpr (kFirst != kSecond) values(std::integral_constant<int, 1>(), std::integral_constant<int, kSecond>());
    if (!to.codes[0]) return;
    const CodesOfSteps& of_steps = of.of_steps();
    const __m512i codes = of_steps.bytes(of_steps.words(of.steps(v[0][0]), of.steps(v[0][1])),
                                         of_steps.words(of.steps(v[1][0]), of.steps(v[1][1])));
    of_steps.store(_mm512_castsi512_si256(codes), to.codes[kFirst / H] + kFirst % H * to.codes_step);
    if constexpr (kFirst != kSecond)
      of_steps.store(_mm512_extracti64x4_epi64(codes, 1), to.codes[kSecond / H] + kSecond % H * to.codes_step);
  });
}

template <int H, int Segments>
void conv_tile_floats(const TileInput& in, const int8_t* weights, const PanelValues& panel, const TileFloats& to) {
  prefetch_pixels<H, Segments>(to.residual, to.residual_step);
  prefetch_pixels<H, Segments>(to.floats, to.floats_step);
  multiply_tile<H, Segments>(in, weights, panel.start,
                             [&](__m512i(&acc)[H * Segments][2]) __attribute__((always_inline)) {
                               to.residual[0] ? store_floats<H, Segments, true>(acc, panel, to)
                                              : store_floats<H, Segments, false>(acc, panel, to);
                             });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
