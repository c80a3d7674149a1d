// A frame's values as the kernels of steps take them: row by row.
#pragma once

#include "cpu/int8_program/frame.h"

namespace qkernels {

// A value that is read: floats, or codes with what they mean. Its channels are neighbours.
struct Readable {
  Operand begin;
  int64_t stride_n, stride_d, stride_h, stride_w;

  Operand at(int64_t n, int64_t d, int64_t h, int64_t w = 0) const {
    const int64_t offset = n * stride_n + d * stride_d + h * stride_h + w * stride_w;
    Operand operand = begin;
    if (operand.floats)
      operand.floats += offset;
    else
      operand.codes += offset;
    return operand;
  }
};

inline Readable readable(const Frame& frame, int value) {
  if (frame.is_codes(value)) {
    const CodeImage x = frame.codes(value);
    return {{nullptr, x.data, frame.quantizer(value)}, x.stride_n, x.stride_d, x.stride_h, x.stride_w};
  }
  const FloatImage x = frame.floats(value);
  return {{x.data, nullptr, {}}, x.stride_n, x.stride_d, x.stride_h, x.stride_w};
}

// What a step writes: floats, codes, or both.
struct Writable {
  FloatImage floats;
  CodeImage codes;
  Quantizer quantizer;

  float* floats_at(int64_t n, int64_t d, int64_t h, int64_t w = 0) const {
    if (!floats.data) return nullptr;
    return floats.data + n * floats.stride_n + d * floats.stride_d + h * floats.stride_h + w * floats.stride_w;
  }
  uint8_t* codes_at(int64_t n, int64_t d, int64_t h, int64_t w = 0) const {
    if (!codes.data) return nullptr;
    return codes.data + n * codes.stride_n + d * codes.stride_d + h * codes.stride_h + w * codes.stride_w;
  }
  // Whether a row of pixels is one run of elements.
  bool dense_rows(int64_t channels) const {
    return (!floats.data || floats.stride_w == channels) && (!codes.data || codes.stride_w == channels);
  }
};

inline Writable writable(const Frame& frame, const Kept& kept) {
  Writable result{};
  if (kept.floats >= 0) result.floats = frame.floats(kept.floats);
  if (kept.codes >= 0) {
    result.codes = frame.codes(kept.codes);
    result.quantizer = frame.quantizer(kept.codes);
  }
  return result;
}

// The memory of a value whose elements move unchanged; strides in bytes.
struct Bytes {
  uint8_t* data;
  int64_t element, stride_n, stride_d, stride_h, stride_w;

  uint8_t* at(int64_t n, int64_t d, int64_t h, int64_t w = 0) const {
    return data + n * stride_n + d * stride_d + h * stride_h + w * stride_w;
  }
};

inline Bytes bytes_of(const Frame& frame, int value) {
  if (frame.is_codes(value)) {
    const CodeImage x = frame.codes(value);
    return {x.data, 1, x.stride_n, x.stride_d, x.stride_h, x.stride_w};
  }
  const FloatImage x = frame.floats(value);
  constexpr int64_t kBytes = sizeof(float);
  return {reinterpret_cast<uint8_t*>(x.data),
          kBytes,
          x.stride_n * kBytes,
          x.stride_d * kBytes,
          x.stride_h * kBytes,
          x.stride_w * kBytes};
}

// Calls f(n, d, h) for each row of pixels; `elements` says how much work a row is.
template <typename F>
void for_each_row(const Frame& frame, const Size3& size, int64_t elements, const F& f) {
  frame.parallel(frame.images * size.d * size.h, elements, [&](int64_t begin, int64_t end) {
    int64_t h = begin % size.h, d = begin / size.h % size.d, n = begin / size.h / size.d;
    for (int64_t i = begin; i < end; ++i) {
      f(n, d, h);
      if (++h < size.h) continue;
      h = 0;
      if (++d < size.d) continue;
      d = 0;
      ++n;
    }
  });
}

}  // namespace qkernels
