// From codes of 2 to 4 bits to packed panels, and back.
#include "cpu/common/path.h"
#include "cpu/int4_gemm/int4_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

void pack_int4_panel(const int8_t* q, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, uint8_t* data) {
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

// By words of 4 codes of a channel: those of k and k + 4, of a channel and of the one 16 further.
void pack_panel(const int8_t* q, int64_t stride_n, int64_t stride_k, int64_t channels, int64_t k, int bits,
                uint8_t* data) {
  if (bits == 4) return pack_int4_panel(q, stride_n, stride_k, channels, k, data);
  const uint32_t ones = 0x01010101, mask = ((1u << bits) - 1) * ones, offset = (1u << (bits - 1)) * ones;
  auto word_at = [&](int64_t c, int64_t i) -> uint32_t {
    if (c >= channels || i >= k) return 0;
    const int8_t* from = q + c * stride_n + i * stride_k;
    uint32_t word = 0;
    if (stride_k == 1 && i + 4 <= k) {
      std::memcpy(&word, from, 4);
      return (word & mask) ^ offset;
    }
    for (int64_t j = 0; j < 4 && i + j < k; ++j)
      word |= (((static_cast<uint32_t>(from[j * stride_k]) & mask) ^ offset) & 0xff) << (8 * j);
    return word;
  };
  for (int64_t b = 0; b < blocks_of(k); ++b, data += block_bytes(bits)) {
    if (bits == 3) std::memset(data + 64, 0, 32);
    for (int64_t c = 0; c < 16; ++c) {
      const uint32_t words[4] = {word_at(c, b * kBlock), word_at(c, b * kBlock + 4), word_at(c + 16, b * kBlock),
                                 word_at(c + 16, b * kBlock + 4)};
      uint32_t low = 0, highest = 0;
      for (int i = 0; i < 4; ++i) {
        low |= (words[i] & 3 * ones) << 2 * i;
        highest |= (words[i] >> 2 & ones) << 2 * i;
      }
      std::memcpy(data + c * 4, &low, 4);
      if (bits == 2) continue;
      uint32_t both;
      std::memcpy(&both, data + 64 + c % 8 * 4, 4);
      both |= highest << c / 8;
      std::memcpy(data + 64 + c % 8 * 4, &both, 4);
    }
  }
}

// A block of 2 or 3 bits as 128 bytes of the 4-bit layout, with `added` added to each code.
template <int kBits>
inline void widen_block(const uint8_t* block, uint8_t added, uint8_t* int4) {
  const uint8_t both = static_cast<uint8_t>(added * 0x11);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i) {
      const int at = half * 32 + i;
      int first = block[at] & 0x33, last = block[at] >> 2 & 0x33;
      if constexpr (kBits == 3) {
        const int highest = block[64 + i] >> half;
        first |= highest << 2 & 0x44;
        last |= highest & 0x44;
      }
      int4[at] = static_cast<uint8_t>(first + both);
      int4[64 + at] = static_cast<uint8_t>(last + both);
    }
}

// The panel with its codes in the 4-bit layout, which `memory` holds.
inline Int4Panel in_int4(Int4Panel panel, int32_t added, std::vector<uint8_t>& memory) {
  if (panel.bits == 4) return panel;
  memory.resize(static_cast<size_t>(blocks_of(panel.k) * 128));
  const auto widen = panel.bits == 2 ? widen_block<2> : widen_block<3>;
  for (int64_t b = 0; b < blocks_of(panel.k); ++b)
    widen(panel.data + b * block_bytes(panel.bits), static_cast<uint8_t>(added), memory.data() + b * 128);
  panel.data = memory.data();
  panel.bits = 4;
  return panel;
}

void unpack_panel(const uint8_t* data, int64_t channels, int64_t k, int bits, int8_t* q) {
  std::vector<uint8_t> memory;
  Int4Panel panel{};
  panel.data = data;
  panel.k = k;
  panel.bits = bits;
  data = in_int4(panel, 0, memory).data;
  const int offset = code_offset(bits);
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* from = data + c % 16 * 4;
    const int shift = c < 16 ? 0 : 4;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
      uint32_t word;
      std::memcpy(&word, from + i * 16, 4);
      for (int j = 0; j < 4; ++j) q[c * k + i + j] = static_cast<int8_t>((word >> (8 * j + shift) & 15) - offset);
    }
    for (; i < k; ++i) q[c * k + i] = static_cast<int8_t>((from[i / 4 * 64 + (i & 3)] >> shift & 15) - offset);
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
