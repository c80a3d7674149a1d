// Low-bit codes to dense bytes and back, by words of the fewest codes that fill whole bytes. The compiler turns the
// loops for 2 and 4 bits into vectors of the path.
#include "cpu/common/path.h"

namespace qkernels::QK_NAMESPACE {

// kCodes codes, one to a byte of a Word, fill kBytes bytes.
template <int kBits>
struct Packing {
  using Word = std::conditional_t<kBits == 2, uint32_t, std::conditional_t<kBits == 3, uint64_t, uint16_t>>;
  static constexpr int64_t kCodes = sizeof(Word), kBytes = kCodes * kBits / 8;
  static constexpr Word kEvery8 = static_cast<Word>(0x0101010101010101), kEvery16 = static_cast<Word>(0x1000100010001),
                        kEvery32 = static_cast<Word>(0x100000001);

  // First two codes come together, then four, then all.
  static Word compressed(Word word) {
    word = static_cast<Word>(word & kEvery8 * ((1u << kBits) - 1));
    word = static_cast<Word>((word | word >> (8 - kBits)) & kEvery16 * ((1u << 2 * kBits) - 1));
    if constexpr (kCodes > 2) word = (word | word >> (16 - 2 * kBits)) & kEvery32 * ((1u << 4 * kBits) - 1);
    if constexpr (kCodes > 4) word = word | word >> (32 - 4 * kBits);
    return word;
  }

  static Word spread(Word word) {
    if constexpr (kCodes > 4) word = (word | word << (32 - 4 * kBits)) & kEvery32 * ((1u << 4 * kBits) - 1);
    if constexpr (kCodes > 2) word = (word | word << (16 - 2 * kBits)) & kEvery16 * ((1u << 2 * kBits) - 1);
    word = static_cast<Word>((word | word << (8 - kBits)) & kEvery8 * ((1u << kBits) - 1));
    // Less the sign bit in each byte; the top bit keeps a byte from borrowing from the next.
    constexpr Word kSign = static_cast<Word>(kEvery8 << (kBits - 1)), kTop = static_cast<Word>(kEvery8 << 7);
    return static_cast<Word>((((word ^ kSign) | kTop) - kSign) ^ kTop);
  }

  static void pack(const int8_t* q, int64_t k, uint8_t* packed) {
    const int64_t whole = k / kCodes;
    for (int64_t i = 0; i < whole; ++i) {
      Word word;
      std::memcpy(&word, q + kCodes * i, kCodes);
      word = compressed(word);
      packed[kBytes * i] = static_cast<uint8_t>(word);
      for (int64_t j = 1; j < kBytes; ++j) packed[kBytes * i + j] = static_cast<uint8_t>(word >> 8 * j);
    }
    if (k % kCodes == 0) return;
    Word word = 0;
    std::memcpy(&word, q + kCodes * whole, static_cast<size_t>(k % kCodes));
    word = compressed(word);
    std::memcpy(packed + kBytes * whole, &word, static_cast<size_t>((k % kCodes * kBits + 7) / 8));
  }

  static void unpack(const uint8_t* packed, int64_t k, int8_t* q) {
    const int64_t whole = k / kCodes;
    for (int64_t i = 0; i < whole; ++i) {
      Word word = packed[kBytes * i];
      for (int64_t j = 1; j < kBytes; ++j) word |= static_cast<Word>(packed[kBytes * i + j]) << 8 * j;
      word = spread(word);
      std::memcpy(q + kCodes * i, &word, kCodes);
    }
    if (k % kCodes == 0) return;
    Word word = 0;
    std::memcpy(&word, packed + kBytes * whole, static_cast<size_t>((k % kCodes * kBits + 7) / 8));
    word = spread(word);
    std::memcpy(q + kCodes * whole, &word, static_cast<size_t>(k % kCodes));
  }
};

// Sets *found where a code is out of range.
inline void pack_row(const int8_t* q, int64_t k, int bits, uint8_t* packed, bool* found) {
  const uint8_t beyond = static_cast<uint8_t>(~((1 << bits) - 1));
  const int sign = 1 << (bits - 1);
  uint8_t bad = 0;
  for (int64_t i = 0; i < k; ++i) bad |= static_cast<uint8_t>((q[i] + sign) & beyond);
  *found = bad != 0;
  switch (bits) {
    case 2: return Packing<2>::pack(q, k, packed);
    case 3: return Packing<3>::pack(q, k, packed);
    default: return Packing<4>::pack(q, k, packed);
  }
}

inline void unpack_row(const uint8_t* packed, int64_t k, int bits, int8_t* q) {
  switch (bits) {
    case 2: return Packing<2>::unpack(packed, k, q);
    case 3: return Packing<3>::unpack(packed, k, q);
    default: return Packing<4>::unpack(packed, k, q);
  }
}

}  // namespace qkernels::QK_NAMESPACE
