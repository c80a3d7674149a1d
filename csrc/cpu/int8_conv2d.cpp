// int8_conv2d on the CPU: the input becomes a zero-padded image of codes with channels innermost, which the convolution
// kernels read in place. And the packing of its weights.
#include <atomic>
#include <cmath>

#include "cpu/common/int8_ops.h"
#include "cpu/int8_conv/convolve.h"
#include "cpu/int8_conv/planes.h"
#include "cpu/int8_conv/transposed.h"
#include "cpu/int8_program/kernels.h"

namespace qkernels {
namespace {

struct Pair {
  int64_t h, w;
};

Pair pair_of(const char* name, const std::vector<int64_t>& values, int64_t least) {
  std::string got;
  for (int64_t value : values) got += (got.empty() ? "" : ", ") + std::to_string(value);
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto good = [&](int64_t value) { return least <= value && value <= kMost; };
  QK_CHECK(values.size() == 2 && good(values[0]) && good(values[1]), name, ": got [", got,
           "]; accepted: 2 integers, height and width, at least ", least, " and at most 2^31");
  return {values[0], values[1]};
}

int64_t out_size(const char* side, int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  QK_CHECK(reach <= padded, "x: got padded ", side, " ", padded, "; accepted: at least the dilated kernel's, ", reach);
  return (padded - reach) / stride + 1;
}

// A weight [C_out, C_in / groups, ...] with one to three kernel dims.
ConvGeometry geometry_of(const char* name, const std::vector<int64_t>& shape, int64_t groups) {
  std::string got;
  for (int64_t size : shape) got += (got.empty() ? "" : ", ") + std::to_string(size);
  QK_CHECK(shape.size() >= 3 && shape.size() <= 5 && *std::min_element(shape.begin(), shape.end()) >= 0, name,
           ": got shape [", got, "]; accepted: [C_out, C_in/groups, kernel], the kernel in 1 to 3 dims");
  QK_CHECK(groups >= 1 && shape[0] % groups == 0, "groups: got ", groups,
           "; accepted: a divisor of the output channels ", shape[0]);
  ConvGeometry g{};
  g.in_channels = shape[1] * groups;
  g.out_channels = shape[0];
  g.groups = groups;
  const size_t rank = shape.size();
  g.kernel = {rank > 4 ? shape[rank - 3] : 1, rank > 3 ? shape[rank - 2] : 1, shape[rank - 1]};
  check_k(name, shape[1] * g.kernel.d * g.kernel.h * g.kernel.w);
  return g;
}

std::tuple<Tensor, Tensor> int8_conv_pack(const Tensor& q, int64_t groups) {
  check_cpu("q", q);
  QK_CHECK(q.scalar_type() == ScalarType::Char, "q: got ", dtype_name(q.scalar_type()), "; accepted: torch.int8");
  const ConvGeometry g = geometry_of("q", to_vector(q.sizes()), groups);
  record_isa(Isa::scalar);
  const int64_t bytes = conv_packed_bytes(g);
  Tensor data = empty({bytes}, ScalarType::Char), colsum = empty({g.out_channels}, ScalarType::Int);
  ask_for_huge_pages(data.data_ptr(), bytes);
  const Tensor codes = to_contiguous(q);
  pack_conv(g, static_cast<const int8_t*>(codes.data_ptr()), static_cast<int8_t*>(data.data_ptr()),
            static_cast<int32_t*>(colsum.data_ptr()));
  return {data, colsum};
}

void check_packed(const Tensor& data, int64_t bytes, const char* packer) {
  check_cpu("data", data);
  QK_CHECK(data.scalar_type() == ScalarType::Char && data.dim() == 1 && data.size(0) == bytes && data.is_contiguous(),
           "data: got ", dtype_name(data.scalar_type()), " of shape ", shape_of(data), "; accepted: what ", packer,
           " gives for this weight, contiguous torch.int8 [", bytes, "]");
}

Tensor int8_conv_unpack(const Tensor& data, std::vector<int64_t> shape, int64_t groups) {
  const ConvGeometry g = geometry_of("shape", shape, groups);
  check_packed(data, conv_packed_bytes(g), "int8_conv_pack");
  record_isa(Isa::scalar);
  Tensor q = empty(shape, ScalarType::Char);
  unpack_conv(g, static_cast<const int8_t*>(data.data_ptr()), static_cast<int8_t*>(q.data_ptr()));
  return q;
}

// A transposed convolution's weight [C_in, C_out / groups, ...].
ConvGeometry transposed_geometry_of(const char* name, const std::vector<int64_t>& shape,
                                    const std::vector<int64_t>& stride, const std::vector<int64_t>& dilation,
                                    int64_t groups) {
  std::string got;
  for (int64_t size : shape) got += (got.empty() ? "" : ", ") + std::to_string(size);
  const size_t rank = shape.size();
  QK_CHECK(rank >= 3 && rank <= 5 && *std::min_element(shape.begin(), shape.end()) >= 0, name, ": got shape [", got,
           "]; accepted: [C_in, C_out/groups, kernel], the kernel in 1 to 3 dims");
  QK_CHECK(groups >= 1 && shape[0] % groups == 0, "groups: got ", groups,
           "; accepted: a divisor of the input channels ", shape[0]);
  const auto size_of = [&](const char* of, const std::vector<int64_t>& numbers) {
    got.clear();
    for (int64_t number : numbers) got += (got.empty() ? "" : ", ") + std::to_string(number);
    QK_CHECK(numbers.size() == rank - 2 && *std::min_element(numbers.begin(), numbers.end()) >= 1, of, ": got [", got,
             "]; accepted: ", rank - 2, " integers, at least 1");
    return Size3{rank > 4 ? numbers[0] : 1, rank > 3 ? numbers[rank - 4] : 1, numbers[rank - 3]};
  };
  ConvGeometry g{};
  g.in_channels = shape[0];
  g.out_channels = shape[1] * groups;
  g.groups = groups;
  g.kernel = {rank > 4 ? shape[2] : 1, rank > 3 ? shape[rank - 2] : 1, shape[rank - 1]};
  g.stride = size_of("stride", stride);
  g.dilation = size_of("dilation", dilation);
  check_k(name, shape[0] / groups * g.kernel.d * g.kernel.h * g.kernel.w);
  return g;
}

std::tuple<Tensor, Tensor> int8_conv_transpose_pack(const Tensor& q, int64_t groups, std::vector<int64_t> stride,
                                                    std::vector<int64_t> dilation) {
  check_cpu("q", q);
  QK_CHECK(q.scalar_type() == ScalarType::Char, "q: got ", dtype_name(q.scalar_type()), "; accepted: torch.int8");
  const ConvGeometry g = transposed_geometry_of("q", to_vector(q.sizes()), stride, dilation, groups);
  record_isa(Isa::scalar);
  Tensor data = empty({transposed_packed_bytes(g)}, ScalarType::Char);
  Tensor colsum = empty({transposed_classes(g) * g.out_channels}, ScalarType::Int);
  const Tensor codes = to_contiguous(q);
  pack_transposed(g, static_cast<const int8_t*>(codes.data_ptr()), static_cast<int8_t*>(data.data_ptr()),
                  static_cast<int32_t*>(colsum.data_ptr()));
  return {data, colsum};
}

Tensor int8_conv_transpose_unpack(const Tensor& data, std::vector<int64_t> shape, int64_t groups,
                                  std::vector<int64_t> stride, std::vector<int64_t> dilation) {
  const ConvGeometry g = transposed_geometry_of("shape", shape, stride, dilation, groups);
  check_packed(data, transposed_packed_bytes(g), "int8_conv_transpose_pack");
  record_isa(Isa::scalar);
  Tensor q = empty(shape, ScalarType::Char);
  unpack_transposed(g, static_cast<const int8_t*>(data.data_ptr()), static_cast<int8_t*>(q.data_ptr()));
  return q;
}

// Memory for images of codes. The border holds the code of zero.
struct Codes {
  Tensor memory;
  CodeImage image;

  Codes(int64_t batch, int64_t channels, Size3 size, Size3 border, uint8_t zero) {
    image = {nullptr, batch, channels, size, 0, 0, 0, channels};
    image.stride_h = (size.w + 2 * border.w) * channels;
    image.stride_d = image.stride_n = (size.h + 2 * border.h) * image.stride_h;
    memory = empty({batch * image.stride_n + 64}, ScalarType::Byte);
    uint8_t* data = static_cast<uint8_t*>(memory.data_ptr());
    image.data = data + border.h * image.stride_h + border.w * channels;
    if (border.h == 0 && border.w == 0) return;
    const size_t edge = static_cast<size_t>(border.w * channels), row = static_cast<size_t>(image.stride_h);
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t h = -border.h; h < size.h + border.h; ++h) {
        uint8_t* begin = image.data + n * image.stride_n + h * image.stride_h - edge;
        if (h < 0 || h >= size.h) {
          std::memset(begin, zero, row);
        } else {
          std::memset(begin, zero, edge);
          std::memset(begin + row - edge, zero, edge);
        }
      }
  }
};

// Where image n and row h of x begin.
const float* row_of(const Tensor& x, int64_t n, int64_t h) {
  return static_cast<const float*>(x.data_ptr()) + n * x.stride(0) + h * x.stride(2);
}

// Of x in planes, so many planes are read at a time, row by row: more streams than that are not prefetched. Codes of so
// many rows stay in the second-level cache until their pixels have all channels.
constexpr int64_t kPlanesAtOnce = 16, kCodesOfRows = 128 << 10;

// Writes images first... of x as codes. Returns whether they hold a NaN.
bool quantize_images(const Tensor& x, int64_t first, const Quantizer& q, const CodeImage& to) {
  const ProgramKernels& kernels = program_kernels();
  const int64_t width = to.size.w, channels = to.channels, stride_c = x.stride(1);
  const int64_t rows = std::clamp<int64_t>(kCodesOfRows / std::max<int64_t>(1, width * channels), 1, to.size.h);
  const bool channels_last = stride_c == 1 && x.stride(3) == channels;
  std::atomic<bool> nan{false};
  const auto row_of_codes = [&](int64_t i) {
    return to.data + i / to.size.h * to.stride_n + i % to.size.h * to.stride_h;
  };
  const auto row_of_x = [&](int64_t i) { return row_of(x, first + i / to.size.h, i % to.size.h); };
  torch::stable::parallel_for(
      0, to.batch * to.size.h, grain(kPointwiseGrain, width * channels), [&](int64_t begin, int64_t end) {
        bool found = false;
        if (channels_last)
          for (int64_t i = begin; i < end; ++i)
            found |= kernels.quantize(row_of_x(i), width * channels, q, row_of_codes(i));
        else
          for (int64_t block = begin; block < end; block += rows)
            for (int64_t c = 0; c < channels; c += kPlanesAtOnce)
              for (int64_t i = block; i < std::min(end, block + rows); ++i)
                found |=
                    kernels.quantize_planes(row_of_x(i) + c * stride_c, stride_c, std::min(kPlanesAtOnce, channels - c),
                                            width, q, row_of_codes(i) + c, channels);
        if (found) nan = true;
      });
  return nan;
}

// Whether a NaN of x lies under output pixel (h, w) of a group.
bool nan_under(const Tensor& x, const ConvGeometry& g, int64_t n, int64_t h, int64_t w, int64_t group) {
  const int64_t channels = g.in_channels / g.groups;
  for (int64_t i = 0; i < g.kernel.h; ++i)
    for (int64_t j = 0; j < g.kernel.w; ++j) {
      const int64_t y = h * g.stride.h + i * g.dilation.h - g.padding.h;
      const int64_t z = w * g.stride.w + j * g.dilation.w - g.padding.w;
      if (y < 0 || y >= x.size(2) || z < 0 || z >= x.size(3)) continue;
      for (int64_t c = group * channels; c < (group + 1) * channels; ++c)
        if (std::isnan(row_of(x, n, y)[c * x.stride(1) + z * x.stride(3)])) return true;
    }
  return false;
}

// Makes the outputs NaN that see a NaN of x.
void spread_nan(const Tensor& x, const ConvGeometry& g, int64_t first, int64_t count, const ConvOutput& o) {
  const int64_t channels = g.out_channels / g.groups;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t h = 0; h < g.out.h; ++h)
      for (int64_t w = 0; w < g.out.w; ++w)
        for (int64_t group = 0; group < g.groups; ++group)
          if (nan_under(x, g, first + n, h, w, group))
            for (int64_t c = group * channels; c < (group + 1) * channels; ++c)
              o.floats[n * o.floats_n + c * o.floats_c + h * o.floats_h + w * o.floats_w] =
                  std::numeric_limits<float>::quiet_NaN();
}

// How many codes are convolved before more are quantized: they stay in the second-level caches.
constexpr int64_t kCodesOfThread = 1 << 20;

Tensor int8_conv2d(const Tensor& x, const Tensor& data, const Tensor& colsum, const Tensor& scale,
                   const std::optional<Tensor>& bias, const Tensor& input_scale,
                   const std::optional<Tensor>& input_zero_point, int64_t quant_min, int64_t quant_max,
                   std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, bool channels_last) {
  check_cpu("x", x);
  element_of("x", x.scalar_type());
  QK_CHECK(x.dim() == 4, "x: got shape ", shape_of(x), "; accepted: [N, C, H, W]");
  check_vector("colsum", colsum, colsum.numel(), -1, false, "[C_out]");
  ConvGeometry g{};
  g.in_channels = x.size(1);
  g.out_channels = colsum.numel();
  g.groups = groups;
  QK_CHECK(groups >= 1 && g.in_channels % groups == 0 && g.out_channels % groups == 0, "groups: got ", groups,
           "; accepted: a divisor of the input channels ", g.in_channels, " and the output channels ", g.out_channels);
  const Pair kernel = pair_of("kernel_size", kernel_size, 1), step = pair_of("stride", stride, 1),
             border = pair_of("padding", padding, 0), spread = pair_of("dilation", dilation, 1);
  g.kernel = {1, kernel.h, kernel.w};
  g.stride = {1, step.h, step.w};
  g.padding = {0, border.h, border.w};
  g.dilation = {1, spread.h, spread.w};
  g.out = {1, out_size("height", x.size(2) + 2 * border.h, kernel.h, step.h, spread.h),
           out_size("width", x.size(3) + 2 * border.w, kernel.w, step.w, spread.w)};
  constexpr int64_t kMostCodes = int64_t{1} << 40;  // far from what int64 holds
  QK_CHECK(x.size(3) + 2 * border.w <=
               kMostCodes / std::max<int64_t>(g.in_channels, 1) / std::max<int64_t>(x.size(2) + 2 * border.h, 1),
           "padding: got ", border.h, " and ", border.w, " for x of shape ", shape_of(x),
           "; accepted: up to 2^40 elements of a padded image");
  check_k("data", g.in_channels / groups * kernel.h * kernel.w);
  check_packed(data, conv_packed_bytes(g), "int8_conv_pack");
  QK_CHECK(colsum.scalar_type() == ScalarType::Int && colsum.is_contiguous(), "colsum: got ",
           dtype_name(colsum.scalar_type()), "; accepted: contiguous torch.int32");
  const auto channel_scale = float_vector("scale", scale, g.out_channels, -1, false, "[C_out]");
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, g.out_channels, -1, false, "[C_out]");
  const RowQparams q = static_qparams("input", input_scale, input_zero_point, quant_min, quant_max);
  record_isa(int8_kernels().isa);

  const int64_t batch = x.size(0), pixels = g.out.h * g.out.w;
  const std::vector<int64_t> sizes = {batch, g.out_channels, g.out.h, g.out.w};
  const std::vector<int64_t> strides = {pixels * g.out_channels, channels_last ? 1 : pixels,
                                        g.out.w * (channels_last ? g.out_channels : 1),
                                        channels_last ? g.out_channels : 1};
  Tensor out = empty_strided({sizes.data(), 4}, {strides.data(), 4}, x.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t in_channels = g.in_channels, width = x.size(3);
  const bool last_in = x.stride(1) == 1 && x.stride(3) == in_channels;
  Tensor source = last_in || x.stride(3) == 1 ? x : to_contiguous(x), result = out;
  if (x.scalar_type() != ScalarType::Float) {
    const int64_t plane = x.size(2) * width;
    const std::vector<int64_t> dense = {plane * in_channels, last_in ? 1 : plane, width * (last_in ? in_channels : 1),
                                        last_in ? in_channels : 1};
    source = empty_strided(x.sizes(), {dense.data(), 4}, ScalarType::Float);
    torch::stable::copy_(source, x);
    result = empty_strided(out.sizes(), out.strides(), ScalarType::Float);
  }

  ConvOutput o{};
  o.colsum = static_cast<const int32_t*>(colsum.data_ptr());
  o.scale = channel_scale.data;
  o.bias = offset ? offset->data : nullptr;
  o.in_scale = q.scale;
  o.in_zero_point = static_cast<int32_t>(q.zero_point);
  o.floats = static_cast<float*>(result.data_ptr());
  o.floats_n = strides[0];
  o.floats_c = strides[1];
  o.floats_h = strides[2];
  o.floats_w = strides[3];

  const Quantizer quantizer = {q.scale, q.inverse, o.in_zero_point, static_cast<int32_t>(q.low),
                               static_cast<int32_t>(q.high)};
  Team team;
  if (takes_planes(g, o) && source.stride(3) == 1 && (g.out.h == 1 || source.stride(2) == width)) {
    const Planes planes = {static_cast<const float*>(source.data_ptr()), batch, pixels, source.stride(0),
                           source.stride(1)};
    if (convolve_planes(g, planes, quantizer, static_cast<const int8_t*>(data.data_ptr()), o, team))
      spread_nan(source, g, 0, batch, o);
    if (x.scalar_type() != ScalarType::Float) torch::stable::copy_(out, result);
    return out;
  }
  const Size3 size = {1, x.size(2), x.size(3)};
  const int64_t bytes = (size.h + 2 * border.h) * (size.w + 2 * border.w) * g.in_channels;
  const int64_t at_once = std::clamp<int64_t>(kCodesOfThread * team.threads() / std::max<int64_t>(bytes, 1), 1, batch);
  Codes codes(at_once, g.in_channels, size, g.padding, static_cast<uint8_t>(o.in_zero_point + 128));
  for (int64_t first = 0; first < batch; first += at_once, o.floats += at_once * o.floats_n) {
    codes.image.batch = std::min(at_once, batch - first);
    const bool nan = quantize_images(source, first, quantizer, codes.image);
    convolve(g, codes.image, static_cast<const int8_t*>(data.data_ptr()), o, team);
    if (nan) spread_nan(source, g, first, codes.image.batch, o);
  }
  if (x.scalar_type() != ScalarType::Float) torch::stable::copy_(out, result);
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("int8_conv2d", TORCH_BOX(&qkernels::int8_conv2d));
  m.impl("int8_conv_pack", TORCH_BOX(&qkernels::int8_conv_pack));
  m.impl("int8_conv_unpack", TORCH_BOX(&qkernels::int8_conv_unpack));
  m.impl("int8_conv_transpose_pack", TORCH_BOX(&qkernels::int8_conv_transpose_pack));
  m.impl("int8_conv_transpose_unpack", TORCH_BOX(&qkernels::int8_conv_transpose_unpack));
}
