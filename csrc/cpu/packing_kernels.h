// Low-bit codes to dense bytes and back. The compiler turns the loops for 4 bits into vectors of the path.
#include "cpu/common/path.h"

namespace qkernels::QK_NAMESPACE {

// Sets *found where a code is out of range.
inline void pack_row(const int8_t* q, int64_t k, int bits, uint8_t* packed, bool* found) {
  const uint8_t mask = static_cast<uint8_t>((1 << bits) - 1), beyond = static_cast<uint8_t>(~mask);
  const int sign = 1 << (bits - 1);
  uint8_t bad = 0;
  for (int64_t i = 0; i < k; ++i) bad |= static_cast<uint8_t>((q[i] + sign) & beyond);
  int64_t done = 0;
  if (bits == 4) {
    done = k / 2 * 2;
    for (int64_t i = 0; i < k / 2; ++i) {
      uint16_t pair;
      std::memcpy(&pair, q + 2 * i, 2);
      packed[i] = static_cast<uint8_t>((pair & 15) | (pair >> 4 & 0xf0));
    }
  }
  uint32_t stream = 0;
  int filled = 0;
  uint8_t* out = packed + done / 2;
  for (int64_t i = done; i < k; ++i) {
    stream |= static_cast<uint32_t>(q[i] & mask) << filled;
    for (filled += bits; filled >= 8; filled -= 8, stream >>= 8) *out++ = static_cast<uint8_t>(stream);
  }
  if (filled) *out = static_cast<uint8_t>(stream);
  *found = bad != 0;
}

inline void unpack_row(const uint8_t* packed, int64_t k, int bits, int8_t* q) {
  int64_t done = 0;
  if (bits == 4) {
    done = k / 2 * 2;
    for (int64_t i = 0; i < k / 2; ++i) {
      const uint16_t pair = static_cast<uint16_t>((packed[i] & 15) | (packed[i] & 0xf0) << 4) ^ 0x0808;
      const uint16_t codes = static_cast<uint16_t>(((pair | 0x8080) - 0x0808) ^ 0x8080);  // - 8 in each byte
      std::memcpy(q + 2 * i, &codes, 2);
    }
  }
  const int sign = 1 << (bits - 1);
  uint32_t stream = 0;
  int filled = 0;
  const uint8_t* in = packed + done / 2;
  for (int64_t i = done; i < k; ++i) {
    for (; filled < bits; filled += 8) stream |= static_cast<uint32_t>(*in++) << filled;
    q[i] = static_cast<int8_t>(((stream & ((1u << bits) - 1)) ^ static_cast<uint32_t>(sign)) -
                               static_cast<uint32_t>(sign));
    stream >>= bits;
    filled -= bits;
  }
}

}  // namespace qkernels::QK_NAMESPACE
