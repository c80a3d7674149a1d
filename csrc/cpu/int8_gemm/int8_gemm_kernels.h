// The int8 GEMM kernels of one instruction-set path. Included once per path by foreach_gemm_isa.h, inside that path's
// target region and namespace, after vec.h, with QK_PATH naming it; what is not written with intrinsics here the
// compiler vectorizes for that target.

#include "cpu/common/activation_kernels.h"

#if QK_PATH == QK_PATH_AVX512VNNI
constexpr Isa kIsa = Isa::avx512vnni;
constexpr uint8_t kFlip = 0x80;
// 12 x 32 int32 sums are 24 registers; 2 hold weights, 1 a broadcast activation: 14 loads for 24 dot products.
constexpr int kTileRows = 12;
constexpr int kUnpackedRows = 8;
#elif QK_PATH == QK_PATH_AVX2
constexpr Isa kIsa = Isa::avx2;
constexpr uint8_t kFlip = 0;
constexpr int kTileRows = 2;
constexpr int kUnpackedRows = 2;
#else
constexpr Isa kIsa = Isa::scalar;
constexpr uint8_t kFlip = 0;
constexpr int kTileRows = 4;
constexpr int kUnpackedRows = 4;
#endif

inline int32_t load_group(const uint8_t* p) {
  int32_t group;
  std::memcpy(&group, p, 4);
  return group;
}

// sums[MR][32] of MR rows and one panel.
#if QK_PATH == QK_PATH_AVX512VNNI
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  // A dot product takes 4 cycles: one row alone keeps 8 of them in flight by working on 4 groups at a time.
  constexpr int kSteps = MR == 1 ? 4 : 1;
  __m512i acc[MR * kSteps][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR * kSteps; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
  int64_t g = 0;
  for (; g + kSteps <= groups; g += kSteps, b += kSteps * kPanel * 4) {
#pragma GCC unroll 4
    for (int s = 0; s < kSteps; ++s) {
      const __m512i b0 = _mm512_loadu_si512(b + s * 128);
      const __m512i b1 = _mm512_loadu_si512(b + s * 128 + 64);
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        const __m512i codes = _mm512_set1_epi32(load_group(a + r * stride + (g + s) * 4));
        acc[r * kSteps + s][0] = _mm512_dpbusd_epi32(acc[r * kSteps + s][0], codes, b0);
        acc[r * kSteps + s][1] = _mm512_dpbusd_epi32(acc[r * kSteps + s][1], codes, b1);
      }
    }
  }
  for (; g < groups; ++g, b += kPanel * 4) {
    const __m512i codes = _mm512_set1_epi32(load_group(a + g * 4));
    acc[0][0] = _mm512_dpbusd_epi32(acc[0][0], codes, _mm512_loadu_si512(b));
    acc[0][1] = _mm512_dpbusd_epi32(acc[0][1], codes, _mm512_loadu_si512(b + 64));
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m512i sum = acc[r * kSteps][h];
#pragma GCC unroll 4
      for (int s = 1; s < kSteps; ++s) sum = _mm512_add_epi32(sum, acc[r * kSteps + s][h]);
      _mm512_store_si512(sums + r * kPanel + h * 16, sum);
    }
}
#elif QK_PATH == QK_PATH_AVX2
// Exact: bytes are widened to int16 and pairs of products summed in int32 (the byte instruction would saturate).
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  for (int half = 0; half < kPanel; half += 16) {
    __m256i acc[MR][4];  // [4 channels][2 sums of pairs]
#pragma GCC unroll 2
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_setzero_si256();
    const int8_t* p = b + half * 4;
    for (int64_t g = 0; g < groups; ++g, p += kPanel * 4) {
      __m256i codes[MR];
#pragma GCC unroll 2
      for (int r = 0; r < MR; ++r) {
        const __m128 four = _mm_broadcast_ss(reinterpret_cast<const float*>(a + r * stride + g * 4));
        codes[r] = _mm256_cvtepi8_epi16(_mm_castps_si128(four));
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * 16)));
#pragma GCC unroll 2
        for (int r = 0; r < MR; ++r) {
          acc[r][i] = _mm256_add_epi32(acc[r][i], _mm256_madd_epi16(codes[r], w));
          __asm__("" : "+x"(acc[r][i]));  // or GCC moves all additions to the end and spills
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][i], acc[r][i + 1]), 0xD8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + half + i * 4), sum);
      }
  }
}
#else
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  for (int i = 0; i < MR * kPanel; ++i) sums[i] = 0;
  for (int64_t g = 0; g < groups; ++g, b += kPanel * 4)
    for (int r = 0; r < MR; ++r) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(a + r * stride + g * 4);
      for (int c = 0; c < kPanel; ++c)
        sums[r * kPanel + c] +=
            codes[0] * b[c * 4] + codes[1] * b[c * 4 + 1] + codes[2] * b[c * 4 + 2] + codes[3] * b[c * 4 + 3];
    }
}
#endif

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <int... MR>
constexpr std::array<Tile, sizeof...(MR)> make_tiles(std::integer_sequence<int, MR...>) {
  return {tile<MR + 1>...};
}
constexpr auto kTiles = make_tiles(std::make_integer_sequence<int, kTileRows>());

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
struct Channels {
  int32_t colsum[kPanel];
  float scale[kPanel];
  float bias[kPanel];

  explicit Channels(const PanelOutput& o) : colsum(), scale(), bias() {
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

// The codes of 16 results; no code is NaN, which becomes the zero point.
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
inline void store_masked(__m512 v, __mmask16 inside, float* out) { _mm512_mask_storeu_ps(out, inside, v); }

inline void store_masked(__m512 v, __mmask16 inside, BFloat16* out) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(out, inside, _mm512_cvtepi32_epi16(kept));
}

inline void store_masked(__m512 v, __mmask16 inside, Half* out) {
  _mm256_mask_storeu_epi16(out, inside, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline void store_masked(__m512i v, __mmask16 inside, int32_t* out) { _mm512_mask_storeu_epi32(out, inside, v); }

inline void store_masked(__m512 codes, __mmask16 inside, int8_t* out) {
  _mm_mask_storeu_epi8(out, inside, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(codes)));
}

// The same as finish() where nothing leaves int32.
template <typename T>
inline void finish_narrow(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip, const Channels& ch,
                          const PanelOutput& o) {
  const uint32_t both = o.channels >= kPanel ? ~0u : (1u << o.channels) - 1;
  const __mmask16 inside[2] = {static_cast<__mmask16>(both), static_cast<__mmask16>(both >> 16)};
  __m512i colsum[2], offset[2];
  for (int h = 0; h < 2; ++h) {
    colsum[h] = _mm512_loadu_si512(ch.colsum + h * 16);
    const uint32_t zero_point = o.zero_point && !o.zero_point_step ? static_cast<uint32_t>(o.zero_point[0]) : 0;
    offset[h] = _mm512_mullo_epi32(colsum[h], _mm512_set1_epi32(static_cast<int32_t>(zero_point + flip)));
  }
  for (int64_t r = 0; r < rows; ++r, sums += kPanel) {
    const int64_t row = first_row + r;
    T* out = static_cast<T*>(o.out) + row * o.row_stride;
    const bool own_zero_point = o.zero_point && o.zero_point_step;
    for (int h = 0; h < 2; ++h) {
      __m512i exact = _mm512_sub_epi32(_mm512_load_si512(sums + h * 16), offset[h]);
      if (own_zero_point)
        exact = _mm512_sub_epi32(
            exact, _mm512_mullo_epi32(colsum[h], _mm512_set1_epi32(o.zero_point[row * o.zero_point_step])));
      if constexpr (std::is_same_v<T, int32_t>) {
        store_masked(exact, inside[h], out + h * 16);
      } else {
        __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_loadu_ps(ch.scale + h * 16));
        v = _mm512_mul_ps(v, _mm512_set1_ps(o.scale_a[row * o.scale_a_step]));
        if (o.bias) v = _mm512_add_ps(v, _mm512_loadu_ps(ch.bias + h * 16));
        v = activate(F32{v}, o.activation).v;
        if constexpr (std::is_same_v<T, int8_t>) v = to_codes(F32{v}, o).v;
        store_masked(v, inside[h], out + h * 16);
      }
    }
  }
}
#endif

// The epilogue: sums[rows][32] of rows first_row… become outputs. `flip` is what the codes were XORed with.
inline void finish(const int32_t* sums, int64_t rows, int64_t first_row, uint8_t flip, const Channels& ch,
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

void multiply(const uint8_t* rows, int64_t row_stride, int64_t m, const int8_t* panel, int64_t k,
              const PanelOutput& output) {
  const Channels channels(output);
  alignas(64) int32_t sums[kTileRows * kPanel];
  // Blocks of equal height: 16 rows run as 8 + 8, not as 12 + 4.
  const int64_t blocks = (m + kTileRows - 1) / kTileRows;
  for (int64_t i = 0, row = 0; i < blocks; ++i) {
    const int64_t height = (m - row) / (blocks - i);
    kTiles[height - 1](rows + row * row_stride, row_stride, panel, k_groups(k), sums);
    finish(sums, height, row, kFlip, channels, output);
    row += height;
  }
}

// Dot products of MR rows, and of a row of ones, with 4 channels.
#if QK_PATH == QK_PATH_AVX512VNNI
// The sums of the lanes of 4 vectors.
inline __m128i sum_lanes(const __m512i (&v)[4]) {
  const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
  const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
  const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

template <int MR>
inline void dot_columns(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k,
                        const int32_t* rowsum, int32_t* sums, int32_t* colsum) {
  // Here the weights play the unsigned part: w XOR 0x80 is w + 128, and 128 * rowsum comes off each row once.
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i acc[MR + 1][4];
#pragma GCC unroll 5
  for (int r = 0; r <= MR; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 64) {
    const __mmask64 inside = k - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (k - i)) - 1;
    __m512i w[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i s = _mm512_maskz_loadu_epi8(inside, b + c * stride_n + i);
      acc[MR][c] = _mm512_dpbusd_epi32(acc[MR][c], ones, s);
      w[c] = _mm512_xor_si512(s, flip);
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const __m512i codes = _mm512_maskz_loadu_epi8(inside, a + r * stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], w[c], codes);
    }
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(colsum), sum_lanes(acc[MR]));
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r) {
    const __m128i offset = _mm_set1_epi32(static_cast<int32_t>(128u * static_cast<uint32_t>(rowsum[r])));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + r * kPanel), _mm_sub_epi32(sum_lanes(acc[r]), offset));
  }
}
#else
template <int MR>
inline void dot_columns(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k, const int32_t*,
                        int32_t* sums, int32_t* colsum) {
  for (int c = 0; c < 4; ++c) {
    const int8_t* w = b + c * stride_n;
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += w[i];
    colsum[c] = total;
    for (int r = 0; r < MR; ++r) {
      const int8_t* codes = a + r * stride;
      int32_t sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += codes[i] * w[i];
      sums[r * kPanel + c] = sum;
    }
  }
}
#endif

template <int MR>
inline void unpacked_rows(const int8_t* a, int64_t stride, const int8_t* b, int64_t stride_n, int64_t k,
                          int64_t channels, int32_t* sums, int32_t* colsum) {
  int32_t rowsum[MR];
  for (int r = 0; r < MR; ++r) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += a[r * stride + i];
    rowsum[r] = total;
  }
  for (int64_t c = 0; c < channels; c += 4) {
    // The last columns are met twice where 4 does not divide their number; fewer than 4 in all repeat the first.
    const int64_t first = channels < 4 ? 0 : std::min(c, channels - 4);
    if (channels < 4)
      for (int64_t one = 0; one < channels; ++one)  // writes 4 equal sums, of which the first stays
        dot_columns<MR>(a, stride, b + one * stride_n, 0, k, rowsum, sums + one, colsum + one);
    else
      dot_columns<MR>(a, stride, b + first * stride_n, stride_n, k, rowsum, sums + first, colsum + first);
  }
}

void multiply_unpacked(const int8_t* rows, int64_t row_stride, int64_t m, const int8_t* b, int64_t stride_n, int64_t k,
                       const PanelOutput& output) {
  Channels channels(output);
  alignas(64) int32_t sums[4 * kPanel] = {};
  for (int64_t row = 0; row < m; row += 4) {
    const int8_t* a = rows + row * row_stride;
    const int64_t height = std::min<int64_t>(4, m - row);
    switch (height) {
      case 1: unpacked_rows<1>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      case 2: unpacked_rows<2>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      case 3: unpacked_rows<3>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum); break;
      default: unpacked_rows<4>(a, row_stride, b, stride_n, k, output.channels, sums, channels.colsum);
    }
    finish(sums, height, row, 0, channels, output);
  }
}

void multiply_depthwise(const uint8_t* codes, int64_t step, int64_t pixels, const int64_t* taps, int64_t n_taps,
                        const int32_t* weights, const PanelOutput& output) {
  const Channels channels(output);
  constexpr int kAtOnce = 8;  // pixels of one epilogue
  alignas(64) int32_t batch[kAtOnce * kPanel];
  for (int64_t pixel = 0; pixel < pixels; ++pixel, codes += step) {
    int32_t* sums = batch + pixel % kAtOnce * kPanel;
#if QK_PATH == QK_PATH_AVX512VNNI
    __m512i sum0 = _mm512_setzero_si512(), sum1 = _mm512_setzero_si512();
    for (int64_t t = 0; t < n_taps; ++t) {
      const __m128i* code = reinterpret_cast<const __m128i*>(codes + taps[t]);
      const __m512i product0 =
          _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(code)), _mm512_loadu_si512(weights + t * kPanel));
      const __m512i product1 = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(code + 1)),
                                                  _mm512_loadu_si512(weights + t * kPanel + 16));
      sum0 = _mm512_add_epi32(sum0, product0);
      sum1 = _mm512_add_epi32(sum1, product1);
    }
    _mm512_store_si512(sums, sum0);
    _mm512_store_si512(sums + 16, sum1);
#else
    for (int c = 0; c < kPanel; ++c) sums[c] = 0;
    for (int64_t t = 0; t < n_taps; ++t) {
      const int8_t* code = reinterpret_cast<const int8_t*>(codes + taps[t]);
      for (int c = 0; c < kPanel; ++c) sums[c] += code[c] * weights[t * kPanel + c];
    }
#endif
    const int64_t waiting = pixel % kAtOnce + 1;
    if (waiting == kAtOnce || pixel + 1 == pixels) finish(batch, waiting, pixel + 1 - waiting, kFlip, channels, output);
  }
}

#if QK_PATH != QK_PATH_SCALAR
// Sums of 4 neighbouring codes, added to `total`.
inline __m256i add_groups(__m256i total, __m256i codes) {
#if QK_PATH == QK_PATH_AVX512VNNI
  return _mm256_dpbusd_epi32(total, _mm256_set1_epi8(1), codes);
#else
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
  return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

inline void keep_group(const __m256i codes, int8_t* out, __m256i& total) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
  total = add_groups(total, codes);
}

// 8 channels x 8 groups of 4 codes, read along k, written along the channels.
inline void transpose_groups(const int8_t* b, int64_t stride_n, int8_t* out, __m256i& total) {
  __m256i r[8], t[8];
#pragma GCC unroll 8
  for (int c = 0; c < 8; ++c) r[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + c * stride_n));
#pragma GCC unroll 4
  for (int c = 0; c < 8; c += 2) {
    t[c] = _mm256_unpacklo_epi32(r[c], r[c + 1]);
    t[c + 1] = _mm256_unpackhi_epi32(r[c], r[c + 1]);
  }
#pragma GCC unroll 2
  for (int c = 0; c < 8; c += 4) {
    r[c] = _mm256_unpacklo_epi64(t[c], t[c + 2]);
    r[c + 1] = _mm256_unpackhi_epi64(t[c], t[c + 2]);
    r[c + 2] = _mm256_unpacklo_epi64(t[c + 1], t[c + 3]);
    r[c + 3] = _mm256_unpackhi_epi64(t[c + 1], t[c + 3]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    keep_group(_mm256_permute2x128_si256(r[g], r[g + 4], 0x20), out + g * kPanel * 4, total);
    keep_group(_mm256_permute2x128_si256(r[g], r[g + 4], 0x31), out + (g + 4) * kPanel * 4, total);
  }
}

// 32 channels x 4 codes from 4 rows of channels.
inline void interleave_rows(const int8_t* b, int64_t stride_k, int8_t* out, __m256i (&total)[4]) {
  __m256i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i * stride_k));
  const __m256i low01 = _mm256_unpacklo_epi8(r[0], r[1]), high01 = _mm256_unpackhi_epi8(r[0], r[1]);
  const __m256i low23 = _mm256_unpacklo_epi8(r[2], r[3]), high23 = _mm256_unpackhi_epi8(r[2], r[3]);
  const __m256i c0 = _mm256_unpacklo_epi16(low01, low23), c4 = _mm256_unpackhi_epi16(low01, low23);
  const __m256i c8 = _mm256_unpacklo_epi16(high01, high23), c12 = _mm256_unpackhi_epi16(high01, high23);
  keep_group(_mm256_permute2x128_si256(c0, c4, 0x20), out, total[0]);
  keep_group(_mm256_permute2x128_si256(c8, c12, 0x20), out + 32, total[1]);
  keep_group(_mm256_permute2x128_si256(c0, c4, 0x31), out + 64, total[2]);
  keep_group(_mm256_permute2x128_si256(c8, c12, 0x31), out + 96, total[3]);
}
#endif

// Packs whole groups of full panels and adds up their codes in totals[channel]; returns how many of the k they hold.
inline int64_t pack_fast(const int8_t* b, int64_t stride_n, int64_t stride_k, int64_t full, int64_t k, int8_t* data,
                         int32_t* totals) {
  int64_t done = 0;
#if QK_PATH != QK_PATH_SCALAR
  const int64_t bytes = panel_bytes(k);
  const auto keep = [&](const __m256i(&total)[4], int64_t panel) {
    for (int c = 0; c < 4; ++c)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(totals + panel * kPanel + c * 8), total[c]);
  };
  if (stride_k == 1) {
    for (int64_t panel = 0; panel < full; ++panel) {
      const int8_t* rows = b + panel * kPanel * stride_n;
      int8_t* out = data + panel * bytes;
      __m256i total[4] = {};
      // Cache line by cache line: rows of 4096 bytes would push each other out before a second visit.
      for (done = 0; done + 64 <= k; done += 64)
        for (int c = 0; c < kPanel; c += 8) {
          for (int i = 0; i < 8 && done + kBytesAhead < k; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(rows + (c + i) * stride_n + done + kBytesAhead), _MM_HINT_T1);
          transpose_groups(rows + c * stride_n + done, stride_n, out + done * kPanel + c * 4, total[c / 8]);
          transpose_groups(rows + c * stride_n + done + 32, stride_n, out + (done + 32) * kPanel + c * 4, total[c / 8]);
        }
      for (; done + 32 <= k; done += 32)
        for (int c = 0; c < kPanel; c += 8)
          transpose_groups(rows + c * stride_n + done, stride_n, out + done * kPanel + c * 4, total[c / 8]);
      keep(total, panel);
    }
  } else if (stride_n == 1) {
    __m256i total[kPackedPanels][4] = {};
    for (; done + 4 <= k; done += 4) {
      const int8_t* rows = b + done * stride_k;
      // Each row is in another page, where no hardware prefetching follows.
      if (done + kRowsAhead + 4 <= k)
        for (int i = 0; i < 4; ++i)
          for (int64_t c = 0; c < full * kPanel; c += 64)
            _mm_prefetch(reinterpret_cast<const char*>(rows + (kRowsAhead + i) * stride_k + c), _MM_HINT_T0);
      for (int64_t panel = 0; panel < full; ++panel)
        interleave_rows(rows + panel * kPanel, stride_k, data + panel * bytes + done * kPanel, total[panel]);
    }
    for (int64_t panel = 0; panel < full; ++panel) keep(total[panel], panel);
  }
#endif
  return done;
}

void pack_panels(const int8_t* b, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, int8_t* data,
                 int32_t* colsum) {
  int32_t totals[kPackedPanels * kPanel] = {};
  const int64_t full = channels / kPanel, bytes = panel_bytes(k);
  const int64_t fast = full ? pack_fast(b, stride_n, stride_k, full, k, data, totals) : 0;
  for (int64_t panel = 0; panel < panels(channels); ++panel) {
    int8_t* out = data + panel * bytes;
    const int64_t done = panel < full ? fast : 0, last = std::min(channels, (panel + 1) * kPanel);
    if (bytes > done * kPanel) std::memset(out + done * kPanel, 0, static_cast<size_t>(bytes - done * kPanel));
    const auto pack = [&](int64_t i, int64_t c) {
      const int8_t code = b[i * stride_k + c * stride_n];
      out[((i / 4) * kPanel + c % kPanel) * 4 + (i & 3)] = code;
      totals[c] += code;
    };
    if (stride_k == 1)
      for (int64_t c = panel * kPanel; c < last; ++c)
        for (int64_t i = done; i < k; ++i) pack(i, c);
    else
      for (int64_t i = done; i < k; ++i)
        for (int64_t c = panel * kPanel; c < last; ++c) pack(i, c);
  }
  for (int64_t c = 0; c < channels; ++c) colsum[c] = totals[c];
}

void copy_codes(const int8_t* codes, int64_t stride, int64_t k, uint8_t flip, uint8_t* row) {
  if (stride == 1)
    for (int64_t i = 0; i < k; ++i) row[i] = static_cast<uint8_t>(codes[i]) ^ flip;
  else
    for (int64_t i = 0; i < k; ++i) row[i] = static_cast<uint8_t>(codes[i * stride]) ^ flip;
}

constexpr int64_t kChunk = 1024;  // floats that a row is converted by: 4 KiB of stack

inline const float* as_floats(const float* x, int64_t, float*) { return x; }

inline const float* as_floats(const BFloat16* x, int64_t n, float* buffer) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
    std::memcpy(buffer + i, &bits, 4);
  }
  return buffer;
}

inline const float* as_floats(const Half* x, int64_t n, float* buffer) {
  int64_t i = 0;
#if QK_PATH != QK_PATH_SCALAR
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
  for (; i < n; ++i) buffer[i] = to_float(x[i]);
  return buffer;
}

// Largest |x| as bits: ordered as the floats are, with NaN above infinity.
inline uint32_t max_magnitude(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return static_cast<uint32_t>(largest);
}

// Returns whether a NaN was met.
inline bool quantize_chunk(const float* x, int64_t n, const RowQuantizer& q, uint8_t flip, uint8_t* row) {
  int64_t i = 0;
  int32_t nan = 0;
#if QK_PATH == QK_PATH_AVX512VNNI
  const __m512 inverse = _mm512_set1_ps(q.inverse), zero_point = _mm512_set1_ps(q.zero_point);
  const __m512 low = _mm512_set1_ps(q.low), high = _mm512_set1_ps(q.high);
  const __m128i flips = _mm_set1_epi8(static_cast<char>(flip));
  for (; i < n; i += 16) {
    const __mmask16 inside = n - i >= 16 ? 0xffff : (1u << (n - i)) - 1;
    const __m512 t = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, x + i), inverse);
    nan |= _mm512_cmp_ps_mask(t, t, _CMP_UNORD_Q);
    const __m512 rounded = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(rounded, zero_point), low), high);
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code)), flips);
    _mm_mask_storeu_epi8(row + i, inside, bytes);
  }
#else
  for (; i < n; ++i) {
    const float t = x[i] * q.inverse;
    nan |= t != t;
    const float code = __builtin_rintf(t) + q.zero_point;
    const float clamped = code > q.low ? (code < q.high ? code : q.high) : q.low;
    row[i] = static_cast<uint8_t>(static_cast<int32_t>(clamped)) ^ flip;
  }
#endif
  return nan != 0;
}

template <typename T>
float quantize_row_of(const T* x, int64_t k, RowQuantizer q, uint8_t flip, uint8_t* row) {
  float buffer[kChunk];
  if (q.dynamic) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < k; i += kChunk) {
      const int64_t n = std::min(kChunk, k - i);
      largest = std::max(largest, max_magnitude(as_floats(x + i, n, buffer), n));
    }
    float amax;
    std::memcpy(&amax, &largest, 4);
    q.scale = std::max(amax / q.half, std::numeric_limits<float>::min());
    q.inverse = 1.0f / q.scale;
    if (largest >= 0x7f800000) q.scale = std::numeric_limits<float>::quiet_NaN();
  }
  bool nan = false;
  for (int64_t i = 0; i < k; i += kChunk) {
    const int64_t n = std::min(kChunk, k - i);
    nan |= quantize_chunk(as_floats(x + i, n, buffer), n, q, flip, row + i);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : q.scale;
}

float quantize_row(const void* x, Element type, int64_t k, const RowQuantizer& quantizer, uint8_t flip, uint8_t* row) {
  switch (type) {
    case Element::bf16: return quantize_row_of(static_cast<const BFloat16*>(x), k, quantizer, flip, row);
    case Element::f16: return quantize_row_of(static_cast<const Half*>(x), k, quantizer, flip, row);
    default: return quantize_row_of(static_cast<const float*>(x), k, quantizer, flip, row);
  }
}

constexpr Int8Kernels kKernels = {kIsa,         kFlip,       kTileRows, kUnpackedRows,     copy_codes,
                                  quantize_row, pack_panels, multiply,  multiply_unpacked, multiply_depthwise};
