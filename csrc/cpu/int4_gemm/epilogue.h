// From the scaled sums of a tile to outputs.
#include "cpu/common/vec.h"
#include "cpu/int4_gemm/int4_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

template <typename T>
inline void store_row(F32 v, int64_t n, T* out) {
  if constexpr (std::is_same_v<T, BFloat16>)
    v = select(is_nan(v), F32::set1(std::numeric_limits<float>::quiet_NaN()), v);
  if (n == 16)
    v.store(out);
  else
    v.store(out, n);
}

// Turns y[rows][32] into outputs.
inline void finish(const float* y, int64_t rows, int64_t first_row, const Int4Output& o) {
  for (int64_t h = 0; h < kPanel && h < o.channels; h += 16) {
    const int64_t n = std::min<int64_t>(16, o.channels - h);
    auto channel_values = [&](const float* values) {
      return n == 16 ? F32::load(values + h) : F32::load(values + h, n);
    };
    const F32 bias = o.bias ? channel_values(o.bias) : F32::set1(0);
    const F32 weight_sum = o.zero_point ? channel_values(o.weight_sum) : F32::set1(0);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r, at = row * o.row_stride + h;
      F32 v = F32::load(y + r * kPanel + h);
      if (o.zero_point) v = v - F32::set1(static_cast<float>(o.zero_point[row * o.zero_point_step])) * weight_sum;
      if (o.scale) v = v * F32::set1(o.scale[row * o.scale_step]);
      if (o.bias) v = v + bias;
      switch (o.type) {
        case Element::bf16: store_row(v, n, static_cast<BFloat16*>(o.out) + at); break;
        case Element::f16: store_row(v, n, static_cast<Half*>(o.out) + at); break;
        default: store_row(v, n, static_cast<float*>(o.out) + at);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
