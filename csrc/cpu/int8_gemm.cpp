// int8_mm, int8_scaled_mm, int8_pack, int8_unpack and int8_linear on the CPU: checks, scratch memory and the split of
// work over threads. The arithmetic is in int8_gemm/.
#include "cpu/int8_gemm/int8_gemm.h"

#include <memory>

#include "cpu/common/int8_ops.h"

namespace qkernels {
namespace {

constexpr int64_t kLine = 64;  // where weights begin at other addresses, every load of them touches two cache lines

void multiply_packed(const Int8Kernels& kernels, const uint8_t* rows, int64_t row_stride, int64_t m, int64_t n,
                     int64_t k, const int8_t* data, const PanelOutput& output) {
  const int64_t n_panels = panels(n);
  if (m == 0 || n == 0) return;
  const RowBlocks blocks = row_blocks(m, n_panels, row_stride, kernels.tile_rows);
  const int64_t work = panel_bytes(k) * (std::min(m, blocks.rows) + 3);
  torch::stable::parallel_for(0, n_panels * blocks.count, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / n_panels * blocks.rows, panel = task % n_panels;
      kernels.multiply(rows + row * row_stride, row_stride, std::min(blocks.rows, m - row),
                       data + panel * panel_bytes(k), k, at(output, row, panel * kPanel));
    }
  });
}

// Multiplies a [M, K] by b [K, N], of any strides, into output.
void multiply_matrices(const Int8Kernels& kernels, const Tensor& a, const Tensor& b, const PanelOutput& output) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  if (m == 0 || n == 0) return;
  const int8_t* a_data = static_cast<const int8_t*>(a.data_ptr());
  const int8_t* b_data = static_cast<const int8_t*>(b.data_ptr());
  const int64_t a_m = a.stride(0), a_k = a.stride(1), b_k = b.stride(0), b_n = b.stride(1);
  const int64_t n_panels = panels(n), stride = code_row_stride(k);
  const bool unpacked = m <= kernels.unpacked_rows && b_k == 1;
  const bool in_place = unpacked && a_k == 1;
  const uint8_t flip = unpacked ? 0 : kernels.flip;
  const int64_t pass = std::min(m, std::max<int64_t>(kernels.tile_rows, kPassBytes / stride));
  Tensor scratch = empty({in_place ? 0 : pass * stride}, ScalarType::Byte);
  uint8_t* rows = static_cast<uint8_t*>(scratch.data_ptr());
  for (int64_t first = 0; first < m; first += pass) {
    const int64_t height = std::min(pass, m - first);
    if (!in_place)
      torch::stable::parallel_for(0, height, grain(kPointwiseGrain, k), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          kernels.copy_codes(a_data + (first + r) * a_m, a_k, k, flip, rows + r * stride);
      });
    const int64_t work = panel_bytes(k) * (height + 3);
    torch::stable::parallel_for(0, n_panels, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
      if (unpacked) {
        const int8_t* codes = in_place ? a_data + first * a_m : reinterpret_cast<const int8_t*>(rows);
        for (int64_t panel = begin; panel < end; ++panel)
          kernels.multiply_unpacked(codes, in_place ? a_m : stride, height, b_data + panel * kPanel * b_n, b_n, k,
                                    at(output, first, panel * kPanel));
        return;
      }
      // Where k is contiguous, one panel already reads whole cache lines.
      const int64_t at_once = b_k == 1 ? 1 : std::min<int64_t>(kPackedPanels, end - begin);
      alignas(64) int32_t colsum[kPackedPanels * kPanel];
      std::unique_ptr<int8_t[]> memory(new int8_t[static_cast<size_t>(at_once * panel_bytes(k) + kLine)]);
      int8_t* packed = memory.get() + (kLine - reinterpret_cast<uintptr_t>(memory.get()) % kLine);
      for (int64_t panel = begin; panel < end; panel += at_once) {
        const int64_t count = std::min(at_once, end - panel), channels = std::min(n - panel * kPanel, count * kPanel);
        kernels.pack_panels(b_data + panel * kPanel * b_n, b_n, b_k, channels, k, packed, colsum);
        for (int64_t i = 0; i < count; ++i) {
          PanelOutput o = at(output, first, (panel + i) * kPanel);
          o.colsum = colsum + i * kPanel;
          kernels.multiply(rows, stride, height, packed + i * panel_bytes(k), k, o);
        }
      }
    });
  }
}

void check_matrices(const Tensor& a, const Tensor& b) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"a", a}, {"b", b}}) {
    check_cpu(name, t);
    QK_CHECK(t.scalar_type() == ScalarType::Char, name, ": got ", dtype_name(t.scalar_type()),
             "; accepted: torch.int8");
    QK_CHECK(t.dim() == 2, name, ": got shape ", shape_of(t), "; accepted: 2 dims");
  }
  QK_CHECK(a.size(1) == b.size(0), "b: got shape ", shape_of(b), "; accepted: [K, N] with a's K, ", a.size(1));
  check_k("a", a.size(1));
}

Tensor int8_mm(const Tensor& a, const Tensor& b) {
  check_matrices(a, b);
  const Int8Kernels& kernels = int8_kernels();
  record_isa(kernels.isa);
  const int64_t m = a.size(0), n = b.size(1);
  Tensor out = empty({m, n}, ScalarType::Int);
  PanelOutput output{};
  output.out = out.data_ptr();
  output.type = Element::i32;
  output.row_stride = n;
  output.channels = n;
  multiply_matrices(kernels, a, b, output);
  return out;
}

Tensor int8_scaled_mm(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                      const std::optional<Tensor>& zero_point_a, const std::optional<Tensor>& colsum_b,
                      const std::optional<Tensor>& bias, const Text& activation, ScalarType out_dtype,
                      const std::optional<Tensor>& out_scale, const std::optional<Tensor>& out_zero_point) {
  check_matrices(a, b);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  PanelOutput output{};
  set_output(output, activation, out_dtype, out_scale, out_zero_point);
  const auto row_scale = float_vector("scale_a", scale_a, m, 0, true, "one element, [M] or [M, 1]");
  auto channel_scale = float_vector("scale_b", scale_b, n, 1, true, "one element, [N] or [1, N]");
  std::vector<float> repeated;
  if (channel_scale.step == 0) {
    repeated.assign(static_cast<size_t>(n), *channel_scale.data);
    channel_scale.data = repeated.data();
  }
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, n, -1, false, "[N]");
  std::optional<Values<int32_t>> zero_point;
  if (zero_point_a) zero_point = set_zero_point(output, "zero_point_a", *zero_point_a, m, k);
  if (colsum_b) {  // checked but not used: the columns are read anyway, and adding them up costs nothing
    check_vector("colsum_b", *colsum_b, n, -1, false, "[N]");
    QK_CHECK(colsum_b->scalar_type() == ScalarType::Int, "colsum_b: got ", dtype_name(colsum_b->scalar_type()),
             "; accepted: torch.int32");
  }
  const Int8Kernels& kernels = int8_kernels();
  record_isa(kernels.isa);
  Tensor out = empty({m, n}, out_dtype);
  output.out = out.data_ptr();
  output.row_stride = n;
  output.channels = n;
  output.scale_a = row_scale.data;
  output.scale_a_step = row_scale.step;
  output.scale_b = channel_scale.data;
  output.bias = offset ? offset->data : nullptr;
  multiply_matrices(kernels, a, b, output);
  return out;
}

std::tuple<Tensor, Tensor> int8_pack(const Tensor& w) {
  check_cpu("w", w);
  QK_CHECK(w.scalar_type() == ScalarType::Char, "w: got ", dtype_name(w.scalar_type()), "; accepted: torch.int8");
  QK_CHECK(w.dim() == 2, "w: got shape ", shape_of(w), "; accepted: [N, K]");
  const int64_t n = w.size(0), k = w.size(1);
  check_k("w", k);
  const Int8Kernels& kernels = int8_kernels();
  record_isa(kernels.isa);
  Tensor data = empty({panels(n), k_groups(k), kPanel, 4}, ScalarType::Char);
  Tensor colsum = empty({n}, ScalarType::Int);
  const int8_t* source = static_cast<const int8_t*>(w.data_ptr());
  int8_t* packed = static_cast<int8_t*>(data.data_ptr());
  int32_t* sums = static_cast<int32_t*>(colsum.data_ptr());
  ask_for_huge_pages(packed, panels(n) * panel_bytes(k));
  const int64_t stride_n = w.stride(0), stride_k = w.stride(1);
  torch::stable::parallel_for(0, panels(n), grain(kPointwiseGrain, panel_bytes(k)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p += kPackedPanels)
      kernels.pack_panels(source + p * kPanel * stride_n, stride_n, stride_k,
                          std::min(std::min<int64_t>(kPackedPanels, end - p) * kPanel, n - p * kPanel), k,
                          packed + p * panel_bytes(k), sums + p * kPanel);
  });
  return {data, colsum};
}

Tensor int8_unpack(const Tensor& data, int64_t n, int64_t k) {
  QK_CHECK(n >= 0 && k >= 0, "n, k: got ", n, ", ", k, "; accepted: at least 0");
  check_packed(data, n, k);
  record_isa(Isa::scalar);
  Tensor w = empty({n, k}, ScalarType::Char);
  const int8_t* packed = static_cast<const int8_t*>(data.data_ptr());
  int8_t* out = static_cast<int8_t*>(w.data_ptr());
  for (int64_t c = 0; c < n; ++c) {
    const int8_t* panel = packed + c / kPanel * panel_bytes(k) + c % kPanel * 4;
    for (int64_t i = 0; i < k; ++i) out[c * k + i] = panel[i / 4 * kPanel * 4 + (i & 3)];
  }
  return w;
}

Tensor int8_linear(const Tensor& x, const Tensor& data, const Tensor& colsum, const Tensor& scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale,
                   const std::optional<Tensor>& input_zero_point, int64_t quant_min, int64_t quant_max,
                   const Text& activation, ScalarType out_dtype, const std::optional<Tensor>& out_scale,
                   const std::optional<Tensor>& out_zero_point) {
  check_cpu("x", x);
  const bool codes = x.scalar_type() == ScalarType::Char;
  const Element type = codes ? Element::i8 : element_of("x", x.scalar_type(), ", torch.int8");
  QK_CHECK(x.dim() >= 1, "x: got 0 dims; accepted: [..., K]");
  check_vector("colsum", colsum, colsum.numel(), -1, false, "[N]");
  const int64_t n = colsum.numel(), k = x.size(x.dim() - 1);
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  check_k("x", k);
  check_packed(data, n, k);
  QK_CHECK(colsum.scalar_type() == ScalarType::Int && colsum.is_contiguous(), "colsum: got ",
           dtype_name(colsum.scalar_type()), "; accepted: contiguous torch.int32");
  const auto channel_scale = float_vector("scale", scale, n, -1, false, "[N]");
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, n, -1, false, "[N]");
  PanelOutput output{};
  RowQparams qparams{};
  std::optional<Values<float>> code_scale;
  std::optional<Values<int32_t>> code_zero_point;
  int32_t zero_point = 0;
  if (codes) {
    QK_CHECK(input_scale, "input_scale: got None; accepted: the scale of the codes x, one element or [M]");
    code_scale = float_vector("input_scale", *input_scale, m, 0, true, "one element, [M] or [M, 1]");
    if (input_zero_point) code_zero_point = set_zero_point(output, "input_zero_point", *input_zero_point, m, k);
  } else {
    qparams = input_qparams(input_scale, input_zero_point, quant_min, quant_max);
    zero_point = static_cast<int32_t>(qparams.zero_point);
    output.zero_point = &zero_point;
    output.wide = is_wide(std::abs(zero_point), k);
  }
  set_output(output, activation, out_dtype, out_scale, out_zero_point);
  const Int8Kernels& kernels = int8_kernels();
  record_isa(kernels.isa);
  std::vector<int64_t> sizes = to_vector(x.sizes());
  sizes.back() = n;
  Tensor out = empty(sizes, out_dtype);
  if (m == 0 || n == 0) return out;
  output.row_stride = n;
  output.channels = n;
  output.colsum = static_cast<const int32_t*>(colsum.data_ptr());
  output.scale_b = channel_scale.data;
  output.bias = offset ? offset->data : nullptr;
  const Tensor source = to_contiguous(x);
  const char* x_data = static_cast<const char*>(source.data_ptr());
  const int64_t stride = code_row_stride(k), x_stride = k * static_cast<int64_t>(element_size(type));
  const int64_t pass = std::min(m, std::max<int64_t>(kernels.tile_rows, kPassBytes / stride));
  Tensor scratch = empty({pass * stride}, ScalarType::Byte);
  uint8_t* rows = static_cast<uint8_t*>(scratch.data_ptr());
  std::vector<float> row_scales(static_cast<size_t>(codes ? 0 : pass));
  const int64_t cost = codes ? k / 8 : k;  // of a row, in elements quantized
  for (int64_t first = 0; first < m; first += pass) {
    const int64_t height = std::min(pass, m - first);
    torch::stable::parallel_for(0, height, grain(kPointwiseGrain, cost), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const char* row = x_data + (first + r) * x_stride;
        if (codes)
          kernels.copy_codes(reinterpret_cast<const int8_t*>(row), 1, k, kernels.flip, rows + r * stride);
        else
          row_scales[static_cast<size_t>(r)] =
              kernels.quantize_row(row, type, k, qparams, kernels.flip, rows + r * stride);
      }
    });
    PanelOutput part = output;
    part.out = static_cast<char*>(out.data_ptr()) + first * n * static_cast<int64_t>(element_size(output.type));
    if (codes) {
      part.scale_a = code_scale->data + first * code_scale->step;
      part.scale_a_step = code_scale->step;
      if (code_zero_point) part.zero_point += first * code_zero_point->step;
    } else {
      part.scale_a = row_scales.data();
      part.scale_a_step = 1;
    }
    multiply_packed(kernels, rows, stride, height, n, k, static_cast<const int8_t*>(data.data_ptr()), part);
  }
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("int8_mm", TORCH_BOX(&qkernels::int8_mm));
  m.impl("int8_scaled_mm", TORCH_BOX(&qkernels::int8_scaled_mm));
  m.impl("int8_pack", TORCH_BOX(&qkernels::int8_pack));
  m.impl("int8_unpack", TORCH_BOX(&qkernels::int8_unpack));
  m.impl("int8_linear", TORCH_BOX(&qkernels::int8_linear));
}
