// What bags of rows of int8 codes ask of each instruction-set path.
#pragma once

#include <cstdint>

#include "cpu/common/isa.h"

namespace qkernels {

// A row of a bag, for the columns that share a scale: their values are (code - zero_point) * scale.
struct BagRow {
  const int8_t* codes;
  float scale, zero_point, weight;
};

// What becomes of the rows: sums of their values; of values without zero points, all weights being 1; or the largest
// values, whatever the weights.
enum class BagOf : int { sums, plain_sums, largest };

struct BagKernels {
  // Adds rows[r].weight * rows[r]'s values to out, in the order of rows, or puts the largest value there. `first`: out
  // holds nothing yet. count is at least 1.
  void (*reduce)(const BagRow* rows, int64_t count, int64_t columns, BagOf of, bool first, float* out);
};

}  // namespace qkernels
