// Fake and real quantization with ranges that x itself gives.
#include "ops.cuh"
#include "ranges.cuh"

namespace qkernels {
namespace {

// Rows that fit registers. The threads that share a row hold all of it: each holds kHeld vectors of kTogether rows.
struct Rows {
  int64_t count, length;
  int vectors, lanes;  // of a row; lanes: the threads that share it, a power of two up to a warp or the whole block
};

constexpr int kRowVectors = 4;

// What a kernel takes for granted. kSymmetric, kAsymmetric: rows are whole vectors at aligned addresses, and the range
// is symmetric, so that the largest absolute value is enough, or asymmetric. kRagged: neither of these.
enum RowKind { kSymmetric, kAsymmetric, kRagged };

// The most threads that share a row. A kernel for 1024 threads has 64 registers for each; so a multiprocessor holds two
// blocks of 512, of which one loads while the other computes. With ragged rows 64 registers would spill.
constexpr int row_threads(RowKind kind) { return kind == kRagged ? 768 : 1024; }

// The minimum and the maximum of 0 and the elements; with kAbsolute only the largest absolute value. NaN where an
// element is. Elements of a half type are compared two at a time, packed as they were loaded.
template <typename S, bool kAbsolute>
struct Extent {
  using T = Arithmetic<S>;
  static constexpr int N = kVector<S>;
  static constexpr bool kPacked = sizeof(S) == 2;
  std::conditional_t<kPacked, unsigned, T> low = 0, high = 0;

  __device__ __forceinline__ void add(const Vec<S, N>& in) {
    if constexpr (kPacked) {
      unsigned words[N / 2];
      memcpy(words, &in, sizeof words);
#pragma unroll
      for (unsigned word : words) {
        if (!kAbsolute) low = min_pair<S>(low, word);
        high = max_pair<S>(high, kAbsolute ? word & 0x7fff7fff : word);
      }
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (!kAbsolute) low = nan_min(low, in.v[k]);
        high = nan_max(high, kAbsolute ? fabs(in.v[k]) : in.v[k]);
      }
    }
  }
  __device__ __forceinline__ Pair<T> ends() const {
    if constexpr (kPacked) {
      Vec<S, 2> lows, highs;
      memcpy(&lows, &low, sizeof low);
      memcpy(&highs, &high, sizeof high);
      return {nan_min(widen(lows, 0), widen(lows, 1)), nan_max(widen(highs, 0), widen(highs, 1))};
    } else {
      return {low, high};
    }
  }
};

template <typename S, typename Out, int kHeld, RowKind kKind>
__global__ void __launch_bounds__(kHeld == 1 ? kThreads : row_threads(kKind), kHeld > 1              ? 1
                                                                              : kKind == kRagged     ? 2
                                                                              : kKind == kAsymmetric ? 3
                                                                                                     : 4)
    rows_kernel(const S* x, Out* y, uint8_t* mask, Arithmetic<S>* scale, int32_t* zero_point, QparamsRule rule,
                Rows s) {
  using T = Arithmetic<S>;
  constexpr int N = kVector<S>, kTogether = kRowVectors / kHeld;
  constexpr bool kWhole = kKind != kRagged;
  if (kWhole) rule.symmetric = kKind == kSymmetric;
  const int shift = s.lanes > kWarp ? 10 : __ffs(s.lanes) - 1;  // a block has at most 2^10 threads, so group is 0
  const int group = static_cast<int>(threadIdx.x) >> shift, lane = static_cast<int>(threadIdx.x) - (group << shift);
  const int groups = s.lanes > kWarp ? 1 : static_cast<int>(blockDim.x) >> shift;
  // Finds this lane's h-th vector of a row: it begins at element `at`, and its elements [first, last) are the row's.
  const auto find = [&](int64_t row, int h, int64_t& at, int& first, int& last) {
    if (kWhole) {
      at = row * s.length + (lane + h * s.lanes) * N;
      first = 0;
      last = row < s.count && lane + h * s.lanes < s.vectors ? N : 0;
    } else {
      at = (row * s.length / N + lane + h * s.lanes) * N;
      const int64_t from = row * s.length - at, to = from + s.length;
      first = from > 0 ? (from < N ? static_cast<int>(from) : N) : 0;
      last = row < s.count && to > 0 ? (to < N ? static_cast<int>(to) : N) : 0;
    }
  };
  const int64_t begin = int64_t{blockIdx.x} * (groups * kTogether) + group;
  Vec<S, N> held[kTogether][kHeld];
#pragma unroll
  for (int t = 0; t < kTogether; ++t)
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      int64_t at;
      int first, last;
      find(begin + t * groups, h, at, first, last);
      held[t][h] = load<kWhole, N>(x + at, first, last);  // beyond the row 0, which every range includes
    }
#pragma unroll
  for (int t = 0; t < kTogether; ++t) {
    const int64_t row = begin + t * groups;
    Extent<S, kKind == kSymmetric> extent;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) extent.add(held[t][h]);
    Pair<T> range = extent.ends();
    if constexpr (kKind == kSymmetric) {
      range.b = merge_lanes(range.b, s.lanes, [](T p, T q) { return nan_max(p, q); });
    } else {
      range = merge_lanes(range, s.lanes,
                          [](Pair<T> p, Pair<T> q) { return Pair<T>{nan_min(p.a, q.a), nan_max(p.b, q.b)}; });
    }
    const auto chosen = choose_qparams<T>(range.a, range.b, rule);
    const T low = static_cast<T>(rule.quant_min), high = static_cast<T>(rule.quant_max);
    const Params<T> p{reciprocal(chosen.scale), chosen.scale, chosen.zero_point};
    if (lane == 0 && row < s.count) {
      scale[row] = chosen.scale;
      zero_point[row] = static_cast<int32_t>(chosen.zero_point);
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      int64_t at;
      int first, last;
      find(row, h, at, first, last);
      keep_packed(held[t][h]);
      Vec<Out, N> out;
      unsigned bits = 0;
      if constexpr (std::is_same_v<Out, int8_t>) {
#pragma unroll
        for (int k = 0; k < N; ++k) out.v[k] = code_of<int8_t>(widen(held[t][h], k), p, low, high);
      } else {
        T values[N];
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const T q = steps_of(widen(held[t][h], k), p);
          bits |= k < last && is_inside(q, low, high) ? 1u << k : 0;
          values[k] = fake_quantized(q, p, low, high);
        }
        out = narrow<S>(values);
      }
      store<kWhole>(y + at, out, first, last);
      // A symmetric range clips nothing, so it has no mask. Where there is a mask, a row is whole bytes of it, so first
      // is 0.
      if (kKind != kSymmetric && mask) store_bits<N>(mask, at, last, bits);
    }
  }
}

// Runs rows_kernel if rows fit registers. Returns whether it did. Rows are contiguous.
template <typename S, typename Out>
bool run_rows(const Gpu& gpu, const S* x, Out* y, uint8_t* mask, Arithmetic<S>* scale, int32_t* zero_point,
              const QparamsRule& rule, int64_t count, int64_t length) {
  constexpr int64_t N = kVector<S>;
  constexpr bool kRight = std::is_same_v<S, double>;  // fp64 has to be right, not fast: one kernel, not three
  const bool whole = !kRight && length % N == 0 && is_aligned({x, y});
  const int64_t vectors = whole ? length / N : ceil_div(length, N) + (length % N != 0);
  if (length == 0 || vectors > row_threads(whole ? kSymmetric : kRagged) * kRowVectors || (mask && length % 8 != 0))
    return false;
  const auto launch = [&](auto held, int lanes, int block) {
    constexpr int kHeld = decltype(held)::value;
    const int64_t rows = block / lanes * (kRowVectors / kHeld);
    const auto run = [&](auto kernel) {
      gpu.launch(kernel, ceil_div(count, rows), 1, block, x, y, mask, scale, zero_point, rule,
                 Rows{count, length, static_cast<int>(vectors), lanes});
    };
    if (!whole) return run(rows_kernel<S, Out, kHeld, kRagged>);
    if constexpr (!kRight) {
      if (rule.symmetric) return run(rows_kernel<S, Out, kHeld, kSymmetric>);
      run(rows_kernel<S, Out, kHeld, kAsymmetric>);
    }
  };
  if (vectors <= 16) {
    launch(std::integral_constant<int, 1>{}, power_of_two_from(vectors), kThreads);
    return true;
  }
  const int64_t threads = ceil_div(vectors, kRowVectors);
  const int lanes = threads <= kWarp ? power_of_two_from(threads) : static_cast<int>(ceil_div(threads, kWarp) * kWarp);
  launch(std::integral_constant<int, kRowVectors>{}, lanes, threads <= kWarp ? kThreads : lanes);
  return true;
}

// Writes the scale and the zero point that a channel's range gives.
template <typename T>
struct ChooseQparams {
  QparamsRule rule;
  T* scale;
  int32_t* zero_point;

  __device__ __forceinline__ bool wanted() const { return true; }
  __device__ void operator()(int64_t channel, T low, T high) const {
    const auto chosen = choose_qparams<T>(low, high, rule);
    scale[channel] = chosen.scale;
    zero_point[channel] = static_cast<int32_t>(chosen.zero_point);
  }
};

// Writes the scale and the zero point of each channel. x is dense, in any memory order.
void dynamic_qparams(const Gpu& gpu, const Tensor& x, const QparamsRule& rule, const Tensor& scale,
                     const Tensor& zero_point) {
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const RangeOp<S, ChooseQparams<T>> op{
        static_cast<const S*>(x.const_data_ptr()),
        {rule, static_cast<T*>(scale.mutable_data_ptr()), static_cast<int32_t*>(zero_point.mutable_data_ptr())}};
    reduce_channels(gpu, op, Qparams<T>{}, runs_of(x, scale), x.numel(), is_aligned({op.x}));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quantize_dynamic_forward(const Tensor& x, int64_t group_size,
                                                                         int64_t quant_min, int64_t quant_max,
                                                                         bool symmetric) {
  check_group_size(x, group_size);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  const Gpu gpu(x);
  auto [scale, zero_point] = empty_qparams(x, group_size, gpu.device());
  Tensor y = empty_dense_like(x, gpu.device()), mask = empty_mask(symmetric ? 0 : x.numel(), gpu.device());
  bool done = false;
  if (group_size != 0 && x.is_contiguous() && x.numel() > 0) {
    dispatch_floating("x", x, [&](auto tag) {
      using S = decltype(tag);
      done = run_rows(gpu, static_cast<const S*>(x.const_data_ptr()), static_cast<S*>(y.mutable_data_ptr()),
                      symmetric ? nullptr : static_cast<uint8_t*>(mask.mutable_data_ptr()),
                      static_cast<Arithmetic<S>*>(scale.mutable_data_ptr()),
                      static_cast<int32_t*>(zero_point.mutable_data_ptr()), rule, scale.numel(),
                      x.numel() / scale.numel());
    });
  }
  if (!done) {
    const Tensor dense = to_dense(x);
    dynamic_qparams(gpu, dense, rule, scale, zero_point);
    fake_quantize_into(gpu, dense, scale, zero_point, quant_min, quant_max, y, symmetric ? nullptr : &mask, Flag());
  }
  return {y, scale, zero_point, mask};
}

std::tuple<Tensor, Tensor, Tensor> quantize_dynamic(const Tensor& x_any, int64_t group_size, int64_t quant_min,
                                                    int64_t quant_max, bool symmetric) {
  check_group_size(x_any, group_size);
  check_codes_hold<int8_t>(ScalarType::Char, quant_min, quant_max);
  const auto rule = QparamsRule::dynamic(quant_min, quant_max, symmetric);
  const Gpu gpu(x_any);
  auto [scale, zero_point] = empty_qparams(x_any, group_size, gpu.device());
  const Tensor x = to_dense(x_any);
  Tensor q = empty_strided(x.sizes(), x.strides(), ScalarType::Char, gpu.device());
  bool done = false;
  if (group_size != 0 && x.is_contiguous() && x.numel() > 0) {
    dispatch_floating("x", x, [&](auto tag) {
      using S = decltype(tag);
      done = run_rows<S, int8_t>(
          gpu, static_cast<const S*>(x.const_data_ptr()), static_cast<int8_t*>(q.mutable_data_ptr()), nullptr,
          static_cast<Arithmetic<S>*>(scale.mutable_data_ptr()), static_cast<int32_t*>(zero_point.mutable_data_ptr()),
          rule, scale.numel(), x.numel() / scale.numel());
    });
  }
  if (!done) {
    dynamic_qparams(gpu, x, rule, scale, zero_point);
    quantize_into(gpu, x, scale, zero_point, quant_min, quant_max, q);
  }
  return {q, scale, zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_dynamic_forward", TORCH_BOX(&fake_quantize_dynamic_forward));
  m.impl("quantize_dynamic", TORCH_BOX(&quantize_dynamic));
}

}  // namespace qkernels
