// The registers of depthwise kernels. A vector has kLanes lanes of 16 channels. Unpacking the bytes of 4 rows twice
// leaves 4 of them: in vector q and lane l, 32 bits hold the 4 rows of one of the channels 16 l + 4 q … 16 l + 4 q + 3.
// Packing the 4 vectors of sums to 16 and then to 8 bits undoes this order.
#ifndef QK_DEPTHWISE_VECTORS
#define QK_DEPTHWISE_VECTORS

#include "cpu/common/vec.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int kVectorBytes = 64;  // of interleaved codes in memory

#if QK_PATH == QK_PATH_AVX512VNNI

constexpr int kLanes = 4;
constexpr bool kManyRegisters = true;
constexpr int kMostOutputs = 8;  // of a tile: products take 4 cycles and a load each
using Codes = __m512i;           // kLanes * 16 bytes
using Sums = __m512i;
using Interleaved = __m512i;
using Weights = __m512i;

// Width channels at each of the places of the parts.
template <int Width>
inline Codes load_codes(const uint8_t* codes, const int64_t* parts) {
  if constexpr (Width == 64) return _mm512_loadu_si512(codes);
  if constexpr (Width == 32) {
    const auto at = [&](int p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + parts[p])); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(at(0)), at(1), 1);
  }
  const auto at = [&](int p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + parts[p])); };
  Codes v = _mm512_castsi128_si512(at(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, at(1));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, at(2));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, at(3));
}

inline void interleave(const Codes (&row)[4], Interleaved (&v)[4]) {
  const Codes low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
  const Codes low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
  v[0] = _mm512_unpacklo_epi16(low01, low23);
  v[1] = _mm512_unpackhi_epi16(low01, low23);
  v[2] = _mm512_unpacklo_epi16(high01, high23);
  v[3] = _mm512_unpackhi_epi16(high01, high23);
}

template <int Width>
inline Weights load_weights(const int8_t* weights) {
  if constexpr (Width == 64) return _mm512_loadu_si512(weights);
  if constexpr (Width == 32)
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights)));
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
}

inline void store(uint8_t* to, Interleaved v) { _mm512_store_si512(to, v); }
inline Interleaved load_interleaved(const uint8_t* from) { return _mm512_load_si512(from); }
inline Sums load_sums(const int32_t* from) { return _mm512_load_si512(from); }
inline void store(int32_t* to, Sums sums) { _mm512_store_si512(to, sums); }
inline Sums multiply_add(Sums sums, Interleaved codes, Weights weights) {
  return _mm512_dpbusd_epi32(sums, codes, weights);
}

// From 4 vectors of sums to the 16 channels of each lane, in order.
inline void to_lanes(const Sums (&sums)[4], Sums (&lanes)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44), b = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee), d = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
  lanes[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  lanes[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  lanes[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  lanes[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}
inline F32 floats_of_lane(const Sums (&lanes)[4], int lane) { return {_mm512_cvtepi32_ps(lanes[lane])}; }

// From 4 vectors of sums to bytes code + 128 within bounds, which are bytes too, where nothing is NaN.
struct CodeRule {
  __m512 in_scale, inverse, high;
  __m512i offset, low;

  CodeRule() = default;
  CodeRule(float scale, float out_inverse, int32_t zero_point, uint8_t lowest, uint8_t highest)
      : in_scale(_mm512_set1_ps(scale)),
        inverse(_mm512_set1_ps(out_inverse)),
        high(_mm512_set1_ps(static_cast<float>(highest - 128 - zero_point))),
        offset(_mm512_set1_epi16(static_cast<int16_t>(zero_point + 128))),
        low(_mm512_set1_epi8(static_cast<char>(lowest))) {}

  __m512i steps(Sums sums, const float* scale, const float* bias) const {
    __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_load_ps(scale)), in_scale);
    v = _mm512_mul_ps(_mm512_add_ps(v, _mm512_load_ps(bias)), inverse);
    return _mm512_cvtps_epi32(_mm512_min_ps(high, v));
  }
  Codes operator()(const Sums (&sums)[4], const float* scale, const float* bias) const {
    __m512i v[4];
    for (int q = 0; q < 4; ++q) v[q] = steps(sums[q], scale + q * 16, bias + q * 16);
    const __m512i first = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), offset);
    const __m512i second = _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), offset);
    return _mm512_max_epu8(low, _mm512_packus_epi16(first, second));
  }
};

inline void store_bytes(uint8_t* to, Codes codes) { _mm512_store_si512(to, codes); }
template <int Width>
inline void store_part(uint8_t* to, Codes codes, int part) {
  if constexpr (Width == 64) _mm512_storeu_si512(to, codes);
  if constexpr (Width == 32)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        part ? _mm512_extracti64x4_epi64(codes, 1) : _mm512_castsi512_si256(codes));
  if constexpr (Width == 16) {
    const __m128i v = part == 0   ? _mm512_castsi512_si128(codes)
                      : part == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                      : part == 2 ? _mm512_extracti32x4_epi32(codes, 2)
                                  : _mm512_extracti32x4_epi32(codes, 3);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
  }
}

#elif QK_PATH == QK_PATH_AVX2

constexpr int kLanes = 2;
constexpr bool kManyRegisters = false;
constexpr int kMostOutputs = 4;
using Codes = __m256i;
using Sums = __m256i;
// Products of bytes would saturate: rows 0 and 2, and rows 1 and 3, are multiplied as int16.
struct Interleaved {
  __m256i even, odd;
};
using Weights = Interleaved;

template <int Width>
inline Codes load_codes(const uint8_t* codes, const int64_t* parts) {
  if constexpr (Width == 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const auto at = [&](int p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + parts[p])); };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
}

inline Interleaved widen(__m256i v) {
  return {_mm256_and_si256(v, _mm256_set1_epi32(0x00ff00ff)), _mm256_srli_epi16(v, 8)};
}

inline void interleave(const Codes (&row)[4], Interleaved (&v)[4]) {
  const Codes low01 = _mm256_unpacklo_epi8(row[0], row[1]), high01 = _mm256_unpackhi_epi8(row[0], row[1]);
  const Codes low23 = _mm256_unpacklo_epi8(row[2], row[3]), high23 = _mm256_unpackhi_epi8(row[2], row[3]);
  v[0] = widen(_mm256_unpacklo_epi16(low01, low23));
  v[1] = widen(_mm256_unpackhi_epi16(low01, low23));
  v[2] = widen(_mm256_unpacklo_epi16(high01, high23));
  v[3] = widen(_mm256_unpackhi_epi16(high01, high23));
}

template <int Width>
inline Weights load_weights(const int8_t* weights) {
  const __m256i v = Width == 32
                        ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights))
                        : _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
  return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
}

inline void store(uint8_t* to, Interleaved v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), v.even);
  _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, v.odd);
}
inline Interleaved load_interleaved(const uint8_t* from) {
  const __m256i* p = reinterpret_cast<const __m256i*>(from);
  return {_mm256_load_si256(p), _mm256_load_si256(p + 1)};
}
inline Sums load_sums(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(int32_t* to, Sums sums) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), sums); }
inline Sums multiply_add(Sums sums, Interleaved codes, Weights weights) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes.even, weights.even));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(codes.odd, weights.odd));
}

inline void to_lanes(const Sums (&sums)[4], Sums (&lanes)[4]) {
  lanes[0] = _mm256_permute2x128_si256(sums[0], sums[1], 0x20);
  lanes[1] = _mm256_permute2x128_si256(sums[2], sums[3], 0x20);
  lanes[2] = _mm256_permute2x128_si256(sums[0], sums[1], 0x31);
  lanes[3] = _mm256_permute2x128_si256(sums[2], sums[3], 0x31);
}
inline F32 floats_of_lane(const Sums (&lanes)[4], int lane) {
  return {_mm256_cvtepi32_ps(lanes[lane * 2]), _mm256_cvtepi32_ps(lanes[lane * 2 + 1])};
}

struct CodeRule {
  __m256 in_scale, inverse, high;
  __m256i offset, low;

  CodeRule() = default;
  CodeRule(float scale, float out_inverse, int32_t zero_point, uint8_t lowest, uint8_t highest)
      : in_scale(_mm256_set1_ps(scale)),
        inverse(_mm256_set1_ps(out_inverse)),
        high(_mm256_set1_ps(static_cast<float>(highest - 128 - zero_point))),
        offset(_mm256_set1_epi16(static_cast<int16_t>(zero_point + 128))),
        low(_mm256_set1_epi8(static_cast<char>(lowest))) {}

  __m256i steps(Sums sums, const float* scale, const float* bias) const {
    __m256 v = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_load_ps(scale)), in_scale);
    v = _mm256_mul_ps(_mm256_add_ps(v, _mm256_load_ps(bias)), inverse);
    return _mm256_cvtps_epi32(_mm256_min_ps(high, v));
  }
  Codes operator()(const Sums (&sums)[4], const float* scale, const float* bias) const {
    __m256i v[4];
    for (int q = 0; q < 4; ++q) v[q] = steps(sums[q], scale + q * 8, bias + q * 8);
    const __m256i first = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), offset);
    const __m256i second = _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), offset);
    return _mm256_max_epu8(low, _mm256_packus_epi16(first, second));
  }
};

inline void store_bytes(uint8_t* to, Codes codes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), codes); }
template <int Width>
inline void store_part(uint8_t* to, Codes codes, int part) {
  if constexpr (Width == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  if constexpr (Width == 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     part ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes));
}

#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
