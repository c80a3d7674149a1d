// Attention of one head at a time: a block of rows against all keys, the scores of which stay in the cache.
#include "cpu/common/activation_kernels.h"
#include "cpu/common/int8_ops.h"
#include "cpu/common/row_sum.h"
#include "cpu/dot_product_attention.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int kTileRows = 6;
#if QK_PATH == QK_PATH_AVX512
constexpr int kTileVectors = 4;  // 24 sums, 4 vectors of b and one of a fill 29 of 32 registers
#else
constexpr int kTileVectors = 1;
#endif
constexpr int64_t kWidth = 16 * kTileVectors;
constexpr int64_t kBlockRows = 8 * kTileRows;
constexpr int64_t kScoreBytes = 256 << 10;  // what the scores of a block may take of the second-level cache

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// a * b + c, rounded once: float sums may be, since no code is decided by a tie here.
inline F32 multiply_add(F32 a, F32 b, F32 c) {
#if QK_PATH == QK_PATH_SCALAR
  for (int i = 0; i < 16; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
#elif QK_PATH == QK_PATH_AVX2
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
#else
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#endif
}

// c[row][column] = the sum of a[row][i] * b[i][column] over i < n, in this order on every path.
template <int kVectors>
void multiply_tile(const float* const (&a)[kTileRows], int64_t n, const float* b, float* c, int64_t c_step) {
  F32 sums[kTileRows][kVectors];
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v] = zero<F32>();
  for (int64_t i = 0; i < n; ++i, b += 16 * kVectors) {
    F32 columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = F32::load(b + 16 * v);
#pragma GCC unroll 6
    for (int row = 0; row < kTileRows; ++row) {
      const F32 factor = F32::set1(a[row][i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[row][v] = multiply_add(factor, columns[v], sums[row][v]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[row][v].store(c + row * c_step + 16 * v);
}

// A matrix of `rows` rows as panels of kWidth columns, the last one as narrow as whole vectors allow. Padding is 0.
class Panels {
 public:
  Panels(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {}

  int64_t padded() const { return rounded_up(columns_, 16); }
  int64_t elements() const { return rows_ * padded(); }
  int64_t count() const { return (columns_ + kWidth - 1) / kWidth; }
  int64_t width(int64_t panel) const { return std::min(kWidth, padded() - panel * kWidth); }

  void multiply(const float* data, int64_t panel, const float* const (&a)[kTileRows], int64_t n, float* c,
                int64_t c_step) const {
    data += panel * kWidth * rows_;
    c += panel * kWidth;
#if QK_PATH == QK_PATH_AVX512
    switch (width(panel) / 16) {
      case 2: return multiply_tile<2>(a, n, data, c, c_step);
      case 3: return multiply_tile<3>(a, n, data, c, c_step);
      case 4: return multiply_tile<4>(a, n, data, c, c_step);
    }
#endif
    multiply_tile<1>(a, n, data, c, c_step);
  }

  // x[row * step + column]
  void pack(const float* x, int64_t step, float* data) const {
    for (int64_t panel = 0; panel < count(); ++panel, x += kWidth) {
      const int64_t all = width(panel), known = std::min(all, columns_ - panel * kWidth);
      for (int64_t row = 0; row < rows_; ++row, data += all) {
        std::memcpy(data, x + row * step, static_cast<size_t>(known) * sizeof(float));
        std::fill(data + known, data + all, 0.0f);
      }
    }
  }

  // x[column * step + row] * factor
  void pack_transposed(const float* x, int64_t step, float factor, float* data) const {
    for (int64_t panel = 0; panel < count(); ++panel, x += kWidth * step) {
      const int64_t all = width(panel), known = std::min(all, columns_ - panel * kWidth);
      for (int64_t column = 0; column < all; column += 4)
        pack_columns(x + column * step, step, std::clamp<int64_t>(known - column, 0, 4), factor, data + column, all);
      data += rows_ * all;
    }
  }

 private:
  // Four columns, of which `known` are in x.
  void pack_columns(const float* x, int64_t step, int64_t known, float factor, float* data, int64_t data_step) const {
    int64_t row = 0;
#if QK_PATH != QK_PATH_SCALAR
    const __m128 factors = _mm_set1_ps(factor);
    for (; known == 4 && row + 4 <= rows_; row += 4) {
      __m128 a = _mm_loadu_ps(x + row), b = _mm_loadu_ps(x + step + row), c = _mm_loadu_ps(x + 2 * step + row),
             d = _mm_loadu_ps(x + 3 * step + row);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(data + row * data_step, _mm_mul_ps(a, factors));
      _mm_storeu_ps(data + (row + 1) * data_step, _mm_mul_ps(b, factors));
      _mm_storeu_ps(data + (row + 2) * data_step, _mm_mul_ps(c, factors));
      _mm_storeu_ps(data + (row + 3) * data_step, _mm_mul_ps(d, factors));
    }
#endif
    for (; row < rows_; ++row)
      for (int64_t column = 0; column < 4; ++column)
        data[row * data_step + column] = column < known ? x[column * step + row] * factor : 0.0f;
  }

  int64_t rows_, columns_;
};

// The first n scores become their exponentials, the rest up to `all` 0. Returns 1 / the sum.
inline float softmax(float* scores, int64_t n, int64_t all) {
  const F32 lowest = F32::set1(-std::numeric_limits<float>::infinity());
  F32 most = lowest;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = F32::load(scores + i, tail...);
    if constexpr (sizeof...(tail) > 0)
      most = max(most, select(F32::Mask::from_bits(static_cast<uint16_t>(bits_of(0xffff, tail...))), v, lowest));
    else
      most = max(most, v);
  });
  most = F32::set1(lane_max(most));
  Sum<F32> sum;
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const F32 v = exponential(F32::load(scores + i, tail...) - most);
    v.store(scores + i, tail...);
    if constexpr (sizeof...(tail) > 0)
      sum.add(F32::load(scores + i, tail...));
    else
      sum.add(v);
  });
  std::fill(scores + n, scores + all, 0.0f);
  return static_cast<float>(1 / sum.total());
}

// Rows `first` to `last` of a head.
void attend_rows(const Attention& a, int64_t n, int64_t head, int64_t first, int64_t last) {
  const Panels scores_of(a.q.size, a.keys), values_of(a.keys, a.v.size);
  const int64_t score_step = scores_of.padded(), value_step = values_of.padded();
  const int64_t fitting = kScoreBytes / static_cast<int64_t>(sizeof(float)) / score_step / kTileRows * kTileRows;
  const int64_t block = std::clamp<int64_t>(fitting, kTileRows, kBlockRows);
  static thread_local std::vector<float> memory;
  const size_t needed =
      static_cast<size_t>(scores_of.elements() + values_of.elements() + block * (score_step + value_step) + 16);
  if (memory.size() < needed) memory.resize(needed);
  float* keys = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  float *values = keys + scores_of.elements(), *scores = values + values_of.elements();
  float* results = scores + block * score_step;
  const int64_t key_head = head / (a.heads / a.heads_of_keys);
  scores_of.pack_transposed(a.k.at(n, key_head), a.k.row_step, a.scale, keys);
  values_of.pack(a.v.at(n, key_head), a.v.row_step, values);

  const auto tiles = [&](int64_t begin, int64_t end, auto f) {
    for (int64_t row = begin; row < end; row += kTileRows) {
      const int64_t behind = std::min(row + kTileRows, end);
      f(row, behind, a.causal ? std::min(behind, a.keys) : a.keys);
    }
  };
  for (int64_t begin = first; begin < last; begin += block) {
    const int64_t end = std::min(begin + block, last);
    const float* rows[kTileRows];
    for (int64_t panel = 0; panel < scores_of.count(); ++panel)
      tiles(begin, end, [&](int64_t row, int64_t behind, int64_t visible) {
        if (panel * kWidth >= visible) return;
        for (int64_t i = 0; i < kTileRows; ++i)
          rows[i] = a.q.at(n, head) + std::min(row + i, behind - 1) * a.q.row_step;
        scores_of.multiply(keys, panel, rows, a.q.size, scores + (row - begin) * score_step, score_step);
      });
    float shares[kBlockRows];
    tiles(begin, end, [&](int64_t row, int64_t behind, int64_t visible) {
      for (int64_t i = row; i < behind; ++i)
        shares[i - begin] =
            softmax(scores + (i - begin) * score_step, a.causal ? std::min(i + 1, a.keys) : a.keys, visible);
    });
    for (int64_t panel = 0; panel < values_of.count(); ++panel)
      tiles(begin, end, [&](int64_t row, int64_t behind, int64_t visible) {
        for (int64_t i = 0; i < kTileRows; ++i) rows[i] = scores + (std::min(row + i, behind - 1) - begin) * score_step;
        values_of.multiply(values, panel, rows, visible, results + (row - begin) * value_step, value_step);
      });
    for (int64_t row = begin; row < end; ++row) {
      const F32 share = F32::set1(shares[row - begin]);
      const float* from = results + (row - begin) * value_step;
      float* to = a.out + ((n * a.rows + row) * a.heads + head) * a.v.size;
      for_each_16(a.v.size, [&](int64_t i, auto... tail)
                                QK_INLINE { (F32::load(from + i, tail...) * share).store(to + i, tail...); });
    }
  }
}

}  // namespace

// Threads take heads; where these cannot be shared out evenly, parts of their rows: whole blocks, so that the rows of a
// tile are the same on any number of threads. An infinity in v reaches all rows of a tile, as 0 times it is NaN.
void attend(const Attention& a) {
  const int64_t heads = a.batch * a.heads, threads = torch::stable::get_num_threads();
  const int64_t blocks = (a.rows + kBlockRows - 1) / kBlockRows;
  const bool even = heads % threads == 0 || heads >= 4 * threads;
  const int64_t parts = even ? 1 : std::min(blocks, (4 * threads + heads - 1) / heads);
  const int64_t work = a.rows / parts * a.keys * (a.q.size + a.v.size);
  torch::stable::parallel_for(0, heads * parts, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts, part = i % parts;
      attend_rows(a, head / a.heads, head % a.heads, part * blocks / parts * kBlockRows,
                  std::min((part + 1) * blocks / parts * kBlockRows, a.rows));
    }
  });
}

}  // namespace qkernels::QK_NAMESPACE
