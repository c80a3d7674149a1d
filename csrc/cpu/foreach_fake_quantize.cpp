// Fake quantization of many tensors on the CPU, by the kernels for one tensor: one thread for each small tensor, all
// threads for each large one.
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/fake_quantize_learnable_kernels.h"
#include "cpu/common/foreach_isa.h"

#include <variant>

#include "cpu/common/gradient.h"

namespace qkernels {
namespace {

using Tensors = std::vector<Tensor>;
using ZeroPoints = std::vector<std::optional<Tensor>>;
using Integers = std::vector<int64_t>;

// From so many elements on, a single tensor keeps all threads busy: it makes 4 tasks for each of 2 threads.
constexpr int64_t kLarge = 8 * kGrain;

// One tensor of the list. All that can fail or that calls torch is done when the job is made.
struct Job {
  Tensor x, grad, out;  // dense and in one layout; grad in backward passes only
  IndexedRuns runs;
  std::variant<Qparams<float>, Qparams<double>> qparams;
  int64_t numel = 0;
  std::vector<double> dscale, dzero_point;  // in the learnable backward pass
  double grad_factor = 0;
};

struct Lists {
  const Tensors& xs;
  const Tensors& scales;
  const ZeroPoints& zero_points;
  const Integers &quant_mins, &quant_maxs;
};

void check_length(const char* name, size_t got, const Lists& lists) {
  QK_CHECK(got == lists.xs.size(), name, ": got ", got, " values; accepted: one for each of the ", lists.xs.size(),
           " tensors");
}

// `prepare(job, i)` gives the i-th job its dense x (and grad) and its output.
template <typename Prepare>
std::vector<Job> jobs_of(const Lists& lists, Prepare prepare) {
  check_length("scales", lists.scales.size(), lists);
  check_length("zero_points", lists.zero_points.size(), lists);
  check_length("quant_min", lists.quant_mins.size(), lists);
  check_length("quant_max", lists.quant_maxs.size(), lists);
  std::vector<Job> jobs(lists.xs.size());
  for (size_t i = 0; i < jobs.size(); ++i) {
    Job& job = jobs[i];
    QK_CHECK(lists.xs[i].is_cpu(), "xs[", i, "]: got a tensor on another device; accepted: the first one's device");
    check_floating("x", lists.xs[i]);
    prepare(job, i);
    job.numel = job.x.numel();
    dispatch_floating("x", job.x, [&](auto tag) {
      job.qparams = qparams<Arithmetic<decltype(tag)>>(job.x, lists.scales[i], lists.zero_points[i],
                                                       lists.quant_mins[i], lists.quant_maxs[i]);
    });
    job.runs = indexed_runs(job.x, lists.scales[i]);
  }
  return jobs;
}

// Calls run(job) for every job that has elements. A kernel that is called inside a parallel region runs on its thread
// alone; what it computes does not depend on that.
template <typename Run>
void run_all(std::vector<Job>& jobs, Run run) {
  std::vector<Job*> small;
  std::vector<int64_t> first;  // the number of elements in the small jobs before each of them
  int64_t elements = 0;
  for (Job& job : jobs) {
    if (job.numel == 0 || job.numel >= kLarge) continue;
    small.push_back(&job);
    first.push_back(elements);
    elements += job.numel;
  }
  // Tasks are ranges of elements; a job belongs to the task that holds its first element.
  torch::stable::parallel_for(0, elements, kGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = std::lower_bound(first.begin(), first.end(), begin) - first.begin();
         i < small.size() && first[i] < end; ++i)
      run(*small[i]);
  });
  for (Job& job : jobs)
    if (job.numel >= kLarge) run(job);
}

template <typename S>
const S* in_of(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}

template <typename S>
S* out_of(const Tensor& t) {
  return static_cast<S*>(t.mutable_data_ptr());
}

template <typename F>
void dispatch_job(const Job& job, F f) {
  dispatch_floating("x", job.x, [&](auto tag) { f(tag, std::get<Qparams<Arithmetic<decltype(tag)>>>(job.qparams)); });
}

Tensors outputs_of(std::vector<Job>& jobs) {
  Tensors out;
  out.reserve(jobs.size());
  for (Job& job : jobs) out.push_back(std::move(job.out));
  return out;
}

Tensors foreach_fake_quantize_forward(Tensors xs, Tensors scales, ZeroPoints zero_points, Integers quant_mins,
                                      Integers quant_maxs) {
  auto jobs = jobs_of({xs, scales, zero_points, quant_mins, quant_maxs}, [&](Job& job, size_t i) {
    job.out = empty_dense_like(xs[i]);
    job.x = in_layout_of(xs[i], job.out);
  });
  run_all(jobs, [](const Job& job) {
    dispatch_job(job, [&](auto tag, const auto& qparams) {
      using S = decltype(tag);
      QK_DISPATCH_ISA(forward(job.runs, qparams, job.numel, in_of<S>(job.x), out_of<S>(job.out), nullptr));
    });
  });
  return outputs_of(jobs);
}

std::vector<Job> backward_jobs(const Tensors& grads, const Lists& lists) {
  check_length("grads", grads.size(), lists);
  return jobs_of(lists, [&](Job& job, size_t i) {
    check_grad(grads[i], lists.xs[i]);
    job.x = to_dense(lists.xs[i]);
    job.grad = in_layout_of(grads[i], job.x);
    job.out = empty_strided(job.x.sizes(), job.x.strides(), job.x.scalar_type());
  });
}

Tensors foreach_fake_quantize_backward(Tensors grads, Tensors xs, Tensors scales, ZeroPoints zero_points,
                                       Integers quant_mins, Integers quant_maxs, bool lsq) {
  auto jobs = backward_jobs(grads, {xs, scales, zero_points, quant_mins, quant_maxs});
  run_all(jobs, [lsq](const Job& job) {
    dispatch_job(job, [&](auto tag, const auto& qparams) {
      using S = decltype(tag);
      const S *grad = in_of<S>(job.grad), *x = in_of<S>(job.x);
      if (lsq) {
        QK_DISPATCH_ISA(backward<true>(job.runs, qparams, job.numel, grad, x, out_of<S>(job.out)));
      } else {
        QK_DISPATCH_ISA(backward(job.runs, qparams, job.numel, grad, x, out_of<S>(job.out)));
      }
    });
  });
  return outputs_of(jobs);
}

std::tuple<Tensors, Tensors, Tensors> foreach_fake_quantize_learnable_backward(Tensors grads, Tensors xs,
                                                                               Tensors scales, ZeroPoints zero_points,
                                                                               Integers quant_mins, Integers quant_maxs,
                                                                               std::vector<double> grad_factors,
                                                                               bool lsq) {
  const Lists lists{xs, scales, zero_points, quant_mins, quant_maxs};
  check_length("grad_factor", grad_factors.size(), lists);
  auto jobs = backward_jobs(grads, lists);
  for (size_t i = 0; i < jobs.size(); ++i) {
    jobs[i].dscale.resize(scales[i].numel());
    jobs[i].dzero_point.resize(scales[i].numel());
    jobs[i].grad_factor = grad_factors[i];
  }
  run_all(jobs, [lsq](Job& job) {
    dispatch_job(job, [&](auto tag, const auto& qparams) {
      using S = decltype(tag);
      const S *grad = in_of<S>(job.grad), *x = in_of<S>(job.x);
      double *dscale = job.dscale.data(), *dzero_point = job.dzero_point.data();
      if (lsq) {
        QK_DISPATCH_ISA(learnable_backward<true>(job.runs, qparams, job.numel, grad, x, out_of<S>(job.out),
                                                 job.grad_factor, dscale, dzero_point));
      } else {
        QK_DISPATCH_ISA(learnable_backward(job.runs, qparams, job.numel, grad, x, out_of<S>(job.out), job.grad_factor,
                                           dscale, dzero_point));
      }
    });
  });
  Tensors dscales, dzero_points;
  for (size_t i = 0; i < jobs.size(); ++i) {
    dscales.push_back(from_double(jobs[i].dscale, scales[i]));
    dzero_points.push_back(from_double(jobs[i].dzero_point, scales[i]));
  }
  return {outputs_of(jobs), std::move(dscales), std::move(dzero_points)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("foreach_fake_quantize_forward", TORCH_BOX(&foreach_fake_quantize_forward));
  m.impl("foreach_fake_quantize_backward", TORCH_BOX(&foreach_fake_quantize_backward));
  m.impl("foreach_fake_quantize_learnable_backward", TORCH_BOX(&foreach_fake_quantize_learnable_backward));
}

}  // namespace qkernels
