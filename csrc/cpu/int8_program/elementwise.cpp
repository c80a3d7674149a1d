// Steps that compute each element from those at the same place.
#include "cpu/int8_program/steps.h"
#include "cpu/int8_program/views.h"

namespace qkernels {
namespace {

// Computes p, whose operands and results this sets, for all elements. b may be null, or one pixel for the whole image.
void run_pointwise(const Frame& frame, Pointwise p, int a, int b, const Kept& to) {
  const Shape& shape = frame.shape(a);
  const Readable x = readable(frame, a);
  Readable other{};
  if (b >= 0) {
    other = readable(frame, b);
    if (frame.shape(b).pixels() == 1) other.stride_d = other.stride_h = other.stride_w = 0;
  }
  const Writable y = writable(frame, to);
  p.quantizer = y.quantizer;
  const int64_t channels = shape.channels, width = shape.size.w;
  const bool runs = x.stride_w == channels && y.dense_rows(channels) && (b < 0 || other.stride_w == channels) &&
                    p.kind != Combination::affine;
  const int64_t run = runs ? width : 1;
  for_each_row(frame, shape.size, width * channels, [&](int64_t n, int64_t d, int64_t h) {
    Pointwise row = p;
    for (int64_t w = 0; w < width; w += run) {
      row.a = x.at(n, d, h, w);
      if (b >= 0) row.b = other.at(n, d, h, w);
      row.floats = y.floats_at(n, d, h, w);
      row.codes = y.codes_at(n, d, h, w);
      frame.kernels().pointwise(row, run * channels);
    }
  });
}

// dequantize, requantize and activate: they differ in what they want.
struct Activate final : Step {
  int x;
  Kept to;
  ActivationStep first;

  Activate(int value, Kept kept, ActivationStep activation) : x(value), to(kept), first(activation) {}

  void infer(Shapes& shapes) const override { shapes.set(to, shapes.of(x)); }

  void run(const Frame& frame) const override {
    Pointwise p{};
    p.first = first;
    run_pointwise(frame, p, x, -1, to);
  }
};

struct Binary final : Step {
  int a, b;
  Combination kind;
  ActivationStep first;
  Kept to;

  explicit Binary(Line& line) : a(line.read("a")), b(line.read("b")), first(line.activation("first")), to(kept(line)) {
    const std::string name = line.text("kind");
    kind = name == "add"   ? Combination::add
           : name == "sub" ? Combination::sub
           : name == "mul" ? Combination::mul
                           : Combination::none;
    if (kind == Combination::none) line.refuse("kind: got '", name, "'; accepted: add, sub, mul");
  }

  void infer(Shapes& shapes) const override {
    const Shape &one = shapes.of(a), &other = shapes.of(b);
    QK_CHECK(one.channels == other.channels && (one.size == other.size || one.pixels() == 1 || other.pixels() == 1),
             where, ": a, b: got ", text(one), " and ", text(other), "; accepted: one shape, or one pixel for all");
    Shape shape = one.pixels() == 1 ? other : one;
    shape.rank = std::max(one.rank, other.rank);
    shapes.set(to, shape);
  }

  void run(const Frame& frame) const override {
    Pointwise p{};
    p.kind = kind;
    p.first = first;
    const bool swapped = frame.shape(a).pixels() == 1 && frame.shape(b).pixels() != 1;
    if (swapped && kind == Combination::sub) p.kind = Combination::subtracted;
    run_pointwise(frame, p, swapped ? b : a, swapped ? a : b, to);
  }
};

struct BatchNorm final : Step {
  int x, mean, var, weight, bias;
  float eps;
  ActivationStep first;
  Kept to;

  explicit BatchNorm(Line& line)
      : x(line.read("x")),
        mean(line.constant("mean", ConstantKind::floats, -1, true, x)),
        var(line.constant("var", ConstantKind::floats, -1, true, x)),
        weight(line.constant_if("weight", ConstantKind::floats, -1, true, x)),
        bias(line.constant_if("bias", ConstantKind::floats, -1, true, x)),
        eps(line.number("eps")),
        first(line.activation("first")),
        to(kept(line)) {}

  void infer(Shapes& shapes) const override { shapes.set(to, shapes.of(x)); }

  void run(const Frame& frame) const override {
    const Call& call = frame.call;
    const size_t channels = static_cast<size_t>(frame.shape(x).channels);
    std::vector<float> alpha(channels), shift(channels);
    for (size_t c = 0; c < channels; ++c) {
      alpha[c] = 1 / std::sqrt(call.floats(var)[c] + eps);
      if (weight >= 0) alpha[c] *= call.floats(weight)[c];
      const float moved = call.floats(mean)[c] * alpha[c];
      shift[c] = bias >= 0 ? call.floats(bias)[c] - moved : -moved;
    }
    Pointwise p{};
    p.kind = Combination::affine;
    p.first = first;
    p.b.floats = alpha.data();
    p.shift = shift.data();
    run_pointwise(frame, p, x, -1, to);
  }
};

}  // namespace

std::unique_ptr<Step> make_activate(Line& line) {
  const int x = line.read("x");
  const ActivationStep first = line.activation("first");
  return std::make_unique<Activate>(x, kept(line), first);
}
std::unique_ptr<Step> make_dequantize(Line& line) {
  const int x = line.read_codes("x");
  return std::make_unique<Activate>(x, Kept{line.make_floats("out"), -1}, ActivationStep{});
}
std::unique_ptr<Step> make_requantize(Line& line) {
  const int x = line.read_codes("x");
  return std::make_unique<Activate>(x, kept(line), ActivationStep{});
}
std::unique_ptr<Step> make_binary(Line& line) { return std::make_unique<Binary>(line); }
std::unique_ptr<Step> make_batch_norm(Line& line) { return std::make_unique<BatchNorm>(line); }

}  // namespace qkernels
