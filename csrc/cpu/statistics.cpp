// Calibration statistics on the CPU: checks and memory layout. The kernels are in statistics_kernels.h.
#include <mutex>
#include <tuple>

#include "cpu/common/qparams.h"

#define QK_BODY "cpu/statistics_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

template <typename T>
std::vector<T> values_of(const Tensor& param) {
  std::vector<T> values(param.numel());
  for_each_value<T>(param, [&](int64_t i, T value) { values[i] = value; });
  return values;
}

// The runs of a period sorted by channel, and where those of each channel begin.
std::pair<std::vector<int64_t>, std::vector<int64_t>> runs_by_channel(const IndexedRuns& runs) {
  std::vector<int64_t> first(runs.channels + 1), order(runs.period);
  for (int64_t run = 0; run < runs.period; ++run) ++first[runs.channel(run) + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t run = 0; run < runs.period; ++run) order[next[runs.channel(run)]++] = run;
  return {order, first};
}

Tensor zeros(std::vector<int64_t> shape, int64_t last) {
  shape.push_back(last);
  Tensor t = empty(shape, ScalarType::Long);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, t.numel() * sizeof(int64_t));
  return t;
}

std::tuple<Tensor, Tensor> histogram(const Tensor& x_any, const Tensor& low, const Tensor& high, int64_t bins) {
  check_floating("x", x_any);
  constexpr int64_t most = int64_t{1} << 20;
  QK_CHECK(1 <= bins && bins <= most, "bins: got ", bins, "; accepted: 1 to ", most);
  const std::pair<const char*, const Tensor*> ends[] = {{"low", &low}, {"high", &high}};
  for (const auto& [name, end] : ends) {
    check_param(name, *end, x_any, device_of(x_any));
    QK_CHECK(is_floating(end->scalar_type()), name, ": got ", dtype_name(end->scalar_type()),
             "; accepted: a floating dtype");
  }
  QK_CHECK(to_vector(high.sizes()) == to_vector(low.sizes()), "high: got shape ", shape_of(high),
           "; accepted: low's shape ", shape_of(low));
  const Tensor x = to_dense(x_any);
  const int64_t numel = x.numel();
  Tensor counts = zeros(to_vector(low.sizes()), bins), outside = zeros(to_vector(low.sizes()), 3);
  if (numel == 0) return {counts, outside};
  const IndexedRuns runs = indexed_runs(x, low);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto lows = values_of<Arithmetic<S>>(low), highs = values_of<Arithmetic<S>>(high);
    const auto [order, first] = runs_by_channel(runs);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    int64_t* inside = static_cast<int64_t*>(counts.mutable_data_ptr());
    int64_t* rest = static_cast<int64_t*>(outside.mutable_data_ptr());
    const auto &sorted = order, &starts = first;  // a structured binding cannot be captured
    QK_DISPATCH_ISA(histogram(runs, numel, in, lows.data(), highs.data(), bins, sorted, starts, inside, rest));
  });
  return {counts, outside};
}

Tensor quantization_errors(const Tensor& x_any, const Tensor& scale, std::optional<Tensor> zero_point,
                           int64_t quant_min, int64_t quant_max) {
  check_floating("x", x_any);
  check_range(quant_min, quant_max);
  check_cpu("scale", scale);
  QK_CHECK(is_floating(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: a floating dtype");
  QK_CHECK(scale.dim() > 0, "scale: got 0 dims; accepted: a first dim for the candidates, then the granularity");
  if (zero_point) {
    check_cpu("zero_point", *zero_point);
    QK_CHECK(to_vector(zero_point->sizes()) == to_vector(scale.sizes()), "zero_point: got shape ",
             shape_of(*zero_point), "; accepted: scale's shape ", shape_of(scale));
  }
  const auto shape = to_vector(scale.sizes());
  const Tensor one = empty({shape.begin() + 1, shape.end()}, ScalarType::Byte);  // for its shape alone
  check_granularity("scale[0]", one, x_any);
  const Tensor x = to_dense(x_any);
  const int64_t numel = x.numel();
  Tensor errors = empty(shape, ScalarType::Double);
  double* sums = static_cast<double*>(errors.mutable_data_ptr());
  std::fill(sums, sums + errors.numel(), 0.0);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const auto q = qparams_within(scale, zero_point, static_cast<T>(quant_min), static_cast<T>(quant_max));
    if (numel == 0 || errors.numel() == 0) return;
    const IndexedRuns runs = indexed_runs(x, one);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    QK_DISPATCH_ISA(quantization_errors(runs, q, numel, in, shape[0], sums));
  });
  return errors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("histogram", TORCH_BOX(&histogram));
  m.impl("quantization_errors", TORCH_BOX(&quantization_errors));
}

}  // namespace qkernels
