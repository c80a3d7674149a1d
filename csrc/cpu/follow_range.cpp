// A learned scale and zero point that follow the range of x, on the CPU.
#include "cpu/common/ranges.h"

namespace qkernels {
namespace {

void check_followed(const Tensor& scale, const std::optional<Tensor>& zero_point, double up, double down,
                    const Tensor& x) {
  check_scale(scale, zero_point, x);
  QK_CHECK(scale.scalar_type() == ScalarType::Float && scale.is_contiguous(), "scale: got ",
           dtype_name(scale.scalar_type()), " of shape ", shape_of(scale), "; accepted: contiguous torch.float32");
  const std::pair<const char*, double> parts[] = {{"up", up}, {"down", down}};
  for (const auto& [name, part] : parts) QK_CHECK(0 <= part && part <= 1, name, ": got ", part, "; accepted: 0 to 1");
  if (!zero_point) return;
  const ScalarType dtype = zero_point->scalar_type();
  const bool whole = (up == 0 || up == 1) && (down == 0 || down == 1);
  QK_CHECK((is_floating(dtype) || (dtype == ScalarType::Int && whole)) && zero_point->is_contiguous() &&
               zero_point->numel() == scale.numel(),
           "zero_point: got ", dtype_name(dtype), " of shape ", shape_of(*zero_point), " with up ", up, " and down ",
           down, "; accepted: contiguous, of scale's shape ", shape_of(scale),
           " and a floating dtype, or torch.int32 where up and down are 0 or 1");
}

// As the reference does, it leaves a channel alone that holds only zeros or whose range is not finite.
void follow_range(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                  int64_t quant_max, bool symmetric, double up, double down) {
  check_floating("x", x);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  check_followed(scale, zero_point, up, down, x);
  if (x.numel() == 0) return;
  const Tensor dense = to_dense(x);
  const Ranges ranges = ranges_of(dense, indexed_runs(dense, scale));
  const int64_t channels = scale.numel();
  float* scales = static_cast<float*>(scale.mutable_data_ptr());
  std::vector<float> parts(channels), zero_points(channels);
  const auto moved = [](float from, float to, float part) { return part == 1 ? to : from + part * (to - from); };
  for (int64_t c = 0; c < channels; ++c) {
    const float low = ranges.low[c], high = ranges.high[c];
    if (!std::isfinite(low) || !std::isfinite(high) || (low == 0 && high == 0)) continue;
    const auto chosen = choose_qparams<float>(low, high, rule);
    parts[c] = static_cast<float>(chosen.scale > scales[c] ? up : down);
    zero_points[c] = chosen.zero_point;
    if (parts[c] != 0) scales[c] = moved(scales[c], chosen.scale, parts[c]);
  }
  if (!zero_point) return;
  const auto move_all = [&](auto* to) {
    using Z = std::remove_pointer_t<decltype(to)>;
    for (int64_t c = 0; c < channels; ++c) {
      if (parts[c] == 0) continue;
      to[c] = from_float<Z>(moved(static_cast<float>(to_float(to[c])), zero_points[c], parts[c]));
    }
  };
  if (zero_point->scalar_type() == ScalarType::Int) {
    move_all(static_cast<int32_t*>(zero_point->mutable_data_ptr()));
  } else {
    dispatch_floating("zero_point", *zero_point,
                      [&](auto tag) { move_all(static_cast<decltype(tag)*>(zero_point->mutable_data_ptr())); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("follow_range", TORCH_BOX(&follow_range)); }

}  // namespace qkernels
