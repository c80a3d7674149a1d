// Transposed convolutions as ordinary ones, one for each class of outputs.
#include "cpu/int8_conv/transposed.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/int8_conv/convolve.h"

namespace qkernels {
namespace {

// One dimension of a class. Output first_out + t * stride sees, for j < taps, tap first_tap + (taps - 1 - j) * tap_step
// at input t + first_in + j * in_step.
struct Side {
  int64_t taps, first_tap, tap_step;
  int64_t outputs, first_out;
  int64_t first_in, in_step;
};

Side side(int64_t at, int64_t kernel, int64_t stride, int64_t dilation, int64_t padding, int64_t out) {
  // Outputs o with (o + padding) % stride == at see the taps k with k * dilation % stride == at.
  const int64_t common = std::gcd(stride, dilation);
  Side s{};
  s.tap_step = stride / common;
  s.in_step = dilation / common;
  while (s.first_tap < s.tap_step && s.first_tap * dilation % stride != at) ++s.first_tap;
  if (s.first_tap < s.tap_step && s.first_tap < kernel) s.taps = (kernel - s.first_tap - 1) / s.tap_step + 1;
  const int64_t first =
      std::max<int64_t>(0, (padding - at + stride - 1) / stride);  // o = first * stride + at - padding
  s.first_out = first * stride + at - padding;
  s.outputs = out > s.first_out ? (out - s.first_out - 1) / stride + 1 : 0;
  const int64_t last_tap = s.first_tap + (s.taps - 1) * s.tap_step;
  if (s.taps) s.first_in = first + (at - last_tap * dilation) / stride;
  return s;
}

struct Class {
  Side d, h, w;
  ConvGeometry geometry;
};

std::vector<Class> classes_of(const ConvGeometry& g) {
  std::vector<Class> classes;
  for (int64_t i = 0; i < g.stride.d; ++i)
    for (int64_t j = 0; j < g.stride.h; ++j)
      for (int64_t k = 0; k < g.stride.w; ++k) {
        const Side d = side(i, g.kernel.d, g.stride.d, g.dilation.d, g.padding.d, g.out.d);
        const Side h = side(j, g.kernel.h, g.stride.h, g.dilation.h, g.padding.h, g.out.h);
        const Side w = side(k, g.kernel.w, g.stride.w, g.dilation.w, g.padding.w, g.out.w);
        ConvGeometry ordinary = g;
        ordinary.kernel = {d.taps, h.taps, w.taps};
        ordinary.stride = {1, 1, 1};
        ordinary.dilation = {d.in_step, h.in_step, w.in_step};
        ordinary.padding = {-d.first_in, -h.first_in, -w.first_in};
        ordinary.out = {d.outputs, h.outputs, w.outputs};
        classes.push_back({d, h, w, ordinary});
      }
  return classes;
}

// Calls visit(offset in the class's codes [C_out][C_in / groups][taps], offset in all codes) for every weight of a
// class.
template <typename Visit>
void for_each_weight(const ConvGeometry& g, const Class& c, const Visit& visit) {
  const int64_t group_in = g.in_channels / g.groups, group_out = g.out_channels / g.groups;
  int64_t at = 0;
  for (int64_t n = 0; n < g.out_channels; ++n)
    for (int64_t i = 0; i < group_in; ++i) {
      const int64_t row = (n / group_out * group_in + i) * group_out + n % group_out;
      for (int64_t d = c.d.taps - 1; d >= 0; --d)
        for (int64_t h = c.h.taps - 1; h >= 0; --h)
          for (int64_t w = c.w.taps - 1; w >= 0; --w, ++at)
            visit(at, ((row * g.kernel.d + c.d.first_tap + d * c.d.tap_step) * g.kernel.h + c.h.first_tap +
                       h * c.h.tap_step) *
                              g.kernel.w +
                          c.w.first_tap + w * c.w.tap_step);
    }
}

int64_t weights(const Class& c) {
  return c.geometry.out_channels * (c.geometry.in_channels / c.geometry.groups) * c.d.taps * c.h.taps * c.w.taps;
}

}  // namespace

int64_t transposed_classes(const ConvGeometry& g) { return g.stride.d * g.stride.h * g.stride.w; }

int64_t transposed_packed_bytes(const ConvGeometry& g) {
  int64_t bytes = 0;
  for (const Class& c : classes_of(g)) bytes += conv_packed_bytes(c.geometry);
  return bytes;
}

void pack_transposed(const ConvGeometry& g, const int8_t* codes, int8_t* data, int32_t* colsum) {
  for (const Class& c : classes_of(g)) {
    std::vector<int8_t> own(static_cast<size_t>(weights(c)));
    for_each_weight(g, c, [&](int64_t at, int64_t from) { own[static_cast<size_t>(at)] = codes[from]; });
    pack_conv(c.geometry, own.data(), data, colsum);
    data += conv_packed_bytes(c.geometry);
    colsum += g.out_channels;
  }
}

void unpack_transposed(const ConvGeometry& g, const int8_t* data, int8_t* codes) {
  for (const Class& c : classes_of(g)) {
    std::vector<int8_t> own(static_cast<size_t>(weights(c)));
    unpack_conv(c.geometry, data, own.data());
    for_each_weight(g, c, [&](int64_t at, int64_t to) { codes[to] = own[static_cast<size_t>(at)]; });
    data += conv_packed_bytes(c.geometry);
  }
}

Borders transposed_borders(const ConvGeometry& g, Size3 in) {
  Borders borders{};
  const auto widen = [](const Side& s, int64_t size, int64_t& before, int64_t& after) {
    if (!s.taps || !s.outputs) return;
    before = std::max(before, -s.first_in);
    after = std::max(after, s.first_in + (s.taps - 1) * s.in_step + s.outputs - size);
  };
  for (const Class& c : classes_of(g)) {
    widen(c.d, in.d, borders.before.d, borders.after.d);
    widen(c.h, in.h, borders.before.h, borders.after.h);
    widen(c.w, in.w, borders.before.w, borders.after.w);
  }
  return borders;
}

void convolve_transposed(const ConvGeometry& g, const CodeImage& x, const int8_t* data, const ConvOutput& output,
                         Team& team) {
  const int32_t* colsum = output.colsum;
  for (const Class& c : classes_of(g)) {
    ConvOutput o = output;
    o.colsum = colsum;
    const int64_t d = c.d.first_out, h = c.h.first_out, w = c.w.first_out;
    const int64_t residual = d * o.residual_d + h * o.residual_h + w * o.residual_w;
    if (o.floats) o.floats += d * o.floats_d + h * o.floats_h + w * o.floats_w;
    if (o.codes.data) o.codes.data += d * o.codes.stride_d + h * o.codes.stride_h + w * o.codes.stride_w;
    if (o.residual) o.residual += residual;
    if (o.residual_codes) o.residual_codes += residual;
    for (int64_t* stride : {&o.floats_d, &o.codes.stride_d, &o.residual_d}) *stride *= g.stride.d;
    for (int64_t* stride : {&o.floats_h, &o.codes.stride_h, &o.residual_h}) *stride *= g.stride.h;
    for (int64_t* stride : {&o.floats_w, &o.codes.stride_w, &o.residual_w}) *stride *= g.stride.w;
    convolve(c.geometry, x, data, o, team);
    data += conv_packed_bytes(c.geometry);
    colsum += g.out_channels;
  }
}

}  // namespace qkernels
