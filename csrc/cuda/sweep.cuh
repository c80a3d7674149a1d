// Elementwise kernels over x in memory order, for a scale of any granularity, and the parameters of each channel.
#pragma once

#include "common.cuh"

namespace qkernels {

template <typename T>
struct Params {
  T inv, scale, zero_point;
};

// round(x / scale) + zero_point, not clamped.
template <typename T>
__device__ __forceinline__ T steps_of(T value, const Params<T>& p) {
  return round_even(value * p.inv) + p.zero_point;
}

template <typename T>
__device__ __forceinline__ T fake_quantized(T steps, const Params<T>& p, T low, T high) {
  return (clamp(steps, low, high) - p.zero_point) * p.scale;
}

// Whether q lies in the range. False for NaN.
template <typename T>
__device__ __forceinline__ bool is_inside(T q, T low, T high) {
  return q >= low && q <= high;
}

// Whether the gradient passes: where q, the rounded code before the clamp, lies in the range, bounds included; with
// `lsq`, where the value before rounding lies in it, bounds excluded. False for NaN.
template <typename T>
__device__ __forceinline__ bool counts_inside(T unrounded, T q, T zero_point, T low, T high, bool lsq) {
  return lsq ? unrounded > low - zero_point && unrounded < high - zero_point : is_inside(q, low, high);
}

// The code of one value. No integer is NaN: a NaN becomes the zero point, or quant_min where that is NaN too.
template <typename I, typename T>
__device__ __forceinline__ I code_of(T value, const Params<T>& p, T low, T high) {
  T q = clamp(steps_of(value, p), low, high);
  if (q != q) q = p.zero_point == p.zero_point ? p.zero_point : low;
  return static_cast<I>(static_cast<int>(q));
}

// The scale and the zero point of each channel, as they lie on the device. The host never reads their values. A wrong
// one (a negative or NaN scale, an integer zero point outside of the range) acts as NaN, which then propagates.
template <typename T>
struct Qparams {
  enum Kind { kNumber, kInt32, kInt64, kReal };
  const T* scale = nullptr;  // null: scale_number is the scale
  const void* zero_point = nullptr;
  Kind kind = kNumber;
  bool shared = true;  // one zero point for all channels
  T quant_min, quant_max;
  T scale_number = 1, zero_point_number = 0;

  // What was read for one channel. read() and of() are apart, so that loads follow each other without a branch.
  struct Raw {
    T scale;
    unsigned low, high;  // halves of the zero point's bits
  };
  __device__ __forceinline__ Raw read(int64_t channel) const {
    Raw raw{scale_number, 0, 0};
    if (scale) raw.scale = scale[channel];
    const unsigned* words = static_cast<const unsigned*>(zero_point);
    const int64_t at = shared ? 0 : channel;
    if (kind != kNumber) raw.low = words[wide() ? 2 * at : at];
    if (wide()) raw.high = words[2 * at + 1];
    return raw;
  }
  __device__ __forceinline__ Params<T> of(const Raw& raw) const {
    const T s = effective_scale(raw.scale);
    return {reciprocal(s), s, zero_point_of(raw)};
  }
  __device__ __forceinline__ Params<T> of(int64_t channel) const { return of(read(channel)); }

 private:
  __device__ __forceinline__ bool wide() const { return kind == kInt64 || (kind == kReal && sizeof(T) == 8); }
  __device__ __forceinline__ T zero_point_of(const Raw& raw) const {
    if (kind == kNumber) return zero_point_number;
    const int64_t bits = wide() ? static_cast<int64_t>(uint64_t{raw.high} << 32 | raw.low) : static_cast<int>(raw.low);
    if (kind == kReal) {
      T real;
      memcpy(&real, &bits, sizeof real);  // the low bytes
      return clamp(round_even(real), quant_min, quant_max);
    }
    const T z = static_cast<T>(bits);
    return z >= quant_min && z <= quant_max ? z : static_cast<T>(NAN);
  }
};

// `t` itself if it is contiguous and of the dtype, as nearly always; else a copy that is.
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

// Runs as kernels take them: by value, with a Divider for each division.
struct DeviceRuns {
  static constexpr int kMost = 12;
  Divider inner;
  int count = 0;
  bool in_order = true;  // the channel is the run's number
  Divider size[kMost];
  int64_t stride[kMost];

  DeviceRuns() = default;
  explicit DeviceRuns(const Runs& runs)
      : inner(std::max<int64_t>(runs.inner, 1)),
        count(static_cast<int>(runs.factors.size())),
        in_order(runs.channels > 1 && runs.in_order() && runs.period == runs.count) {
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
#pragma unroll 1
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
#pragma unroll 1
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

// The same for a scale that varies along at most one dimension of x: the channels of consecutive runs form a cycle.
struct Cycle {
  Divider channels;

  static bool fits(const Runs& runs) { return runs.in_order(); }
  explicit Cycle(const Runs& runs) : channels(runs.channels) {}
  __device__ __forceinline__ int64_t of_run(int64_t run) const { return run - channels.divide(run) * channels.divisor; }
  __device__ __forceinline__ int64_t run_of(int64_t c, int64_t k) const { return c + k * channels.divisor; }
};

// Fills `out` with the parameters of N elements from `at` on, in runs of `inner`. The loop over their runs is not
// unrolled: otherwise its divisions alone would be 40 times the code of everything else, and take 5 s of compile time
// per kernel.
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

// An Op has T, the type of arithmetic; kWidth, the elements of a vector; Loaded, what load<kWhole>(at, n) returns;
// begin(), which is called once before run; and run<kWhole>(at, n, loaded, params), where params(k) are the parameters
// of element k. kWhole: n is kWidth, or it is 0 and nothing is read or written.

// Each block takes a stretch of vectors: of one run, or of all of x where runs are short. A thread takes kUnroll of
// them, unroll_step apart.
struct Stretches {
  int64_t numel, whole, vectors;  // whole: vectors of x that are full and aligned; vectors: of a run, or of x
  int block_step, unroll_step;
  bool run_per_x;     // blockIdx.x is the number of the run, blockIdx.y that of the stretch in it; else x is one run
  Divider short_run;  // where runs are short: the vectors of one
  int64_t step_runs = 0, step_rest = 0;  // unroll_step is step_runs short runs and step_rest vectors
};

// How many blocks a multiprocessor shall hold: more where a thread has fewer bytes in flight. 3, 4 and 5 blocks bound
// the registers of a thread at 80, 64 and 48.
template <typename Op, bool kShortRuns>
constexpr int sweep_blocks() {
  if (kShortRuns) return 3;
  return sizeof(typename Op::Loaded) <= 16 && (kFrugal || Op::kWidth < 8) ? 5 : 4;
}

// How many vectors there are from v to `end`, limited so that the number of a lane can be added without overflow.
__host__ __device__ constexpr int left_of(int64_t end, int64_t v) {
  return static_cast<int>(end - v < INT_MAX - kWarp ? end - v : INT_MAX - kWarp);
}
static_assert(int64_t{left_of(int64_t{1} << 40, 0)} + kWarp - 1 <= INT_MAX && left_of(5, 9) == -4,
              "lanes would overflow");

// Reads take long. So the kernel starts to read x, then the parameters, and only then uses either.
template <typename Op, bool kShortRuns>
__global__ void __launch_bounds__(kThreads, sweep_blocks<Op, kShortRuns>())
    sweep_kernel(Op given, Qparams<typename Op::T> q, DeviceRuns channels, Stretches s) {
  using Q = Qparams<typename Op::T>;
  using P = Params<typename Op::T>;
  constexpr int N = Op::kWidth, kRaw = kShortRuns ? kUnroll : 1;
  Op op = given;
  const int64_t run = s.run_per_x ? blockIdx.x : 0, end = (run + 1) * s.vectors;
  const int64_t v = run * s.vectors + int64_t{s.run_per_x ? blockIdx.y : blockIdx.x} * s.block_step + threadIdx.x;
  const int left = left_of(end, v), lane = threadIdx.x % kWarp;
  if (left + lane <= 0) return;  // alike in all lanes of a warp
  if (__builtin_expect(end <= s.whole || v - lane + kWarp + (kUnroll - 1) * s.unroll_step <= s.whole, 1)) {
    typename Op::Loaded loaded[kUnroll];
    typename Q::Raw raw[kRaw];
    const auto there = [&](int u) { return u * s.unroll_step < left ? N : 0; };
    const auto at = [&](int u) { return v * N + u * s.unroll_step * N; };
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u] = op.template load<true>(at(u), there(u));
    if constexpr (kShortRuns) {
      int64_t in = s.short_run.divide(v), rest = v - in * s.short_run.divisor;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        raw[u] = q.read(there(u) ? channels.of_run(in) : 0);
        in += s.step_runs;
        rest += s.step_rest;
        if (rest >= s.short_run.divisor) {
          rest -= s.short_run.divisor;
          ++in;
        }
      }
    } else {
      raw[0] = q.read(channels.of_run(run));
    }
    op.begin();
    P params;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < kRaw) params = q.of(raw[u]);
      keep_packed(loaded[u]);
      op.template run<true>(at(u), there(u), loaded[u], [&](int) -> const P& { return params; });
    }
    return;
  }
  op.begin();
#pragma unroll 1
  for (int u = 0; u < kUnroll && u * s.unroll_step < left + lane; ++u) {
    const int64_t here = v + u * s.unroll_step, at = here * N, rest = s.numel - at;
    const int n = here >= end ? 0 : rest >= N ? N : static_cast<int>(rest);
    const P params = q.of(n == 0 ? 0 : channels.of_run(kShortRuns ? s.short_run.divide(here) : run));
    op.template run<false>(at, n, op.template load<false>(at, n), [&](int) -> const P& { return params; });
  }
}

// For vectors with elements of more than one channel. A thread takes every step-th vector. With `hoisted`, step is a
// whole number of periods of the channels: all vectors of a thread then have the same channels, and it reads their
// parameters once.
struct Elements {
  int64_t numel, vectors, step;
  bool hoisted, aligned;
};

// ptxas spills to stay within 64 registers unless it is told that three blocks are enough.
template <typename Op>
__global__ void __launch_bounds__(kThreads, 3)
    elements_kernel(Op given, Qparams<typename Op::T> q, DeviceRuns channels, Elements s) {
  using P = Params<typename Op::T>;
  constexpr int N = Op::kWidth;
  Op op = given;
  op.begin();
  int64_t v = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (v >= s.step) return;  // alike in all lanes of a warp
  P own[N];
  if (s.hoisted) fill(channels.inner, channels, q, v * N, s.numel, own);
  const auto params = [&](int k) -> const P& { return own[k]; };
  const int64_t lane = threadIdx.x % kWarp;
  for (; v - lane < s.vectors; v += kUnroll * s.step) {
    const int64_t last = v - lane + kWarp - 1 + (kUnroll - 1) * s.step;
    // The condition is the same in all lanes of a warp. A thread takes four vectors at a time only where it has their
    // parameters already: otherwise the code that finds them would exist five times.
    if (s.hoisted && s.aligned && (last + 1) * N <= s.numel) {
      typename Op::Loaded loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) loaded[u] = op.template load<true>((v + u * s.step) * N, N);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) op.template run<true>((v + u * s.step) * N, N, loaded[u], params);
    } else {
#pragma unroll 1
      for (int u = 0; u < kUnroll; ++u) {
        if (v - lane + u * s.step >= s.vectors) break;
        const int64_t at = (v + u * s.step) * N, rest = s.numel - at;
        const int n = rest >= N ? N : rest > 0 ? static_cast<int>(rest) : 0;
        if (!s.hoisted && n > 0) fill(channels.inner, channels, q, at, s.numel, own);
        op.template run<false>(at, n, op.template load<false>(at, n), params);
      }
    }
  }
}

// Whether a run of so many vectors is worth a block, and needs no more blocks than a grid may have along y.
constexpr bool is_long(int64_t vectors) {
  return vectors >= 4 * kWarp && vectors <= int64_t{65535} * kThreads * kUnroll;
}

constexpr int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// kShortRuns: the stretches are of all of x, not of one run.
template <bool kShortRuns, typename Op>
void sweep_stretches(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
                     bool aligned) {
  constexpr int64_t N = Op::kWidth;
  const bool many = !kShortRuns && runs.channels > 1;
  const int64_t count = many ? runs.count : 1, vectors = ceil_div(numel / count, N);
  int64_t parts = ceil_div(vectors, kThreads * kUnroll);
  const int threads = static_cast<int>(ceil_div(ceil_div(vectors, parts * kUnroll), kWarp)) * kWarp;
  Stretches s{numel, aligned ? numel / N : 0, vectors, threads * kUnroll, threads, many, Divider()};
  if (count * parts < 2 * gpu.processors()) {  // with kUnroll vectors to a thread x does not fill the GPU
    parts = ceil_div(vectors, threads);
    s.block_step = threads;
    s.unroll_step = static_cast<int>(parts) * threads;
  }
  if (kShortRuns) {
    s.short_run = Divider(runs.inner / N);
    s.step_runs = s.unroll_step / s.short_run.divisor;
    s.step_rest = s.unroll_step % s.short_run.divisor;
  }
  gpu.launch(sweep_kernel<Op, kShortRuns>, many ? count : parts, many ? parts : 1, threads, op, q, DeviceRuns(runs), s);
}

template <typename Op>
void sweep_elements(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
                    bool aligned) {
  constexpr int64_t N = Op::kWidth;
  const int64_t vectors = ceil_div(numel, N);
  int64_t blocks = ceil_div(vectors, kThreads * kUnroll);
  if (blocks < 2 * gpu.processors()) blocks = ceil_div(vectors, kThreads);
  Elements s{numel, vectors, blocks * kThreads, false, aligned};
  if (runs.channels > 1) {
    const int64_t pattern = runs.period * runs.inner;  // elements of a period of the channels
    const int64_t period = pattern / gcd(pattern, N);  // vectors
    const int64_t step = period / gcd(period, kWarp) * kWarp;
    const int64_t threads = std::min<int64_t>(vectors, int64_t{gpu.processors()} * 3 * kThreads);
    if (vectors >= 2 * step && step <= threads) {
      s.hoisted = true;
      s.step = threads / step * step;
      blocks = ceil_div(s.step, kThreads);
    }
  }
  gpu.launch(elements_kernel<Op>, blocks, 1, kThreads, op, q, DeviceRuns(runs), s);
}

// kGranular: whether Op uses parameters.
template <typename Op, bool kGranular = true>
void sweep(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
           bool aligned) {
  constexpr int64_t N = Op::kWidth;
  if (numel == 0) return;
  if constexpr (!kGranular) {
    sweep_stretches<false>(gpu, op, q, runs, numel, aligned);
  } else if constexpr (std::is_same_v<typename Op::T, double>) {
    sweep_elements(gpu, op, q, runs, numel, aligned);  // fp64 has to be right, not fast: one kernel, not three
  } else if (runs.channels == 1 || (runs.inner % 8 == 0 && is_long(runs.inner / N))) {  // % 8: whole bytes of a mask
    sweep_stretches<false>(gpu, op, q, runs, numel, aligned);
  } else if (runs.inner % N == 0) {
    sweep_stretches<true>(gpu, op, q, runs, numel, aligned);
  } else {
    sweep_elements(gpu, op, q, runs, numel, aligned);
  }
}

// Writes the mask bits of the first n of N elements from `at` on. Lanes that share a byte join their bits first, so all
// lanes of a warp have to call this.
template <int N>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t at, int n, unsigned bits) {
  constexpr int kShare = 8 / N;
  if (n == 0) bits = 0;
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
