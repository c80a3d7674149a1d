// Steps that normalize the channels of each pixel.
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

struct Normalize final : Step {
  bool centered;
  int x, weight, bias;
  int64_t channels;
  float eps;
  Kept to;

  Normalize(Line& line, bool layer_norm)
      : centered(layer_norm),
        x(line.read("x")),
        weight(line.constant_if("weight", ConstantKind::floats, -1, true, x)),
        bias(layer_norm ? line.constant_if("bias", ConstantKind::floats, -1, true, x) : -1),
        channels(line.integer("channels", 1, int64_t{1} << 31)),
        eps(line.number("eps")),
        to(kept(line)) {}

  void infer(Shapes& shapes) const override {
    const Shape& shape = shapes.of(x);
    QK_CHECK(shape.channels == channels, where, ": x: got ", shape.channels, " channels; accepted: ", channels);
    shapes.set(to, shape);
  }

  void run(const Frame& frame) const override {
    const Norm norm{centered, eps, frame.call.floats(weight), frame.call.floats(bias)};
    const Readable from = readable(frame, x);
    const Writable y = writable(frame, to);
    const Size3 size = frame.shape(x).size;
    for_each_row(frame, size, size.w * channels, [&](int64_t n, int64_t d, int64_t h) {
      for (int64_t w = 0; w < size.w; ++w)
        if (frame.kernels().normalize(norm, from.at(n, d, h, w), channels, y.quantizer, y.floats_at(n, d, h, w),
                                      y.codes_at(n, d, h, w)))
          frame.call.nan[frame.first + n] = true;
    });
  }
};

}  // namespace

std::unique_ptr<Step> make_layer_norm(Line& line) { return std::make_unique<Normalize>(line, true); }
std::unique_ptr<Step> make_rms_norm(Line& line) { return std::make_unique<Normalize>(line, false); }

}  // namespace qkernels
