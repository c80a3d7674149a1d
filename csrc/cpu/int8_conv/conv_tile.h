// The tile of the path: conv_tile<H, Segments> gives the dot products of one or two segments of H pixels with one
// panel.
#ifndef QK_CONV_TILE
#define QK_CONV_TILE

#include "cpu/common/path.h"

#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int8_conv/avx512vnni.h"
#elif QK_PATH == QK_PATH_AVX2
#include "cpu/int8_conv/avx2.h"
#else
#include "cpu/int8_conv/scalar.h"
#endif

#endif
