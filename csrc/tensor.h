// What ops need of torch's tensors, on any device: checks, allocation, memory layout. Kernels take raw pointers. Errors
// are thrown before any parallel region, which would lose their text.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace qkernels {

// A string argument of an op. What torch 2.10 to 2.13 converts to std::string leaks at every call.
struct Text : std::string {
  using std::string::string;
};

}  // namespace qkernels

template <>
struct torch::stable::detail::ToImpl<qkernels::Text> {
  static qkernels::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    qkernels::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

namespace qkernels {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  throw std::runtime_error(text.str());
}

// An error names the argument, and says what it was and what is accepted.
#define QK_CHECK(condition, ...)                     \
  do {                                               \
    if (!(condition)) ::qkernels::fail(__VA_ARGS__); \
  } while (0)

template <typename Sizes>
std::string shape_of_sizes(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_of(const Tensor& t) { return shape_of_sizes(t.sizes()); }

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::ComplexHalf: return "torch.complex32";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    case ScalarType::Float8_e4m3fn: return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "torch.float8_e5m2";
    default: return "another dtype";
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

struct Device {
  int32_t type, index;
  bool operator==(Device other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& t) {
  Device device{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

inline std::string device_name(Device device) {
  std::ostringstream text;
  if (device.type == aoti_torch_device_type_cpu()) {
    text << "cpu";
  } else if (device.type == aoti_torch_device_type_cuda()) {
    text << "cuda";
  } else {
    text << "device type " << device.type;
  }
  if (device.index >= 0) text << ':' << device.index;
  return text.str();
}

// `accepted` is the device of x. Callers ask torch for it once, since that takes two calls into torch.
inline void check_device(const char* name, const Tensor& t, Device accepted) {
  const Device got = device_of(t);
  if (got == accepted) return;
  fail(name, ": got a tensor on ", device_name(got), "; accepted: x's device, ", device_name(accepted));
}

inline void check_cpu(const char* name, const Tensor& t) {
  QK_CHECK(t.is_cpu(), name, ": got a tensor on another device than the first argument's; accepted: a CPU tensor");
}

inline void check_floating(const char* name, const Tensor& t) {
  QK_CHECK(is_floating(t.scalar_type()), name, ": got ", dtype_name(t.scalar_type()),
           "; accepted: torch.float32, torch.float64, torch.float16, torch.bfloat16");
}

// Huge pages make the first write of fresh memory, in which Linux finds and clears pages, at least three times as fast,
// and save reading it most of the search for pages: one thread reads weights from beyond the second-level cache at 45
// GB/s instead of 30. Call this before the memory is first written; nothing depends on its success.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Less memory may not hold one whole huge page.
constexpr int64_t kHugePagesFrom = int64_t{4} << 20;

// Takes a third of the time of torch::stable::empty, which goes through the dispatcher.
inline Tensor empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype,
                            Device device = {aoti_torch_device_type_cpu(), 0}) {
  AtenTensorHandle handle = nullptr;
  const int32_t shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  shim_dtype, device.type, std::max(device.index, 0), &handle));
  Tensor t(handle);
  if (device.type == aoti_torch_device_type_cpu() && t.numel() >= kHugePagesFrom / 8) {  // of 8 bytes at most
    const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
    if (bytes >= kHugePagesFrom) ask_for_huge_pages(t.data_ptr(), bytes);
  }
  return t;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype,
                    Device device = {aoti_torch_device_type_cpu(), 0}) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return empty_strided({sizes.data(), sizes.size()}, {strides.data(), strides.size()}, dtype, device);
}

inline std::vector<int64_t> to_vector(IntHeaderOnlyArrayRef ref) { return {ref.data(), ref.data() + ref.size()}; }

// Dimensions from the outermost to the innermost in memory.
inline std::vector<int64_t> storage_order(const Tensor& t) {
  std::vector<int64_t> order(t.dim());
  std::iota(order.begin(), order.end(), 0);
  const auto strides = t.strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  return order;
}

// True where the elements fill one block of memory without gaps or overlaps, in any order of dimensions.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto order = storage_order(t);
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    const int64_t size = t.sizes()[order[i]];
    if (size == 1) continue;
    if (t.strides()[order[i]] != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.sizes()[i] > 1 && a.strides()[i] != b.strides()[i]) return false;
  return true;
}

// As torch.empty_like: with t's strides if t is dense, else with those of a dense tensor.
inline Tensor empty_dense_like(const Tensor& t, Device device, std::optional<ScalarType> dtype = std::nullopt) {
  if (is_dense(t)) return empty_strided(t.sizes(), t.strides(), dtype.value_or(t.scalar_type()), device);
  const Tensor dense = torch::stable::empty_like(t);
  return dtype ? empty_strided(dense.sizes(), dense.strides(), *dtype, device) : dense;
}

inline Tensor empty_dense_like(const Tensor& t, std::optional<ScalarType> dtype = std::nullopt) {
  return empty_dense_like(t, device_of(t), dtype);
}

// `t` itself if it has the layout of `like`, a dense tensor of the same shape; else a copy that has.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = empty_strided(like.sizes(), like.strides(), t.scalar_type(), device_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

inline Tensor to_dense(const Tensor& t) { return is_dense(t) ? t : in_layout_of(t, torch::stable::empty_like(t)); }

inline Tensor to_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = empty(to_vector(t.sizes()), t.scalar_type(), device_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace qkernels
