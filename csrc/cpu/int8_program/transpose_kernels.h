// Between pixels of neighbouring channels and planes of neighbouring pixels.
#ifndef QK_PROGRAM_TRANSPOSE
#define QK_PROGRAM_TRANSPOSE

#include "cpu/int8_conv/quantized_pixels.h"
#include "cpu/int8_program/pointwise_kernels.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// out[i * stride + j] = in[j][i] for i < rows, j < columns.
inline void transpose_bytes(const uint8_t (&in)[16][16], int64_t rows, int64_t columns, uint8_t* out, int64_t stride) {
#if QK_PATH != QK_PATH_SCALAR
  if (columns >= 4) {
    __m128i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(in[i]));
    // Each pass interleaves row i with row i + 8; four passes rotate the 8 bits of a byte's position by four.
#pragma GCC unroll 4
    for (int pass = 0; pass < 4; ++pass) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm_unpacklo_epi8(r[i], r[i + 8]);
        t[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + 8]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = t[i];
    }
    if (rows == 16 && columns == 16) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * stride), r[i]);
      return;
    }
#if QK_PATH != QK_PATH_AVX2
    const __mmask16 inside = F32::first(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      if (i < rows) _mm_mask_storeu_epi8(out + i * stride, inside, r[i]);
#else
    alignas(16) uint8_t all[16][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(all[i]), r[i]);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * stride, all[i], static_cast<size_t>(columns));
#endif
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[i * stride + j] = in[j][i];
}

#if QK_PATH != QK_PATH_SCALAR
// Three planes of 16 codes as 16 pixels of 3 neighbouring channels.
inline void interleave_3(const uint8_t (&planes)[16][16], uint8_t* out) {
  const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(planes[0]));
  const __m128i b = _mm_load_si128(reinterpret_cast<const __m128i*>(planes[1]));
  const __m128i c = _mm_load_si128(reinterpret_cast<const __m128i*>(planes[2]));
  constexpr char o = -128;  // a zero
  const auto merged = [](__m128i x, __m128i y, __m128i z) { return _mm_or_si128(_mm_or_si128(x, y), z); };
  const __m128i first = merged(_mm_shuffle_epi8(a, _mm_setr_epi8(0, o, o, 1, o, o, 2, o, o, 3, o, o, 4, o, o, 5)),
                               _mm_shuffle_epi8(b, _mm_setr_epi8(o, 0, o, o, 1, o, o, 2, o, o, 3, o, o, 4, o, o)),
                               _mm_shuffle_epi8(c, _mm_setr_epi8(o, o, 0, o, o, 1, o, o, 2, o, o, 3, o, o, 4, o)));
  const __m128i second = merged(_mm_shuffle_epi8(a, _mm_setr_epi8(o, o, 6, o, o, 7, o, o, 8, o, o, 9, o, o, 10, o)),
                                _mm_shuffle_epi8(b, _mm_setr_epi8(5, o, o, 6, o, o, 7, o, o, 8, o, o, 9, o, o, 10)),
                                _mm_shuffle_epi8(c, _mm_setr_epi8(o, 5, o, o, 6, o, o, 7, o, o, 8, o, o, 9, o, o)));
  const __m128i third =
      merged(_mm_shuffle_epi8(a, _mm_setr_epi8(o, 11, o, o, 12, o, o, 13, o, o, 14, o, o, 15, o, o)),
             _mm_shuffle_epi8(b, _mm_setr_epi8(o, o, 11, o, o, 12, o, o, 13, o, o, 14, o, o, 15, o)),
             _mm_shuffle_epi8(c, _mm_setr_epi8(10, o, o, 11, o, o, 12, o, o, 13, o, o, 14, o, o, 15)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), first);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), second);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 32), third);
}
#endif

#if QK_PATH == QK_PATH_AVX512VNNI
// 16 pixels and 16 channels at a time.
inline bool quantize_squares(const float* x, int64_t stride_c, int64_t channels, int64_t pixels, const Quantizer& q,
                             uint8_t* codes, int64_t stride_w) {
  QuantizedPixels quantized(q);
  for (int64_t i = 0; i < pixels; i += 16) {
    const int64_t height = std::min<int64_t>(16, pixels - i);
    const __mmask16 rows = F32::first(height);
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t width = std::min<int64_t>(16, channels - c);
      __m512i v[4], t[4], r[4];
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g)  // those behind the last channel are not stored
        v[g] = g * 4 < width ? quantized(x + (c + g * 4) * stride_c + i, stride_c, width - g * 4, rows) : v[0];
      t[0] = _mm512_unpacklo_epi32(v[0], v[1]);
      t[1] = _mm512_unpackhi_epi32(v[0], v[1]);
      t[2] = _mm512_unpacklo_epi32(v[2], v[3]);
      t[3] = _mm512_unpackhi_epi32(v[2], v[3]);
      r[0] = _mm512_unpacklo_epi64(t[0], t[2]);
      r[1] = _mm512_unpackhi_epi64(t[0], t[2]);
      r[2] = _mm512_unpacklo_epi64(t[1], t[3]);
      r[3] = _mm512_unpackhi_epi64(t[1], t[3]);
      uint8_t* out = codes + i * stride_w + c;
      const auto pixels_of = [&](auto lane) QK_INLINE {
        constexpr int kLane = decltype(lane)::value;
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          const __m128i pixel = _mm512_extracti32x4_epi32(r[p], kLane);
          uint8_t* to = out + (kLane * 4 + p) * stride_w;
          if (width == 16)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pixel);
          else
            _mm_mask_storeu_epi8(to, F32::first(width), pixel);
          if (kLane * 4 + p + 1 == height) return;
        }
      };
      pixels_of(std::integral_constant<int, 0>());
      if (height > 4) pixels_of(std::integral_constant<int, 1>());
      if (height > 8) pixels_of(std::integral_constant<int, 2>());
      if (height > 12) pixels_of(std::integral_constant<int, 3>());
    }
  }
  return quantized.found_nan();
}
#endif

// 16 pixels at a time: each channel's codes are a row of a square, which is then transposed.
bool quantize_planes(const float* x, int64_t stride_c, int64_t channels, int64_t pixels, const Quantizer& q,
                     uint8_t* codes, int64_t stride_w) {
#if QK_PATH == QK_PATH_AVX512VNNI
  if (channels > 3) return quantize_squares(x, stride_c, channels, pixels, q, codes, stride_w);
#endif
  const ToCodes to_codes(q);
  uint32_t nan = 0;
  alignas(16) uint8_t square[16][16] = {};
  for_each_16(pixels, [&](int64_t i, auto... tail) QK_INLINE {
    for (int64_t first = 0; first < channels; first += 16) {
      const int64_t count = std::min<int64_t>(16, channels - first);
      for (int64_t c = 0; c < count; ++c) {
        const F32 v = F32::load(x + (first + c) * stride_c + i, tail...);
        nan |= is_nan(v).bits();
        to_codes(v).store(square[c]);
      }
      uint8_t* out = codes + i * stride_w + first;
#if QK_PATH != QK_PATH_SCALAR
      if (channels == 3 && stride_w == 3 && sizeof...(tail) == 0) {
        interleave_3(square, out);
        continue;
      }
#endif
      transpose_bytes(square, lanes_of(tail...), count, out, stride_w);
    }
  });
  return nan != 0;
}

void bytes_to_planes(const uint8_t* x, int64_t stride_w, int64_t channels, int64_t pixels, uint8_t* out,
                     int64_t stride_c) {
  alignas(16) uint8_t square[16][16] = {};
  for (int64_t i = 0; i < pixels; i += 16)
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t height = std::min<int64_t>(16, pixels - i), width = std::min<int64_t>(16, channels - c);
      for (int64_t j = 0; j < height; ++j)
        std::memcpy(square[j], x + (i + j) * stride_w + c, static_cast<size_t>(width));
      transpose_bytes(square, width, height, out + c * stride_c + i, stride_c);
    }
}

void to_planes(const Operand& x, int64_t stride_w, int64_t channels, int64_t pixels, float* out, int64_t stride_c) {
  float square[16][16];
  for (int64_t i = 0; i < pixels; i += 16)
    for_each_16(channels, [&](int64_t c, auto... tail) QK_INLINE {
      const int64_t height = std::min<int64_t>(16, pixels - i), width = lanes_of(tail...);
      for (int64_t j = 0; j < height; ++j) load_operand(x, (i + j) * stride_w + c, tail...).store(square[j]);
      for (int64_t k = 0; k < width; ++k)
        for (int64_t j = 0; j < height; ++j) out[(c + k) * stride_c + i + j] = square[j][k];
    });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
