// quantize_dynamic_transposed. One pass over x [rows, columns] finds the magnitudes of all rows and columns. A second
// pass writes the codes of both outputs.
#include "cpu/common/ranges_kernels.h"
#include "cpu/stochastic_kernels.h"

namespace qkernels::QK_NAMESPACE {

constexpr int64_t kSquare = 64;  // rows and columns of a tile, which so writes whole cache lines of both outputs

// Turns magnitudes into the scales that cover them, and gives their reciprocals. The length is a multiple of 16.
template <typename T>
void scales_of(std::vector<T>& values, const QparamsRule& rule, std::vector<T>& inverse) {
  using V = typename VecOf<T>::type;
  const V floor = V::set1(static_cast<T>(rule.floor)), steps = V::set1(static_cast<T>(rule.steps));
  for (size_t i = 0; i < values.size(); i += 16) {
    const V scale = max(floor, within_reach(V::load(&values[i])) / steps);  // keeps a NaN
    scale.store(&values[i]);
    (V::set1(1) / scale).store(&inverse[i]);
  }
}

// The largest |x| of each of R rows; `columns` becomes the largest |x| of each column in these and the earlier rows.
template <int R, typename S>
void magnitudes_of_rows(const S* x, int64_t length, Arithmetic<S>* rows, Arithmetic<S>* columns) {
  using V = typename VecOf<S>::type;
  V row[R];
  for (V& acc : row) acc = zero<V>();
  for_each_16(length, [&](int64_t c, auto... tail) {
    V column = V::load(columns + c);
    for (int r = 0; r < R; ++r) {
      const V v = V::load(x + r * length + c, tail...);
      row[r] = max_abs(row[r], v);
      column = max_abs(column, v);
    }
    column.store(columns + c);
  });
  for (int r = 0; r < R; ++r) rows[r] = lane_max_abs(row[r]);
}

template <typename S>
void magnitudes(const S* x, int64_t height, int64_t length, std::vector<Arithmetic<S>>& rows,
                std::vector<Arithmetic<S>>& columns) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  // Each piece of rows has its own maxima of the columns. The result does not depend on the number of pieces.
  const int64_t threads = torch::stable::get_num_threads(), width = static_cast<int64_t>(columns.size());
  const int64_t piece = std::max<int64_t>({1, (height + 4 * threads - 1) / (4 * threads), kGrain / (length + 1)});
  const int64_t pieces = (height + piece - 1) / piece;
  std::vector<T> partial(static_cast<size_t>(pieces * width));
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t last = std::min(height, (p + 1) * piece);
      int64_t r = p * piece;
      for (; r + 4 <= last; r += 4) magnitudes_of_rows<4>(x + r * length, length, &rows[r], &partial[p * width]);
      for (; r < last; ++r) magnitudes_of_rows<1>(x + r * length, length, &rows[r], &partial[p * width]);
    }
  });
  for (int64_t c = 0; c < width; c += 16) {
    V acc = zero<V>();
    for (int64_t p = 0; p < pieces; ++p) acc = max_abs(acc, V::load(&partial[p * width + c]));
    acc.store(&columns[c]);
  }
}

// Transposes 16 x 16 bytes; rows of both lie kSquare bytes apart.
inline void transpose(const int8_t* from, int8_t* to) {
#if QK_PATH != QK_PATH_SCALAR
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(from + i * kSquare));
  // Interleaving rows i and i + 8 four times transposes 16 x 16 bytes.
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
  }
  for (int i = 0; i < 16; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(to + i * kSquare), a[i]);
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * kSquare + i] = from[i * kSquare + j];
#endif
}

// What a tile is made from: x and the reciprocals of its scales; and both outputs, with the strides of their rows.
template <typename S>
struct Squares {
  const S* x;
  int64_t rows, columns;
  const Arithmetic<S>*row_inverse, *column_inverse;
  Arithmetic<S> quant_max;
  int8_t* q;
  int64_t q_stride;
  int8_t* q_t;
  int64_t q_t_stride;
};

// Quantizes one tile. Without a philox it rounds to nearest.
template <typename S>
void quantize_square(const Squares<S>& t, int64_t first_row, int64_t first_column, const Philox* philox) {
  using V = typename VecOf<S>::type;
  const int64_t height = std::min(kSquare, t.rows - first_row), width = std::min(kSquare, t.columns - first_column);
  const V high = V::set1(t.quant_max), low = zero<V>() - high;
  const auto code_of = [&](V q) {
    const V code = min(high, max(low, q));
    return select(is_nan(code), zero<V>(), code);
  };
  alignas(64) int8_t block[kSquare * kSquare], turned[kSquare * kSquare];
  if (height < kSquare) std::memset(block + height * kSquare, 0, (kSquare - height) * kSquare);
  const auto fill = [&](auto rounded) {
    for (int64_t r = 0; r < height; ++r) {
      const int64_t at = (first_row + r) * t.columns + first_column;
      int8_t* q = t.q + (first_row + r) * t.q_stride + first_column;
      const V inverse = V::set1(t.row_inverse[first_row + r]);
      for_each_16(width, [&](int64_t c, auto... tail) {
        const V v = V::load(t.x + at + c, tail...);
        const V by_column = v * V::load(t.column_inverse + first_column + c);
        const auto [code, code_t] = rounded(at + c, v * inverse, by_column);
        code_of(code).store(q + c, tail...);
        code_of(code_t).store(block + r * kSquare + c);
      });
    }
  };
  if (philox) {
    Uniforms uniforms(*philox, width);
    fill([&](int64_t i, V steps, V steps_t) {
      const V u = uniforms.template at<V>(i);  // one number for both: each code alone is right on average
      return std::pair(round_stochastically(steps, u), round_stochastically(steps_t, u));
    });
  } else {
    fill([](int64_t, V steps, V steps_t) { return std::pair(round(steps), round(steps_t)); });
  }
  for (int64_t c = 0; c < width; c += 16)
    for (int64_t r = 0; r < height; r += 16) transpose(block + r * kSquare + c, turned + c * kSquare + r);
  for (int64_t c = 0; c < width; ++c)
    std::memcpy(t.q_t + (first_column + c) * t.q_t_stride + first_row, turned + c * kSquare,
                static_cast<size_t>(height));
}

template <typename S>
void quantize_transposed(const S* x, int64_t rows, int64_t columns, const QparamsRule& rule, const Philox* philox,
                         int8_t* q, int64_t q_stride, Arithmetic<S>* scale, int8_t* q_t, int64_t q_t_stride,
                         Arithmetic<S>* scale_t) {
  using T = Arithmetic<S>;
  const auto whole_vectors = [](int64_t n) { return std::vector<T>(static_cast<size_t>((n + 15) / 16 * 16)); };
  std::vector<T> row = whole_vectors(rows), column = whole_vectors(columns);
  if (rows && columns) magnitudes(x, rows, columns, row, column);
  std::vector<T> row_inverse(row.size()), column_inverse(column.size());
  scales_of(row, rule, row_inverse);
  scales_of(column, rule, column_inverse);
  std::copy_n(row.data(), rows, scale);
  std::copy_n(column.data(), columns, scale_t);
  const Squares<S> squares{
      x, rows,     columns, row_inverse.data(), column_inverse.data(), static_cast<T>(rule.quant_max),
      q, q_stride, q_t,     q_t_stride};
  const int64_t across = (columns + kSquare - 1) / kSquare, down = (rows + kSquare - 1) / kSquare;
  torch::stable::parallel_for(0, across * down, kGrain / (kSquare * kSquare), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) quantize_square(squares, i / across * kSquare, i % across * kSquare, philox);
  });
}

}  // namespace qkernels::QK_NAMESPACE
