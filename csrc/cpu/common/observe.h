// The moving-average observer: from each channel's range in a batch to statistics, scale and zero point.
#pragma once

#include "cpu/common/ranges.h"

namespace qkernels {

// Updates the four statistics in place. They are contiguous with one element per channel, and fp32, zero_point int32 or
// int64. A channel whose range is not finite keeps what it has.
inline void observe(const Ranges& ranges, float momentum, const QparamsRule& rule, const Tensor& running_min,
                    const Tensor& running_max, const Tensor& scale, const Tensor& zero_point) {
  float* min_stat = static_cast<float*>(running_min.mutable_data_ptr());
  float* max_stat = static_cast<float*>(running_max.mutable_data_ptr());
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  const bool narrow = zero_point.scalar_type() == ScalarType::Int;
  void* zero_points = zero_point.mutable_data_ptr();
  const auto average = [momentum](float running, float batch) { return moving_average(running, batch, momentum); };
  for (size_t c = 0; c < ranges.low.size(); ++c) {
    const float low = ranges.low[c], high = ranges.high[c];
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    min_stat[c] = average(min_stat[c], low);
    max_stat[c] = average(max_stat[c], high);
    const auto chosen = choose_qparams<float>(min_stat[c], max_stat[c], rule);
    scales[c] = chosen.scale;
    if (narrow) {
      static_cast<int32_t*>(zero_points)[c] = static_cast<int32_t>(chosen.zero_point);
    } else {
      static_cast<int64_t*>(zero_points)[c] = static_cast<int64_t>(chosen.zero_point);
    }
  }
}

}  // namespace qkernels
