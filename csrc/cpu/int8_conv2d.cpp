// int8_conv2d on the CPU: the input is quantized once to a zero-padded image with channels innermost; then blocks of
// output pixels are gathered into rows [kernel_h][kernel_w][channel] that stay in the second-level cache while the
// int8 GEMM kernels run on them. The full im2col matrix never exists.
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu/common/int8_ops.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels {
namespace {

constexpr int64_t kGatherBytes = 192 << 10;

struct Pair {
  int64_t h, w;
};

struct Geometry {
  int64_t batch, channels, out_channels, groups;  // channels of the whole tensors
  Pair in, padded, out, kernel, stride, padding, dilation;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  int64_t k() const { return kernel.h * kernel.w * group_channels(); }
};

Pair pair_of(const char* name, const std::vector<int64_t>& values, int64_t least) {
  std::string got;
  for (int64_t value : values) got += (got.empty() ? "" : ", ") + std::to_string(value);
  QK_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, name, ": got [", got,
           "]; accepted: 2 integers, height and width, at least ", least);
  return {values[0], values[1]};
}

int64_t out_size(const char* side, int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  QK_CHECK(reach <= padded, "x: got padded ", side, " ", padded, "; accepted: at least the dilated kernel's, ", reach);
  return (padded - reach) / stride + 1;
}

// Writes x as codes [batch][padded.h][padded.w][channels], with the code of 0 in the padding. Returns whether x holds a
// NaN.
bool quantize_image(const Int8Kernels& kernels, const Tensor& x, Element type, const Geometry& g,
                    const RowQparams& qparams, uint8_t* image) {
  const bool channels_last = x.stride(1) == 1 && x.stride(3) == g.channels;
  const int64_t stride_n = x.stride(0), stride_c = x.stride(1), stride_h = x.stride(2);
  const char* data = static_cast<const char*>(x.data_ptr());
  const int64_t bytes = static_cast<int64_t>(element_size(type));
  const uint8_t zero = static_cast<uint8_t>(static_cast<int8_t>(qparams.zero_point)) ^ kernels.flip;
  const int64_t row_bytes = g.padded.w * g.channels;
  std::atomic<bool> nan{false};
  torch::stable::parallel_for(
      0, g.batch * g.padded.h, grain(kPointwiseGrain, row_bytes), [&](int64_t begin, int64_t end) {
        std::unique_ptr<uint8_t[]> plane(new uint8_t[static_cast<size_t>(g.in.w)]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / g.padded.h, h = i % g.padded.h - g.padding.h;
          uint8_t* row = image + i * row_bytes;
          if (h < 0 || h >= g.in.h) {
            std::memset(row, zero, static_cast<size_t>(row_bytes));
            continue;
          }
          const int64_t border = g.padding.w * g.channels;
          std::memset(row, zero, static_cast<size_t>(border));
          std::memset(row + row_bytes - border, zero, static_cast<size_t>(border));
          row += border;
          const char* source = data + (n * stride_n + h * stride_h) * bytes;
          if (channels_last) {
            if (std::isnan(kernels.quantize_row(source, type, g.in.w * g.channels, qparams, kernels.flip, row)))
              nan = true;
            continue;
          }
          for (int64_t c = 0; c < g.channels; ++c) {
            if (std::isnan(kernels.quantize_row(source + c * stride_c * bytes, type, g.in.w, qparams, kernels.flip,
                                                plane.get())))
              nan = true;
            for (int64_t w = 0; w < g.in.w; ++w) row[w * g.channels + c] = plane[static_cast<size_t>(w)];
          }
        }
      });
  return nan;
}

// Copies 16 bytes at a time, since a call of memcpy costs more than most copies here. May read and write up to 15 bytes
// beyond n.
inline void copy_run(const uint8_t* from, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; i += 16) std::memcpy(to + i, from + i, 16);
}

// The codes under output pixel (h, w) of a group, as one row.
void gather(const uint8_t* image, const Geometry& g, int64_t h, int64_t w, int64_t group, uint8_t* row) {
  const bool one_run = g.groups == 1 && g.dilation.w == 1;
  const int64_t run = g.group_channels() * (one_run ? g.kernel.w : 1), runs = one_run ? 1 : g.kernel.w;
  const uint8_t* corner =
      image + (h * g.stride.h * g.padded.w + w * g.stride.w) * g.channels + group * g.group_channels();
  for (int64_t i = 0; i < g.kernel.h; ++i)
    for (int64_t j = 0; j < runs; ++j, row += run)
      copy_run(corner + (i * g.dilation.h * g.padded.w + j * g.dilation.w) * g.channels, run, row);
}

bool is_nan(const char* x, Element type) {
  if (type == Element::f32) {
    float value;
    std::memcpy(&value, x, 4);
    return std::isnan(value);
  }
  uint16_t bits;
  std::memcpy(&bits, x, 2);
  return (bits & 0x7fff) > (type == Element::bf16 ? 0x7f80 : 0x7c00);
}

// Whether a NaN of x lies under output pixel (h, w) of a group.
bool nan_under(const Tensor& x, Element type, const Geometry& g, int64_t n, int64_t h, int64_t w, int64_t group) {
  const char* data = static_cast<const char*>(x.data_ptr());
  for (int64_t i = 0; i < g.kernel.h; ++i)
    for (int64_t j = 0; j < g.kernel.w; ++j) {
      const int64_t y = h * g.stride.h + i * g.dilation.h - g.padding.h;
      const int64_t z = w * g.stride.w + j * g.dilation.w - g.padding.w;
      if (y < 0 || y >= g.in.h || z < 0 || z >= g.in.w) continue;
      for (int64_t c = group * g.group_channels(); c < (group + 1) * g.group_channels(); ++c)
        if (is_nan(data + (n * x.stride(0) + c * x.stride(1) + y * x.stride(2) + z * x.stride(3)) *
                              static_cast<int64_t>(element_size(type)),
                   type))
          return true;
    }
  return false;
}

// One filter per channel, where x holds no NaN. Rows of output pixels are computed straight from the image, 32 channels
// at a time.
void convolve_depthwise(const Int8Kernels& kernels, const uint8_t* images, const int8_t* data, const Geometry& g,
                        const PanelOutput& output) {
  const int64_t n_taps = g.kernel.h * g.kernel.w, blocks = panels(g.channels);
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < g.kernel.h; ++i)
    for (int64_t j = 0; j < g.kernel.w; ++j)
      taps.push_back((i * g.dilation.h * g.padded.w + j * g.dilation.w) * g.channels);
  std::vector<int32_t> weights(static_cast<size_t>(blocks * n_taps * kPanel));  // [channel / 32][tap][channel % 32]
  for (int64_t c = 0; c < g.channels; ++c)
    for (int64_t t = 0; t < n_taps; ++t)
      weights[static_cast<size_t>((c / kPanel * n_taps + t) * kPanel + c % kPanel)] =
          data[c * panel_bytes(n_taps) + t / 4 * kPanel * 4 + t % 4];
  const int64_t work = g.out.w * g.channels * n_taps * 16;  // a tap costs what 16 products cost in the GEMM
  torch::stable::parallel_for(0, g.batch * g.out.h, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / g.out.h, h = i % g.out.h;
      const uint8_t* line = images + (n * g.padded.h + h * g.stride.h) * g.padded.w * g.channels;
      for (int64_t block = 0; block < blocks; ++block)
        kernels.multiply_depthwise(line + block * kPanel, g.stride.w * g.channels, g.out.w, taps.data(), n_taps,
                                   weights.data() + block * n_taps * kPanel, at(output, i * g.out.w, block * kPanel));
    }
  });
}

Tensor int8_conv2d(const Tensor& x, const Tensor& data, const Tensor& colsum, const Tensor& scale,
                   const std::optional<Tensor>& bias, const Tensor& input_scale,
                   const std::optional<Tensor>& input_zero_point, int64_t quant_min, int64_t quant_max,
                   std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups) {
  check_cpu("x", x);
  const Element type = element_of("x", x.scalar_type());
  QK_CHECK(x.dim() == 4, "x: got shape ", shape_of(x), "; accepted: [N, C, H, W]");
  check_vector("colsum", colsum, colsum.numel(), -1, false, "[C_out]");
  Geometry g;
  g.batch = x.size(0);
  g.channels = x.size(1);
  g.out_channels = colsum.numel();
  g.groups = groups;
  QK_CHECK(groups >= 1 && g.channels % groups == 0 && g.out_channels % groups == 0, "groups: got ", groups,
           "; accepted: a divisor of the input channels ", g.channels, " and the output channels ", g.out_channels);
  g.in = {x.size(2), x.size(3)};
  g.kernel = pair_of("kernel_size", kernel_size, 1);
  g.stride = pair_of("stride", stride, 1);
  g.padding = pair_of("padding", padding, 0);
  g.dilation = pair_of("dilation", dilation, 1);
  g.padded = {g.in.h + 2 * g.padding.h, g.in.w + 2 * g.padding.w};
  g.out = {out_size("height", g.padded.h, g.kernel.h, g.stride.h, g.dilation.h),
           out_size("width", g.padded.w, g.kernel.w, g.stride.w, g.dilation.w)};
  const int64_t k = g.k(), group_panels = panels(g.group_out());
  check_k("data", k);
  check_cpu("data", data);
  QK_CHECK(data.scalar_type() == ScalarType::Char && data.dim() == 5 && data.size(0) == groups &&
               data.size(1) == group_panels && data.size(2) == k_groups(k) && data.size(3) == kPanel &&
               data.size(4) == 4 && data.is_contiguous(),
           "data: got ", dtype_name(data.scalar_type()), " of shape ", shape_of(data),
           "; accepted: what PackedInt8Conv2d holds, contiguous torch.int8 [", groups, ", ", group_panels, ", ",
           k_groups(k), ", ", kPanel, ", 4]");
  QK_CHECK(colsum.scalar_type() == ScalarType::Int && colsum.is_contiguous(), "colsum: got ",
           dtype_name(colsum.scalar_type()), "; accepted: contiguous torch.int32");
  const auto channel_scale = float_vector("scale", scale, g.out_channels, -1, false, "[C_out]");
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, g.out_channels, -1, false, "[C_out]");
  const RowQparams qparams = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max);
  const Int8Kernels& kernels = int8_kernels();
  record_isa(kernels.isa);

  const int64_t pixels = g.out.h * g.out.w;
  const std::vector<int64_t> sizes = {g.batch, g.out_channels, g.out.h, g.out.w};
  const std::vector<int64_t> strides = {pixels * g.out_channels, 1, g.out.w * g.out_channels, g.out_channels};
  Tensor out = empty_strided({sizes.data(), 4}, {strides.data(), 4}, x.scalar_type());
  if (out.numel() == 0) return out;
  const bool readable = x.stride(3) == 1 || (x.stride(1) == 1 && x.stride(3) == g.channels);
  const Tensor source = readable ? x : to_contiguous(x);
  const int64_t image_bytes = g.padded.h * g.padded.w * g.channels;
  // 64 bytes of slack: the last codes are read in groups of 4, 16 and 32.
  Tensor image_tensor = empty({g.batch * image_bytes + 64}, ScalarType::Byte);
  uint8_t* images = static_cast<uint8_t*>(image_tensor.data_ptr());
  const bool nan = quantize_image(kernels, source, type, g, qparams, images) || std::isnan(qparams.scale);

  PanelOutput output{};
  output.type = type;
  output.row_stride = g.out_channels;
  output.colsum = static_cast<const int32_t*>(colsum.data_ptr());
  output.scale_b = channel_scale.data;
  output.bias = offset ? offset->data : nullptr;
  const int32_t zero_point = static_cast<int32_t>(qparams.zero_point);
  output.zero_point = &zero_point;
  output.wide = is_wide(std::abs(zero_point), k);
  const int8_t* weights = static_cast<const int8_t*>(data.data_ptr());
  char* out_data = static_cast<char*>(out.data_ptr());

  if (g.group_channels() == 1 && g.group_out() == 1 && !nan) {
    output.out = out_data;
    output.channels = g.channels;
    output.scale_a = &qparams.scale;
    convolve_depthwise(kernels, images, weights, g, output);
    return out;
  }

  // A 1x1 kernel at stride 1 without padding reads the image as it is.
  const bool in_place =
      g.kernel.h == 1 && g.kernel.w == 1 && g.stride.h == 1 && g.stride.w == 1 && g.padding.h == 0 && g.padding.w == 0;
  const int64_t gathered = code_row_stride(k), row_stride = in_place ? g.channels : gathered;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tiles =
      std::min(kGatherBytes / gathered, g.batch * pixels / (2 * threads)) / kernels.tile_rows;  // per block of pixels
  const int64_t block = std::clamp<int64_t>(tiles, 1, 20) * kernels.tile_rows, blocks = (pixels + block - 1) / block;
  const int64_t work = panel_bytes(k) * group_panels * groups * (std::min(block, pixels) + 3);
  torch::stable::parallel_for(0, g.batch * blocks, grain(kMultiplyGrain, work), [&](int64_t begin, int64_t end) {
    std::unique_ptr<uint8_t[]> scratch(in_place ? nullptr : new uint8_t[static_cast<size_t>(block * gathered)]);
    std::vector<float> row_scales(static_cast<size_t>(block), qparams.scale);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * block, height = std::min(block, pixels - first);
      const uint8_t* image = images + n * image_bytes;
      for (int64_t group = 0; group < groups; ++group) {
        // Each output pixel of the block has a row of codes and a scale, which is NaN if a NaN lies under the pixel.
        const uint8_t* rows = in_place ? image + first * g.channels + group * g.group_channels() : scratch.get();
        int64_t h = first / g.out.w, w = first % g.out.w;
        for (int64_t r = 0; r < height; ++r) {
          if (!in_place) gather(image, g, h, w, group, scratch.get() + r * gathered);
          if (nan)
            row_scales[static_cast<size_t>(r)] =
                nan_under(source, type, g, n, h, w, group) ? std::numeric_limits<float>::quiet_NaN() : qparams.scale;
          if (++w == g.out.w) {
            w = 0;
            ++h;
          }
        }
        PanelOutput o = output;
        o.out = out_data + (n * pixels + first) * g.out_channels * static_cast<int64_t>(element_size(type));
        o.channels = (group + 1) * g.group_out();
        o.scale_a = row_scales.data();
        o.scale_a_step = 1;
        for (int64_t panel = 0; panel < group_panels; ++panel)
          kernels.multiply(rows, row_stride, height, weights + (group * group_panels + panel) * panel_bytes(k), k,
                           at(o, 0, group * g.group_out() + panel * kPanel));
      }
    }
  });
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("int8_conv2d", TORCH_BOX(&qkernels::int8_conv2d)); }
