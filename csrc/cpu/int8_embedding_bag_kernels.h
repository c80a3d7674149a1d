// Sums and maxima of rows of codes, up to 128 columns at a time in registers, on one path.
#include <utility>

#include "cpu/common/vec.h"
#include "cpu/int8_embedding_bag.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int kVectors = 8;  // of sums in registers

// The last of N vectors has as many elements as `tail` says.
template <int N, BagOf of, typename... Tail>
inline void reduce_columns(const BagRow* rows, int64_t count, int64_t column, bool first, float* out, Tail... tail) {
  F32 acc[N];
  const auto each = [&](auto f) QK_INLINE {
    for (int v = 0; v < N - 1; ++v) f(v, column + v * 16);
    f(N - 1, column + (N - 1) * 16, tail...);
  };
  const F32 none = F32::set1(of == BagOf::largest ? -std::numeric_limits<float>::infinity() : 0.0f);
  each([&](int v, int64_t at, auto... rest) QK_INLINE { acc[v] = first ? none : F32::load(out + at, rest...); });
  for (int64_t r = 0; r < count; ++r) {
    const F32 scale = F32::set1(rows[r].scale);
    each([&](int v, int64_t at, auto... rest) QK_INLINE {
      const F32 codes = F32::load(rows[r].codes + at, rest...);
      if constexpr (of == BagOf::plain_sums) {
        acc[v] = acc[v] + codes * scale;
      } else {
        const F32 value = (codes - F32::set1(rows[r].zero_point)) * scale;
        if constexpr (of == BagOf::largest)
          acc[v] = select(is_nan(acc[v]), acc[v], max(acc[v], value));
        else
          acc[v] = acc[v] + value * F32::set1(rows[r].weight);
      }
    });
  }
  each([&](int v, int64_t at, auto... rest) QK_INLINE { acc[v].store(out + at, rest...); });
}

template <BagOf of, int... N>
void reduce_any(std::integer_sequence<int, N...>, const BagRow* rows, int64_t count, int64_t columns, bool first,
                float* out) {
  using Whole = void (*)(const BagRow*, int64_t, int64_t, bool, float*);
  using Partial = void (*)(const BagRow*, int64_t, int64_t, bool, float*, int64_t);
  constexpr Whole kWhole[] = {reduce_columns<N + 1, of>...};
  constexpr Partial kPartial[] = {reduce_columns<N + 1, of, int64_t>...};
  for (int64_t column = 0; column < columns; column += kVectors * 16) {
    const int64_t width = std::min<int64_t>(columns - column, kVectors * 16), vectors = (width + 15) / 16;
    if (width % 16 == 0)
      kWhole[vectors - 1](rows, count, column, first, out);
    else
      kPartial[vectors - 1](rows, count, column, first, out, width % 16);
  }
}

void reduce(const BagRow* rows, int64_t count, int64_t columns, BagOf of, bool first, float* out) {
  constexpr auto kWidths = std::make_integer_sequence<int, kVectors>();
  switch (of) {
    case BagOf::plain_sums: return reduce_any<BagOf::plain_sums>(kWidths, rows, count, columns, first, out);
    case BagOf::largest: return reduce_any<BagOf::largest>(kWidths, rows, count, columns, first, out);
    default: return reduce_any<BagOf::sums>(kWidths, rows, count, columns, first, out);
  }
}

constexpr BagKernels kBagKernels = {reduce};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
