// What dot_product_attention.cpp and dot_product_attention_kernels.h share.
#pragma once

#include <cstdint>

namespace qkernels {

// [batch, heads, rows, size] whose last dim is dense.
struct HeadRows {
  const float* data;
  int64_t batch_step, head_step, row_step, size;

  const float* at(int64_t n, int64_t head) const { return data + n * batch_step + head * head_step; }
};

// softmax(scale * q @ k.T) @ v for each head; neighbouring heads of q share a head of k and v.
struct Attention {
  int64_t batch, heads, heads_of_keys, rows, keys;
  HeadRows q, k, v;
  float* out;  // [batch, rows, heads, size of v]
  float scale;
  bool causal;  // row i sees the keys 0 to i
};

}  // namespace qkernels
