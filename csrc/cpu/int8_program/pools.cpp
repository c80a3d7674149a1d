// Pools.
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

// One dim of a pool.
struct Pooled {
  int64_t kernel, stride, padding, dilation;

  // torch's rule: with `ceil` a last window counts if it begins inside the image or its padding before.
  int64_t out_size(const std::string& where, int64_t size, bool ceil) const {
    const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1 + (ceil ? stride - 1 : 0);
    QK_CHECK(room >= 0, where, ": x: got a padded side of ", size + 2 * padding,
             "; accepted: at least the dilated kernel's, ", dilation * (kernel - 1) + 1);
    const int64_t out = room / stride + 1;
    return ceil && (out - 1) * stride >= size + padding ? out - 1 : out;
  }
  // The pixels of the image that lie under window `at`: how many, and the first.
  std::pair<int64_t, int64_t> under(int64_t at, int64_t size) const {
    const int64_t begin = at * stride - padding;
    const int64_t skipped = begin < 0 ? (-begin + dilation - 1) / dilation : 0, first = begin + skipped * dilation;
    const int64_t inside = first < size ? (size - first + dilation - 1) / dilation : 0;
    return {std::clamp<int64_t>(kernel - skipped, 0, inside), first};
  }
};

struct Pooled3 {
  Pooled d, h, w;

  explicit Pooled3(Line& line, bool dilated) {
    const Size3 kernel = line.sizes("kernel", 1), stride = line.sizes("stride", 1);
    const Size3 padding = line.sizes("padding", 0, 0);
    const Size3 dilation = dilated ? line.sizes("dilation", 1, 1) : Size3{1, 1, 1};
    d = {kernel.d, stride.d, padding.d, dilation.d};
    h = {kernel.h, stride.h, padding.h, dilation.h};
    w = {kernel.w, stride.w, padding.w, dilation.w};
    for (const Pooled* side : {&d, &h, &w})
      if (2 * side->padding > side->dilation * (side->kernel - 1) + 1)
        line.refuse("padding: got ", side->padding, "; accepted: at most half of the dilated kernel's ",
                    side->dilation * (side->kernel - 1) + 1);
  }
  Size3 out_size(const std::string& where, Size3 size, bool ceil) const {
    return {d.out_size(where, size.d, ceil), h.out_size(where, size.h, ceil), w.out_size(where, size.w, ceil)};
  }
};

struct MaxPool final : Step {
  int x, out;
  Pooled3 pooled;
  bool ceil;

  explicit MaxPool(Line& line)
      : x(line.read("x")), out(line.make_like("out", x)), pooled(line, true), ceil(line.flag("ceil")) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    shape.size = pooled.out_size(where, shape.size, ceil);
    shapes.set(out, shape);
  }

  void run(const Frame& frame) const override {
    const Shape &in = frame.shape(x), &to = frame.shape(out);
    const Bytes from = bytes_of(frame, x), y = bytes_of(frame, out);
    const bool codes = from.element == 1;
    const uint8_t lowest = codes ? static_cast<uint8_t>(frame.quantizer(x).low + 128) : 0;
    const int64_t taps = pooled.d.kernel * pooled.h.kernel * pooled.w.kernel;
    for_each_row(frame, to.size, to.size.w * to.channels * taps * from.element / 16,
                 [&](int64_t n, int64_t d, int64_t h) {
                   const auto [count_d, first_d] = pooled.d.under(d, in.size.d);
                   const auto [count_h, first_h] = pooled.h.under(h, in.size.h);
                   for (int64_t w = 0; w < to.size.w; ++w) {
                     const auto [count_w, first_w] = pooled.w.under(w, in.size.w);
                     const Window window = {count_d,
                                            count_h,
                                            count_w,
                                            pooled.d.dilation * from.stride_d / from.element,
                                            pooled.h.dilation * from.stride_h / from.element,
                                            pooled.w.dilation * from.stride_w / from.element};
                     const uint8_t* corner = from.at(n, first_d, first_h, first_w);
                     uint8_t* pixel = y.at(n, d, h, w);
                     if (codes)
                       frame.kernels().max_codes(corner, window, in.channels, lowest, pixel);
                     else
                       frame.kernels().max_floats(reinterpret_cast<const float*>(corner), window, in.channels,
                                                  reinterpret_cast<float*>(pixel));
                   }
                 });
  }
};

// One dim of an averaging window: its pixels inside the image, and what the sum is divided by.
struct Side {
  int64_t first, count, divisor;
};

// Averages of floats, or of the values of codes. `side(dim, at)` gives a window's sides.
template <typename Sides>
void run_average(const Frame& frame, int x, const Kept& to, const Size3& size, bool by_rows, int64_t divisor,
                 bool one_division, const Sides& side) {
  const Readable from = readable(frame, x);
  const Writable y = writable(frame, to);
  const int64_t channels = frame.shape(x).channels;
  // A pool of the whole image has few windows: its channels are divided among threads.
  constexpr int64_t kBlock = 64;
  const int64_t blocks = size.d * size.h * size.w == 1 ? (channels + kBlock - 1) / kBlock : 1;
  const Size3& in = frame.shape(x).size;
  const int64_t work =
      size.w * channels / blocks * std::max<int64_t>(1, in.d * in.h * in.w / (size.d * size.h * size.w));
  frame.parallel(frame.images * size.d * size.h * blocks, work, [&](int64_t begin, int64_t end) {
    std::vector<float> kept(y.floats.data ? 0 : static_cast<size_t>(channels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, h = i / blocks % size.h, d = i / blocks / size.h % size.d;
      const int64_t n = i / blocks / size.h / size.d;
      const int64_t c = blocks == 1 ? 0 : block * kBlock,
                    count = blocks == 1 ? channels : std::min(kBlock, channels - c);
      const Side side_d = side(0, d), side_h = side(1, h);
      for (int64_t w = 0; w < size.w; ++w) {
        const Side side_w = side(2, w);
        const Window window = {side_d.count, side_h.count, side_w.count, from.stride_d, from.stride_h, from.stride_w};
        float divisors[3] = {static_cast<float>(side_d.divisor), static_cast<float>(side_h.divisor),
                             static_cast<float>(side_w.divisor)};
        if (divisor || one_division) {
          divisors[0] = static_cast<float>(divisor ? divisor : side_d.divisor * side_h.divisor * side_w.divisor);
          divisors[1] = divisors[2] = 1;
        }
        Operand corner = from.at(n, side_d.first, side_h.first, side_w.first);
        if (corner.floats)
          corner.floats += c;
        else
          corner.codes += c;
        float* floats = y.floats.data ? y.floats_at(n, d, h, w) + c : kept.data();
        frame.kernels().average(corner, window, by_rows, count, divisors, floats);
        if (y.codes.data) frame.kernels().quantize(floats, count, y.quantizer, y.codes_at(n, d, h, w) + c);
      }
    }
  });
}

struct AvgPool final : Step {
  int x;
  Kept to;
  Pooled3 pooled;
  bool ceil, include_pad;
  int64_t divisor;  // 0: the window's

  explicit AvgPool(Line& line)
      : x(line.read("x")),
        to(kept(line)),
        pooled(line, false),
        ceil(line.flag("ceil")),
        include_pad(line.flag("include_pad")),
        divisor(line.integer("divisor", 1, int64_t{1} << 24, 0)) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    shape.size = pooled.out_size(where, shape.size, ceil);
    shapes.set(to, shape);
  }

  void run(const Frame& frame) const override {
    const Size3 in = frame.shape(x).size;
    const Size3 out = frame.shape(to.floats >= 0 ? to.floats : to.codes).size;
    const int64_t sizes[3] = {in.d, in.h, in.w};
    const Pooled* const sides[3] = {&pooled.d, &pooled.h, &pooled.w};
    run_average(frame, x, to, out, false, divisor, true, [&](int dim, int64_t at) {
      const Pooled& p = *sides[dim];
      const int64_t begin = at * p.stride - p.padding, end = std::min(begin + p.kernel, sizes[dim] + p.padding);
      const auto [count, first] = p.under(at, sizes[dim]);
      return Side{first, count, include_pad ? end - begin : count};
    });
  }
};

// Windows that cut the image into `size` parts, by torch's rule.
struct AdaptiveAvgPool final : Step {
  int x;
  Kept to;
  Size3 size;

  explicit AdaptiveAvgPool(Line& line) : x(line.read("x")), to(kept(line)), size(line.sizes("size", 1)) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    QK_CHECK(shape.pixels() > 0, where, ": x: got ", text(shape), "; accepted: at least one pixel");
    shape.size = size;
    shapes.set(to, shape);
  }

  void run(const Frame& frame) const override {
    const Size3 in = frame.shape(x).size;
    const int64_t ins[3] = {in.d, in.h, in.w}, outs[3] = {size.d, size.h, size.w};
    const bool whole = size.d * size.h * size.w == 1;
    run_average(frame, x, to, size, whole, 0, whole, [&](int dim, int64_t at) {
      const int64_t first = at * ins[dim] / outs[dim];
      const int64_t end = ((at + 1) * ins[dim] + outs[dim] - 1) / outs[dim];
      return Side{first, end - first, end - first};
    });
  }
};

// The mean of all pixels.
struct Mean final : Step {
  int x;
  Kept to;
  bool keep;

  explicit Mean(Line& line) : x(line.read("x")), to(kept(line)), keep(line.flag("keep")) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    if (!keep) shape.rank = 0;
    shape.size = {1, 1, 1};
    shapes.set(to, shape);
  }

  void run(const Frame& frame) const override {
    const Size3 in = frame.shape(x).size;
    const int64_t ins[3] = {in.d, in.h, in.w};
    run_average(frame, x, to, {1, 1, 1}, true, 0, true, [&](int dim, int64_t) { return Side{0, ins[dim], ins[dim]}; });
  }
};

}  // namespace

std::unique_ptr<Step> make_max_pool(Line& line) { return std::make_unique<MaxPool>(line); }
std::unique_ptr<Step> make_avg_pool(Line& line) { return std::make_unique<AvgPool>(line); }
std::unique_ptr<Step> make_adaptive_avg_pool(Line& line) { return std::make_unique<AdaptiveAvgPool>(line); }
std::unique_ptr<Step> make_mean(Line& line) { return std::make_unique<Mean>(line); }

}  // namespace qkernels
