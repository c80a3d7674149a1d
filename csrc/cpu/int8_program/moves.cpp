// Steps that move elements, floats or codes, unchanged.
#include "cpu/int8_program/new_size.h"
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

void copy(const uint8_t* from, int64_t bytes, uint8_t* to) { std::memcpy(to, from, static_cast<size_t>(bytes)); }

struct Cat final : Step {
  std::vector<int> xs;
  int out;

  explicit Cat(Line& line) : xs(line.read_list("xs")), out(line.make_like("out", xs[0])) {
    const std::vector<ValueInfo>& values = line.plan().values;
    for (int x : xs)
      if (values[static_cast<size_t>(x)].quantizer != values[static_cast<size_t>(xs[0])].quantizer)
        line.refuse("xs: got '", line.text("xs"), "'; accepted: all floats, or all codes of one quantizer");
  }

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(xs[0]);
    shape.channels = 0;
    for (int x : xs) {
      const Shape& part = shapes.of(x);
      QK_CHECK(part.size == shape.size && part.rank == shape.rank, where, ": xs: got ", text(shapes.of(xs[0])), " and ",
               text(part), "; accepted: shapes that differ in channels alone");
      shape.channels += part.channels;
    }
    shapes.set(out, shape);
  }

  // What makes the parts writes them to their channels of the whole, where they lie nowhere else.
  void place(Places& places) const override {
    bool all = true;
    int64_t first = 0;
    for (int x : xs) {
      all = places.join(x, out, first) && all;
      first += places.shape(x).channels;
    }
    if (all) places.done();
  }

  void run(const Frame& frame) const override {
    const Bytes to = bytes_of(frame, out);
    const Shape& shape = frame.shape(out);
    int64_t first = 0;
    for (int x : xs) {
      const Bytes from = bytes_of(frame, x);
      const int64_t bytes = frame.shape(x).channels * from.element;
      uint8_t* begin = to.data + first;
      first += bytes;
      if (from.data == begin) continue;
      for_each_row(frame, shape.size, shape.size.w * bytes, [&](int64_t n, int64_t d, int64_t h) {
        const uint8_t* row = from.at(n, d, h);
        uint8_t* out_row = begin + (to.at(n, d, h) - to.data);
        for (int64_t w = 0; w < shape.size.w; ++w) copy(row + w * from.stride_w, bytes, out_row + w * to.stride_w);
      });
    }
  }
};

// Always a view.
struct Slice final : Step {
  int x, out;
  int64_t begin, end;

  explicit Slice(Line& line)
      : x(line.read("x")),
        out(line.make_like("out", x)),
        begin(line.integer("begin", 0, int64_t{1} << 31)),
        end(line.integer("end", begin + 1, int64_t{1} << 31)) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    QK_CHECK(end <= shape.channels, where, ": end: got ", end, "; accepted: at most x's channels, ", shape.channels);
    shape.channels = end - begin;
    shapes.set(out, shape);
  }
  void place(Places& places) const override { places.view(out, x, begin); }
  void run(const Frame&) const override {}
};

struct Shuffle final : Step {
  int x, out;
  int64_t groups;

  explicit Shuffle(Line& line)
      : x(line.read("x")), out(line.make_like("out", x)), groups(line.integer("groups", 1, int64_t{1} << 31)) {}

  void infer(Shapes& shapes) const override {
    const Shape& shape = shapes.of(x);
    QK_CHECK(shape.channels % groups == 0, where, ": groups: got ", groups, "; accepted: a divisor of x's channels, ",
             shape.channels);
    shapes.set(out, shape);
  }

  void run(const Frame& frame) const override {
    const Bytes from = bytes_of(frame, x), to = bytes_of(frame, out);
    const Shape& shape = frame.shape(x);
    for_each_row(frame, shape.size, shape.size.w * shape.channels, [&](int64_t n, int64_t d, int64_t h) {
      for (int64_t w = 0; w < shape.size.w; ++w)
        frame.kernels().shuffle(from.at(n, d, h, w), from.element, groups, shape.channels, to.at(n, d, h, w));
    });
  }
};

// Each pixel's channels become factor x factor pixels, in torch's order; or the reverse.
struct PixelShuffle final : Step {
  int x, out;
  bool back;
  int64_t factor;

  PixelShuffle(Line& line, bool back_)
      : x(line.read("x")), out(line.make_like("out", x)), back(back_), factor(line.integer("factor", 1, 1 << 15)) {}

  void infer(Shapes& shapes) const override {
    Shape shape = shapes.of(x);
    const int64_t square = factor * factor;
    const bool divides = back ? shape.size.h % factor == 0 && shape.size.w % factor == 0 : shape.channels % square == 0;
    QK_CHECK(shape.rank == 2 && divides, where, ": x: got ", text(shape), "; accepted: an image ",
             back ? "whose sides factor divides" : "whose channels the square of factor divides", ", ", factor);
    shape.channels = back ? shape.channels * square : shape.channels / square;
    shape.size.h = back ? shape.size.h / factor : shape.size.h * factor;
    shape.size.w = back ? shape.size.w / factor : shape.size.w * factor;
    shapes.set(out, shape);
  }

  void run(const Frame& frame) const override {
    const Bytes from = bytes_of(frame, x), to = bytes_of(frame, out);
    const Shape& coarse = frame.shape(back ? out : x);
    const int64_t square = factor * factor, each = coarse.channels / square, bytes = each * from.element;
    if (each == 0) return;
    for_each_row(frame, coarse.size, coarse.size.w * coarse.channels, [&](int64_t n, int64_t d, int64_t h) {
      std::vector<uint8_t> parts(static_cast<size_t>(square * bytes));  // of one coarse pixel: its fine ones in turn
      for (int64_t w = 0; w < coarse.size.w; ++w) {
        if (!back) frame.kernels().shuffle(from.at(n, d, h, w), from.element, each, coarse.channels, parts.data());
        uint8_t* part = parts.data();
        for (int64_t i = 0; i < factor; ++i)
          for (int64_t j = 0; j < factor; ++j, part += bytes) {
            if (back)
              copy(from.at(n, d, h * factor + i, w * factor + j), bytes, part);
            else
              copy(part, bytes, to.at(n, d, h * factor + i, w * factor + j));
          }
        if (back) frame.kernels().shuffle(parts.data(), from.element, square, coarse.channels, to.at(n, d, h, w));
      }
    });
  }
};

// The nearest pixel, by torch's rule.
int64_t nearest(int64_t at, int64_t in, int64_t out) {
  const float ratio = static_cast<float>(in) / static_cast<float>(out);
  return in == out ? at : std::min(static_cast<int64_t>(static_cast<float>(at) * ratio), in - 1);
}

struct Upsample final : Step {
  int x, out;
  NewSize size;

  explicit Upsample(Line& line) : x(line.read("x")), out(line.make_like("out", x)), size(line) {}

  void infer(Shapes& shapes) const override { shapes.set(out, size.of(shapes, x, where)); }

  void run(const Frame& frame) const override {
    const Bytes from = bytes_of(frame, x), to = bytes_of(frame, out);
    const Shape& shape = frame.shape(out);
    const Size3 in = frame.shape(x).size, pixels = shape.size;
    const int64_t bytes = shape.channels * from.element;
    for_each_row(frame, pixels, pixels.w * bytes, [&](int64_t n, int64_t d, int64_t h) {
      const uint8_t* row = from.at(n, nearest(d, in.d, pixels.d), nearest(h, in.h, pixels.h));
      uint8_t* pixel = to.at(n, d, h);
      for (int64_t w = 0; w < pixels.w; ++w, pixel += to.stride_w)
        copy(row + nearest(w, in.w, pixels.w) * from.stride_w, bytes, pixel);
    });
  }
};

// All elements as channels, in torch's order: each channel's pixels one after the other.
struct Flatten final : Step {
  int x, out;

  explicit Flatten(Line& line) : x(line.read("x")), out(line.make_like("out", x)) {}

  void infer(Shapes& shapes) const override {
    const Shape& shape = shapes.of(x);
    shapes.set(out, {0, shape.channels * shape.pixels(), {1, 1, 1}});
  }

  void place(Places& places) const override {
    if (places.shape(x).pixels() == 1) places.view(out, x, 0);
  }

  void run(const Frame& frame) const override {
    const Readable from = readable(frame, x);
    const Bytes to = bytes_of(frame, out);
    const Shape& shape = frame.shape(x);
    const int64_t pixels = shape.pixels();
    for_each_row(frame, shape.size, shape.size.w * shape.channels, [&](int64_t n, int64_t d, int64_t h) {
      const int64_t first = (d * shape.size.h + h) * shape.size.w;
      uint8_t* row = to.at(n, 0, 0) + first * to.element;
      const Operand pixel = from.at(n, d, h);
      if (to.element == 1)
        frame.kernels().bytes_to_planes(pixel.codes, from.stride_w, shape.channels, shape.size.w, row, pixels);
      else
        frame.kernels().to_planes(pixel, from.stride_w, shape.channels, shape.size.w, reinterpret_cast<float*>(row),
                                  pixels);
    });
  }
};

}  // namespace

std::unique_ptr<Step> make_cat(Line& line) { return std::make_unique<Cat>(line); }
std::unique_ptr<Step> make_slice(Line& line) { return std::make_unique<Slice>(line); }
std::unique_ptr<Step> make_shuffle(Line& line) { return std::make_unique<Shuffle>(line); }
std::unique_ptr<Step> make_pixel_shuffle(Line& line) { return std::make_unique<PixelShuffle>(line, false); }
std::unique_ptr<Step> make_pixel_unshuffle(Line& line) { return std::make_unique<PixelShuffle>(line, true); }
std::unique_ptr<Step> make_upsample(Line& line) { return std::make_unique<Upsample>(line); }
std::unique_ptr<Step> make_flatten(Line& line) { return std::make_unique<Flatten>(line); }

}  // namespace qkernels
