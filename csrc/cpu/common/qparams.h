// Granularity and parameters as CPU kernels take them: the runs of x, and the parameters of each channel.
#pragma once

#include "qparams_rule.h"
#include "runs.h"

namespace qkernels {

// Runs, and the channel of each.
struct IndexedRuns : Runs {
  std::vector<int64_t> index;  // the channel of each run of a period; empty: it is the run's number

  int64_t channel(int64_t run) const { return index.empty() ? run : index[run]; }
};

inline IndexedRuns indexed_runs(const Tensor& x, const Tensor& scale) {
  IndexedRuns runs{runs_of(x, scale), {}};
  if (runs.in_order()) return runs;
  runs.index.assign(1, 0);
  for (const Factor& f : runs.factors) {
    std::vector<int64_t> next;
    next.reserve(runs.index.size() * f.size);
    for (int64_t base : runs.index)
      for (int64_t i = 0; i < f.size; ++i) next.push_back(base + i * f.stride);
    runs.index = std::move(next);
  }
  return runs;
}

// The range of codes, and the parameters of each channel; T is the arithmetic type.
template <typename T>
struct Qparams {
  struct Params {
    T inv, scale, zero_point;
  };
  T quant_min, quant_max;
  Params first{};              // of the first channel
  std::vector<Params> others;  // of every channel; empty where there is one channel only

  const Params& of(int64_t channel) const { return others.empty() ? first : others[channel]; }
};

template <typename T, typename F>
void for_each_value(const Tensor& param, F f) {
  const Tensor dense = to_contiguous(param);
  const int64_t n = dense.numel();
  const void* data = dense.const_data_ptr();
  const auto visit = [&](auto tag) {
    const auto* p = static_cast<const decltype(tag)*>(data);
    for (int64_t i = 0; i < n; ++i) f(i, static_cast<T>(to_float(p[i])));
  };
  switch (dense.scalar_type()) {
    case ScalarType::Float: return visit(float{});
    case ScalarType::Double: return visit(double{});
    case ScalarType::Half: return visit(Half{});
    case ScalarType::BFloat16: return visit(BFloat16{});
    case ScalarType::Char: return visit(int8_t{});
    case ScalarType::Byte: return visit(uint8_t{});
    case ScalarType::Short: return visit(int16_t{});
    case ScalarType::Int: return visit(int32_t{});
    case ScalarType::Long: return visit(int64_t{});
    case ScalarType::Bool: return visit(bool{});
    default: fail("param: got a dtype that is no number; accepted: floating and integer dtypes");
  }
}

template <typename T>
Qparams<T> qparams(double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  check_range(quant_min, quant_max);
  check_zero_point(zero_point, quant_min, quant_max);
  Qparams<T> q{static_cast<T>(quant_min), static_cast<T>(quant_max), {}, {}};
  const T s = effective_scale(static_cast<T>(scale));
  q.first = {1 / s, s, static_cast<T>(zero_point)};
  return q;
}

// Checks no shapes and no range.
template <typename T>
Qparams<T> qparams_within(const Tensor& scale, const std::optional<Tensor>& zero_point, T quant_min, T quant_max) {
  Qparams<T> q{quant_min, quant_max, {}, {}};
  const int64_t channels = scale.numel();
  if (channels > 1) q.others.resize(channels);
  auto* params = channels > 1 ? q.others.data() : &q.first;
  for_each_value<T>(scale, [&](int64_t c, T value) {
    const T s = effective_scale(value);
    params[c] = {1 / s, s, 0};
  });
  if (zero_point) {
    const bool rounds = is_floating(zero_point->scalar_type());
    const bool shared = zero_point->numel() == 1;
    for_each_value<T>(*zero_point, [&](int64_t c, T value) {
      if (rounds) {
        value = static_cast<T>(std::nearbyint(value));
        value = value < q.quant_min ? q.quant_min : value > q.quant_max ? q.quant_max : value;
        if (value != value) value = static_cast<T>(NAN);
      }
      QK_CHECK(rounds || (q.quant_min <= value && value <= q.quant_max), "zero_point: got ",
               static_cast<int64_t>(value), "; accepted: quant_min to quant_max, ", q.quant_min, " to ", q.quant_max);
      for (int64_t i = shared ? 0 : c; i < (shared ? channels : c + 1); ++i) params[i].zero_point = value;
    });
  }
  return q;
}

template <typename T>
Qparams<T> qparams(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t quant_min,
                   int64_t quant_max) {
  check_range(quant_min, quant_max);
  check_scale(scale, zero_point, x);
  return qparams_within(scale, zero_point, static_cast<T>(quant_min), static_cast<T>(quant_max));
}

// For dequantize, which does not clamp: the zero point may have any value.
template <typename T>
Qparams<T> unclamped_qparams(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point) {
  check_scale(scale, zero_point, q);
  return qparams_within<T>(scale, zero_point, -INFINITY, INFINITY);
}

constexpr int64_t kGrain = 32768;  // elements per task: 3 µs of work, against 2.4 µs to start a second thread

}  // namespace qkernels
