// int4_pack, int4_unpack and int4_linear on the CPU: checks, scratch memory and the split of work over threads. The
// arithmetic is in int4_gemm/.
#include "cpu/int4_gemm/int4_gemm.h"

#include "cpu/common/int8_ops.h"

namespace qkernels {
namespace {

std::vector<int64_t> packed_shape(int64_t n, int64_t k, int bits) {
  if (bits == 4) return {panels(n), k_groups(k), kPanel / 2, 4};
  return {panels(n), blocks_of(k), block_bytes(bits)};
}

Tensor int4_pack(const Tensor& q, int64_t width) {
  check_cpu("q", q);
  QK_CHECK(q.scalar_type() == ScalarType::Char, "q: got ", dtype_name(q.scalar_type()), "; accepted: torch.int8");
  QK_CHECK(q.dim() == 2, "q: got shape ", shape_of(q), "; accepted: [N, K]");
  QK_CHECK(2 <= width && width <= 4, "bits: got ", width, "; accepted: 2, 3, 4");
  const int bits = static_cast<int>(width);
  const int64_t n = q.size(0), k = q.size(1);
  check_k("q", k);
  const Int4Kernels& kernels = int4_kernels();
  record_isa(kernels.isa);
  Tensor data = empty(packed_shape(n, k, bits), ScalarType::Byte);
  if (n == 0 || k == 0) return data;
  const int8_t* source = static_cast<const int8_t*>(q.data_ptr());
  uint8_t* packed = static_cast<uint8_t*>(data.data_ptr());
  const int64_t bytes = int4_panel_bytes(k, bits);
  ask_for_huge_pages(packed, panels(n) * bytes);
  const int64_t stride_n = q.stride(0), stride_k = q.stride(1);
  torch::stable::parallel_for(0, panels(n), grain(kPointwiseGrain, kPanel * k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      kernels.pack_panel(source + p * kPanel * stride_n, stride_n, stride_k, std::min<int64_t>(kPanel, n - p * kPanel),
                         k, bits, packed + p * bytes);
  });
  return data;
}

// Returns the bits of a code, which the shape tells.
int check_packed(const Tensor& data, int64_t n, int64_t k) {
  check_cpu("data", data);
  QK_CHECK(data.scalar_type() == ScalarType::Byte, "data: got ", dtype_name(data.scalar_type()),
           "; accepted: torch.uint8");
  const int bits = data.dim() != 3 ? 4 : data.size(2) == block_bytes(2) ? 2 : 3;
  const std::vector<int64_t> shape = packed_shape(n, k, bits);
  QK_CHECK(to_vector(data.sizes()) == shape, "data: got shape ", shape_of(data),
           "; accepted: what PackedInt holds for N = ", n, ", K = ", k, " and ", bits, " bits, ",
           shape_of_sizes(shape));
  QK_CHECK(data.is_contiguous(), "data: got strided memory; accepted: contiguous");
  return bits;
}

Tensor int4_unpack(const Tensor& data, int64_t n, int64_t k) {
  QK_CHECK(n >= 0 && k >= 0, "n, k: got ", n, ", ", k, "; accepted: at least 0");
  const int bits = check_packed(data, n, k);
  const Int4Kernels& kernels = int4_kernels();
  record_isa(kernels.isa);
  Tensor q = empty({n, k}, ScalarType::Char);
  const uint8_t* packed = static_cast<const uint8_t*>(data.data_ptr());
  int8_t* codes = static_cast<int8_t*>(q.data_ptr());
  torch::stable::parallel_for(0, panels(n), grain(kPointwiseGrain, kPanel * k), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      kernels.unpack_panel(packed + p * int4_panel_bytes(k, bits), std::min<int64_t>(kPanel, n - p * kPanel), k, bits,
                           codes + p * kPanel * k);
  });
  return q;
}

// Scales, zero points or minima: [panels, groups, 32].
void check_groups(const char* name, const Tensor& t, int64_t n, int64_t groups) {
  check_cpu(name, t);
  QK_CHECK(t.dim() == 3 && t.size(0) == panels(n) && t.size(1) == groups && t.size(2) == kPanel, name, ": got shape ",
           shape_of(t), "; accepted: what PackedInt holds for N = ", n, " and ", groups, " groups, [", panels(n), ", ",
           groups, ", ", kPanel, "]");
  QK_CHECK(t.is_contiguous(), name, ": got strided memory; accepted: contiguous");
}

struct Weights {
  Int4Panel first;
  int64_t groups;
  Int4Panel at(int64_t panel) const {
    Int4Panel p = first;
    const int64_t values = panel * groups * kPanel;
    p.data += panel * int4_panel_bytes(p.k, p.bits);
    p.scale = static_cast<const char*>(p.scale) + values * static_cast<int64_t>(element_size(p.type));
    if (p.zero_point) p.zero_point += values;
    if (p.minimum)
      p.minimum = static_cast<const char*>(p.minimum) + values * static_cast<int64_t>(element_size(p.type));
    return p;
  }
};

Weights weights_of(const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   const std::optional<Tensor>& minimum, int64_t n, int64_t k, int64_t group_size) {
  const int bits = check_packed(data, n, k);
  QK_CHECK(group_size == k || (group_size >= 16 && group_size % 8 == 0 && k % group_size == 0), "group_size: got ",
           group_size, "; accepted: -1 or K = ", k, ", or a multiple of 8, from 16 on, that divides it");
  Weights w{};
  w.groups = k ? k / group_size : 1;
  check_groups("scale", scale, n, w.groups);
  w.first.data = static_cast<const uint8_t*>(data.data_ptr());
  w.first.scale = scale.data_ptr();
  w.first.type = element_of("scale", scale.scalar_type());
  w.first.k = k;
  w.first.group_size = group_size;
  w.first.bits = bits;
  if (zero_point) {
    QK_CHECK(!minimum, "minimum: got a tensor beside zero_point; accepted: one of them");
    check_groups("zero_point", *zero_point, n, w.groups);
    QK_CHECK(zero_point->scalar_type() == ScalarType::Char, "zero_point: got ", dtype_name(zero_point->scalar_type()),
             "; accepted: torch.int8");
    w.first.zero_point = static_cast<const int8_t*>(zero_point->data_ptr());
  }
  if (minimum) {
    check_groups("minimum", *minimum, n, w.groups);
    QK_CHECK(minimum->scalar_type() == scale.scalar_type(), "minimum: got ", dtype_name(minimum->scalar_type()),
             "; accepted: scale's dtype, ", dtype_name(scale.scalar_type()));
    w.first.minimum = minimum->data_ptr();
  }
  return w;
}

// Calls multiply(first row, height, panel, output) for blocks of rows and panels, in parallel.
template <typename F>
void for_each_block(const Int4Output& output, int64_t m, int64_t n, int64_t k, int64_t row_bytes, int tile_rows,
                    F multiply) {
  const int64_t n_panels = panels(n);
  const RowBlocks blocks = row_blocks(m, n_panels, row_bytes, tile_rows);
  const int64_t work = panel_bytes(k) * (std::min(m, blocks.rows) + 3);
  torch::stable::parallel_for(0, n_panels * blocks.count, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / n_panels * blocks.rows, panel = task % n_panels, channel = panel * kPanel;
      Int4Output o = output;
      o.out = static_cast<char*>(o.out) + (row * o.row_stride + channel) * static_cast<int64_t>(element_size(o.type));
      o.channels = std::min<int64_t>(kPanel, n - channel);
      o.weight_sum += channel;
      if (o.bias) o.bias += channel;
      if (o.scale) o.scale += row * o.scale_step;
      if (o.zero_point) o.zero_point += row * o.zero_point_step;
      multiply(row, std::min(blocks.rows, m - row), panel, o);
    }
  });
}

Tensor int4_linear(const Tensor& x, const Tensor& data, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   const std::optional<Tensor>& minimum, const Tensor& weight_sum, const std::optional<Tensor>& bias,
                   int64_t group_size, int64_t act_bits, const std::optional<Tensor>& input_scale,
                   const std::optional<Tensor>& input_zero_point, int64_t quant_min, int64_t quant_max,
                   ScalarType out_dtype) {
  check_cpu("x", x);
  const bool codes = x.scalar_type() == ScalarType::Char;
  const Element type = codes ? Element::i8 : element_of("x", x.scalar_type(), ", torch.int8");
  QK_CHECK(x.dim() >= 1, "x: got 0 dims; accepted: [..., K]");
  QK_CHECK(act_bits == 8 || act_bits == 16, "act_bits: got ", act_bits, "; accepted: 8, 16");
  const bool floats = act_bits == 16;
  const int64_t n = weight_sum.numel(), k = x.size(x.dim() - 1);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  check_vector("weight_sum", weight_sum, n, -1, false, "[N]");
  QK_CHECK(weight_sum.scalar_type() == ScalarType::Float && weight_sum.is_contiguous(), "weight_sum: got ",
           dtype_name(weight_sum.scalar_type()), "; accepted: contiguous torch.float32");
  check_k("x", k);
  const Weights weights = weights_of(data, scale, zero_point, minimum, n, k, group_size);
  const bool affine = weights.first.affine();
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, n, -1, false, "[N]");
  Int4Output output{};
  output.type = element_of("out_dtype", out_dtype);
  output.row_stride = n;
  output.bias = offset ? offset->data : nullptr;
  output.weight_sum = static_cast<const float*>(weight_sum.data_ptr());
  RowQparams qparams{};
  std::optional<Values<float>> code_scale;
  std::optional<Values<int32_t>> code_zero_point;
  int32_t one_zero_point = 0;
  if (floats) {
    QK_CHECK(!codes, "x: got torch.int8; accepted with act_bits 16: a floating dtype");
    QK_CHECK(!input_scale && !input_zero_point,
             "input_scale: got a tensor; accepted with act_bits 16: None, as x stays in float");
  } else if (codes) {
    QK_CHECK(input_scale, "input_scale: got None; accepted: the scale of the codes x, one element or [M]");
    code_scale = float_vector("input_scale", *input_scale, m, 0, true, "one element, [M] or [M, 1]");
    if (input_zero_point)
      code_zero_point = zero_point_vector("input_zero_point", *input_zero_point, m, 0, "one element, [M] or [M, 1]");
  } else {
    qparams = input_qparams(input_scale, input_zero_point, quant_min, quant_max);
    one_zero_point = static_cast<int32_t>(qparams.zero_point);
    if (one_zero_point != 0) output.zero_point = &one_zero_point;
  }
  const Int4Kernels& kernels = int4_kernels();
  const Int8Kernels& row_kernels = int8_kernels();
  record_isa(kernels.isa);
  std::vector<int64_t> sizes = to_vector(x.sizes());
  sizes.back() = n;
  Tensor out = empty(sizes, out_dtype);
  if (m == 0 || n == 0) return out;
  const Tensor source = to_contiguous(x);
  const char* x_data = static_cast<const char*>(source.data_ptr());
  const int64_t x_stride = k * static_cast<int64_t>(element_size(type)), stride = code_row_stride(k);  // in elements
  const bool pairs = floats && type == Element::bf16 && kernels.multiply_bf16 && has_bf16_dot();
  const int64_t row_bytes = stride * (pairs ? 2 : floats ? 4 : 1);
  const int tile_rows = floats ? kernels.float_tile_rows : kernels.tile_rows;
  const int64_t pass = std::min(m, std::max<int64_t>(tile_rows, kPassBytes / row_bytes));
  const int64_t n_terms = k ? weights.groups * sums_per_group(group_size) : 0;
  Tensor scratch = empty({pass * row_bytes}, ScalarType::Byte);
  char* rows = static_cast<char*>(scratch.data_ptr());
  std::vector<Int4Term> terms(static_cast<size_t>(std::max<int64_t>(1, n_terms * pass)));
  std::vector<float> row_scales(static_cast<size_t>(floats || codes ? 0 : pass));
  for (int64_t first = 0; first < m; first += pass) {
    const int64_t height = std::min(pass, m - first);
    torch::stable::parallel_for(0, height, grain(kPointwiseGrain, codes ? k / 4 : k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const char* from = x_data + (first + r) * x_stride;
        char* row = rows + r * row_bytes;
        if (floats) {
          if (pairs)
            kernels.swap_pairs(reinterpret_cast<const uint16_t*>(from), k, reinterpret_cast<uint16_t*>(row));
          else
            kernels.widen_row(from, type, k, reinterpret_cast<float*>(row));
          if (affine) kernels.float_terms(from, type, k, group_size, terms.data() + r, height);
          continue;
        }
        uint8_t* row_codes = reinterpret_cast<uint8_t*>(row);
        if (codes)
          row_kernels.copy_codes(reinterpret_cast<const int8_t*>(from), 1, k, 0, row_codes);
        else
          row_scales[static_cast<size_t>(r)] = row_kernels.quantize_row(from, type, k, qparams, 0, row_codes);
        kernels.code_terms(reinterpret_cast<int8_t*>(row), k, group_size, weights.first.bits, affine, terms.data() + r,
                           height);
      }
    });
    Int4Output part = output;
    part.out = static_cast<char*>(out.data_ptr()) + first * n * static_cast<int64_t>(element_size(output.type));
    if (codes) {
      part.scale = code_scale->data + first * code_scale->step;
      part.scale_step = code_scale->step;
      if (code_zero_point) {
        part.zero_point = code_zero_point->data + first * code_zero_point->step;
        part.zero_point_step = code_zero_point->step;
      }
    } else if (!floats) {
      part.scale = row_scales.data();
      part.scale_step = 1;
    }
    for_each_block(part, height, n, k, row_bytes, tile_rows,
                   [&](int64_t row, int64_t count, int64_t panel, const Int4Output& o) {
                     const char* block = rows + row * row_bytes;
                     const Int4Term* block_terms = terms.data() + row;
                     if (pairs)
                       kernels.multiply_bf16(reinterpret_cast<const uint16_t*>(block), stride, block_terms, height,
                                             count, weights.at(panel), o);
                     else if (floats)
                       kernels.multiply_float(reinterpret_cast<const float*>(block), stride, block_terms, height, count,
                                              weights.at(panel), o);
                     else
                       kernels.multiply(reinterpret_cast<const int8_t*>(block), stride, block_terms, height, count,
                                        weights.at(panel), o);
                   });
  }
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("int4_pack", TORCH_BOX(&qkernels::int4_pack));
  m.impl("int4_unpack", TORCH_BOX(&qkernels::int4_unpack));
  m.impl("int4_linear", TORCH_BOX(&qkernels::int4_linear));
}
