// Gradients of learned scales and zero points (LSQ, LSQ+): one pass over grad and x writes dx and leaves sums.
#include "reduce.cuh"

namespace qkernels {
namespace {

template <typename S>
struct LearnableOp {
  using T = Arithmetic<S>;
  using Total = double;
  static constexpr int kWidth = kVector<S>;
  static constexpr bool kQuantizes = true;
  struct Loaded {
    Vec<S, kWidth> grad, x;
  };
  const S *grad, *x;
  S* dx;
  T low, high;
  double grad_factor;
  RealOutput dscale, dzero_point;

  static __device__ __forceinline__ Pair<T> identity() { return {0, 0}; }
  template <typename U>
  static __device__ __forceinline__ Pair<U> merge(Pair<U> p, Pair<U> q) {
    return {p.a + q.a, p.b + q.b};
  }
  __device__ __forceinline__ bool wanted() const { return true; }
  template <bool kWhole>
  __device__ __forceinline__ Loaded load(int64_t at, int first, int last) const {
    return {qkernels::load<kWhole, kWidth>(grad + at, first, last),
            qkernels::load<kWhole, kWidth>(x + at, first, last)};
  }
  // Select, never multiply, so that an infinite dy outside the range does not become NaN.
  template <bool kWhole, typename P>
  __device__ __forceinline__ void terms(int64_t at, int first, int last, const Loaded& in, P params,
                                        Pair<T> (&out)[kWidth]) const {
    Vec<S, kWidth> d;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Params<T>& p = params(k);
      const T dy = widen(in.grad.v[k]), steps = widen(in.x.v[k]) * p.inv;
      const T q = round_even(steps) + p.zero_point;
      const bool inside = q >= low && q <= high;
      d.v[k] = inside ? in.grad.v[k] : S{};
      out[k].a = dy * ((clamp(q, low, high) - p.zero_point) - (inside ? steps : T{0}));
      out[k].b = inside ? T{0} : -dy * p.scale;
      if (!kWhole && (k < first || k >= last)) out[k] = identity();
    }
    store<kWhole>(dx + at, d, first, last);
  }
  __device__ __forceinline__ void result(int64_t channel, Pair<double> sum) const {
    dscale.set(channel, sum.a * grad_factor);
    dzero_point.set(channel, sum.b * grad_factor);
  }
};

std::tuple<Tensor, Tensor, Tensor> fake_quantize_learnable_backward(const Tensor& grad_any, const Tensor& x_any,
                                                                    const Tensor& scale,
                                                                    std::optional<Tensor> zero_point, int64_t quant_min,
                                                                    int64_t quant_max, double grad_factor) {
  check_floating("x", x_any);
  check_grad(grad_any, x_any);
  check_range(quant_min, quant_max);
  check_scale(scale, zero_point, x_any);
  const Gpu gpu(x_any);
  const Device device = device_of(x_any);
  const Tensor x = to_dense(x_any);
  const Tensor grad = in_layout_of(grad_any, x);
  Tensor dx = empty_strided(x.sizes(), x.strides(), x.scalar_type(), device);
  Tensor dscale = empty(to_vector(scale.sizes()), scale.scalar_type(), device);
  Tensor dzero_point = empty(to_vector(scale.sizes()), scale.scalar_type(), device);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    const auto q = qparams<Arithmetic<S>>(scale, zero_point, quant_min, quant_max);
    const LearnableOp<S> op{static_cast<const S*>(grad.const_data_ptr()),
                            static_cast<const S*>(x.const_data_ptr()),
                            static_cast<S*>(dx.mutable_data_ptr()),
                            q.quant_min,
                            q.quant_max,
                            grad_factor,
                            RealOutput(dscale),
                            RealOutput(dzero_point)};
    reduce_channels(gpu, op, q, runs_of(x, scale), x, is_aligned({op.grad, op.x, op.dx}));
  });
  return {dx, dscale, dzero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_learnable_backward", TORCH_BOX(&fake_quantize_learnable_backward));
}

}  // namespace qkernels
