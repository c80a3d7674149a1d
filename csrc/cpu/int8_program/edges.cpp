// Where floats enter a plan and leave it, and where they become codes and floats again.
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

Operand floats_operand(const float* x) { return {x, nullptr, {}}; }

// Copies an input into the arena, with the channels innermost, for steps that want it so. Where they read it in place,
// looks for NaNs alone.
struct Input final : Step {
  int index, out;

  explicit Input(Line& line)
      : index(static_cast<int>(line.integer("index", 0, 1 << 20))), out(line.make_floats("out")) {
    if (!line.plan().inputs.emplace(index, out).second)
      line.refuse("index: got ", index, ", which an earlier line takes; accepted: each input once");
  }

  void infer(Shapes&) const override {}

  void run(const Frame& frame) const override {
    const ProgramKernels& kernels = frame.kernels();
    const TensorPlace& x = frame.call.inputs[static_cast<size_t>(index)];
    const FloatImage y = frame.floats(out);
    const bool in_place = frame.call.layout.places[static_cast<size_t>(out)].memory == Place::Memory::input;
    const int64_t row = y.size.w * y.channels;
    for_each_row(frame, y.size, row, [&](int64_t n, int64_t d, int64_t h) {
      const float* from = x.data + (frame.first + n) * x.stride_n + d * x.stride_d + h * x.stride_h;
      float* to = y.data + n * y.stride_n + d * y.stride_d + h * y.stride_h;
      if (in_place) {
        // The values are where they are read.
      } else if (x.stride_c == 1) {
        for (int64_t w = 0; w < y.size.w; ++w)
          std::memcpy(to + w * y.stride_w, from + w * x.stride_w, static_cast<size_t>(y.channels) * sizeof(float));
      } else {
        // Channels take the part of pixels: x's planes are to become y's pixels.
        kernels.to_planes(floats_operand(from), x.stride_c, y.size.w, y.channels, to, y.stride_w);
      }
      for (int64_t w = 0; w < y.size.w; ++w)
        if (kernels.any_nan(to + w * y.stride_w, y.channels)) frame.call.nan[frame.first + n] = true;
    });
  }
};

struct Output final : Step {
  int x, index;

  explicit Output(Line& line) : x(line.read("x")), index(static_cast<int>(line.integer("index", 0, 1 << 20))) {
    std::vector<OutputInfo>& outputs = line.plan().outputs;
    const size_t at = static_cast<size_t>(index);
    if (outputs.size() <= at) outputs.resize(at + 1, {-1, -1, false});
    if (outputs[at].value >= 0)
      line.refuse("index: got ", index, ", which an earlier line gives; accepted: each output once");
    bool like_input = false;
    if (line.has("channels_last")) {
      const std::string value = line.text("channels_last");
      if (value != "input") line.refuse("channels_last: got '", value, "'; accepted: input");
      like_input = true;
    }
    outputs[at] = {x, static_cast<int>(line.plan().steps.size()), like_input};
  }

  void infer(Shapes&) const override {}

  void run(const Frame& frame) const override {
    const Readable from = readable(frame, x);
    const Shape& shape = frame.shape(x);
    const TensorPlace& to = frame.call.outputs[static_cast<size_t>(index)];
    const int64_t channels = shape.channels;
    for_each_row(frame, shape.size, shape.size.w * channels, [&](int64_t n, int64_t d, int64_t h) {
      float* row = to.data + (frame.first + n) * to.stride_n + d * to.stride_d + h * to.stride_h;
      if (to.stride_c != 1)
        return frame.kernels().to_planes(from.at(n, d, h), from.stride_w, channels, shape.size.w, row, to.stride_c);
      Pointwise copy{};
      for (int64_t w = 0; w < shape.size.w; ++w) {
        copy.a = from.at(n, d, h, w);
        copy.floats = row + w * to.stride_w;
        frame.kernels().pointwise(copy, channels);
      }
    });
  }
};

// Reads floats of any strides.
struct Quantize final : Step {
  int x, out;

  explicit Quantize(Line& line) : x(line.read("x")), out(line.make_codes("out", line.quantizer("q"))) {
    if (line.plan().values[static_cast<size_t>(x)].codes())
      line.refuse("x: got the codes '", line.text("x"), "'; accepted: floats");
    reads_any_order = true;
  }

  void infer(Shapes& shapes) const override { shapes.set(out, shapes.of(x)); }

  void run(const Frame& frame) const override {
    const ProgramKernels& kernels = frame.kernels();
    const FloatImage from = frame.floats(x);
    const CodeImage to = frame.codes(out);
    const Quantizer& q = frame.quantizer(out);
    const bool is_input = frame.call.layout.places[static_cast<size_t>(x)].memory == Place::Memory::input;
    const int64_t channels = from.channels, width = from.size.w, row = width * channels;
    const bool dense = from.stride_c == 1 && from.stride_w == channels && to.stride_w == channels;
    for_each_row(frame, from.size, row, [&](int64_t n, int64_t d, int64_t h) {
      const float* floats = from.data + n * from.stride_n + d * from.stride_d + h * from.stride_h;
      uint8_t* codes = to.data + n * to.stride_n + d * to.stride_d + h * to.stride_h;
      bool nan = false;
      if (dense) {
        nan = kernels.quantize(floats, row, q, codes);
      } else if (from.stride_c == 1) {
        for (int64_t w = 0; w < width; ++w)
          nan |= kernels.quantize(floats + w * from.stride_w, channels, q, codes + w * to.stride_w);
      } else {
        nan = kernels.quantize_planes(floats, from.stride_c, channels, width, q, codes, to.stride_w);
      }
      if (nan && is_input) frame.call.nan[frame.first + n] = true;
    });
  }
};

}  // namespace

std::unique_ptr<Step> make_input(Line& line) { return std::make_unique<Input>(line); }
std::unique_ptr<Step> make_output(Line& line) { return std::make_unique<Output>(line); }
std::unique_ptr<Step> make_quantize(Line& line) { return std::make_unique<Quantize>(line); }

}  // namespace qkernels
