// int8_program on the CPU: a plan's steps on a few images at a time, whose activations then stay in the cache.
#include "cpu/int8_program/arguments.h"
#include "cpu/int8_program/cache.h"
#include "cpu/int8_program/views.h"

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <algorithm>

namespace qkernels {
namespace {

constexpr size_t kPlans = 64, kLayouts = 16;    // how many are kept, and for each plan
constexpr int64_t kMany = 8;                    // images for each thread
constexpr int64_t kRegionElements = 128 << 10;  // from about 20 us on a region for all steps is worth its start

// What one thread's activations may take: three quarters of its second-level cache, of which some CPUs have 1 MiB and
// some 2. Several cores may share a larger one.
int64_t frame_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t size = 0;
#endif
  return (size > 0 ? std::clamp<int64_t>(size, 512 << 10, 2 << 20) : 1 << 20) / 4 * 3;
}

struct Program {
  std::unique_ptr<Plan> plan;
  mutable Cache<LayoutKey, Layout> layouts{kLayouts};
};

std::shared_ptr<const Program> program_of(std::string_view text) {
  static Cache<std::string, Program> programs(kPlans);
  return programs.get(text, [&] {
    auto program = std::make_shared<Program>();
    program->plan = parse_plan(std::string(text));
    return program;
  });
}

// Whether x is in channels_last memory and not in torch's usual order.
bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims < 4 || x.is_contiguous()) return false;
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto next = [&](int64_t dim) {
    const bool good = sizes[dim] == 1 || strides[dim] == expected;
    expected *= sizes[dim];
    return good;
  };
  if (!next(1)) return false;
  for (int64_t dim = dims - 1; dim >= 2; --dim)
    if (!next(dim)) return false;
  return next(0);
}

LayoutKey check_inputs(const Plan& plan, const std::vector<Tensor>& inputs) {
  QK_CHECK(!inputs.empty(), "inputs: got none; accepted: at least one tensor");
  for (const auto& [index, value] : plan.inputs)
    QK_CHECK(index < static_cast<int64_t>(inputs.size()), "inputs: got ", inputs.size(),
             " tensors; accepted: ", index + 1, ", as the plan reads input ", index);
  LayoutKey key{{}, is_channels_last(inputs[0])};
  const int64_t batch = inputs[0].dim() ? inputs[0].size(0) : 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& x = inputs[i];
    const int64_t dims = x.dim();
    QK_CHECK(x.is_cpu(), "inputs[", i, "]: got a tensor on another device; accepted: a CPU tensor");
    QK_CHECK(x.scalar_type() == ScalarType::Float && dims >= 2 && dims <= 5, "inputs[", i, "]: got ",
             dtype_name(x.scalar_type()), " of shape ", shape_of(x),
             "; accepted: torch.float32 [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]");
    const auto sizes = x.sizes();
    QK_CHECK(sizes[0] == batch, "inputs[", i, "]: got ", sizes[0], " images; accepted: as many as inputs[0] has, ",
             batch);
    key.sizes.push_back(dims);
    for (int64_t dim = 1; dim < dims; ++dim) key.sizes.push_back(sizes[dim]);
  }
  return key;
}

const char* accepted(ConstantKind kind) {
  switch (kind) {
    case ConstantKind::floats: return "torch.float32";
    case ConstantKind::int8: return "torch.int8";
    case ConstantKind::int32: return "torch.int32";
    case ConstantKind::integer: return "an integer dtype";
    default: return "torch.float32 or an integer dtype";
  }
}

// Torch's numbers of dtypes.
struct Dtypes {
  int32_t float32 = aoti_torch_dtype_float32(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8(),
          int16 = aoti_torch_dtype_int16(), int32 = aoti_torch_dtype_int32(), int64 = aoti_torch_dtype_int64();

  bool is_integer(int32_t dtype) const {
    return dtype == int8 || dtype == uint8 || dtype == int16 || dtype == int32 || dtype == int64;
  }
  bool fits(ConstantKind kind, int32_t dtype) const {
    switch (kind) {
      case ConstantKind::floats: return dtype == float32;
      case ConstantKind::int8: return dtype == int8;
      case ConstantKind::int32: return dtype == int32;
      case ConstantKind::integer: return is_integer(dtype);
      default: return dtype == float32 || is_integer(dtype);
    }
  }
};

const Dtypes& dtypes() {
  static const Dtypes known;
  return known;
}

// Finds the constants' memory. Returns whether what has to be finite is finite.
bool read_constants(Call& call, const TensorList& constants) {
  const Dtypes& known = dtypes();
  call.constants.resize(constants.size());
  bool finite = true;
  for (const ConstantUse& use : call.plan.constants) {
    const size_t i = static_cast<size_t>(use.index);
    QK_CHECK(i < constants.size(), use.where, ": got constant ", i, "; accepted: below ", constants.size());
    const int64_t numel =
        use.channels_of < 0 ? use.numel : call.layout.shapes[static_cast<size_t>(use.channels_of)].channels;
    QK_CHECK(known.fits(use.kind, constants.dtype(i)) && constants.numel(i) == numel && constants.is_contiguous(i),
             use.where, ": got constant ", i, ", ", constants.description(i), "; accepted: contiguous ",
             accepted(use.kind), " with ", numel, " elements");
    call.constants[i] = constants.data(i);
    if (use.finite && finite) finite = call.kernels.all_finite(call.floats(use.index), numel);
  }
  return finite;
}

double number_of(const TensorList& constants, int index) {
  const size_t i = static_cast<size_t>(index);
  const Dtypes& known = dtypes();
  const int32_t dtype = constants.dtype(i);
  const void* data = constants.data(i);
  if (dtype == known.float32) return static_cast<double>(*static_cast<const float*>(data));
  if (dtype == known.int8) return *static_cast<const int8_t*>(data);
  if (dtype == known.uint8) return *static_cast<const uint8_t*>(data);
  if (dtype == known.int16) return *static_cast<const int16_t*>(data);
  if (dtype == known.int32) return *static_cast<const int32_t*>(data);
  return static_cast<double>(*static_cast<const int64_t*>(data));
}

// Returns whether all scales are finite and not negative.
bool read_quantizers(Call& call, const TensorList& constants) {
  bool good = true;
  for (const QuantizerInfo& info : call.plan.quantizers) {
    float scale = *call.floats(info.scale);
    good = good && scale >= 0;
    scale = std::max(scale, std::numeric_limits<float>::min());
    const double zero_point = info.zero_point < 0 ? 0 : number_of(constants, info.zero_point);
    QK_CHECK(info.low <= zero_point && zero_point <= info.high, "input_zero_point: got ", zero_point,
             "; accepted: quant_min to quant_max, ", info.low, " to ", info.high);
    call.quantizers.push_back({scale, 1 / scale, static_cast<int32_t>(zero_point), info.low, info.high});
  }
  for (const EqualConstants& pair : call.plan.equal)
    QK_CHECK(number_of(constants, pair.a) == number_of(constants, pair.b), pair.where, ": constants ", pair.a, " and ",
             pair.b, " differ; accepted: equal ones, as the plan takes them for one quantizer");
  return good;
}

// The strides of an input, or of an output, by depth, height and width.
TensorPlace place_of(const Tensor& t) {
  const auto strides = t.strides();
  const int64_t dims = t.dim();
  const auto stride = [&](int64_t dim) { return dim < 2 ? int64_t{0} : strides[dim]; };
  return {static_cast<float*>(t.data_ptr()),
          strides[0],
          t.size(1) == 1 ? 1 : strides[1],
          stride(dims - 3),
          stride(dims - 2),
          stride(dims - 1)};
}

// What is left of an input's order of dims: channels are neighbours, or the pixels of a row.
bool is_readable(const Tensor& x) {
  const int64_t dims = x.dim();
  if (x.size(1) == 1 || x.stride(1) == 1) return true;
  return dims > 2 && (x.size(dims - 1) == 1 || x.stride(dims - 1) == 1);
}

Tensor make_output(const Shape& shape, int64_t batch, bool channels_last) {
  std::vector<int64_t> sizes = {batch, shape.channels};
  const int64_t spatial[] = {shape.size.d, shape.size.h, shape.size.w};
  for (int i = 3 - shape.rank; i < 3; ++i) sizes.push_back(spatial[i]);
  if (!channels_last) return empty(sizes, ScalarType::Float);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  strides[1] = stride;
  stride *= std::max<int64_t>(sizes[1], 1);
  for (size_t dim = sizes.size() - 1; dim >= 2; --dim) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  strides[0] = stride;
  return empty_strided({sizes.data(), sizes.size()}, {strides.data(), strides.size()}, ScalarType::Float);
}

void fill_border(const Frame& frame, const Border& border) {
  const CodeImage x = frame.codes(border.value);
  const int code = frame.quantizer(border.value).zero_point + 128;
  const Size3 before = border.before, after = border.after;
  const auto fill = [&](uint8_t* pixels, int64_t count) {
    std::memset(pixels, code, static_cast<size_t>(count * x.stride_w));
  };
  const Size3 all = {before.d + x.size.d + after.d, before.h + x.size.h + after.h, before.w + x.size.w + after.w};
  for_each_row(frame, all, (before.w + after.w) * x.stride_w, [&](int64_t n, int64_t i, int64_t j) {
    const int64_t d = i - before.d, h = j - before.h;
    uint8_t* row = x.data + n * x.stride_n + d * x.stride_d + h * x.stride_h;
    if (d < 0 || d >= x.size.d || h < 0 || h >= x.size.h) return fill(row - before.w * x.stride_w, all.w);
    fill(row - before.w * x.stride_w, before.w);
    fill(row + x.size.w * x.stride_w, after.w);
  });
}

void run_frame(const Frame& frame) {
  const Call& call = frame.call;
  for (size_t i = 0; i < call.plan.steps.size(); ++i) {
    if (call.layout.free[i]) continue;
    for (const Border& border : call.layout.borders[i]) fill_border(frame, border);
    call.plan.steps[i]->run(frame);
  }
}

// With at least as many images as threads, every thread takes images to itself, a few at a time, and runs all steps on
// them. What is left is computed step by step, each step by all threads; of many images nothing is, as each step reads
// its weights, and threads that have an image more to do are soon done with it.
void run_all(const Call& call, int64_t batch) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t apart = batch >= kMany * threads ? batch : batch / threads * threads, rest = batch - apart;
  const int64_t fitting = std::max<int64_t>(1, frame_bytes() / std::max<int64_t>(1, call.layout.bytes));
  const int64_t share = std::max<int64_t>(1, (apart + threads - 1) / threads);
  const int64_t chunk = (share - 1) / ((share + fitting - 1) / fitting) + 1;
  const int64_t bytes = std::max(apart ? threads * chunk : 0, rest) * call.layout.bytes;
  const Tensor memory = empty({bytes + 64}, ScalarType::Byte);
  uint8_t* arena = static_cast<uint8_t*>(memory.data_ptr());
  if (apart) {
    const int64_t chunks = (apart + chunk - 1) / chunk;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
      Team alone = Team::alone();
      for (int64_t i = next++; i < chunks; i = next++) {
        const int64_t first = i * chunk;
        run_frame({call, arena + thread * chunk * call.layout.bytes, first, std::min(chunk, apart - first), alone});
      }
    });
  }
  if (rest == 0) return;
  const auto run_rest = [&](Team& team) { run_frame({call, arena, apart, rest, team}); };
  if (rest * call.layout.elements >= kRegionElements) return Team::run(run_rest);
  Team team;
  run_rest(team);
}

std::vector<Tensor> int8_program(const std::vector<Tensor>& inputs, const TensorList& constants,
                                 std::string_view text) {
  const std::shared_ptr<const Program> program = program_of(text);
  const Plan& plan = *program->plan;
  const LayoutKey key = check_inputs(plan, inputs);
  const std::shared_ptr<const Layout> layout = program->layouts.get(key, [&] { return make_layout(plan, key); });
  Call call{plan, *layout, program_kernels(), {}, {}, {}, {}, nullptr};
  bool finite = read_constants(call, constants);
  finite = read_quantizers(call, constants) && finite;
  record_isa(int8_kernels().isa);

  const int64_t batch = inputs[0].size(0);
  std::vector<Tensor> readable_inputs, outputs;
  for (const Tensor& x : inputs) {
    readable_inputs.push_back(is_readable(x) ? x : to_contiguous(x));
    call.inputs.push_back(place_of(readable_inputs.back()));
  }
  for (size_t i = 0; i < plan.outputs.size(); ++i) {
    const Shape& shape = layout->shapes[static_cast<size_t>(plan.outputs[i].value)];
    outputs.push_back(make_output(shape, batch, layout->channels_last[i]));
    call.outputs.push_back(place_of(outputs.back()));
  }
  if (batch == 0) return outputs;
  std::unique_ptr<std::atomic<bool>[]> nan(new std::atomic<bool>[static_cast<size_t>(batch)]);
  for (int64_t n = 0; n < batch; ++n) nan[static_cast<size_t>(n)] = !finite;
  call.nan = nan.get();
  if (finite) run_all(call, batch);
  for (int64_t n = 0; n < batch; ++n) {
    if (!nan[static_cast<size_t>(n)]) continue;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const int64_t elements = outputs[i].numel() / batch;
      std::fill_n(call.outputs[i].data + n * elements, elements, std::numeric_limits<float>::quiet_NaN());
    }
  }
  return outputs;
}

// Owns its arguments, and puts the result in their place.
void boxed_int8_program(StableIValue* stack, uint64_t, uint64_t) {
  const Text text = torch::stable::detail::to<Text>(stack[2]);
  const TensorList constants(stack[1]);
  const auto inputs = torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
  stack[0] = torch::stable::detail::from(int8_program(inputs, constants, text));
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("int8_program", &qkernels::boxed_int8_program); }
