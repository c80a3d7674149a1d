// Quantization to integers on the GPU, and back.
#include "ops.cuh"
#include "sweep.cuh"

namespace qkernels {
namespace {

template <typename S, typename I>
struct QuantizeOp {
  using T = Arithmetic<S>;
  static constexpr int kWidth = kVector<S>;
  using Loaded = Vec<S, kWidth>;
  const S* x;
  I* q;
  T low, high;

  __device__ __forceinline__ void begin() {}
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int n) const {
    return qkernels::load<kWhole, kWidth>(x + at, 0, n);
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void run(int64_t at, int n, const Loaded& in, P params) const {
    Vec<I, kWidth> out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.v[k] = code_of<I>(widen(in, k), params(k), low, high);
    store<kWhole>(q + at, out, 0, n);
  }
};

template <typename I, typename S>
struct DequantizeOp {
  using T = Arithmetic<S>;
  static constexpr int kWidth = kVector<S>;
  using Loaded = Vec<I, kWidth>;
  const I* q;
  S* y;

  __device__ __forceinline__ void begin() {}
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int n) const {
    return qkernels::load<kWhole, kWidth>(q + at, 0, n);
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void run(int64_t at, int n, const Loaded& in, P params) const {
    T out[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out[k] = (static_cast<T>(in.v[k]) - params(k).zero_point) * params(k).scale;
    store<kWhole>(y + at, narrow<S>(out), 0, n);
  }
};

Tensor quantize(const Tensor& x_any, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                int64_t quant_max, ScalarType dtype) {
  check_floating("x", x_any);
  dispatch_integer("dtype", dtype, [&](auto code) { check_codes_hold<decltype(code)>(dtype, quant_min, quant_max); });
  check_range(quant_min, quant_max);
  const Gpu gpu(x_any);
  check_scale(scale, zero_point, x_any, gpu.device());
  const Tensor x = to_dense(x_any);
  Tensor q = empty_strided(x.sizes(), x.strides(), dtype, gpu.device());
  quantize_into(gpu, x, scale, zero_point, quant_min, quant_max, q);
  return q;
}

Tensor dequantize(const Tensor& q_any, const Tensor& scale, std::optional<Tensor> zero_point, ScalarType dtype) {
  QK_CHECK(is_floating(dtype), "dtype: got ", dtype_name(dtype), "; accepted: a floating dtype");
  const Gpu gpu(q_any);
  check_scale(scale, zero_point, q_any, gpu.device());
  Tensor y;
  dispatch_integer("q", q_any.scalar_type(), [&](auto code) {
    using I = decltype(code);
    const Tensor q = to_dense(q_any);
    y = empty_strided(q.sizes(), q.strides(), dtype, gpu.device());
    if (q.numel() == 0) return;
    dispatch_floating("dtype", dtype, [&](auto tag) {
      using S = decltype(tag);
      using T = Arithmetic<S>;
      const T infinity = std::numeric_limits<T>::infinity();  // nothing is clamped, and any zero point is valid
      const auto params = qparams_within<T>(scale, zero_point, -infinity, infinity);
      const DequantizeOp<I, S> op{static_cast<const I*>(q.const_data_ptr()), static_cast<S*>(y.mutable_data_ptr())};
      sweep(gpu, op, params, runs_of(q, scale), q.numel(), is_aligned({op.q, op.y}));
    });
  });
  return y;
}

}  // namespace

void quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   int64_t quant_min, int64_t quant_max, const Tensor& q) {
  if (x.numel() == 0) return;
  dispatch_integer("dtype", q.scalar_type(), [&](auto code) {
    using I = decltype(code);
    dispatch_floating("x", x, [&](auto tag) {
      using S = decltype(tag);
      const auto params = qparams<Arithmetic<S>>(scale, zero_point, quant_min, quant_max);
      const QuantizeOp<S, I> op{static_cast<const S*>(x.const_data_ptr()), static_cast<I*>(q.mutable_data_ptr()),
                                params.quant_min, params.quant_max};
      sweep(gpu, op, params, runs_of(x, scale), x.numel(), is_aligned({op.x, op.q}));
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

}  // namespace qkernels
