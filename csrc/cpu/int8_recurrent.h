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

struct RecurrentKernels {
  // The new states of `units` units of `rows` rows.
  void (*advance)(Recurrence mode, const Units& u, int64_t rows, int64_t units, const CellQparams& cell);
  // out[row][channel] = h[row] . codes[channel] * scale[channel] + bias[channel], summed in fp32; rows of h and codes
  // have k elements. bias may be null.
  void (*multiply_float)(const float* h, int64_t rows, int64_t k, const int8_t* codes, int64_t channels,
                         const float* scale, const float* bias, float* out, int64_t out_row);
};

const RecurrentKernels& recurrent_kernels();

}  // namespace qkernels
