// The size of a result with other pixels than x's: x's times `scale`, or `size`, or that of another value.
#pragma once

#include "cpu/int8_program/layout.h"

namespace qkernels {

struct NewSize {
  Size3 scale, size;
  int like;

  explicit NewSize(Line& line)
      : scale(line.sizes("scale", 1, 0)), size(line.sizes("size", 1, 0)), like(line.read_if("like")) {
    if ((scale.d > 0) + (size.d > 0) + (like >= 0) != 1)
      line.refuse("got none or several of scale, size and like; accepted: one of them");
  }

  Shape of(const Shapes& shapes, int x, const std::string& where) const {
    Shape shape = shapes.of(x);
    const Size3 from = shape.size;
    if (like >= 0) {
      const Shape& other = shapes.of(like);
      QK_CHECK(other.rank == shape.rank, where, ": like: got ", text(other), "; accepted: as many dims as x, ",
               text(shape));
      shape.size = other.size;
    } else if (size.d > 0) {
      shape.size = size;
    } else {
      shape.size = {shape.size.d * scale.d, shape.size.h * scale.h, shape.size.w * scale.w};
    }
    QK_CHECK((from.d && from.h && from.w) || shape.pixels() == 0, where, ": x: got ", text(shapes.of(x)),
             "; accepted: at least one pixel, for an output that has some");
    return shape;
  }
};

}  // namespace qkernels
