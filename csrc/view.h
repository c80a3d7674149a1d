// What kernels on every device share: granularity as runs of elements in memory order, checks, choice of a range.
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>
#include <tuple>

#include "element.h"
#include "tensor.h"

#ifdef __CUDACC__
#define QK_HOST_DEVICE __host__ __device__
#else
#define QK_HOST_DEVICE
#endif

namespace qkernels {

// One level of the walk over x in memory order, from the outermost: `size` steps of `stride` elements of scale, where
// stride 0 means the same scale for all.
struct Factor {
  int64_t size, stride;
};

// x in memory order is a sequence of runs of `inner` elements that share one channel, i.e. one element of scale.
struct Runs {
  int64_t channels = 1;  // elements of scale
  int64_t period = 1;    // runs after which the pattern of channels repeats
  int64_t runs = 1;
  int64_t inner = 0;            // elements of a run
  std::vector<Factor> factors;  // of a period; the run's number in a period is the mixed-radix number of their steps

  bool in_order() const { return factors.size() <= 1; }  // the channel is the run's number in its period
};

// Where all of x shares one channel.
inline Runs one_run(const Tensor& x) {
  Runs runs;
  runs.inner = x.numel();
  return runs;
}

// x is dense. Any scale shape that divides x's, in any memory order of x.
inline Runs runs_of(const Tensor& x, const Tensor& scale) {
  Runs view = one_run(x);
  view.channels = scale.numel();
  const int64_t numel = x.numel();
  if (view.channels == 1 || numel == 0) return view;

  // Each dim of size n = s·b splits into s scaled steps of b elements. Walk them from the outermost in memory.
  std::vector<int64_t> scale_stride(scale.dim());
  int64_t step = 1;
  for (int64_t i = scale.dim(); i-- > 0;) {
    scale_stride[i] = step;
    step *= scale.sizes()[i];
  }
  std::vector<Factor>& factors = view.factors;
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
  return view;
}

template <typename T>
QK_HOST_DEVICE T effective_scale(T scale) {
  if (!(scale >= 0)) return static_cast<T>(NAN);  // a canonical one: the bf16 store relies on that
  return scale < static_cast<T>(FLT_MIN) ? static_cast<T>(FLT_MIN) : scale;
}

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

inline void check_range(int64_t quant_min, int64_t quant_max) {
  constexpr int64_t exact = int64_t{1} << 24;
  QK_CHECK(quant_min <= quant_max, "quant_min: got ", quant_min, ", above quant_max ", quant_max,
           "; accepted: at most quant_max");
  QK_CHECK(-exact <= quant_min && quant_max <= exact, "quant_min, quant_max: got ", quant_min, ", ", quant_max,
           "; accepted: ", -exact, " to ", exact, ", the integers that fp32 holds exactly");
}

// Here and below: `device` is that of x.
inline void check_param(const char* name, const Tensor& param, const Tensor& x, Device device) {
  check_device(name, param, device);
  check_granularity(name, param, x);
}

inline void check_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& x, Device device) {
  check_param("scale", scale, x, device);
  QK_CHECK(is_floating(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: a floating dtype");
  if (!zero_point) return;
  check_param("zero_point", *zero_point, x, device);
  QK_CHECK(zero_point->numel() == 1 || zero_point->numel() == scale.numel(), "zero_point: got shape ",
           shape_of(*zero_point), "; accepted: one element or scale's shape ", shape_of(scale));
}

inline void check_scale(const Tensor& scale, const std::optional<Tensor>& zero_point, const Tensor& x) {
  check_scale(scale, zero_point, x, device_of(x));
}

inline void check_zero_point(int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  QK_CHECK(quant_min <= zero_point && zero_point <= quant_max, "zero_point: got ", zero_point,
           "; accepted: quant_min to quant_max, ", quant_min, " to ", quant_max);
}

inline void check_grad(const Tensor& grad, const Tensor& x, Device device) {
  check_device("grad", grad, device);
  QK_CHECK(grad.scalar_type() == x.scalar_type(), "grad: got ", dtype_name(grad.scalar_type()),
           "; accepted: x's dtype, ", dtype_name(x.scalar_type()));
  bool same = grad.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = grad.sizes()[i] == x.sizes()[i];
  QK_CHECK(same, "grad: got shape ", shape_of(grad), "; accepted: x's shape ", shape_of(x));
}

inline void check_grad(const Tensor& grad, const Tensor& x) { check_grad(grad, x, device_of(x)); }

inline Tensor empty_mask(int64_t numel, Device device) { return empty({(numel + 7) / 8}, ScalarType::Byte, device); }

inline Tensor empty_mask(int64_t numel, const Tensor& x) { return empty_mask(numel, device_of(x)); }

// device: of grad.
inline void check_mask(const Tensor& mask, const Tensor& grad, Device device) {
  check_device("mask", mask, device);
  QK_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == (grad.numel() + 7) / 8,
           "mask: got ", dtype_name(mask.scalar_type()), " of shape ", shape_of(mask),
           "; accepted: contiguous torch.uint8, one bit for each of grad's ", grad.numel(), " elements");
}

inline void check_mask(const Tensor& mask, const Tensor& grad) { check_mask(mask, grad, device_of(grad)); }

inline void check_group_size(const Tensor& x, int64_t group_size) {
  check_floating("x", x);
  if (group_size == 0) return;
  QK_CHECK(x.dim() > 0, "x: got 0 dims; accepted: at least 1, or group_size None");
  const int64_t last = x.sizes()[x.dim() - 1];
  QK_CHECK(group_size == -1 || (group_size > 0 && last % group_size == 0), "group_size: got ", group_size,
           "; accepted: -1 (a row), None (the whole tensor), or a divisor of x's last dim ", last);
}

// Scale and zero point tensors of x's groups, empty as yet.
inline std::tuple<Tensor, Tensor> empty_qparams(const Tensor& x, int64_t group_size, Device device) {
  auto shape = to_vector(x.sizes());
  if (group_size == 0) std::fill(shape.begin(), shape.end(), 1);
  if (group_size == -1) shape.back() = 1;
  if (group_size > 0) shape.back() /= group_size;
  const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {empty(shape, dtype, device), empty(shape, ScalarType::Int, device)};
}

inline std::tuple<Tensor, Tensor> empty_qparams(const Tensor& x, int64_t group_size) {
  return empty_qparams(x, group_size, device_of(x));
}

// The statistics that an observer keeps and changes in place.
inline void check_statistics(const Tensor& running_min, const Tensor& running_max, const Tensor& scale,
                             const Tensor& zero_point, const Tensor& x, Device device) {
  const std::pair<const char*, const Tensor*> stats[] = {
      {"running_min", &running_min}, {"running_max", &running_max}, {"scale", &scale}};
  for (const auto& [name, stat] : stats) {
    check_param(name, *stat, x, device);
    QK_CHECK(stat->scalar_type() == ScalarType::Float && stat->is_contiguous() && stat->numel() == scale.numel(), name,
             ": got ", dtype_name(stat->scalar_type()), " of shape ", shape_of(*stat),
             "; accepted: contiguous torch.float32 of one shape for all statistics");
  }
  check_device("zero_point", zero_point, device);
  const ScalarType dtype = zero_point.scalar_type();
  QK_CHECK((dtype == ScalarType::Int || dtype == ScalarType::Long) && zero_point.is_contiguous() &&
               zero_point.numel() == scale.numel(),
           "zero_point: got ", dtype_name(dtype), " of shape ", shape_of(zero_point),
           "; accepted: contiguous torch.int32 or torch.int64 of scale's shape ", shape_of(scale));
}

inline void check_flag(const char* name, const Tensor& flag, Device device) {
  check_device(name, flag, device);
  QK_CHECK(flag.numel() == 1, name, ": got shape ", shape_of(flag), "; accepted: one element, on x's device");
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
  // With the floor of torch.ao's observers; steps 0: asymmetric.
  static QparamsRule observed(int64_t quant_min, int64_t quant_max, double steps, int64_t middle) {
    check_range(quant_min, quant_max);
    return {quant_min, quant_max, steps != 0, steps, middle, FLT_EPSILON};
  }
};

// One step of an observer; infinite: no value yet. Two finite values may lie further apart than fp32 goes.
QK_HOST_DEVICE inline float moving_average(float running, float batch, float momentum) {
  if (std::fabs(running) == INFINITY) return batch;
  const float distance = batch - running;
  if (std::fabs(distance) == INFINITY) return (1 - momentum) * running + momentum * batch;
  return running + momentum * distance;
}

// The end of a range; a finite one less than four roundings below the largest number, as it is there: else the multiple
// of a scale that was rounded up would be infinite where the end is not.
template <typename T>
struct Reach {
  static constexpr T last = static_cast<T>(std::is_same_v<T, double> ? DBL_MAX : FLT_MAX);
  static constexpr T top = last - last * static_cast<T>(0x1p-22);
};

template <typename T>
struct ChosenQparams {
  T scale, zero_point;
};

template <typename T>
QK_HOST_DEVICE ChosenQparams<T> choose_qparams(T low, T high, const QparamsRule& rule) {
  const T floor = static_cast<T>(rule.floor);
  low = low > 0 ? 0 : low;  // NaN stays
  high = high < 0 ? 0 : high;
  constexpr T top = Reach<T>::top, last = Reach<T>::last;
  if (low < -top && low >= -last) low = -top;
  if (high > top && high <= last) high = top;
  if (rule.symmetric) {
    const T amax = -low > high || low != low ? -low : high;
    const T scale = amax / static_cast<T>(rule.steps);
    return {scale < floor ? floor : scale, static_cast<T>(rule.middle)};
  }
  const T quant_min = static_cast<T>(rule.quant_min), quant_max = static_cast<T>(rule.quant_max);
  // Half the range over half the steps: the same bits, and what lies between two numbers of T may be none.
  constexpr T half = static_cast<T>(0.5);
  T scale = (high * half - low * half) / ((quant_max - quant_min) * half);
  scale = scale < floor ? floor : scale;
  T zero_point = quant_min - static_cast<T>(std::nearbyint(low / scale));
  zero_point = zero_point > quant_min ? zero_point : quant_min;  // NaN too
  return {scale, zero_point > quant_max ? quant_max : zero_point};
}

// Calls f with a value of x's storage type.
template <typename F>
void dispatch_floating(const char* name, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default:
      fail(name, ": got ", dtype_name(dtype),
           "; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16");
  }
}

template <typename F>
void dispatch_floating(const char* name, const Tensor& x, F f) {
  dispatch_floating(name, x.scalar_type(), f);
}

// Calls f with a value of the integer type that a tensor of codes holds.
template <typename F>
void dispatch_integer(const char* name, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Char: return f(int8_t{});
    case ScalarType::Byte: return f(uint8_t{});
    case ScalarType::Int: return f(int32_t{});
    default: fail(name, ": got ", dtype_name(dtype), "; accepted: torch.int8, torch.uint8, torch.int32");
  }
}

// That codes of type I hold the range.
template <typename I>
void check_codes_hold(ScalarType dtype, int64_t quant_min, int64_t quant_max) {
  using Limits = std::numeric_limits<I>;
  QK_CHECK(Limits::min() <= quant_min && quant_max <= Limits::max(), "quant_min, quant_max: got ", quant_min, ", ",
           quant_max, "; accepted: what ", dtype_name(dtype), " holds, ", int64_t{Limits::min()}, " to ",
           int64_t{Limits::max()});
}

template <typename S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace qkernels
