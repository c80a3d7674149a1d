// A moving-average observer and fake quantization in one op, on the CPU.
#include "cpu/common/observe.h"
#include "cpu/common/ops.h"

namespace qkernels {
namespace {

bool is_set(const Tensor& flag) {
  bool set = false;
  for_each_value<double>(flag, [&](int64_t, double value) { set = value != 0; });
  return set;
}

std::tuple<Tensor, Tensor> observe_fake_quantize(const Tensor& x, const Tensor& observer_on,
                                                 const Tensor& fake_quant_on, const Tensor& running_min,
                                                 const Tensor& running_max, const Tensor& scale,
                                                 const Tensor& zero_point, double averaging_const, int64_t quant_min,
                                                 int64_t quant_max, double symmetric_steps,
                                                 int64_t symmetric_zero_point) {
  check_floating("x", x);
  check_range(quant_min, quant_max);
  const Device device = device_of(x);
  check_statistics(running_min, running_max, scale, zero_point, x, device);
  check_flag("observer_on", observer_on, device);
  check_flag("fake_quant_on", fake_quant_on, device);
  const int64_t numel = x.numel();
  if (is_set(observer_on) && numel) {
    const auto rule = QparamsRule::observed(quant_min, quant_max, symmetric_steps, symmetric_zero_point);
    const Tensor dense = to_dense(x);
    observe(ranges_of(dense, indexed_runs(dense, scale)), static_cast<float>(averaging_const), rule, running_min,
            running_max, scale, zero_point);
  }
  Tensor y = empty_dense_like(x), mask = empty_mask(numel, x);
  if (is_set(fake_quant_on)) {
    fake_quantize_into(x, scale, zero_point, quant_min, quant_max, y, &mask);
  } else {
    torch::stable::copy_(y, x);
    if (numel) std::memset(mask.mutable_data_ptr(), 0xff, mask.numel());
  }
  return {y, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("observe_fake_quantize", TORCH_BOX(&observe_fake_quantize)); }

}  // namespace qkernels
