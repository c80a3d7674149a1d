// The dot products of one or two segments of pixels with one panel.
#ifndef QK_CONV_TILE
#define QK_CONV_TILE

#include "cpu/common/vec.h"
#include "cpu/int8_conv/conv_work.h"
#include "cpu/int8_gemm/int8_gemm.h"

namespace qkernels::QK_NAMESPACE {
namespace {

// What conv_tile<H, Segments> reads: H pixels of each segment. It gives sums[pixel][32], which begin at start[32] and
// wrap around, so that they are exact if the result fits.
struct TileInput {
  const uint8_t* pixels[2];  // the first pixel of each segment
  int64_t step;              // bytes from pixel to pixel
  const int64_t* offsets;    // of the runs
  int64_t runs, run_groups;
  // If not 0, the panel's first 16 channels have weights for so many groups of 4 codes of a run, the others for the
  // rest.
  int64_t first_half;
};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int8_conv/avx512vnni.h"
#elif QK_PATH == QK_PATH_AVX2
#include "cpu/int8_conv/avx2.h"
#else
#include "cpu/int8_conv/scalar.h"
#endif

#endif
