// Philox-4x32-10 (Salmon et al., SC 2011): four random words from a counter of four words and a key of two.
#pragma once

#include <cstdint>

namespace qkernels {

struct Philox {
  static constexpr int kRounds = 10;
  static constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;

  uint64_t key[kRounds][2];  // of each round; words in 64 bits, as the vector paths multiply them
  uint64_t offset[2];        // the upper half of the counter; the lower one numbers blocks of four elements

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

}  // namespace qkernels
