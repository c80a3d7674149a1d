// From (x, scale, zero_point) to what kernels walk: runs of elements in memory order and the parameters of each.
#pragma once

#include <cfloat>
#include <cmath>

#include "element.h"
#include "tensor.h"

namespace qkernels {

// x in memory order is a sequence of runs of `inner` elements that share one channel, i.e. one element of scale.
struct View {
  int64_t channels = 1;  // elements of scale
  int64_t period = 1;    // runs after which the pattern of channels repeats
  int64_t runs = 1;
  int64_t inner = 0;           // elements of a run
  std::vector<int64_t> index;  // channel of each run of a period; empty: the run's number itself

  int64_t channel(int64_t run) const { return index.empty() ? run : index[run]; }
};

inline void check_granularity(const char* name, const Tensor& param, const Tensor& x) {
  if (param.numel() == 1) return;
  bool divides = param.dim() == x.dim();
  for (int64_t i = 0; divides && i < x.dim(); ++i) {
    const int64_t p = param.sizes()[i], n = x.sizes()[i];
    divides = p == n || (p != 0 && n % p == 0);
  }
  QK_CHECK(divides, name, ": got shape ", shape_of(param), "; accepted: one element, or ", x.dim(),
           " dims that each divide x's shape ", shape_of(x));
}

// x is dense. Any scale shape that divides x's, in any memory order of x.
inline View view_of(const Tensor& x, const Tensor& scale) {
  View view;
  view.channels = scale.numel();
  const int64_t numel = x.numel();
  view.inner = numel;
  if (view.channels == 1 || numel == 0) return view;

  // Each dim of size n = s·b splits into s scaled steps of b elements. Walk them from the outermost in memory.
  struct Factor {
    int64_t size, stride;  // stride: in elements of scale; 0: the same scale for all
  };
  std::vector<int64_t> scale_stride(scale.dim());
  int64_t step = 1;
  for (int64_t i = scale.dim(); i-- > 0;) {
    scale_stride[i] = step;
    step *= scale.sizes()[i];
  }
  std::vector<Factor> factors;
  const auto push = [&](int64_t size, int64_t stride) {
    if (size == 1) return;
    if (!factors.empty() && factors.back().stride == size * stride) {
      factors.back() = {factors.back().size * size, stride};
    } else {
      factors.push_back({size, stride});
    }
  };
  for (int64_t d : storage_order(x)) {
    const int64_t s = scale.sizes()[d];
    if (s > 1) push(s, scale_stride[d]);
    push(x.sizes()[d] / s, 0);
  }
  view.inner = 1;
  if (factors.back().stride == 0) {
    view.inner = factors.back().size;
    factors.pop_back();
  }
  view.runs = numel / view.inner;
  view.period = view.runs;
  if (factors.front().stride == 0) {
    view.period /= factors.front().size;
    factors.erase(factors.begin());
  }
  if (factors.size() == 1 && factors[0].stride == 1) return view;
  view.index.assign(1, 0);
  for (const Factor& f : factors) {
    std::vector<int64_t> next;
    next.reserve(view.index.size() * f.size);
    for (int64_t base : view.index)
      for (int64_t i = 0; i < f.size; ++i) next.push_back(base + i * f.stride);
    view.index = std::move(next);
  }
  return view;
}

template <typename T>
T effective_scale(T scale) {
  if (!(scale >= 0)) return static_cast<T>(NAN);  // a canonical one: the bf16 store relies on that
  return scale < static_cast<T>(FLT_MIN) ? static_cast<T>(FLT_MIN) : scale;
}

// What every kernel needs to know of one call; T is the arithmetic type.
template <typename T>
struct Quantizer {
  struct Params {
    T inv, scale, zero_point;
  };
  T quant_min, quant_max;
  Params first{};              // of channel 0: all there is per tensor
  std::vector<Params> others;  // of every channel, where there is more than one

  const Params& of(int64_t channel) const { return others.empty() ? first : others[channel]; }
};

template <typename T, typename F>
void for_each_value(const Tensor& param, F f) {
  const Tensor dense = to_contiguous(param);
  const int64_t n = dense.numel();
  const void* data = dense.const_data_ptr();
  const auto walk = [&](auto tag) {
    const auto* p = static_cast<const decltype(tag)*>(data);
    for (int64_t i = 0; i < n; ++i) f(i, static_cast<T>(to_float(p[i])));
  };
  switch (dense.scalar_type()) {
    case ScalarType::Float: return walk(float{});
    case ScalarType::Double: return walk(double{});
    case ScalarType::Half: return walk(Half{});
    case ScalarType::BFloat16: return walk(BFloat16{});
    case ScalarType::Char: return walk(int8_t{});
    case ScalarType::Byte: return walk(uint8_t{});
    case ScalarType::Short: return walk(int16_t{});
    case ScalarType::Int: return walk(int32_t{});
    case ScalarType::Long: return walk(int64_t{});
    case ScalarType::Bool: return walk(bool{});
    default: fail("param: got a dtype that is no number; accepted: floating and integer dtypes");
  }
}

inline void check_range(int64_t quant_min, int64_t quant_max) {
  constexpr int64_t exact = int64_t{1} << 24;
  QK_CHECK(quant_min <= quant_max, "quant_min: got ", quant_min, ", above quant_max ", quant_max,
           "; accepted: at most quant_max");
  QK_CHECK(-exact <= quant_min && quant_max <= exact, "quant_min, quant_max: got ", quant_min, ", ", quant_max,
           "; accepted: ", -exact, " to ", exact, ", the integers that fp32 holds exactly");
}

inline void check_param(const char* name, const Tensor& param, const Tensor& x) {
  QK_CHECK(param.is_cpu(), name, ": got a tensor on another device; accepted: x's device, cpu");
  check_granularity(name, param, x);
}

inline void check_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& x) {
  check_param("scale", scale, x);
  QK_CHECK(is_floating(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: a floating dtype");
  if (!zero_point) return;
  check_param("zero_point", *zero_point, x);
  QK_CHECK(zero_point->numel() == 1 || zero_point->numel() == scale.numel(), "zero_point: got shape ",
           shape_of(*zero_point), "; accepted: one element or scale's shape ", shape_of(scale));
}

template <typename T>
Quantizer<T> quantizer(double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  check_range(quant_min, quant_max);
  QK_CHECK(quant_min <= zero_point && zero_point <= quant_max, "zero_point: got ", zero_point,
           "; accepted: quant_min to quant_max, ", quant_min, " to ", quant_max);
  Quantizer<T> q{static_cast<T>(quant_min), static_cast<T>(quant_max), {}, {}};
  const T s = effective_scale(static_cast<T>(scale));
  q.first = {1 / s, s, static_cast<T>(zero_point)};
  return q;
}

// Fills in the parameters of every channel; `q` holds the range.
template <typename T>
Quantizer<T> quantizer_of(const Tensor& scale, const std::optional<Tensor>& zero_point, Quantizer<T> q) {
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
Quantizer<T> quantizer(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t quant_min,
                       int64_t quant_max) {
  check_range(quant_min, quant_max);
  check_scale(scale, zero_point, x);
  return quantizer_of<T>(scale, zero_point, {static_cast<T>(quant_min), static_cast<T>(quant_max), {}, {}});
}

// For dequantize: no range to clamp to, and a zero point of any value.
template <typename T>
Quantizer<T> dequantizer(const Tensor& q, const Tensor& scale, const std::optional<Tensor>& zero_point) {
  check_scale(scale, zero_point, q);
  return quantizer_of<T>(scale, zero_point, {-INFINITY, INFINITY, {}, {}});
}

// How a range [low, high] becomes a scale and a zero point.
struct QparamsRule {
  int64_t quant_min, quant_max;
  bool symmetric;
  double steps;    // symmetric: steps that cover max(|low|, |high|)
  int64_t middle;  // symmetric: the zero point
  double floor;    // smallest scale

  // As many steps as fit on the shorter side of the middle: the largest value is never clipped.
  static QparamsRule dynamic(int64_t quant_min, int64_t quant_max, bool symmetric) {
    check_range(quant_min, quant_max);
    const int64_t steps = (quant_max - quant_min) / 2;
    return {quant_min, quant_max, symmetric, static_cast<double>(steps), quant_max - steps, FLT_MIN};
  }
};

template <typename T>
struct ChosenQparams {
  T scale, zero_point;
};

template <typename T>
ChosenQparams<T> choose_qparams(T low, T high, const QparamsRule& rule) {
  const T floor = static_cast<T>(rule.floor);
  low = low > 0 ? 0 : low;  // NaN stays
  high = high < 0 ? 0 : high;
  if (rule.symmetric) {
    const T amax = -low > high || low != low ? -low : high;
    const T scale = amax / static_cast<T>(rule.steps);
    return {scale < floor ? floor : scale, static_cast<T>(rule.middle)};
  }
  const T quant_min = static_cast<T>(rule.quant_min), quant_max = static_cast<T>(rule.quant_max);
  T scale = (high - low) / (quant_max - quant_min);
  scale = scale < floor ? floor : scale;
  T zero_point = quant_min - static_cast<T>(std::nearbyint(low / scale));
  zero_point = zero_point > quant_min ? zero_point : quant_min;  // NaN too
  return {scale, zero_point > quant_max ? quant_max : zero_point};
}

// Calls f with a value of x's storage type.
template <typename F>
void dispatch_floating(const char* name, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: check_floating(name, x);
  }
}

template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int64_t kGrain = 32768;  // elements per task: 3 µs of work, against 2.4 µs to start a second thread

}  // namespace qkernels
