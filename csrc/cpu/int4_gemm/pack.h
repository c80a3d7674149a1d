// From int4 codes to packed panels, and back.
#include "cpu/common/path.h"
#include "cpu/int4_gemm/int4_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

void pack_panel(const int8_t* q, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, uint8_t* data) {
  const int64_t whole = channels == kPanel && stride_k == 1 ? k / 4 : 0;
  for (int64_t g = 0; g < whole; ++g)
    for (int64_t c = 0; c < 16; ++c) {
      uint32_t low, high;  // 4 codes of a channel, and of the one 16 further
      std::memcpy(&low, q + c * stride_n + g * 4, 4);
      std::memcpy(&high, q + (c + 16) * stride_n + g * 4, 4);
      constexpr uint32_t kOffset = 0x08080808, kBits = 0x0f0f0f0f;  // + 8 flips the highest of 4 bits
      const uint32_t both = ((low & kBits) ^ kOffset) | ((high & kBits) ^ kOffset) << 4;
      std::memcpy(data + g * 64 + c * 4, &both, 4);
    }
  std::memset(data + whole * 64, 0, static_cast<size_t>((k_groups(k) - whole) * 64));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = whole * 4; i < k; ++i) {
      const uint8_t code = static_cast<uint8_t>((q[c * stride_n + i * stride_k] + 8) & 15);
      data[i / 4 * 64 + c % 16 * 4 + (i & 3)] |= static_cast<uint8_t>(c < 16 ? code : code << 4);
    }
}

void unpack_panel(const uint8_t* data, int64_t channels, int64_t k, int8_t* q) {
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* from = data + c % 16 * 4;
    const int shift = c < 16 ? 0 : 4;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
      uint32_t word;
      std::memcpy(&word, from + i * 16, 4);
      for (int j = 0; j < 4; ++j) q[c * k + i + j] = static_cast<int8_t>((word >> (8 * j + shift) & 15) - 8);
    }
    for (; i < k; ++i) q[c * k + i] = static_cast<int8_t>((from[i / 4 * 64 + (i & 3)] >> shift & 15) - 8);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
