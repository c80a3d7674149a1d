// A moving-average observer and fake quantization in one op.
#include "ops.cuh"
#include "ranges.cuh"

namespace qkernels {
namespace {

// Writes a zero point to an int32 or int64 tensor.
struct IntOutput {
  void* data;
  bool wide;
  __device__ void set(int64_t i, int64_t value) const {
    if (wide) {
      static_cast<int64_t*>(data)[i] = value;
    } else {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
    }
  }
};

// Moves a channel's running minimum and maximum towards its range in x, and writes the scale and the zero point that
// they give.
struct Observe {
  QparamsRule rule;
  Flag observer_on;
  float *running_min, *running_max, *scale;
  IntOutput zero_point;
  float momentum;

  __device__ __forceinline__ bool wanted() const { return observer_on.is_set(); }
  template <typename T>
  __device__ void operator()(int64_t channel, T least, T most) const {
    const float low = static_cast<float>(least), high = static_cast<float>(most);
    if (!(fabsf(low) <= FLT_MAX && fabsf(high) <= FLT_MAX)) return;  // NaN and infinity change nothing
    const float new_low = moving_average(running_min[channel], low, momentum);
    const float new_high = moving_average(running_max[channel], high, momentum);
    running_min[channel] = new_low;
    running_max[channel] = new_high;
    const auto chosen = choose_qparams<float>(new_low, new_high, rule);
    scale[channel] = chosen.scale;
    zero_point.set(channel, static_cast<int64_t>(chosen.zero_point));
  }
};

std::tuple<Tensor, Tensor> observe_fake_quantize(const Tensor& x, const Tensor& observer_on,
                                                 const Tensor& fake_quant_on, const Tensor& running_min,
                                                 const Tensor& running_max, const Tensor& scale,
                                                 const Tensor& zero_point, double averaging_const, int64_t quant_min,
                                                 int64_t quant_max, double symmetric_steps,
                                                 int64_t symmetric_zero_point) {
  check_floating("x", x);
  const auto rule = QparamsRule::observed(quant_min, quant_max, symmetric_steps, symmetric_zero_point);
  const Gpu gpu(x);
  check_statistics(running_min, running_max, scale, zero_point, x, gpu.device());
  check_flag("observer_on", observer_on, gpu.device());
  check_flag("fake_quant_on", fake_quant_on, gpu.device());
  Tensor y = empty_dense_like(x, gpu.device()), mask = empty_mask(x.numel(), gpu.device());
  if (x.numel() == 0) return {y, mask};
  const Tensor dense = in_layout_of(x, y);
  dispatch_floating("x", dense, [&](auto tag) {
    using S = decltype(tag);
    const RangeOp<S, Observe> op{
        static_cast<const S*>(dense.const_data_ptr()),
        {rule, Flag(observer_on), static_cast<float*>(running_min.mutable_data_ptr()),
         static_cast<float*>(running_max.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()),
         IntOutput{zero_point.mutable_data_ptr(), zero_point.scalar_type() == ScalarType::Long},
         static_cast<float>(averaging_const)}};
    reduce_channels(gpu, op, Qparams<Arithmetic<S>>{}, runs_of(dense, scale), dense.numel(), is_aligned({op.x}));
  });
  fake_quantize_into(gpu, dense, scale, zero_point, quant_min, quant_max, y, &mask, Flag(fake_quant_on));
  return {y, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize)); }

}  // namespace qkernels
