// What steps run on: some images of one call, on memory of their own.
#pragma once

#include <atomic>

#include "cpu/common/int8_ops.h"
#include "cpu/common/team.h"
#include "cpu/int8_program/kernels.h"
#include "cpu/int8_program/layout.h"

namespace qkernels {

struct TensorPlace {
  float* data;
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;
};

// What holds for a whole call.
struct Call {
  const Plan& plan;
  const Layout& layout;
  const ProgramKernels& kernels;
  std::vector<const void*> constants;
  std::vector<Quantizer> quantizers;
  std::vector<TensorPlace> inputs, outputs;
  std::atomic<bool>* nan;  // for each image: an input holds a NaN

  const float* floats(int constant) const {
    return constant < 0 ? nullptr : static_cast<const float*>(constants[static_cast<size_t>(constant)]);
  }
};

struct FloatImage {
  float* data;
  int64_t batch, channels;
  Size3 size;
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;  // floats
};

struct Frame {
  const Call& call;
  uint8_t* arena;
  int64_t first, images;
  Team& team;

  const ProgramKernels& kernels() const { return call.kernels; }
  const Shape& shape(int value) const { return call.layout.shapes[static_cast<size_t>(value)]; }
  bool is_codes(int value) const { return call.plan.values[static_cast<size_t>(value)].codes(); }
  const Quantizer& quantizer(int value) const {
    return call.quantizers[static_cast<size_t>(call.plan.values[static_cast<size_t>(value)].quantizer)];
  }

  CodeImage codes(int value) const {
    const Shape& s = shape(value);
    const Place& p = call.layout.places[static_cast<size_t>(value)];
    return {arena + p.buffer * images + p.inside + p.first,
            images,
            s.channels,
            s.size,
            p.stride_n,
            p.stride_d,
            p.stride_h,
            p.stride_w};
  }

  FloatImage floats(int value) const {
    const Shape& s = shape(value);
    const Place& p = call.layout.places[static_cast<size_t>(value)];
    if (p.memory == Place::Memory::input) {
      const TensorPlace& t = call.inputs[static_cast<size_t>(p.index)];
      return {t.data + first * t.stride_n + p.first * t.stride_c,
              images,
              s.channels,
              s.size,
              t.stride_n,
              t.stride_c,
              t.stride_d,
              t.stride_h,
              t.stride_w};
    }
    float* data = p.memory == Place::Memory::output
                      ? call.outputs[static_cast<size_t>(p.index)].data + first * p.stride_n
                      : reinterpret_cast<float*>(arena + p.buffer * images + p.inside);
    return {data + p.first, images, s.channels, s.size, p.stride_n, p.stride_c, p.stride_d, p.stride_h, p.stride_w};
  }

  // Calls f(begin, end) for parts of `count` tasks, each of which handles about `elements` elements; for no task not at
  // all, so that f can divide by the sizes of the image.
  template <typename F>
  void parallel(int64_t count, int64_t elements, const F& f) const {
    team.parallel_for(count, grain(kPointwiseGrain, elements), f);
  }
};

}  // namespace qkernels
