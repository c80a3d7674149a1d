// The int8 GEMM tile of the scalar path.
#include "cpu/common/vec.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kIsa = Isa::scalar;
constexpr uint8_t kFlip = 0;
constexpr int kTileRows = 4;
constexpr int kUnpackedRows = 4;

// The dot products of MR rows and one panel: sums[MR][32].
template <int MR>
void tile(const uint8_t* a, int64_t stride, const int8_t* b, int64_t groups, int32_t* sums) {
  for (int i = 0; i < MR * kPanel; ++i) sums[i] = 0;
  for (int64_t g = 0; g < groups; ++g, b += kPanel * 4)
    for (int r = 0; r < MR; ++r) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(a + r * stride + g * 4);
      for (int c = 0; c < kPanel; ++c)
        sums[r * kPanel + c] +=
            codes[0] * b[c * 4] + codes[1] * b[c * 4 + 1] + codes[2] * b[c * 4 + 2] + codes[3] * b[c * 4 + 3];
    }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
