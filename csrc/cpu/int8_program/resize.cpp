// Linear interpolation between pixels: bilinear, trilinear.
#include "cpu/int8_program/new_size.h"
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

// The two pixels of one dim that an output lies between, and the share of the second.
struct Between {
  int64_t low, high;
  float share;
};

// torch's rule: without align_corners the centers of pixels keep their places, else those of the corner pixels.
Between between(int64_t at, int64_t in, int64_t out, bool align_corners) {
  if (in == out) return {at, at, 0};
  const float step = align_corners ? (out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0)
                                   : static_cast<float>(in) / static_cast<float>(out);
  const float center = static_cast<float>(at);
  const float source = align_corners ? center * step : std::max(0.0f, (center + 0.5f) * step - 0.5f);
  const int64_t low = std::min(static_cast<int64_t>(source), in - 1);
  return {low, std::min(low + 1, in - 1), std::min(std::max(source - static_cast<float>(low), 0.0f), 1.0f)};
}

struct Resize final : Step {
  int x;
  Kept to;
  NewSize size;
  bool align_corners;

  explicit Resize(Line& line)
      : x(line.read("x")), to(kept(line)), size(line), align_corners(line.flag("align_corners")) {
    const std::string mode = line.text("mode");
    if (mode != "linear") line.refuse("mode: got '", mode, "'; accepted: linear");
  }

  void infer(Shapes& shapes) const override { shapes.set(to, size.of(shapes, x, where)); }

  void run(const Frame& frame) const override {
    const Readable from = readable(frame, x);
    const Writable y = writable(frame, to);
    const Size3 in = frame.shape(x).size;
    const Size3 out = frame.shape(to.floats >= 0 ? to.floats : to.codes).size;
    const int64_t channels = frame.shape(x).channels;
    for_each_row(frame, out, out.w * channels, [&](int64_t n, int64_t d, int64_t h) {
      std::vector<float> kept(y.floats.data ? 0 : static_cast<size_t>(channels));
      const Between depth = between(d, in.d, out.d, align_corners), height = between(h, in.h, out.h, align_corners);
      for (int64_t w = 0; w < out.w; ++w) {
        const Between width = between(w, in.w, out.w, align_corners);
        const Blend blend = {(depth.high - depth.low) * from.stride_d,
                             (height.high - height.low) * from.stride_h,
                             (width.high - width.low) * from.stride_w,
                             depth.share,
                             height.share,
                             width.share};
        float* floats = y.floats.data ? y.floats_at(n, d, h, w) : kept.data();
        frame.kernels().blend(from.at(n, depth.low, height.low, width.low), blend, channels, floats);
        if (y.codes.data) frame.kernels().quantize(floats, channels, y.quantizer, y.codes_at(n, d, h, w));
      }
    });
  }
};

}  // namespace

std::unique_ptr<Step> make_resize(Line& line) { return std::make_unique<Resize>(line); }

}  // namespace qkernels
