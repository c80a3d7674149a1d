// Checks and scratch memory that the int8 and int4 linear, matmul and convolution ops share.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include "cpu/int8_gemm/int8_gemm.h"
#include "tensor.h"

namespace qkernels {

inline void check_k(const char* name, int64_t k) {
  QK_CHECK(k <= kMaxK, name, ": got K = ", k, "; accepted: K <= ", kMaxK, ", where int8 products sum exactly in int32");
}

// `also` ends the error: what else is accepted.
inline Element element_of(const char* name, ScalarType dtype, const char* also = "") {
  switch (dtype) {
    case ScalarType::Float: return Element::f32;
    case ScalarType::BFloat16: return Element::bf16;
    case ScalarType::Half: return Element::f16;
    default: fail(name, ": got ", dtype_name(dtype), "; accepted: torch.float32, torch.bfloat16, torch.float16", also);
  }
}

inline Tensor to_contiguous_dtype(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  Tensor copy = empty(to_vector(t.sizes()), dtype);
  torch::stable::copy_(copy, t);
  return copy;
}

// The values of a tensor as contiguous T: one for each row or channel, or one for all.
template <typename T>
struct Values {
  Tensor tensor;
  const T* data;
  int64_t step;  // 0: one value for all
};

// Accepts [n]; with `dim` 0 or 1 also two dims, where `dim` has n elements and the other 1; with `broadcast` also one
// element. `shapes` is the text for this in the error.
inline void check_vector(const char* name, const Tensor& t, int64_t n, int dim, bool broadcast, const char* shapes) {
  check_cpu(name, t);
  const bool flat = t.dim() == 1 && t.size(0) == n;
  const bool column = dim >= 0 && t.dim() == 2 && t.size(dim) == n && t.size(1 - dim) == 1;
  QK_CHECK(flat || column || (broadcast && t.numel() == 1), name, ": got shape ", shape_of(t), "; accepted: ", shapes,
           " with ", n, " in place of the letter");
}

inline Values<float> float_vector(const char* name, const Tensor& t, int64_t n, int dim, bool broadcast,
                                  const char* shapes) {
  check_vector(name, t, n, dim, broadcast, shapes);
  check_floating(name, t);
  const Tensor values = to_contiguous_dtype(t, ScalarType::Float);
  return {values, static_cast<const float*>(values.data_ptr()), broadcast && t.numel() == 1 ? 0 : 1};
}

inline Values<int32_t> zero_point_vector(const char* name, const Tensor& t, int64_t n, int dim, const char* shapes) {
  check_vector(name, t, n, dim, true, shapes);
  switch (t.scalar_type()) {
    case ScalarType::Char:
    case ScalarType::Byte:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: break;
    default: fail(name, ": got ", dtype_name(t.scalar_type()), "; accepted: an integer dtype up to torch.int64");
  }
  if (t.scalar_type() == ScalarType::Long) {
    const Tensor wide = to_contiguous(t);
    const int64_t* values = static_cast<const int64_t*>(wide.data_ptr());
    for (int64_t i = 0; i < wide.numel(); ++i)
      QK_CHECK(values[i] >= std::numeric_limits<int32_t>::min() && values[i] <= std::numeric_limits<int32_t>::max(),
               name, ": got ", values[i], "; accepted: what torch.int32 holds");
  }
  const Tensor values = to_contiguous_dtype(t, ScalarType::Int);
  return {values, static_cast<const int32_t*>(values.data_ptr()), t.numel() == 1 ? 0 : 1};
}

inline void check_packed(const Tensor& data, int64_t n, int64_t k) {
  check_cpu("data", data);
  QK_CHECK(data.scalar_type() == ScalarType::Char, "data: got ", dtype_name(data.scalar_type()),
           "; accepted: torch.int8");
  QK_CHECK(data.dim() == 4 && data.size(0) == panels(n) && data.size(1) == k_groups(k) && data.size(2) == kPanel &&
               data.size(3) == 4,
           "data: got shape ", shape_of(data), "; accepted: what int8_pack gives for N = ", n, " and K = ", k, ", [",
           panels(n), ", ", k_groups(k), ", ", kPanel, ", 4]");
  QK_CHECK(data.is_contiguous(), "data: got strided memory; accepted: contiguous");
}

// The sums of the codes of n output channels.
inline void check_colsum(const Tensor& colsum, int64_t n) {
  check_vector("colsum", colsum, n, -1, false, "[N]");
  QK_CHECK(colsum.scalar_type() == ScalarType::Int && colsum.is_contiguous(), "colsum: got ",
           dtype_name(colsum.scalar_type()), "; accepted: contiguous torch.int32");
}

inline void check_codes(int64_t quant_min, int64_t quant_max) {
  QK_CHECK(-128 <= quant_min && quant_min < quant_max && quant_max <= 127, "quant_min, quant_max: got ", quant_min,
           ", ", quant_max, "; accepted: -128 <= quant_min < quant_max <= 127");
}

// Per-tensor quantization with a given scale. A scale below the smallest normal fp32 acts as that value; a negative one
// gives NaN. `of` is "input" or "out": the names of the arguments begin with it.
inline RowQparams static_qparams(const std::string& of, const Tensor& scale, const std::optional<Tensor>& zero_point,
                                 int64_t quant_min, int64_t quant_max) {
  check_codes(quant_min, quant_max);
  const std::string scale_name = of + "_scale", zero_point_name = of + "_zero_point";
  QK_CHECK(scale.numel() == 1, scale_name, ": got shape ", shape_of(scale), "; accepted: one element");
  float s = *float_vector(scale_name.c_str(), scale, 1, -1, true, "one element").data;
  s = s < 0           ? std::numeric_limits<float>::quiet_NaN()
      : std::isnan(s) ? s
                      : std::max(s, std::numeric_limits<float>::min());
  int32_t z = 0;
  if (zero_point) {
    QK_CHECK(zero_point->numel() == 1, zero_point_name, ": got shape ", shape_of(*zero_point),
             "; accepted: one element");
    z = *zero_point_vector(zero_point_name.c_str(), *zero_point, 1, -1, "one element").data;
  }
  QK_CHECK(quant_min <= z && z <= quant_max, zero_point_name, ": got ", z, "; accepted: quant_min to quant_max, ",
           quant_min, " to ", quant_max);
  return {
      false, s, 1.0f / s, 0.0f, static_cast<float>(z), static_cast<float>(quant_min), static_cast<float>(quant_max)};
}

// How the floating input of a linear layer becomes codes: by input_scale, or without one by the range of each row.
inline RowQparams input_qparams(const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                                int64_t quant_min, int64_t quant_max) {
  if (scale) return static_qparams("input", *scale, zero_point, quant_min, quant_max);
  QK_CHECK(!zero_point, "input_zero_point: got a tensor without input_scale; accepted: both, or neither");
  check_codes(quant_min, quant_max);
  const int64_t half = (quant_max - quant_min) / 2;
  return {true,
          0.0f,
          0.0f,
          static_cast<float>(half),
          static_cast<float>(quant_max - half),
          static_cast<float>(quant_min),
          static_cast<float>(quant_max)};
}

// Whether acc - zero_point * colsum may leave int32 for zero points of this magnitude.
inline bool is_wide(int64_t zero_point_magnitude, int64_t k) {
  return (128 + zero_point_magnitude) * 128 > std::numeric_limits<int32_t>::max() / std::max<int64_t>(k, 1);
}

// Rows of codes in scratch memory. The extra 64 bytes keep rows of 4096 codes out of each other's cache sets.
inline int64_t code_row_stride(int64_t k) { return (k + 63) / 64 * 64 + 64; }

// How many elements, or multiply-accumulates, are worth a task of their own: a second thread takes 2 to 5 us to wake.
constexpr int64_t kPointwiseGrain = 16384;
constexpr int64_t kMultiplyGrain = 1 << 20;

inline int64_t grain(int64_t least_work, int64_t work_of_one) {
  return std::max<int64_t>(1, least_work / std::max<int64_t>(1, work_of_one));
}

// Every block of rows reads all panels again. So blocks are large, even larger than a second-level cache of 1 MiB:
// 256 x 4096 x 4096 on 2 threads reached 740 GOPS with blocks of 256 KiB, 760 with 512, 862 with 1200 (one block).
constexpr int64_t kRowBlockBytes = 1200 << 10;
// A pass quantizes and multiplies as many rows as this much scratch holds. malloc keeps so much between calls.
constexpr int64_t kPassBytes = 16 << 20;

struct RowBlocks {
  int64_t rows, count;
};

// Cuts m rows into equal blocks: into one where that is not too large, into several where panels are too few for the
// threads.
inline RowBlocks row_blocks(int64_t m, int64_t n_panels, int64_t row_stride, int tile_rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, kRowBlockBytes / row_stride / tile_rows) * tile_rows;
  int64_t count = std::max<int64_t>(1, (m + most - 1) / most);
  if (n_panels * count < 4 * threads)
    count = std::max(count, std::min((m + tile_rows - 1) / tile_rows, (4 * threads + n_panels - 1) / n_panels));
  const int64_t tiles = (m + count * tile_rows - 1) / (count * tile_rows);
  const int64_t rows = std::max<int64_t>(1, tiles * tile_rows);
  return {rows, (m + rows - 1) / rows};
}

inline size_t element_size(Element type) {
  return type == Element::i8 ? 1 : type == Element::f32 || type == Element::i32 ? 4 : 2;
}

inline Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "silu") return Activation::silu;
  fail("activation: got '", name, "'; accepted: none, relu, gelu, silu");
}

// Sets what a scaled sum becomes: its activation, and the type of the output or the qparams of its codes.
inline void set_output(PanelOutput& o, const std::string& activation, ScalarType out_dtype,
                       const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  o.activation = activation_of(activation);
  if (!out_scale) {
    QK_CHECK(out_dtype != ScalarType::Char,
             "out_dtype: got torch.int8; accepted: torch.float32, torch.bfloat16, torch.float16, and with out_scale "
             "torch.int8");
    o.type = element_of("out_dtype", out_dtype, ", and with out_scale torch.int8");
    QK_CHECK(!out_zero_point, "out_zero_point: got a tensor without out_scale; accepted: both, or neither");
    return;
  }
  QK_CHECK(out_dtype == ScalarType::Char, "out_dtype: got ", dtype_name(out_dtype),
           "; accepted: torch.int8, as there is an out_scale");
  const RowQparams qparams = static_qparams("out", *out_scale, out_zero_point, -128, 127);
  o.type = Element::i8;
  o.out_inverse = qparams.inverse;
  o.out_zero_point = qparams.zero_point;
}

// Sets the zero points of the rows of a, and returns the values that o then points to.
inline Values<int32_t> set_zero_point(PanelOutput& o, const char* name, const Tensor& zero_point, int64_t m,
                                      int64_t k) {
  Values<int32_t> values = zero_point_vector(name, zero_point, m, 0, "one element, [M] or [M, 1]");
  int64_t magnitude = 0;
  for (int64_t i = 0; i < values.tensor.numel(); ++i)
    magnitude = std::max(magnitude, std::abs(static_cast<int64_t>(values.data[i])));
  o.zero_point = values.data;
  o.zero_point_step = values.step;
  o.wide = is_wide(magnitude, k);
  return values;
}

// The output from `row` and output channel `channel` on.
inline PanelOutput at(PanelOutput o, int64_t row, int64_t channel) {
  o.out = static_cast<char*>(o.out) + (row * o.row_stride + channel) * static_cast<int64_t>(element_size(o.type));
  o.channels = std::min<int64_t>(kPanel, o.channels - channel);
  if (o.colsum) o.colsum += channel;
  if (o.scale_b) o.scale_b += channel;
  if (o.bias) o.bias += channel;
  if (o.scale_a) o.scale_a += row * o.scale_a_step;
  if (o.zero_point) o.zero_point += row * o.zero_point_step;
  return o;
}

}  // namespace qkernels
