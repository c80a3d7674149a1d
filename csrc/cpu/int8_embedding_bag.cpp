// Bags of rows of an int8 table on the CPU: checks, and the rows of each bag; the kernels are in
// int8_embedding_bag_kernels.h.
#include "cpu/int8_embedding_bag.h"

#include "cpu/common/int8_ops.h"

#define QK_BODY "cpu/int8_embedding_bag_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

enum class Reduction { sum, mean, max };

Reduction reduction_of(const std::string& mode) {
  if (mode == "sum") return Reduction::sum;
  if (mode == "mean") return Reduction::mean;
  if (mode == "max") return Reduction::max;
  fail("mode: got '", mode, "'; accepted: sum, mean, max");
}

// Integers of either width.
struct Indices {
  Tensor tensor;
  bool wide;
  const void* data;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

Indices indices_of(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  QK_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name, ": got ", dtype_name(dtype),
           "; accepted: torch.int32, torch.int64");
  QK_CHECK(t.dim() == 1, name, ": got shape ", shape_of(t), "; accepted: one dim");
  const Tensor dense = to_contiguous(t);
  return {dense, dtype == ScalarType::Long, dense.data_ptr()};
}

// Of each row and group of columns.
struct Qparams {
  Tensor tensor, zero_point_tensor;
  Element type;
  const void* scale;
  const int8_t* zero_point;  // may be null

  float scale_at(int64_t i) const {
    switch (type) {
      case Element::bf16: return to_float(static_cast<const BFloat16*>(scale)[i]);
      case Element::f16: return to_float(static_cast<const Half*>(scale)[i]);
      default: return static_cast<const float*>(scale)[i];
    }
  }
  float zero_point_at(int64_t i) const { return zero_point ? static_cast<float>(zero_point[i]) : 0.0f; }
};

Tensor int8_embedding_bag(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero_point,
                          const Tensor& indices_any, const Tensor& offsets_any, const std::optional<Tensor>& weights,
                          const Text& mode, int64_t padding_idx, bool include_last_offset) {
  QK_CHECK(data.scalar_type() == ScalarType::Char, "data: got ", dtype_name(data.scalar_type()),
           "; accepted: torch.int8");
  QK_CHECK(data.dim() == 2 && data.is_contiguous(), "data: got shape ", shape_of(data),
           "; accepted: contiguous [rows, columns]");
  const int64_t rows = data.size(0), columns = data.size(1);
  const Element type = element_of("scale", scale.scalar_type());
  const bool fits = scale.dim() == 2 && scale.size(0) == rows && scale.size(1) > 0 && columns % scale.size(1) == 0;
  QK_CHECK(fits && scale.is_contiguous(), "scale: got shape ", shape_of(scale),
           "; accepted: contiguous [rows, groups] for data's shape ", shape_of(data));
  const int64_t groups = scale.size(1), width = columns / groups;
  if (zero_point) {
    QK_CHECK(zero_point->scalar_type() == ScalarType::Char, "zero_point: got ", dtype_name(zero_point->scalar_type()),
             "; accepted: torch.int8");
    QK_CHECK(shape_of(*zero_point) == shape_of(scale) && zero_point->is_contiguous(), "zero_point: got shape ",
             shape_of(*zero_point), "; accepted: contiguous, of scale's shape ", shape_of(scale));
  }
  const Indices indices = indices_of("indices", indices_any), offsets = indices_of("offsets", offsets_any);
  const int64_t count = indices_any.size(0), bags = offsets_any.size(0) - (include_last_offset ? 1 : 0);
  QK_CHECK(bags >= 0, "offsets: got none; accepted: at least the last one, as include_last_offset says");
  const Reduction reduction = reduction_of(mode);
  std::optional<Values<float>> weight;
  if (weights) {
    QK_CHECK(reduction == Reduction::sum, "weights: got a tensor with mode='", mode, "'; accepted: None");
    weight = float_vector("weights", *weights, count, -1, false, "[L]");
  }
  QK_CHECK(-1 <= padding_idx && padding_idx < rows, "padding_idx: got ", padding_idx, "; accepted: -1 to ", rows - 1);
  for (int64_t i = 0; i < count; ++i)
    QK_CHECK(0 <= indices[i] && indices[i] < rows, "indices: got ", indices[i], "; accepted: 0 to ", rows - 1);
  int64_t before = 0;
  for (int64_t i = 0; i < offsets_any.size(0); ++i) {
    const int64_t offset = offsets[i];
    QK_CHECK(before <= offset && offset <= count && (i || !offset), "offsets: got ", offset, " at ", i,
             "; accepted: 0, and from there on at least the one before and at most the number of indices, ", count);
    before = offset;
  }
  Tensor out = empty({bags, columns}, ScalarType::Float);
  const Qparams q = {scale, zero_point ? *zero_point : scale, type, scale.data_ptr(),
                     zero_point ? static_cast<const int8_t*>(zero_point->data_ptr()) : nullptr};
  const int8_t* codes = static_cast<const int8_t*>(data.data_ptr());
  float* y = static_cast<float*>(out.data_ptr());
  const Isa isa = std::min(active_isa(), Isa::avx512);
  record_isa(isa);
  const BagKernels& kernels = QK_OF_ACTIVE_ISA(kBagKernels);
  const int64_t of_one = (count / std::max<int64_t>(bags, 1) + 1) * columns;
  torch::stable::parallel_for(0, bags, grain(kPointwiseGrain, of_one), [&](int64_t begin, int64_t end) {
    std::vector<BagRow> found;
    for (int64_t bag = begin; bag < end; ++bag) {
      const int64_t first = offsets[bag], last = bag + 1 < offsets_any.size(0) ? offsets[bag + 1] : count;
      float* result = y + bag * columns;
      for (int64_t group = 0; group < groups; ++group, result += width) {
        found.clear();
        for (int64_t i = first; i < last; ++i) {
          const int64_t row = indices[i], at = row * groups + group;
          if (row == padding_idx) continue;
          found.push_back({codes + row * columns + group * width, q.scale_at(at), q.zero_point_at(at),
                           weight ? weight->data[i] : 1.0f});
        }
        const int64_t length = static_cast<int64_t>(found.size());
        if (length == 0) {
          std::fill(result, result + width, 0.0f);
          continue;
        }
        kernels.reduce(found.data(), length, width, reduction == Reduction::max, result);
        if (reduction == Reduction::mean)
          for (int64_t c = 0; c < width; ++c) result[c] /= static_cast<float>(length);
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("int8_embedding_bag", TORCH_BOX(&qkernels::int8_embedding_bag)); }
