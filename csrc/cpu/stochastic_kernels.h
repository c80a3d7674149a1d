// Stochastic rounding.
#include "cpu/common/philox.h"
#include "cpu/fake_quantize_learnable_kernels.h"

namespace qkernels::QK_NAMESPACE {

// Uniform numbers for elements in memory order: element i has word i % 4 of the block i / 4.
//
// The vector paths keep each word in the low half of a 64-bit lane. One instruction multiplies it there, and the
// product holds both words that the next round needs. What lies in the high halves never reaches a result.
class Uniforms {
 public:
  // `ahead`: how many elements will be asked for.
  Uniforms(const Philox& philox, int64_t ahead) : philox_(philox), ahead_(std::min(ahead, kAhead)) {}

  // The numbers of elements [i, i + 16).
  template <typename V>
  V at(int64_t i) {
    if (i < first_ || i + 16 > end_) fill(i);
    return V::load(u_ + (i - first_));
  }

 private:
  static constexpr int64_t kAhead = 512;
  static constexpr float kUnit = 0x1p-24f;
  const Philox& philox_;
  const int64_t ahead_;
  int64_t first_ = 0, end_ = 0;
  alignas(64) float u_[kAhead + 64];

  void fill(int64_t i) {
    first_ = i / 4 * 4;
    const int64_t wanted = i - first_ + std::max<int64_t>(ahead_, 16);
    int64_t n = 0;
    for (; n < wanted; n += kGroup) group((first_ + n) / 4, u_ + n);
    end_ = first_ + n;
  }

#if QK_PATH == QK_PATH_AVX512
  static constexpr int64_t kGroup = 32;
  void group(int64_t block, float* u) const {
    // The unpacking below puts the numbers of blocks in this order into the order of elements.
    const __m512i blocks = _mm512_add_epi64(_mm512_set1_epi64(block), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    __m512i c0 = blocks, c1 = _mm512_srli_epi64(blocks, 32);
    __m512i c2 = _mm512_set1_epi64(philox_.offset[0]), c3 = _mm512_set1_epi64(philox_.offset[1]);
    for (int r = 0; r < Philox::kRounds; ++r) {
      const __m512i p0 = _mm512_mul_epu32(c0, _mm512_set1_epi64(Philox::kMultiplier0));
      const __m512i p1 = _mm512_mul_epu32(c2, _mm512_set1_epi64(Philox::kMultiplier1));
      const __m512i k0 = _mm512_set1_epi64(philox_.key[r][0]), k1 = _mm512_set1_epi64(philox_.key[r][1]);
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
      c1 = p1;
      c3 = p0;
    }
    const __m512i words01 = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
    const __m512i words23 = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
    store(_mm512_unpacklo_epi64(words01, words23), u);
    store(_mm512_unpackhi_epi64(words01, words23), u + 16);
  }
  static void store(__m512i words, float* u) {
    _mm512_storeu_ps(u, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8)), _mm512_set1_ps(kUnit)));
  }
#elif QK_PATH == QK_PATH_AVX2
  static constexpr int64_t kGroup = 16;
  void group(int64_t block, float* u) const {
    const __m256i blocks = _mm256_add_epi64(_mm256_set1_epi64x(block), _mm256_setr_epi64x(0, 2, 1, 3));
    __m256i c0 = blocks, c1 = _mm256_srli_epi64(blocks, 32);
    __m256i c2 = _mm256_set1_epi64x(philox_.offset[0]), c3 = _mm256_set1_epi64x(philox_.offset[1]);
    for (int r = 0; r < Philox::kRounds; ++r) {
      const __m256i p0 = _mm256_mul_epu32(c0, _mm256_set1_epi64x(Philox::kMultiplier0));
      const __m256i p1 = _mm256_mul_epu32(c2, _mm256_set1_epi64x(Philox::kMultiplier1));
      const __m256i k0 = _mm256_set1_epi64x(philox_.key[r][0]), k1 = _mm256_set1_epi64x(philox_.key[r][1]);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), k0);
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), k1);
      c1 = p1;
      c3 = p0;
    }
    const __m256i words01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const __m256i words23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    store(_mm256_unpacklo_epi64(words01, words23), u);
    store(_mm256_unpackhi_epi64(words01, words23), u + 8);
  }
  static void store(__m256i words, float* u) {
    _mm256_storeu_ps(u, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8)), _mm256_set1_ps(kUnit)));
  }
#else
  static constexpr int64_t kGroup = 4;
  void group(int64_t block, float* u) const {
    const uint64_t word = 0xffffffff;
    uint64_t c0 = block & word, c1 = static_cast<uint64_t>(block) >> 32, c2 = philox_.offset[0], c3 = philox_.offset[1];
    for (const auto& key : philox_.key) {
      const uint64_t p0 = c0 * Philox::kMultiplier0, p1 = c2 * Philox::kMultiplier1;
      c0 = (p1 >> 32) ^ c1 ^ key[0];
      c2 = (p0 >> 32) ^ c3 ^ key[1];
      c1 = p1 & word;
      c3 = p0 & word;
    }
    const uint64_t words[] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) u[i] = static_cast<float>(words[i] >> 8) * kUnit;
  }
#endif
};

// floor(steps), plus one where u lies below the fraction. The fraction of an infinity is NaN, so the infinity stays.
template <typename V>
inline V round_stochastically(V steps, V u) {
  using T = typename V::Scalar;
  const V one = V::set1(1), nearest = round(steps);
  const V low = select(inside(steps, nearest, V::set1(static_cast<T>(INFINITY))), nearest, nearest - one);
  return select(inside(u, steps - low, one), low, low + one);
}

// Calls f(q before the clamp, zero point, i, tail...) for the elements of a stretch that begins at element `at`.
template <typename V, typename S, typename P, typename F>
inline void for_each_code(const S* x, int64_t at, int64_t n, const P& p, const Philox& philox, F f) {
  Uniforms uniforms(philox, n);
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const V z = p.zero_point(i, tail...), steps = V::load(x + at + i, tail...) * p.inv(i, tail...);
    f(round_stochastically(steps, uniforms.template at<V>(at + i)) + z, z, i, tail...);
  });
}

template <typename S>
void stochastic_forward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x, S* y,
                        uint8_t* mask, const Philox& philox) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    BitWriter bits(mask, at);
    for_each_code<V>(x, at, n, p, philox, [&](V q, V z, int64_t i, auto... tail) {
      bits.add(bits_of(inside(q, b.low, b.high).bits(), tail...), lanes_of(tail...));
      ((min(b.high, max(b.low, q)) - z) * p.scale(i, tail...)).store(y + at + i, tail...);
    });
    bits.finish();
  });
}

template <typename S, typename I>
void quantize_stochastic(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* x,
                         I* out, const Philox& philox) {
  using V = typename VecOf<S>::type;
  const Bounds<V> b(qparams);
  for_each_stretch<V>(runs, qparams, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_code<V>(x, at, n, p, philox, [&](V q, V z, int64_t i, auto... tail) {
      V code = min(b.high, max(b.low, q));
      code = select(is_nan(code), z, code);
      code.store(out + at + i, tail...);
    });
  });
}

// LSQ's terms, but with the integer that the forward pass drew, not the nearest one.
template <typename V>
struct StochasticTerms {
  struct Drawn {
    Uniforms uniforms;
    void operator()(int64_t i, V dy, V value, V inv, V scale, V z, const Bounds<V>& b, V& dx, V& dscale,
                    V& dzero_point) {
      const V steps = value * inv;
      const V q = round_stochastically(steps, uniforms.template at<V>(i)) + z;
      const auto in = inside(q, b.low, b.high);
      dx = select(in, dy, zero<V>());
      dscale = dy * ((min(b.high, max(b.low, q)) - z) - select(in, steps, zero<V>()));
      dzero_point = select(in, zero<V>(), (zero<V>() - dy) * scale);
    }
  };
  const Philox* philox;
  Drawn along(int64_t, int64_t n) const { return {Uniforms(*philox, n)}; }
};

template <typename S>
void stochastic_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& qparams, int64_t numel, const S* grad,
                         const S* x, S* dx, const Philox& philox, double grad_factor, double* dscale,
                         double* dzero_point) {
  using Terms = StochasticTerms<typename VecOf<S>::type>;
  reduce_channels(runs, numel,
                  LearnableOp<S, Terms>{qparams, runs, grad, x, dx, grad_factor, dscale, dzero_point, Terms{&philox}});
}

}  // namespace qkernels::QK_NAMESPACE
