// 16 lanes of fp32 (F32) or fp64 (F64) with one interface on every path. Kernels work on 16 lanes whatever the path, so
// that sums come out in one order and bit-identical.
//
// There are no friends here: GCC does not apply a target region to a friend that is defined in a class.
//
// min(bound, v) and max(bound, v) keep a NaN in v, which is how NaN propagates through a clamp.
#ifndef QK_VEC
#define QK_VEC

#include "cpu/common/path.h"

namespace qkernels::QK_NAMESPACE {

template <typename T>
struct Lanes {
  using Scalar = T;
  struct Mask {
    uint16_t bits_;
    uint16_t bits() const { return bits_; }
    static Mask from_bits(uint16_t bits) { return {bits}; }
    Mask operator|(Mask other) const { return {static_cast<uint16_t>(bits_ | other.bits_)}; }
  };
  T v[16];

  static Lanes set1(T value) {
    Lanes r;
    for (T& lane : r.v) lane = value;
    return r;
  }
  template <typename S>
  static Lanes load(const S* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = static_cast<T>(to_float(p[i]));
    return r;
  }
  template <typename S>
  static Lanes load(const S* p, int64_t n) {
    Lanes r = set1(0);
    for (int i = 0; i < n; ++i) r.v[i] = static_cast<T>(to_float(p[i]));
    return r;
  }
  template <typename S>
  void store(S* p) const {
    for (int i = 0; i < 16; ++i) p[i] = from_float<S>(v[i]);
  }
  template <typename S>
  void store(S* p, int64_t n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<S>(v[i]);
  }
};

template <typename T, typename F>
inline Lanes<T> map(Lanes<T> a, Lanes<T> b, F f) {
  Lanes<T> r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}
template <typename T, typename F>
inline uint16_t test(Lanes<T> a, Lanes<T> b, F f) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(f(a.v[i], b.v[i])) << i;
  return static_cast<uint16_t>(bits);
}
template <typename T>
inline Lanes<T> operator+(Lanes<T> a, Lanes<T> b) {
  return map(a, b, [](T p, T q) { return p + q; });
}
template <typename T>
inline Lanes<T> operator-(Lanes<T> a, Lanes<T> b) {
  return map(a, b, [](T p, T q) { return p - q; });
}
template <typename T>
inline Lanes<T> operator*(Lanes<T> a, Lanes<T> b) {
  return map(a, b, [](T p, T q) { return p * q; });
}
template <typename T>
inline Lanes<T> operator/(Lanes<T> a, Lanes<T> b) {
  return map(a, b, [](T p, T q) { return p / q; });
}
template <typename T>
inline Lanes<T> min(Lanes<T> bound, Lanes<T> a) {
  return map(bound, a, [](T p, T q) { return p < q ? p : q; });
}
template <typename T>
inline Lanes<T> max(Lanes<T> bound, Lanes<T> a) {
  return map(bound, a, [](T p, T q) { return p > q ? p : q; });
}
template <typename T>
inline Lanes<T> round(Lanes<T> a) {
  return map(a, a, [](T p, T) { return static_cast<T>(__builtin_rint(p)); });
}
// The larger of acc and |a|; NaN where one of them is.
template <typename T>
inline Lanes<T> max_abs(Lanes<T> acc, Lanes<T> a) {
  return map(acc, a, [](T p, T q) {
    const T abs = q < 0 ? -q : q;
    return abs > p || abs != abs ? abs : p;
  });
}
template <typename T>
inline typename Lanes<T>::Mask inside(Lanes<T> a, Lanes<T> low, Lanes<T> high) {
  return {static_cast<uint16_t>(test(a, low, [](T p, T q) { return p >= q; }) &
                                test(a, high, [](T p, T q) { return p <= q; }))};
}
template <typename T>
inline typename Lanes<T>::Mask between(Lanes<T> a, Lanes<T> low, Lanes<T> high) {  // neither bound included
  return {static_cast<uint16_t>(test(a, low, [](T p, T q) { return p > q; }) &
                                test(a, high, [](T p, T q) { return p < q; }))};
}
template <typename T>
inline typename Lanes<T>::Mask is_nan(Lanes<T> a) {
  return {test(a, a, [](T p, T q) { return p != q; })};
}
template <typename T>
inline Lanes<T> select(typename Lanes<T>::Mask m, Lanes<T> a, Lanes<T> b) {
  Lanes<T> r;
  for (int i = 0; i < 16; ++i) r.v[i] = (m.bits_ >> i) & 1 ? a.v[i] : b.v[i];
  return r;
}

using F64 = Lanes<double>;

#if QK_PATH == QK_PATH_SCALAR

using F32 = Lanes<float>;

#elif QK_PATH == QK_PATH_AVX2

struct F32 {
  using Scalar = float;
  struct Mask {
    __m256 lo, hi;
    uint16_t bits() const { return static_cast<uint16_t>(_mm256_movemask_ps(lo) | (_mm256_movemask_ps(hi) << 8)); }
    static Mask from_bits(uint16_t bits) {
      const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
      const __m256i lo = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
      const __m256i hi = _mm256_and_si256(_mm256_set1_epi32(bits >> 8), lane);
      return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(lo, lane)), _mm256_castsi256_ps(_mm256_cmpeq_epi32(hi, lane))};
    }
  };
  __m256 lo, hi;

  static F32 set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F32 load(const Half* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
  static F32 load(const BFloat16* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q)), widen(_mm_loadu_si128(q + 1))};
  }
  static F32 load(const int8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
  }
  static F32 load(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
  }
  static F32 load(const int32_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(q)), _mm256_cvtepi32_ps(_mm256_loadu_si256(q + 1))};
  }
  template <typename S>
  static F32 load(const S* p, int64_t n) {
    S padded[16] = {};
    std::memcpy(padded, p, n * sizeof(S));
    return load(padded);
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  void store(Half* p) const {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(q + 1, _mm256_cvtps_ph(hi, _MM_FROUND_TO_NEAREST_INT));
  }
  static __m256i narrow(__m256 f) {  // bf16 in the low half of each lane, rounded as in F32::narrow of AVX-512
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  }
  void store(BFloat16* p) const {
    const __m256i packed = _mm256_packus_epi32(narrow(lo), narrow(hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  void store(int32_t* p) const {
    __m256i* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, _mm256_cvtps_epi32(lo));
    _mm256_storeu_si256(q + 1, _mm256_cvtps_epi32(hi));
  }
  __m128i to_int16(__m256 f) const {
    const __m256i i = _mm256_cvtps_epi32(f);
    return _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  }
  void store(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(to_int16(lo), to_int16(hi)));
  }
  void store(uint8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(to_int16(lo), to_int16(hi)));
  }
  template <typename S>
  void store(S* p, int64_t n) const {
    S padded[16];
    store(padded);
    std::memcpy(p, padded, n * sizeof(S));
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 min(F32 bound, F32 a) { return {_mm256_min_ps(bound.lo, a.lo), _mm256_min_ps(bound.hi, a.hi)}; }
inline F32 max(F32 bound, F32 a) { return {_mm256_max_ps(bound.lo, a.lo), _mm256_max_ps(bound.hi, a.hi)}; }
inline F32 round(F32 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// As integers, the bits of |a| are ordered as the values are, with NaN above infinity.
inline __m256 larger_abs(__m256 acc, __m256 a) {
  const __m256i abs = _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff));
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(acc), abs));
}
inline F32 max_abs(F32 acc, F32 a) { return {larger_abs(acc.lo, a.lo), larger_abs(acc.hi, a.hi)}; }
inline F32::Mask inside(F32 a, F32 low, F32 high) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, low.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.lo, high.lo, _CMP_LE_OQ)),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, low.hi, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, high.hi, _CMP_LE_OQ))};
}
inline F32::Mask between(F32 a, F32 low, F32 high) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, low.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.lo, high.lo, _CMP_LT_OQ)),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, low.hi, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, high.hi, _CMP_LT_OQ))};
}
inline F32::Mask is_nan(F32 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline F32::Mask operator|(F32::Mask a, F32::Mask b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }
inline F32 select(F32::Mask m, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}

#else

struct F32 {
  using Scalar = float;
  struct Mask {
    __mmask16 m;
    uint16_t bits() const { return m; }
    static Mask from_bits(uint16_t bits) { return {bits}; }
  };
  __m512 v;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static __m512 widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
  // bf16, half to even; vcvtneps2bf16 would flush denormals. Every NaN here is canonical or a widened bf16 (see
  // effective_scale), so that the rounding cannot carry it into infinity.
  static __m256i narrow(__m512 f) {
    const __m512i u = _mm512_castps_si512(f);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i high_words = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                                0xb0009, 0x70005, 0x30001);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high_words, r));
  }
  static F32 set1(float value) { return {_mm512_set1_ps(value)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static F32 load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F32 load(const Half* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
  static F32 load(const BFloat16* p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static F32 load(const BFloat16* p, int64_t n) { return {widen(_mm256_maskz_loadu_epi16(first(n), p))}; }
  static F32 load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static F32 load(const int8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  static F32 load(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static F32 load(const uint8_t* p, int64_t n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
  }
  static F32 load(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  static F32 load(const int32_t* p, int64_t n) { return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(first(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(Half* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(Half* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }
  void store(BFloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }
  void store(int32_t* p) const { _mm512_storeu_si512(p, _mm512_cvtps_epi32(v)); }
  void store(int32_t* p, int64_t n) const { _mm512_mask_storeu_epi32(p, first(n), _mm512_cvtps_epi32(v)); }
  template <typename S>  // int8_t or uint8_t: the value is in range, so that its low byte holds it
  void store(S* p, int64_t n = 16) const {
    static_assert(sizeof(S) == 1);
    _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
};
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 min(F32 bound, F32 a) { return {_mm512_min_ps(bound.v, a.v)}; }
inline F32 max(F32 bound, F32 a) { return {_mm512_max_ps(bound.v, a.v)}; }
inline F32 round(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// As integers, the bits of |a| are ordered as the values are, with NaN above infinity.
inline F32 max_abs(F32 acc, F32 a) {
  const __m512i abs = _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff));
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(acc.v), abs))};
}
inline F32::Mask inside(F32 a, F32 low, F32 high) {
  return {_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ), a.v, high.v, _CMP_LE_OQ)};
}
inline F32::Mask between(F32 a, F32 low, F32 high) {
  return {_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a.v, low.v, _CMP_GT_OQ), a.v, high.v, _CMP_LT_OQ)};
}
inline F32::Mask is_nan(F32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline F32::Mask operator|(F32::Mask a, F32::Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
inline F32 select(F32::Mask m, F32 a, F32 b) { return {_mm512_mask_mov_ps(b.v, m.m, a.v)}; }

#endif

// The vector type that elements of storage type S are computed in.
template <typename S>
struct VecOf {
  using type = F32;
};
template <>
struct VecOf<double> {
  using type = F64;
};

template <typename V>
inline V zero() {
  return V::set1(0);
}

// Calls f(i) for every 16 of n elements, then f(i, count) for the rest: f is [](int64_t i, auto... tail). V::load and
// V::store and the parameters of sweep.h take these arguments, so that f says once what is done to 16 elements and to
// fewer.
template <typename F>
__attribute__((always_inline)) inline void for_each_16(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i);
  if (i < n) f(i, n - i);
}

// For an f that GCC 12 would otherwise inline too late: a fake quantization in groups of 32 took 5 to 9 % longer.
#define QK_INLINE __attribute__((always_inline))

// How many elements f was called for: lanes_of(tail...).
constexpr int lanes_of() { return 16; }
constexpr int lanes_of(int64_t count) { return static_cast<int>(count); }

// The bits of the elements that f was called for: bits_of(bits, tail...).
inline uint32_t bits_of(uint32_t bits) { return bits; }
inline uint32_t bits_of(uint32_t bits, int64_t count) { return bits & ((1u << count) - 1); }

// Reductions over the lanes. Sums are taken in fp64 and in one fixed order.
template <typename V>
inline void add_lanes(double (&total)[16], V a) {
  typename V::Scalar lane[16];
  a.store(lane);
  for (int i = 0; i < 16; ++i) total[i] += static_cast<double>(lane[i]);
}

inline double tree_sum(double (&total)[16]) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  return total[0];
}

template <typename V>
inline typename V::Scalar lane_max(V a) {  // NaN if any lane is
  typename V::Scalar lane[16];
  a.store(lane);
  typename V::Scalar best = lane[0];
  for (int i = 1; i < 16; ++i) best = lane[i] > best || lane[i] != lane[i] ? lane[i] : best;
  return best;
}

// lane_max of what max_abs returned, whose bits are ordered as integers too.
template <typename V>
inline typename V::Scalar lane_max_abs(V a) {
#if QK_PATH != QK_PATH_SCALAR
  if constexpr (std::is_same_v<V, F32>) {
#if QK_PATH != QK_PATH_AVX2
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a.v));
#else
    const __m256i m = _mm256_max_epi32(_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi));
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
#endif
    float amax;
    std::memcpy(&amax, &bits, sizeof amax);
    return amax;
  }
#endif
  return lane_max(a);
}

template <typename V>
inline typename V::Scalar lane_min(V a) {
  return -lane_max(zero<V>() - a);
}

}  // namespace qkernels::QK_NAMESPACE

#endif
