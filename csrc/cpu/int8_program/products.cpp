// Convolutions, transposed ones too, and linear layers.
#include "cpu/int8_conv/convolve.h"
#include "cpu/int8_conv/transposed.h"
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 31;

// Of one dim: how far the codes under the last output reach behind the image.
int64_t behind(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return std::max<int64_t>(0, (out - 1) * stride + dilation * (kernel - 1) + 1 - padding - size);
}

enum class ProductKind { linear, conv, conv_transpose };

struct Product final : Step {
  ProductKind kind;
  int x, residual = -1;
  Kept to;
  ConvGeometry geometry{};  // without the output's size
  Size3 padding_after{};    // of a convolution
  Size3 output_padding{};   // of a transposed one
  int data, colsum, scale, bias;
  ActivationStep first, second;

  Product(Line& line, ProductKind which) : kind(which), x(line.read_codes("x")) {
    ConvGeometry& g = geometry;
    g.in_channels = line.integer("in", 1, kMostChannels);
    g.out_channels = line.integer("out_channels", 1, kMostChannels);
    g.groups = 1;
    g.kernel = g.stride = g.dilation = {1, 1, 1};
    if (kind != ProductKind::linear) {
      g.groups = line.integer("groups", 1, g.in_channels, 1);
      if (g.in_channels % g.groups || g.out_channels % g.groups)
        line.refuse("groups: got ", g.groups, "; accepted: a divisor of the input channels ", g.in_channels,
                    " and the output channels ", g.out_channels);
      g.kernel = line.sizes("kernel", 1);
      g.stride = line.sizes("stride", 1, 1);
      g.dilation = line.sizes("dilation", 1, 1);
      g.padding = line.sizes("padding", 0, 0);
    }
    if (kind == ProductKind::conv)
      padding_after = line.has("padding_after") ? line.sizes("padding_after", 0) : g.padding;
    if (kind == ProductKind::conv_transpose) output_padding = line.sizes("output_padding", 0, 0);
    check_k(line.where().c_str(), g.in_channels / g.groups * g.kernel.d * g.kernel.h * g.kernel.w);
    const bool transposed = kind == ProductKind::conv_transpose;
    data = line.constant("data", ConstantKind::int8, transposed ? transposed_packed_bytes(g) : conv_packed_bytes(g),
                         false);
    colsum = line.constant("colsum", ConstantKind::int32,
                           transposed ? transposed_classes(g) * g.out_channels : g.out_channels, false);
    scale = line.constant("scale", ConstantKind::floats, g.out_channels, true);
    bias = line.constant_if("bias", ConstantKind::floats, g.out_channels, true);
    first = line.activation("first");
    second = line.activation("second");
    residual = line.read_if("residual");
    to = kept(line);
    writes_any_order = true;
    const bool once = kind != ProductKind::conv_transpose && !is_depthwise(g);  // each output is computed once
    if (once && residual >= 0 && to.floats >= 0 && !line.plan().values[static_cast<size_t>(residual)].codes()) {
      overwrites = residual;
      overwrites_with = to.floats;
    }
  }

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    QK_CHECK(shape.channels == geometry.in_channels, where, ": x: got ", shape.channels,
             " channels; accepted: ", geometry.in_channels);
    shape.channels = geometry.out_channels;
    shape.size = out_size(shape.size);
    if (residual >= 0) {
      const Shape& added = shapes.of(residual);
      QK_CHECK(added.channels == shape.channels && added.size == shape.size, where, ": residual: got ", text(added),
               "; accepted: the output's shape ", text(shape));
    }
    shapes.set(to, shape);
  }

  void place(Places& places) const override {
    const Size3 size = places.shape(x).size, out = out_size(size);
    ConvGeometry g = geometry;
    if (kind == ProductKind::conv_transpose) {
      g.out = out;
      const Borders borders = transposed_borders(g, size);
      return places.want_border(x, borders.before, borders.after);
    }
    places.want_border(x, g.padding,
                       {behind(size.d, out.d, g.kernel.d, g.stride.d, g.padding.d, g.dilation.d),
                        behind(size.h, out.h, g.kernel.h, g.stride.h, g.padding.h, g.dilation.h),
                        behind(size.w, out.w, g.kernel.w, g.stride.w, g.padding.w, g.dilation.w)});
  }

  void run(const Frame& frame) const override {
    const CodeImage image = frame.codes(x);
    ConvGeometry g = geometry;
    const Writable y = writable(frame, to);
    g.out = y.floats.data ? y.floats.size : y.codes.size;
    ConvOutput o{};
    o.colsum = static_cast<const int32_t*>(frame.call.constants[static_cast<size_t>(colsum)]);
    o.scale = frame.call.floats(scale);
    o.bias = frame.call.floats(bias);
    o.in_scale = frame.quantizer(x).scale;
    o.in_zero_point = frame.quantizer(x).zero_point;
    o.first = first;
    o.second = second;
    if (residual >= 0) {
      const Readable added = readable(frame, residual);
      o.residual = added.begin.floats;
      o.residual_codes = added.begin.codes;
      o.residual_q = added.begin.quantizer;
      o.residual_n = added.stride_n;
      o.residual_d = added.stride_d;
      o.residual_h = added.stride_h;
      o.residual_w = added.stride_w;
    }
    o.floats = y.floats.data;
    o.floats_n = y.floats.stride_n;
    o.floats_c = y.floats.stride_c;
    o.floats_d = y.floats.stride_d;
    o.floats_h = y.floats.stride_h;
    o.floats_w = y.floats.stride_w;
    o.codes = y.codes;
    o.codes_q = y.quantizer;
    const auto multiply = kind == ProductKind::conv_transpose ? convolve_transposed : convolve;
    multiply(g, image, static_cast<const int8_t*>(frame.call.constants[static_cast<size_t>(data)]), o, frame.team);
  }

 private:
  int64_t out_size(const char* side, int64_t size, int64_t kernel, int64_t stride, int64_t before, int64_t after,
                   int64_t dilation, int64_t added) const {
    if (kind == ProductKind::conv_transpose) {
      const int64_t out = (size - 1) * stride - 2 * before + dilation * (kernel - 1) + added + 1;
      QK_CHECK(out > 0, where, ": x: got ", side, " ", size, ", for which the output's would be ", out,
               "; accepted: at least 1");
      return out;
    }
    const int64_t reach = dilation * (kernel - 1) + 1, padded = size + before + after;
    QK_CHECK(reach <= padded, where, ": x: got padded ", side, " ", padded,
             "; accepted: at least the dilated kernel's, ", reach);
    return (padded - reach) / stride + 1;
  }

  Size3 out_size(Size3 size) const {
    const ConvGeometry& g = geometry;
    return {
        out_size("depth", size.d, g.kernel.d, g.stride.d, g.padding.d, padding_after.d, g.dilation.d, output_padding.d),
        out_size("height", size.h, g.kernel.h, g.stride.h, g.padding.h, padding_after.h, g.dilation.h,
                 output_padding.h),
        out_size("width", size.w, g.kernel.w, g.stride.w, g.padding.w, padding_after.w, g.dilation.w,
                 output_padding.w)};
  }
};

}  // namespace

std::unique_ptr<Step> make_conv(Line& line) { return std::make_unique<Product>(line, ProductKind::conv); }
std::unique_ptr<Step> make_linear(Line& line) { return std::make_unique<Product>(line, ProductKind::linear); }

std::unique_ptr<Step> make_conv_transpose(Line& line) {
  return std::make_unique<Product>(line, ProductKind::conv_transpose);
}

}  // namespace qkernels
