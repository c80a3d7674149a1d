// Philox-4x32-10 (Salmon et al., SC 2011): four random words from a counter of four words and a key of two.
#pragma once

#include <cstdint>
#include <optional>

#include "tensor.h"

namespace qkernels {

struct Philox {
  static constexpr int kRounds = 10;
  static constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

  uint64_t key[kRounds][2];  // for each round; each word takes 64 bits, as the vector paths need it
  uint64_t offset[2];        // the upper half of the counter; the lower half is the number of a block of four elements

  Philox(uint64_t seed, uint64_t number) : offset{number & 0xffffffff, number >> 32} {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto& round : key) {
      round[0] = k0;
      round[1] = k1;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

// The Philox for the arguments of an op that rounds stochastically.
inline Philox generator(int64_t seed, int64_t offset, const std::optional<Tensor>& offset_tensor) {
  uint64_t number = static_cast<uint64_t>(offset);
  if (offset_tensor) {
    QK_CHECK(offset_tensor->scalar_type() == ScalarType::Long && offset_tensor->numel() == 1, "offset: got ",
             dtype_name(offset_tensor->scalar_type()), " of shape ", shape_of(*offset_tensor),
             "; accepted: an int, or one torch.int64 element on x's device");
    QK_CHECK(offset_tensor->is_cpu(), "offset: got a tensor on another device; accepted: x's device, cpu");
    number += static_cast<uint64_t>(*static_cast<const int64_t*>(offset_tensor->const_data_ptr()));
  }
  return Philox(static_cast<uint64_t>(seed), number);
}

}  // namespace qkernels
