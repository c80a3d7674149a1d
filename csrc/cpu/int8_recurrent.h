// What the steps of recurrent layers ask of each instruction-set path.
#pragma once

#include <cstdint>

#include "cpu/common/isa.h"

namespace qkernels {

enum class Recurrence : int { lstm, gru, tanh, relu };

inline int gates_of(Recurrence mode) { return mode == Recurrence::lstm ? 4 : mode == Recurrence::gru ? 3 : 1; }

// How a step reads c: (clamp(round(c * inverse) + zero_point, low, high) - zero_point) * scale.
struct CellQparams {
  bool quantizes;
  float inverse, scale, zero_point, low, high;
};

// Neighbouring hidden units of some rows at one step. Each pointer is to the first unit of the first row, that of gates
// to the first gate; the other gates lie `…_gate` floats apart.
struct Units {
  const float *input, *hidden;  // gates of the input, and of the state
  int64_t input_row, input_gate, hidden_row, hidden_gate;
  const float* h;  // of the step before
  float* c;        // becomes the new one
  float* out;      // the new h
  int64_t state_row;
};

// Where h has no quantizer, its product is one of integers too: 24 bits of each element, relative to the largest of its
// row, as three rows of codes, one for each byte. That is as exact as a sum in fp32, and weights are read once for the
// three. The largest integer whose bytes are all codes:
constexpr float kLargestParts = 127 * 65536 + 127 * 256 + 127;

struct RecurrentKernels {
  // The new states of `units` units of `rows` rows.
  void (*advance)(Recurrence mode, const Units& u, int64_t rows, int64_t units, const CellQparams& cell);
  // A row of floats as integers times a power of two, the unit, which is returned: NaN where h holds a NaN or an
  // infinity. The integers' bytes become three rows of codes, the most significant one first, XORed with `flip`.
  float (*split_row)(const float* h, int64_t k, uint8_t flip, uint8_t* rows, int64_t stride);
  // The sum of each three rows of parts [3 * rows, kPanel], plus bias, which may be null.
  void (*add_parts)(const float* parts, int64_t rows, int64_t channels, const float* bias, float* out, int64_t out_row);
};

const RecurrentKernels& recurrent_kernels();

}  // namespace qkernels
