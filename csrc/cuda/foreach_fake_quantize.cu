// Fake quantization of many tensors on the GPU. Each launch takes a table of tensors by value: tensors of one dtype, as
// many as fit the 4 KB of arguments. The number of blocks for a tensor follows from its elements. A tensor whose scale
// varies along more than one dimension, or whose gradients are reduced by columns (reduce.cuh), is left to the op of
// one tensor.
#include "learnable.cuh"
#include "ops.cuh"

namespace qkernels {
namespace {

template <typename Item>
struct Table {
  static constexpr int kMost = (4096 - 8) / (sizeof(Item) + 8);
  Item items[kMost];
  int64_t end[kMost];  // the number of blocks of an item and of all items before it
  int count;

  // Returns the item that `block` belongs to. `block` becomes its number in that item, and `blocks` how many the item
  // has.
  __device__ __forceinline__ const Item& find(int64_t& block, int64_t& blocks) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (block < end[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int64_t begin = low ? end[low - 1] : 0;
    block -= begin;
    blocks = end[low] - begin;
    return items[low];
  }
};

// Collects items, and launches the kernel whenever the table or the grid is full.
template <typename Item>
class Batch {
 public:
  // early: the kernel begins with wait_for_previous().
  Batch(const Gpu& gpu, void (*kernel)(Table<Item>), bool early = false) : gpu_(gpu), kernel_(kernel), early_(early) {}
  void add(const Item& item, int64_t blocks) {
    blocks = std::min(blocks, kGrid);  // kernels loop over the rest
    if (count_ == Table<Item>::kMost || (count_ && end_[count_ - 1] + blocks > kGrid)) flush();
    items_.push_back(item);
    end_[count_] = (count_ ? end_[count_ - 1] : 0) + blocks;
    ++count_;
  }
  void flush() {
    if (!count_) return;
    alignas(Table<Item>) unsigned char bytes[sizeof(Table<Item>)] = {};
    auto* table = reinterpret_cast<Table<Item>*>(bytes);
    std::copy(items_.begin(), items_.end(), table->items);
    std::copy(end_, end_ + count_, table->end);
    table->count = count_;
    if (early_) {
      gpu_.launch_early(kernel_, end_[count_ - 1], 1, kThreads, *table);
    } else {
      gpu_.launch(kernel_, end_[count_ - 1], 1, kThreads, *table);
    }
    items_.clear();
    count_ = 0;
  }

 private:
  static constexpr int64_t kGrid = 0x7fffffff;
  const Gpu& gpu_;
  void (*kernel_)(Table<Item>);
  bool early_;
  std::vector<Item> items_;
  int64_t end_[Table<Item>::kMost];
  int count_ = 0;
};

template <typename S>
struct Elements {
  using T = Arithmetic<S>;
  const S *grad, *x;
  S* out;
  int64_t numel;
  Qparams<T> q;
  Divider inner;
  Cycle channels;
  bool whole;  // aligned, and no vector holds elements of two channels
  bool lsq;

  static constexpr int64_t kPerBlock = int64_t{kThreads} * kUnroll * kVector<S>;
};

template <typename S, bool kBackward>
__global__ void __launch_bounds__(kThreads, kFrugal ? 4 : 3)
    foreach_kernel(const __grid_constant__ Table<Elements<S>> table) {
  using T = Arithmetic<S>;
  constexpr int N = kVector<S>;
  int64_t block = blockIdx.x, blocks;
  const Elements<S>& item = table.find(block, blocks);
  const T low = item.q.quant_min, high = item.q.quant_max;
  const auto run = [&](auto whole, int64_t at, int n, const Vec<S, N>& grad, const Vec<S, N>& x, const auto& params) {
    constexpr bool kWhole = decltype(whole)::value;
    if constexpr (kBackward) {
      Vec<S, N> out;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const Params<T>& p = params(k);
        const T unrounded = widen(x, k) * p.inv, q = round_even(unrounded) + p.zero_point;
        out.v[k] = counts_inside(unrounded, q, p.zero_point, low, high, item.lsq) ? grad.v[k] : S{};
      }
      store<kWhole>(item.out + at, out, 0, n);
    } else {
      T out[N];
#pragma unroll
      for (int k = 0; k < N; ++k) out[k] = fake_quantized(steps_of(widen(x, k), params(k)), params(k), low, high);
      store<kWhole>(item.out + at, narrow<S>(out), 0, n);
    }
  };
  for (int64_t from = block * Elements<S>::kPerBlock; from < item.numel; from += blocks * Elements<S>::kPerBlock) {
    if (item.whole && from + Elements<S>::kPerBlock <= item.numel) {
      Vec<S, N> grad[kUnroll], x[kUnroll];
      const int64_t first = from + threadIdx.x * N;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if constexpr (kBackward) grad[u] = load<true, N>(item.grad + first + u * kThreads * N, 0, N);
        x[u] = load<true, N>(item.x + first + u * kThreads * N, 0, N);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = first + u * kThreads * N;
        const Params<T> p = item.q.of(item.channels.of_run(item.inner.divide(at)));
        run(std::true_type{}, at, N, grad[u], x[u], [&](int) -> const Params<T>& { return p; });
      }
      continue;
    }
#pragma unroll 1
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = from + (u * kThreads + threadIdx.x) * N, rest = item.numel - at;
      if (rest <= 0) break;
      const int n = rest >= N ? N : static_cast<int>(rest);
      Params<T> own[N];
      fill(item.inner, item.channels, item.q, at, item.numel, own);
      Vec<S, N> grad;
      if constexpr (kBackward) grad = load<false, N>(item.grad + at, 0, n);
      run(std::false_type{}, at, n, grad, load<false, N>(item.x + at, 0, n),
          [&](int k) -> const Params<T>& { return own[k]; });
    }
  }
}

template <typename S, bool kLsq>
struct Sums {
  LearnableOp<S, kLsq> op;
  Qparams<Arithmetic<S>> q;
  Cycle channels;
  Pieces pieces;
  Pair<Arithmetic<S>>* partial;
};

template <typename S, bool kLsq>
__global__ void __launch_bounds__(kThreads, 2)
    foreach_pieces_kernel(const __grid_constant__ Table<Sums<S, kLsq>> table) {
  let_next_start();
  int64_t block = blockIdx.x, blocks;
  const Sums<S, kLsq>& item = table.find(block, blocks);
  add_pieces(item.op, item.q, item.channels, item.pieces, item.partial, block, blocks);
}

template <typename S, bool kLsq>
struct Totals {
  LearnableOp<S, kLsq> op;
  Cycle channels;
  Combine combine;
  const Pair<Arithmetic<S>>* partial;
};

template <typename S, bool kLsq>
__global__ void __launch_bounds__(kThreads)
    foreach_combine_kernel(const __grid_constant__ Table<Totals<S, kLsq>> table) {
  wait_for_previous();
  int64_t block = blockIdx.x, blocks;
  const Totals<S, kLsq>& item = table.find(block, blocks);
  add_partials(item.op, item.channels, item.combine, item.partial, block, blocks);
}

using Tensors = std::vector<Tensor>;
using ZeroPoints = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;

// One tensor of the list, which is checked. x, grad and out are dense and in one layout.
struct Job {
  Tensor grad, x, out;
  const Tensor& scale;
  const std::optional<Tensor>& zero_point;
  int64_t quant_min, quant_max;
  Runs runs;

  template <typename T>
  OwnedQparams<T> params() const {
    return qparams<T>(scale, zero_point, quant_min, quant_max);
  }
  bool is_aligned() const {
    return qkernels::is_aligned(
        {grad.defined() ? grad.const_data_ptr() : nullptr, x.const_data_ptr(), out.const_data_ptr()});
  }
};

struct Lists {
  const Tensors* grads;  // null: a forward pass
  const Tensors& xs;
  const Tensors& scales;
  const ZeroPoints& zero_points;
  const Integers &quant_mins, &quant_maxs;

  void check(const char* name, size_t got) const {
    QK_CHECK(got == xs.size(), name, ": got ", got, " values; accepted: one for each of the ", xs.size(), " tensors");
  }
  void check_lengths() const {
    if (grads) check("grads", grads->size());
    check("scales", scales.size());
    check("zero_points", zero_points.size());
    check("quant_min", quant_mins.size());
    check("quant_max", quant_maxs.size());
  }
  // Makes the jobs. All errors are thrown here, before the first launch.
  std::vector<Job> jobs(Device device) const {
    for (size_t i = 0; i < xs.size(); ++i) {
      const Device got = device_of(xs[i]);
      QK_CHECK(got == device, "xs[", i, "]: got a tensor on ", device_name(got), "; accepted: the first one's device, ",
               device_name(device));
      check_floating("x", xs[i]);
      check_range(quant_mins[i], quant_maxs[i]);
      check_scale(scales[i], zero_points[i], xs[i], device);
      if (grads) check_grad((*grads)[i], xs[i], device);
    }
    std::vector<Job> jobs;
    jobs.reserve(xs.size());
    for (size_t i = 0; i < xs.size(); ++i) {
      Job job{{}, {}, {}, scales[i], zero_points[i], quant_mins[i], quant_maxs[i], {}};
      if (grads) {
        job.x = to_dense(xs[i]);
        job.grad = in_layout_of((*grads)[i], job.x);
        job.out = empty_strided(job.x.sizes(), job.x.strides(), job.x.scalar_type(), device);
      } else {
        job.out = empty_dense_like(xs[i], device);
        job.x = in_layout_of(xs[i], job.out);
      }
      job.runs = runs_of(job.x, job.scale);
      jobs.push_back(std::move(job));
    }
    return jobs;
  }
};

// Calls run(a value of the storage type, dtype) for each dtype that occurs.
template <typename F>
void for_each_dtype(const std::vector<Job>& jobs, F run) {
  for (ScalarType dtype : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double})
    if (std::any_of(jobs.begin(), jobs.end(), [&](const Job& job) { return job.x.scalar_type() == dtype; }))
      dispatch_floating("x", dtype, [&](auto tag) { run(tag, dtype); });
}

Tensors outputs_of(const std::vector<Job>& jobs) {
  Tensors out;
  out.reserve(jobs.size());
  for (const Job& job : jobs) out.push_back(job.out);
  return out;
}

template <bool kBackward>
Tensors elementwise(const Lists& lists, bool lsq = false) {
  lists.check_lengths();
  if (lists.xs.empty()) return {};
  const Gpu gpu(lists.xs[0]);
  const std::vector<Job> jobs = lists.jobs(gpu.device());
  for_each_dtype(jobs, [&](auto tag, ScalarType dtype) {
    using S = decltype(tag);
    std::vector<OwnedQparams<Arithmetic<S>>> held;  // keeps tensors alive until the last launch
    Batch<Elements<S>> batch(gpu, foreach_kernel<S, kBackward>);
    for (const Job& job : jobs) {
      const int64_t numel = job.x.numel();
      if (job.x.scalar_type() != dtype || numel == 0) continue;
      if (Cycle::fits(job.runs)) {
        held.push_back(job.params<Arithmetic<S>>());
        const bool whole = job.is_aligned() && (job.runs.channels == 1 || job.runs.inner % kVector<S> == 0);
        batch.add({kBackward ? static_cast<const S*>(job.grad.const_data_ptr()) : nullptr,
                   static_cast<const S*>(job.x.const_data_ptr()), static_cast<S*>(job.out.mutable_data_ptr()), numel,
                   held.back(), Divider(job.runs.inner), Cycle(job.runs), whole, lsq},
                  ceil_div(numel, Elements<S>::kPerBlock));
      } else if constexpr (kBackward) {
        fake_quantize_backward_into(gpu, job.grad, job.x, job.scale, job.zero_point, job.quant_min, job.quant_max,
                                    job.out, lsq);
      } else {
        fake_quantize_into(gpu, job.x, job.scale, job.zero_point, job.quant_min, job.quant_max, job.out, nullptr,
                           Flag());
      }
    }
    batch.flush();
  });
  return outputs_of(jobs);
}

Tensors foreach_fake_quantize_forward(Tensors xs, Tensors scales, ZeroPoints zero_points, Integers quant_mins,
                                      Integers quant_maxs) {
  return elementwise<false>({nullptr, xs, scales, zero_points, quant_mins, quant_maxs});
}

Tensors foreach_fake_quantize_backward(Tensors grads, Tensors xs, Tensors scales, ZeroPoints zero_points,
                                       Integers quant_mins, Integers quant_maxs, bool lsq) {
  return elementwise<true>({&grads, xs, scales, zero_points, quant_mins, quant_maxs}, lsq);
}

std::tuple<Tensors, Tensors, Tensors> foreach_fake_quantize_learnable_backward(Tensors grads, Tensors xs,
                                                                               Tensors scales, ZeroPoints zero_points,
                                                                               Integers quant_mins, Integers quant_maxs,
                                                                               std::vector<double> grad_factors,
                                                                               bool lsq) {
  const Lists lists{&grads, xs, scales, zero_points, quant_mins, quant_maxs};
  lists.check("grad_factor", grad_factors.size());
  lists.check_lengths();
  if (xs.empty()) return {};
  const Gpu gpu(xs[0]);
  const std::vector<Job> jobs = lists.jobs(gpu.device());
  Tensors dscales, dzero_points;
  for (const Tensor& scale : scales)
    for (Tensors* list : {&dscales, &dzero_points})
      list->push_back(empty(to_vector(scale.sizes()), scale.scalar_type(), gpu.device()));
  const auto run = [&](auto tag, ScalarType dtype, auto open) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    constexpr bool kLsq = decltype(open)::value;
    constexpr int64_t N = kVector<S>;
    std::vector<OwnedQparams<T>> params;  // keeps tensors alive until the last launch
    std::vector<Sums<S, kLsq>> all;
    std::vector<const Runs*> runs;
    int64_t pairs = 0;
    for (size_t i = 0; i < jobs.size(); ++i) {
      const Job& job = jobs[i];
      if (job.x.scalar_type() != dtype) continue;
      const int64_t numel = job.x.numel();
      if (numel == 0 || !Cycle::fits(job.runs) || in_columns(job.runs, numel, N)) {
        fake_quantize_learnable_backward_into(gpu, job.grad, job.x, job.scale, job.zero_point, job.quant_min,
                                              job.quant_max, grad_factors[i], lsq, job.out, dscales[i],
                                              dzero_points[i]);
        continue;
      }
      params.push_back(job.params<T>());
      const LearnableOp<S, kLsq> op{static_cast<const S*>(job.grad.const_data_ptr()),
                                    static_cast<const S*>(job.x.const_data_ptr()),
                                    static_cast<S*>(job.out.mutable_data_ptr()),
                                    params.back().quant_min,
                                    params.back().quant_max,
                                    grad_factors[i],
                                    RealOutput(dscales[i]),
                                    RealOutput(dzero_points[i])};
      const Pieces pieces(job.runs, N, blocks_wanted(gpu), job.is_aligned());
      all.push_back({op, params.back(), Cycle(job.runs), pieces, nullptr});
      runs.push_back(&job.runs);
      if (!pieces.direct) pairs += pieces.count;
    }
    const Workspace<Pair<T>> workspace(pairs, gpu.device());
    Pair<T>* partial = workspace.data();
    Batch<Sums<S, kLsq>> sums(gpu, foreach_pieces_kernel<S, kLsq>);
    Batch<Totals<S, kLsq>> totals(gpu, foreach_combine_kernel<S, kLsq>, true);
    for (Sums<S, kLsq>& item : all) {
      if (!item.pieces.direct) {
        item.partial = partial;
        partial += item.pieces.count;
      }
      sums.add(item, item.pieces.blocks());
    }
    sums.flush();
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].pieces.direct) continue;
      const Combine combine = all[i].pieces.combine(*runs[i]);
      totals.add({all[i].op, all[i].channels, combine, all[i].partial}, combine.blocks());
    }
    totals.flush();
  };
  for_each_dtype(jobs,
                 [&](auto tag, ScalarType dtype) { with_convention(lsq, [&](auto open) { run(tag, dtype, open); }); });
  return {outputs_of(jobs), dscales, dzero_points};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("foreach_fake_quantize_forward", TORCH_BOX(&foreach_fake_quantize_forward));
  m.impl("foreach_fake_quantize_backward", TORCH_BOX(&foreach_fake_quantize_backward));
  m.impl("foreach_fake_quantize_learnable_backward", TORCH_BOX(&foreach_fake_quantize_learnable_backward));
}

}  // namespace qkernels
