// How a range of values becomes a scale and a zero point, on every device.
#pragma once

#include <cfloat>
#include <cmath>
#include <tuple>

#include "checks.h"

#ifdef __CUDACC__
#define QK_HOST_DEVICE __host__ __device__
#else
#define QK_HOST_DEVICE
#endif

namespace qkernels {

template <typename T>
QK_HOST_DEVICE T effective_scale(T scale) {
  if (!(scale >= 0)) return static_cast<T>(NAN);  // a canonical NaN, which the bf16 store relies on
  return scale < static_cast<T>(FLT_MIN) ? static_cast<T>(FLT_MIN) : scale;
}

// Uninitialised tensors for the scales and the zero points of x's groups.
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

// How a range [low, high] becomes a scale and a zero point.
struct QparamsRule {
  int64_t quant_min, quant_max;
  bool symmetric;
  double steps;    // symmetric: steps that cover max(|low|, |high|)
  int64_t middle;  // symmetric: the zero point
  double floor;    // smallest scale

  // Takes as many steps as fit on the shorter side of the middle, so that the largest value is never clipped.
  static QparamsRule dynamic(int64_t quant_min, int64_t quant_max, bool symmetric) {
    check_range(quant_min, quant_max);
    const int64_t steps = (quant_max - quant_min) / 2;
    return {quant_min, quant_max, symmetric, static_cast<double>(steps), quant_max - steps, FLT_MIN};
  }
  // The smallest scale is that of torch.ao's observers. If steps is 0, the range is asymmetric.
  static QparamsRule observed(int64_t quant_min, int64_t quant_max, double steps, int64_t middle) {
    check_range(quant_min, quant_max);
    return {quant_min, quant_max, steps != 0, steps, middle, FLT_EPSILON};
  }
};

// One step of an observer. An infinite running value means that there is none yet. The distance between two finite
// values may be larger than fp32 holds; the other formula avoids it.
QK_HOST_DEVICE inline float moving_average(float running, float batch, float momentum) {
  if (std::fabs(running) == INFINITY) return batch;
  const float distance = batch - running;
  if (std::fabs(distance) == INFINITY) return (1 - momentum) * running + momentum * batch;
  return running + momentum * distance;
}

// Finite ends of a range are limited to `top`, four roundings below the largest number. The scale may be rounded up,
// and even then its multiples must be finite.
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
  // Half the range divided by half the steps gives the same bits. The whole range may be larger than T holds.
  constexpr T half = static_cast<T>(0.5);
  T scale = (high * half - low * half) / ((quant_max - quant_min) * half);
  scale = scale < floor ? floor : scale;
  T zero_point = quant_min - static_cast<T>(std::nearbyint(low / scale));
  zero_point = zero_point > quant_min ? zero_point : quant_min;  // NaN too
  return {scale, zero_point > quant_max ? quant_max : zero_point};
}

}  // namespace qkernels
