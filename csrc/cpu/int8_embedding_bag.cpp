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

// As int64.
Tensor indices_of(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  QK_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, name, ": got ", dtype_name(dtype),
           "; accepted: torch.int32, torch.int64");
  QK_CHECK(t.dim() == 1, name, ": got shape ", shape_of(t), "; accepted: one dim");
  return to_contiguous_dtype(t, ScalarType::Long);
}

void check_values(const int64_t* indices, int64_t count, const int64_t* offsets, int64_t offset_count, int64_t rows) {
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= static_cast<uint64_t>(indices[i]) < static_cast<uint64_t>(rows);
  for (int64_t i = 0; !inside && i < count; ++i)
    QK_CHECK(0 <= indices[i] && indices[i] < rows, "indices: got ", indices[i], "; accepted: 0 to ", rows - 1);
  for (int64_t i = 0, before = 0; i < offset_count; before = offsets[i++])
    QK_CHECK(before <= offsets[i] && offsets[i] <= count && (i || !offsets[i]), "offsets: got ", offsets[i], " at ", i,
             "; accepted: 0, and from there on at least the one before and at most the number of indices, ", count);
}

constexpr int64_t kAtOnce = 32;  // rows of a bag
constexpr int64_t kAhead = 24;   // rows lie anywhere in the table: they are asked for so many indices early

// What one call reads.
template <typename S>
struct Bags {
  const int8_t *codes, *zero_point;  // zero_point may be null
  const S* scale;
  int64_t columns, groups, count, padding_idx;
  const int64_t *indices, *offsets;
  int64_t offset_count;
  const float* weights;  // may be null
  Reduction reduction;

  void ask_for([[maybe_unused]] int64_t i) const {
#if defined(__GNUC__)
    if (i >= count) return;
    const int8_t* row = codes + indices[i] * columns;
    for (int64_t line = 0; line < columns; line += 64) __builtin_prefetch(row + line);
    __builtin_prefetch(scale + indices[i] * groups);
#endif
  }

  void run(int64_t bag, const BagKernels& kernels, float* out) const {
    const int64_t first = offsets[bag], last = bag + 1 < offset_count ? offsets[bag + 1] : count;
    const int64_t width = columns / groups;
    const bool plain = !zero_point && !weights;
    const BagOf of = reduction == Reduction::max ? BagOf::largest : plain ? BagOf::plain_sums : BagOf::sums;
    int64_t rows = 0;
    for (int64_t begin = first; begin < last; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, last);
      int64_t found = 0;
      for (int64_t group = 0; group < groups; ++group) {
        BagRow taken[kAtOnce];
        found = 0;
        for (int64_t i = begin; i < end; ++i) {
          if (group == 0) ask_for(i + kAhead);
          const int64_t row = indices[i], at = row * groups + group;
          if (row == padding_idx) continue;
          taken[found++] = {codes + row * columns + group * width, to_float(scale[at]),
                            zero_point ? static_cast<float>(zero_point[at]) : 0.0f, weights ? weights[i] : 1.0f};
        }
        if (found) kernels.reduce(taken, found, width, of, rows == 0, out + group * width);
      }
      rows += found;
    }
    if (rows == 0) std::fill(out, out + columns, 0.0f);
    if (reduction == Reduction::mean && rows > 1)
      for (int64_t c = 0; c < columns; ++c) out[c] /= static_cast<float>(rows);
  }
};

template <typename S>
void run(const Bags<S>& bags, int64_t count, float* out) {
  const Isa isa = std::min(active_isa(), Isa::avx512);
  record_isa(isa);
  const BagKernels& kernels = QK_OF_ACTIVE_ISA(kBagKernels);
  const int64_t of_one = (bags.count / std::max<int64_t>(count, 1) + 1) * bags.columns;
  torch::stable::parallel_for(0, count, grain(kPointwiseGrain, of_one), [&](int64_t begin, int64_t end) {
    for (int64_t bag = begin; bag < end; ++bag) bags.run(bag, kernels, out + bag * bags.columns);
  });
}

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
  if (zero_point) {
    QK_CHECK(zero_point->scalar_type() == ScalarType::Char, "zero_point: got ", dtype_name(zero_point->scalar_type()),
             "; accepted: torch.int8");
    QK_CHECK(shape_of(*zero_point) == shape_of(scale) && zero_point->is_contiguous(), "zero_point: got shape ",
             shape_of(*zero_point), "; accepted: contiguous, of scale's shape ", shape_of(scale));
  }
  const Tensor indices = indices_of("indices", indices_any), offsets = indices_of("offsets", offsets_any);
  const int64_t count = indices_any.size(0), bags = offsets_any.size(0) - (include_last_offset ? 1 : 0);
  QK_CHECK(bags >= 0, "offsets: got none; accepted: at least the last one, as include_last_offset says");
  const Reduction reduction = reduction_of(mode);
  std::optional<Values<float>> weight;
  if (weights) {
    QK_CHECK(reduction == Reduction::sum, "weights: got a tensor with mode='", mode, "'; accepted: None");
    weight = float_vector("weights", *weights, count, -1, false, "[L]");
  }
  QK_CHECK(-1 <= padding_idx && padding_idx < rows, "padding_idx: got ", padding_idx, "; accepted: -1 to ", rows - 1);
  const int64_t* offset_values = static_cast<const int64_t*>(offsets.data_ptr());
  const int64_t* index_values = static_cast<const int64_t*>(indices.data_ptr());
  check_values(index_values, count, offset_values, offsets.size(0), rows);
  Tensor out = empty({bags, columns}, ScalarType::Float);
  const auto run_as = [&](auto tag) {
    using S = decltype(tag);
    const Bags<S> all = {static_cast<const int8_t*>(data.data_ptr()),
                         zero_point ? static_cast<const int8_t*>(zero_point->data_ptr()) : nullptr,
                         static_cast<const S*>(scale.data_ptr()),
                         columns,
                         scale.size(1),
                         count,
                         padding_idx,
                         index_values,
                         offset_values,
                         offsets.size(0),
                         weight ? weight->data : nullptr,
                         reduction};
    run(all, bags, static_cast<float*>(out.data_ptr()));
  };
  if (type == Element::f32)
    run_as(float{});
  else if (type == Element::bf16)
    run_as(BFloat16{});
  else
    run_as(Half{});
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("int8_embedding_bag", TORCH_BOX(&qkernels::int8_embedding_bag)); }
