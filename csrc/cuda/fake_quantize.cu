// Fake quantization on the GPU, element by element.
#include "ops.cuh"
#include "sweep.cuh"

namespace qkernels {
namespace {

// y = (clamp(round(x/scale) + zp) - zp)*scale, and with kMask a bit for each element: whether its gradient passes.
template <typename S, bool kMask>
struct ForwardOp {
  using T = Arithmetic<S>;
  static constexpr int kWidth = kVector<S>;
  using Loaded = Vec<S, kWidth>;
  const S* x;
  S* y;
  uint8_t* mask;
  T low, high;
  Flag on;  // where it has a tensor and is not set, y = x
  bool lsq = false;
  bool through = false;

  __device__ __forceinline__ void begin() {
    if constexpr (kMask) through = on.data && !on.is_set();
  }
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int n) const {
    return qkernels::load<kWhole, kWidth>(x + at, 0, n);
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void run(int64_t at, int n, const Loaded& in, P params) const {
    T out[kWidth];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Params<T>& p = params(k);
      const T unrounded = widen(in, k) * p.inv, q = round_even(unrounded) + p.zero_point;
      if constexpr (kMask)
        bits |= ((kWhole || k < n) && counts_inside(unrounded, q, p.zero_point, low, high, lsq)) ? 1u << k : 0;
      out[k] = fake_quantized(q, p, low, high);
    }
    if (kMask && through) {
      store<kWhole>(y + at, in, 0, n);
    } else {
      store<kWhole>(y + at, narrow<S>(out), 0, n);
    }
    if constexpr (kMask) store_bits<kWidth>(mask, at, n, through ? 0xffu : bits);
  }
};

// Where a call's qparams come from: TensorParams from tensors, ScalarParams from numbers. Both check them, and make the
// Runs and the Qparams of the call.
struct TensorParams {
  const Tensor& scale;
  const std::optional<Tensor>& zero_point;

  Runs runs(const Tensor& x) const { return runs_of(x, scale); }
  void check(const Tensor& x, int64_t quant_min, int64_t quant_max, Device device) const {
    check_range(quant_min, quant_max);
    check_scale(scale, zero_point, x, device);
  }
  template <typename T>
  OwnedQparams<T> make(int64_t quant_min, int64_t quant_max) const {
    return qparams<T>(scale, zero_point, quant_min, quant_max);
  }
};

struct ScalarParams {
  double scale;
  int64_t zero_point;

  Runs runs(const Tensor& x) const { return one_run(x); }
  void check(const Tensor&, int64_t quant_min, int64_t quant_max, Device) const {
    check_range(quant_min, quant_max);
    check_zero_point(zero_point, quant_min, quant_max);
  }
  template <typename T>
  OwnedQparams<T> make(int64_t quant_min, int64_t quant_max) const {
    return qparams<T>(scale, zero_point, quant_min, quant_max);
  }
};

// dx = dy where the gradient passes, else 0.
template <typename S>
struct BackwardOp {
  using T = Arithmetic<S>;
  static constexpr int kWidth = kVector<S>;
  struct Loaded {
    Vec<S, kWidth> grad, x;
  };
  const S *grad, *x;
  S* dx;
  T low, high;
  bool lsq;

  __device__ __forceinline__ void begin() {}
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int n) const {
    return {qkernels::load<kWhole, kWidth>(grad + at, 0, n), qkernels::load<kWhole, kWidth>(x + at, 0, n)};
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void run(int64_t at, int n, const Loaded& in, P params) const {
    Vec<S, kWidth> out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Params<T>& p = params(k);
      const T unrounded = widen(in.x, k) * p.inv, q = round_even(unrounded) + p.zero_point;
      out.v[k] = counts_inside(unrounded, q, p.zero_point, low, high, lsq) ? in.grad.v[k] : S{};
    }
    store<kWhole>(dx + at, out, 0, n);
  }
};

// dx from the mask that the forward pass wrote.
template <typename S>
struct BackwardMaskOp {
  using T = float;
  static constexpr int kWidth = kVector<S>;
  struct Loaded {
    Vec<S, kWidth> grad;
    unsigned bits;
  };
  const S* grad;
  const uint8_t* mask;
  S* dx;

  __device__ __forceinline__ void begin() {}
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int n) const {
    return {qkernels::load<kWhole, kWidth>(grad + at, 0, n), n > 0 ? unsigned{mask[at / 8]} >> (at % 8) : 0u};
  }
  template <bool kWhole, typename P>
  __device__ __forceinline__ void run(int64_t at, int n, const Loaded& in, P) const {
    Vec<S, kWidth> out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) out.v[k] = in.bits >> k & 1 ? in.grad.v[k] : S{};
    store<kWhole>(dx + at, out, 0, n);
  }
};

// Checks nothing. If `mask` is null, no mask is written.
template <typename P>
void run_forward(const Gpu& gpu, const Tensor& x_any, const P& params, int64_t quant_min, int64_t quant_max,
                 const Tensor& y, const Tensor* mask, Flag on, bool lsq = false) {
  if (x_any.numel() == 0) return;
  const Tensor x = in_layout_of(x_any, y);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const auto q = params.template make<T>(quant_min, quant_max);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    S* out = static_cast<S*>(y.mutable_data_ptr());
    const bool aligned = is_aligned({in, out});
    if (mask) {
      const ForwardOp<S, true> op{in, out, static_cast<uint8_t*>(mask->mutable_data_ptr()), q.quant_min, q.quant_max,
                                  on, lsq};
      sweep(gpu, op, q, params.runs(x), x.numel(), aligned);
    } else {
      sweep(gpu, ForwardOp<S, false>{in, out, nullptr, q.quant_min, q.quant_max, on}, q, params.runs(x), x.numel(),
            aligned);
    }
  });
}

template <typename P>
Tensor forward_with(const Tensor& x, const P& params, int64_t quant_min, int64_t quant_max) {
  check_floating("x", x);
  const Gpu gpu(x);
  params.check(x, quant_min, quant_max, gpu.device());
  Tensor y = empty_dense_like(x, gpu.device());
  run_forward(gpu, x, params, quant_min, quant_max, y, nullptr, Flag());
  return y;
}

template <typename P>
std::tuple<Tensor, Tensor> forward_mask_with(const Tensor& x, const P& params, int64_t quant_min, int64_t quant_max,
                                             bool lsq = false) {
  check_floating("x", x);
  const Gpu gpu(x);
  params.check(x, quant_min, quant_max, gpu.device());
  Tensor y = empty_dense_like(x, gpu.device()), mask = empty_mask(x.numel(), gpu.device());
  run_forward(gpu, x, params, quant_min, quant_max, y, &mask, Flag(), lsq);
  return {y, mask};
}

// All tensors are dense and in one layout.
template <typename P>
void run_backward(const Gpu& gpu, const Tensor& grad, const Tensor& x, const P& params, int64_t quant_min,
                  int64_t quant_max, const Tensor& dx, bool lsq) {
  if (x.numel() == 0) return;
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = params.template make<Arithmetic<S>>(quant_min, quant_max);
    const BackwardOp<S> op{static_cast<const S*>(grad.const_data_ptr()),
                           static_cast<const S*>(x.const_data_ptr()),
                           static_cast<S*>(dx.mutable_data_ptr()),
                           q.quant_min,
                           q.quant_max,
                           lsq};
    sweep(gpu, op, q, params.runs(x), x.numel(), is_aligned({op.grad, op.x, op.dx}));
  });
}

template <typename P>
Tensor backward_with(const Tensor& grad_any, const Tensor& x_any, const P& params, int64_t quant_min, int64_t quant_max,
                     bool lsq = false) {
  check_floating("x", x_any);
  const Gpu gpu(x_any);
  check_grad(grad_any, x_any, gpu.device());
  params.check(x_any, quant_min, quant_max, gpu.device());
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type(), gpu.device());
  run_backward(gpu, grad, x, params, quant_min, quant_max, dx, lsq);
  return dx;
}

Tensor fake_quantize_forward(const Tensor& x, const Tensor& scale, std::optional<Tensor> zero_point, int64_t quant_min,
                             int64_t quant_max) {
  return forward_with(x, TensorParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_forward_scalar(const Tensor& x, double scale, int64_t zero_point, int64_t quant_min,
                                    int64_t quant_max) {
  return forward_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask(const Tensor& x, const Tensor& scale,
                                                      std::optional<Tensor> zero_point, int64_t quant_min,
                                                      int64_t quant_max, bool lsq) {
  return forward_mask_with(x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

std::tuple<Tensor, Tensor> fake_quantize_forward_mask_scalar(const Tensor& x, double scale, int64_t zero_point,
                                                             int64_t quant_min, int64_t quant_max) {
  return forward_mask_with(x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                              std::optional<Tensor> zero_point, int64_t quant_min, int64_t quant_max, bool lsq) {
  return backward_with(grad, x, TensorParams{scale, zero_point}, quant_min, quant_max, lsq);
}

Tensor fake_quantize_backward_scalar(const Tensor& grad, const Tensor& x, double scale, int64_t zero_point,
                                     int64_t quant_min, int64_t quant_max) {
  return backward_with(grad, x, ScalarParams{scale, zero_point}, quant_min, quant_max);
}

Tensor fake_quantize_backward_mask(const Tensor& grad_any, const Tensor& mask) {
  check_floating("grad", grad_any);
  const Gpu gpu(grad_any);
  check_mask(mask, grad_any, gpu.device());
  const Tensor grad = to_dense(grad_any);
  Tensor dx = empty_strided(grad.sizes(), grad.strides(), grad.scalar_type(), gpu.device());
  if (grad.numel() == 0) return dx;
  dispatch_floating("grad", grad, [&](auto tag) {
    using S = decltype(tag);
    const BackwardMaskOp<S> op{static_cast<const S*>(grad.const_data_ptr()),
                               static_cast<const uint8_t*>(mask.const_data_ptr()),
                               static_cast<S*>(dx.mutable_data_ptr())};
    sweep<BackwardMaskOp<S>, false>(gpu, op, Qparams<float>{}, one_run(grad), grad.numel(),
                                    is_aligned({op.grad, op.dx}));
  });
  return dx;
}

}  // namespace

void fake_quantize_into(const Gpu& gpu, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                        int64_t quant_min, int64_t quant_max, const Tensor& y, const Tensor* mask, Flag on) {
  run_forward(gpu, x, TensorParams{scale, zero_point}, quant_min, quant_max, y, mask, on);
}

void fake_quantize_backward_into(const Gpu& gpu, const Tensor& grad, const Tensor& x, const Tensor& scale,
                                 const std::optional<Tensor>& zero_point, int64_t quant_min, int64_t quant_max,
                                 const Tensor& dx, bool lsq) {
  run_backward(gpu, grad, x, TensorParams{scale, zero_point}, quant_min, quant_max, dx, lsq);
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_forward", TORCH_BOX(&fake_quantize_forward));
  m.impl("fake_quantize_forward.scalar", TORCH_BOX(&fake_quantize_forward_scalar));
  m.impl("fake_quantize_forward_mask", TORCH_BOX(&fake_quantize_forward_mask));
  m.impl("fake_quantize_forward_mask.scalar", TORCH_BOX(&fake_quantize_forward_mask_scalar));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward));
  m.impl("fake_quantize_backward.scalar", TORCH_BOX(&fake_quantize_backward_scalar));
  m.impl("fake_quantize_backward_mask", TORCH_BOX(&fake_quantize_backward_mask));
}

}  // namespace qkernels
