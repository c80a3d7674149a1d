// From exact sums to outputs: zero points, scales, bias, activation, one rounding.
#ifndef QK_INT8_EPILOGUE
#define QK_INT8_EPILOGUE

#include "cpu/common/activation_kernels.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

inline void to_storage(const float* v, float* out) {
  for (int c = 0; c < kPanel; ++c) out[c] = v[c];
}

inline void to_storage(const float* v, BFloat16* out) {
  for (int c = 0; c < kPanel; ++c) {
    uint32_t bits;
    std::memcpy(&bits, v + c, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out[c].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

inline void to_storage(const float* v, Half* out) {
#if QK_PATH == QK_PATH_SCALAR
  for (int c = 0; c < kPanel; ++c) out[c] = from_float<Half>(v[c]);
#else
  for (int c = 0; c < kPanel; c += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c), _mm256_cvtps_ph(_mm256_loadu_ps(v + c), 0));
#endif
}

// The per-channel values of one panel, padded to its width.
struct ChannelValues {
  int32_t colsum[kPanel];
  float scale[kPanel];
  float bias[kPanel];

  explicit ChannelValues(const PanelOutput& o) : colsum(), scale(), bias() {
    for (int64_t c = 0; c < o.channels; ++c) {
      if (o.colsum) colsum[c] = o.colsum[c];
      if (o.scale_b) scale[c] = o.scale_b[c];
      if (o.bias) bias[c] = o.bias[c];
    }
  }
};

template <typename T>
inline void store_row(const T* values, const PanelOutput& o, int64_t row) {
  T* out = static_cast<T*>(o.out) + row * o.row_stride;
  if (o.channels == kPanel)
    std::memcpy(out, values, kPanel * sizeof(T));
  else
    std::memcpy(out, values, static_cast<size_t>(o.channels) * sizeof(T));
}

template <typename T>
inline void finish_float(const float* v, const PanelOutput& o, int64_t row) {
  T values[kPanel];
  to_storage(v, values);
  store_row(values, o, row);
}

// The codes of 16 results. No code is NaN: a NaN becomes the zero point.
inline F32 to_codes(F32 v, const PanelOutput& o) {
  const F32 zero_point = F32::set1(o.out_zero_point), steps = round(v * F32::set1(o.out_inverse));
  const F32 code = min(F32::set1(127), max(F32::set1(-128), steps + zero_point));
  return select(is_nan(code), zero_point, code);
}

inline void finish_codes(const float* v, const PanelOutput& o, int64_t row) {
  int8_t values[kPanel];
  for (int c = 0; c < kPanel; c += 16) to_codes(F32::load(v + c), o).store(values + c);
  store_row(values, o, row);
}

#if QK_PATH == QK_PATH_AVX512VNNI
// 16 results, or those of the channels that the mask has.
inline void store(__m512 v, float* out) { _mm512_storeu_ps(out, v); }
inline void store(__m512 v, float* out, __mmask16 inside) { _mm512_mask_storeu_ps(out, inside, v); }

inline __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
inline void store(__m512 v, BFloat16* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_bf16(v)); }
inline void store(__m512 v, BFloat16* out, __mmask16 inside) { _mm256_mask_storeu_epi16(out, inside, to_bf16(v)); }

inline __m256i to_f16(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(__m512 v, Half* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_f16(v)); }
inline void store(__m512 v, Half* out, __mmask16 inside) { _mm256_mask_storeu_epi16(out, inside, to_f16(v)); }

inline __m128i to_i8(__m512 codes) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(codes)); }
inline void store(__m512 codes, int8_t* out) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_i8(codes)); }
inline void store(__m512 codes, int8_t* out, __mmask16 inside) { _mm_mask_storeu_epi8(out, inside, to_i8(codes)); }

inline void store(__m512i v, int32_t* out) { _mm512_storeu_si512(out, v); }
inline void store(__m512i v, int32_t* out, __mmask16 inside) { _mm512_mask_storeu_epi32(out, inside, v); }

// Rows of 16 channels of a panel, from channel `at` on. What does not differ between rows stays in registers: with the
// questions about it asked for each 16 results, they took 35 cycles.
template <typename T, bool kActivates, typename... Inside>
QK_INLINE inline void finish_rows(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip,
                                  const ChannelValues& ch, const PanelOutput& o, int at, Inside... inside) {
  const bool own_zero_point = o.zero_point && o.zero_point_step;
  const uint32_t zero_point = o.zero_point && !o.zero_point_step ? static_cast<uint32_t>(o.zero_point[0]) : 0;
  const __m512i colsum = _mm512_loadu_si512(ch.colsum + at);
  const __m512i offset = _mm512_mullo_epi32(colsum, _mm512_set1_epi32(static_cast<int32_t>(zero_point + flip)));
  const __m512 scale_b = _mm512_loadu_ps(ch.scale + at);
  // Adding -0 changes nothing, not even the sign of a zero.
  const __m512 bias = o.bias ? _mm512_loadu_ps(ch.bias + at) : _mm512_set1_ps(-0.0f);
  const int64_t row_stride = o.row_stride, scale_a_step = o.scale_a_step;
  const float* scale_a = std::is_same_v<T, int32_t> ? nullptr : o.scale_a + first_row * scale_a_step;
  T* out = static_cast<T*>(o.out) + first_row * row_stride + at;
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, out += row_stride) {
    __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums + at), offset);
    if (own_zero_point) {
      const __m512i own = _mm512_set1_epi32(o.zero_point[(first_row + r) * o.zero_point_step]);
      exact = _mm512_sub_epi32(exact, _mm512_mullo_epi32(colsum, own));
    }
    if constexpr (std::is_same_v<T, int32_t>) {
      store(exact, out, inside...);
    } else {
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale_b);
      v = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(scale_a[r * scale_a_step])), bias);
      if constexpr (kActivates) v = activate(F32{v}, o.activation).v;
      if constexpr (std::is_same_v<T, int8_t>) v = to_codes(F32{v}, o).v;
      store(v, out, inside...);
    }
  }
}

// The same as finish() where nothing leaves int32.
template <typename T, bool kActivates>
inline void finish_narrow(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip, const ChannelValues& ch,
                          const PanelOutput& o) {
  for (int at = 0; at < kPanel; at += 16) {
    const int64_t channels = o.channels - at;
    if (channels >= 16)
      finish_rows<T, kActivates>(sums, rows, first_row, flip, ch, o, at);
    else if (channels > 0)
      finish_rows<T, kActivates>(sums, rows, first_row, flip, ch, o, at, static_cast<__mmask16>((1u << channels) - 1));
  }
}

template <typename T>
inline void finish_narrow(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip, const ChannelValues& ch,
                          const PanelOutput& o) {
  if (o.activation == Activation::none || std::is_same_v<T, int32_t>)
    return finish_narrow<T, false>(sums, rows, first_row, flip, ch, o);
  finish_narrow<T, true>(sums, rows, first_row, flip, ch, o);
}
#endif

// The epilogue: sums[rows][32] of rows first_row… become outputs. `flip` is what the codes were XORed with.
inline void finish(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip, const ChannelValues& ch,
                   const PanelOutput& o) {
#if QK_PATH == QK_PATH_AVX512VNNI
  if (!o.wide) switch (o.type) {
      case Element::i8: return finish_narrow<int8_t>(sums, rows, first_row, flip, ch, o);
      case Element::i32: return finish_narrow<int32_t>(sums, rows, first_row, flip, ch, o);
      case Element::bf16: return finish_narrow<BFloat16>(sums, rows, first_row, flip, ch, o);
      case Element::f16: return finish_narrow<Half>(sums, rows, first_row, flip, ch, o);
      default: return finish_narrow<float>(sums, rows, first_row, flip, ch, o);
    }
#endif
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    const int64_t row = first_row + r;
    const int32_t zero_point = o.zero_point ? o.zero_point[row * o.zero_point_step] : 0;
    float v[kPanel];
    if (o.wide) {
      for (int c = 0; c < kPanel; ++c) {
        const int32_t sum = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) -
                                                 static_cast<uint32_t>(flip) * static_cast<uint32_t>(ch.colsum[c]));
        v[c] = static_cast<float>(sum - static_cast<int64_t>(zero_point) * ch.colsum[c]);
      }
    } else {
      const uint32_t offset = static_cast<uint32_t>(zero_point) + flip;
      int32_t exact[kPanel];
      for (int c = 0; c < kPanel; ++c)
        exact[c] = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) - offset * static_cast<uint32_t>(ch.colsum[c]));
      if (o.type == Element::i32) {
        store_row(exact, o, row);
        continue;
      }
      for (int c = 0; c < kPanel; ++c) v[c] = static_cast<float>(exact[c]);
    }
    const float scale_a = o.scale_a[row * o.scale_a_step];
    for (int c = 0; c < kPanel; ++c) v[c] = v[c] * ch.scale[c] * scale_a;
    if (o.bias)
      for (int c = 0; c < kPanel; ++c) v[c] += ch.bias[c];
    if (o.activation != Activation::none)
      for (int c = 0; c < kPanel; c += 16) activate(F32::load(v + c), o.activation).store(v + c);
    switch (o.type) {
      case Element::i8: finish_codes(v, o, row); break;
      case Element::bf16: finish_float<BFloat16>(v, o, row); break;
      case Element::f16: finish_float<Half>(v, o, row); break;
      default: finish_float<float>(v, o, row);
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
