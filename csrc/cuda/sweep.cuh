// Elementwise kernels over a tensor of any granularity: parameters of each channel, and the walk in memory order.
#pragma once

#include "common.cuh"

namespace qkernels {

template <typename T>
struct Params {
  T inv, scale, zero_point;
};

// x / scale + zero_point, rounded but not clamped.
template <typename T>
__device__ __forceinline__ T steps_of(T value, const Params<T>& p) {
  return round_even(value * p.inv) + p.zero_point;
}

template <typename T>
__device__ __forceinline__ T fake_quantized(T steps, const Params<T>& p, T low, T high) {
  return (clamp(steps, low, high) - p.zero_point) * p.scale;
}

// Whether q lies in the range: false for NaN.
template <typename T>
__device__ __forceinline__ bool is_inside(T q, T low, T high) {
  return q >= low && q <= high;
}

// Where the gradient passes: q, the rounded code before the clamp, lies in the range, or, with `lsq`, x/scale does
// before rounding, bounds excluded. False for NaN.
template <typename T>
__device__ __forceinline__ bool counts_inside(T unrounded, T q, T zero_point, T low, T high, bool lsq) {
  return lsq ? unrounded > low - zero_point && unrounded < high - zero_point : is_inside(q, low, high);
}

// The integer of one value. No integer is NaN: it becomes the zero point, and quant_min where that is NaN too.
template <typename I, typename T>
__device__ __forceinline__ I code_of(T value, const Params<T>& p, T low, T high) {
  T q = clamp(steps_of(value, p), low, high);
  if (q != q) q = p.zero_point == p.zero_point ? p.zero_point : low;
  return static_cast<I>(static_cast<int>(q));
}

// scale and zero_point as they lie on the device; their values are never read on the host. What cannot be right (a
// negative or NaN scale, an integer zero point outside the range) becomes NaN, and so do the outputs.
template <typename T>
struct Qparams {
  enum Kind { kNumber, kInt32, kInt64, kReal };
  const T* scale = nullptr;  // null: `number`
  const void* zero_point = nullptr;
  Kind kind = kNumber;
  bool shared = true;  // one zero point for all channels
  T quant_min, quant_max;
  T scale_number = 1, zero_point_number = 0;

  __device__ __forceinline__ Params<T> of(int64_t channel) const {
    const T s = effective_scale(scale ? scale[channel] : scale_number);
    return {reciprocal(s), s, zero_point_of(shared ? 0 : channel)};
  }
  __device__ __forceinline__ T zero_point_of(int64_t at) const {
    if (kind == kNumber) return zero_point_number;
    if (kind == kReal) return clamp(round_even(static_cast<const T*>(zero_point)[at]), quant_min, quant_max);
    const T z = kind == kInt32 ? static_cast<T>(static_cast<const int32_t*>(zero_point)[at])
                               : static_cast<T>(static_cast<const int64_t*>(zero_point)[at]);
    return z >= quant_min && z <= quant_max ? z : static_cast<T>(NAN);
  }
};

// A contiguous tensor of one dtype: `t` itself nearly always.
inline Tensor contiguous_as(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  Tensor copy = empty(to_vector(t.sizes()), dtype, device_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

// Qparams, and the tensors that they point into.
template <typename T>
struct OwnedQparams : Qparams<T> {
  std::optional<Tensor> scale_tensor, zero_point_tensor;
};

template <typename T>
OwnedQparams<T> qparams_within(const Tensor& scale, const std::optional<Tensor>& zero_point, T quant_min, T quant_max) {
  using Q = Qparams<T>;
  constexpr ScalarType real = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
  OwnedQparams<T> q;
  q.quant_min = quant_min;
  q.quant_max = quant_max;
  q.scale_tensor = contiguous_as(scale, real);
  q.scale = static_cast<const T*>(q.scale_tensor->const_data_ptr());
  if (!zero_point) return q;
  const ScalarType given = zero_point->scalar_type();
  const ScalarType held = is_floating(given) ? real : given == ScalarType::Long ? given : ScalarType::Int;
  q.kind = held == real ? Q::kReal : held == ScalarType::Long ? Q::kInt64 : Q::kInt32;
  q.zero_point_tensor = contiguous_as(*zero_point, held);
  q.zero_point = q.zero_point_tensor->const_data_ptr();
  q.shared = zero_point->numel() == 1;
  return q;
}

template <typename T>
OwnedQparams<T> qparams(const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t quant_min,
                        int64_t quant_max) {
  return qparams_within(scale, zero_point, static_cast<T>(quant_min), static_cast<T>(quant_max));
}

template <typename T>
OwnedQparams<T> qparams(double scale, int64_t zero_point, int64_t quant_min, int64_t quant_max) {
  OwnedQparams<T> q;
  q.quant_min = static_cast<T>(quant_min);
  q.quant_max = static_cast<T>(quant_max);
  q.scale_number = static_cast<T>(scale);
  q.zero_point_number = static_cast<T>(zero_point);
  return q;
}

// Runs, as kernels carry them: by value and with division prepared.
struct Channels {
  static constexpr int kMost = 12;
  Divider inner;
  int count = 0;
  bool in_order = true;  // the channel is the run's number
  Divider size[kMost];
  int64_t stride[kMost];

  Channels() = default;
  explicit Channels(const Runs& runs)
      : inner(std::max<int64_t>(runs.inner, 1)),
        count(static_cast<int>(runs.factors.size())),
        in_order(runs.channels > 1 && runs.in_order() && runs.period == runs.runs) {
    QK_CHECK(count <= kMost, "scale: got a granularity of ", count,
             " levels in x's memory order; accepted on a GPU: ", kMost);
    for (int f = 0; f < count; ++f) {
      size[f] = Divider(runs.factors[f].size);
      stride[f] = runs.factors[f].stride;
    }
  }
  __device__ __forceinline__ int64_t of_run(int64_t run) const {
    if (in_order) return run;
    int64_t channel = 0;
    for (int f = count - 1; f >= 0; --f) {
      const int64_t rest = size[f].divide(run);
      channel += (run - rest * size[f].divisor) * stride[f];
      run = rest;
    }
    return channel;
  }
  __device__ __forceinline__ int64_t of_element(int64_t at) const { return of_run(inner.divide(at)); }

  // The run where channel c occurs for the k-th time.
  __device__ int64_t run_of(int64_t c, int64_t k) const {
    int64_t run = 0, step = 1;
    for (int f = count - 1; f >= 0; --f) {
      const int64_t n = size[f].divisor;
      int64_t digit;
      if (stride[f] == 0) {
        const int64_t rest = size[f].divide(k);
        digit = k - rest * n;
        k = rest;
      } else {
        digit = c / stride[f] % n;
      }
      run += digit * step;
      step *= n;
    }
    return run + k * step;
  }
};

// The same for a scale along one dimension, or none, of x in memory order: its channels follow each other in a cycle.
struct Cycle {
  Divider channels;

  static bool fits(const Runs& runs) { return runs.in_order(); }
  explicit Cycle(const Runs& runs) : channels(runs.channels) {}
  __device__ __forceinline__ int64_t of_run(int64_t run) const { return run - channels.divide(run) * channels.divisor; }
  __device__ __forceinline__ int64_t run_of(int64_t c, int64_t k) const { return c + k * channels.divisor; }
};

// The parameters of N elements from `at` on, in runs of `inner`. A loop over their runs that is not unrolled: unrolled,
// its divisions alone are 40 times the code of everything else, and 5 s of compile time per kernel.
template <typename C, typename T, int N>
__device__ __forceinline__ void fill(const Divider& inner, const C& channels, const Qparams<T>& q, int64_t at,
                                     int64_t numel, Params<T> (&out)[N]) {
  int64_t run = inner.divide(at), first = 0, last = (run + 1) * inner.divisor - at;
#pragma unroll 1
  while (first < N && at + first < numel) {
    const Params<T> p = q.of(channels.of_run(run++));
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k >= first && k < last) out[k] = p;
    first = last;
    last += inner.divisor;
  }
}

// Which vectors a thread visits: from blockIdx.x * block_step + threadIdx.x on, kUnroll of them unroll_step apart, then
// loop_step further. With `hoisted` the steps are multiples of what the channels repeat after: a thread then meets the
// same channels all the time, and reads their parameters once.
struct Sweep {
  int64_t numel, vectors, block_step, unroll_step, loop_step, first_vectors;
  bool hoisted, aligned;
};

enum Mode { kOneChannel, kChannelPerVector, kChannelPerElement };

// Op: kWidth elements per vector, Loaded, begin(), load<kWhole>(at, n), run<kWhole>(at, n, loaded, parameters of k).
// Where each element looks for its parameters, ptxas spills to stay within 64 registers unless it is told otherwise.
template <typename Op, int kMode>
__global__ void __launch_bounds__(kThreads, kMode == kChannelPerElement ? 3 : 1)
    sweep_kernel(Op given, Qparams<typename Op::T> q, Channels channels, Sweep s) {
  using T = typename Op::T;
  constexpr int N = Op::kWidth;
  Op op = given;
  op.begin();
  int64_t v = blockIdx.x * s.block_step + threadIdx.x;
  if (v >= s.first_vectors) return;  // whole warps
  Params<T> one, own[kMode == kChannelPerElement ? N : 1];
  if constexpr (kMode == kOneChannel) one = q.of(0);
  if constexpr (kMode == kChannelPerElement) {
    if (s.hoisted) fill(channels.inner, channels, q, v * N, s.numel, own);
  }
  const auto run = [&](auto whole, int64_t at, int n, const typename Op::Loaded& loaded, const Params<T>& same) {
    op.template run<decltype(whole)::value>(at, n, loaded, [&](int k) -> const Params<T>& {
      return kMode == kChannelPerElement ? own[kMode == kChannelPerElement ? k : 0] : same;
    });
  };
  const int64_t lane = threadIdx.x % kWarp;
  for (; v - lane < s.vectors; v += s.loop_step) {
    const int64_t last = v - lane + kWarp - 1 + (kUnroll - 1) * s.unroll_step;
    // For the whole warp alike. Elements with parameters of their own come four vectors at a time only where these are
    // known already: else the code to find them would be there five times.
    const bool known = kMode != kChannelPerElement || s.hoisted;
    if (known && s.aligned && (last + 1) * N <= s.numel) {
      typename Op::Loaded loaded[kUnroll];
      Params<T> same[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = op.template load<true>((v + u * s.unroll_step) * N, N);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if constexpr (kMode == kOneChannel) same[u] = one;
        if constexpr (kMode == kChannelPerVector) same[u] = q.of(channels.of_element((v + u * s.unroll_step) * N));
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) run(std::true_type{}, (v + u * s.unroll_step) * N, N, loaded[u], same[u]);
    } else {
#pragma unroll 1
      for (int u = 0; u < kUnroll; ++u) {
        if (v - lane + u * s.unroll_step >= s.vectors) break;
        const int64_t at = (v + u * s.unroll_step) * N, rest = s.numel - at;
        const int n = rest >= N ? N : rest > 0 ? static_cast<int>(rest) : 0;
        if constexpr (kMode == kChannelPerVector) {
          if (n > 0) one = q.of(channels.of_element(at));
        }
        if constexpr (kMode == kChannelPerElement) {
          if (!s.hoisted && n > 0) fill(channels.inner, channels, q, at, s.numel, own);
        }
        run(std::false_type{}, at, n, op.template load<false>(at, n), one);
      }
    }
  }
}

constexpr int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// kGranular: whether Op has parameters at all.
template <typename Op, bool kGranular = true>
void sweep(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
           bool aligned) {
  constexpr int64_t N = Op::kWidth;
  if (numel == 0) return;
  const int64_t vectors = ceil_div(numel, N);
  Sweep s{numel, vectors, kThreads * kUnroll, kThreads, 0, INT64_MAX, false, aligned};
  int64_t blocks = ceil_div(vectors, s.block_step);
  if (blocks < 2 * gpu.processors()) {  // too few vectors to fill the GPU with four per thread
    blocks = ceil_div(vectors, kThreads);
    s.block_step = kThreads;
    s.unroll_step = blocks * kThreads;
  }
  // fp64 is here to be right, not fast: one kernel instead of three.
  constexpr bool kAnyMode = kGranular && !std::is_same_v<typename Op::T, double>;
  Mode mode = kChannelPerElement;
  if (kAnyMode && runs.channels == 1) {
    mode = kOneChannel;
  } else if (kAnyMode && runs.inner % N == 0) {
    mode = kChannelPerVector;
  } else if (runs.channels > 1) {
    const int64_t pattern = runs.period * runs.inner;  // elements that the channels repeat after
    const int64_t period = pattern / gcd(pattern, N);  // vectors
    const int64_t step = period / gcd(period, kWarp) * kWarp;
    const int64_t threads = std::min<int64_t>(vectors, int64_t{gpu.processors()} * 3 * kThreads);
    if (vectors >= 2 * step && step <= threads) {
      s.unroll_step = threads / step * step;
      s.first_vectors = s.unroll_step;
      s.block_step = kThreads;
      s.hoisted = true;
      blocks = ceil_div(s.first_vectors, kThreads);
      s.loop_step = s.unroll_step * kUnroll;
    }
  }
  if (!s.hoisted)
    s.loop_step =
        s.block_step == kThreads ? s.unroll_step * kUnroll : std::min<int64_t>(blocks, 0x7fffffff) * s.block_step;
  const Channels channels(runs);
  const auto launch = [&](auto kernel) { gpu.launch(kernel, blocks, 1, kThreads, op, q, channels, s); };
  if constexpr (!kGranular) {
    launch(sweep_kernel<Op, kOneChannel>);
  } else if constexpr (!kAnyMode) {
    launch(sweep_kernel<Op, kChannelPerElement>);
  } else if (mode == kOneChannel) {
    launch(sweep_kernel<Op, kOneChannel>);
  } else if (mode == kChannelPerVector) {
    launch(sweep_kernel<Op, kChannelPerVector>);
  } else {
    launch(sweep_kernel<Op, kChannelPerElement>);
  }
}

// Writes the mask bits of the N elements from `at` on; lanes of a warp that share a byte join them.
template <int N>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t at, int n, unsigned bits) {
  constexpr int kShare = 8 / N;
  if constexpr (kShare > 1) {
    const unsigned place = threadIdx.x % kShare;
    bits <<= N * place;
#pragma unroll
    for (int step = 1; step < kShare; step *= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
    if (place) return;
  }
  if (n > 0) mask[at / 8] = static_cast<uint8_t>(bits);
}

}  // namespace qkernels
