// The tile of the path: its constants, and tile<MR> for MR rows and one panel.
#ifndef QK_INT8_TILE
#define QK_INT8_TILE

#include "cpu/common/path.h"

#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int8_gemm/avx512vnni.h"
#elif QK_PATH == QK_PATH_AVX2
#include "cpu/int8_gemm/avx2.h"
#else
#include "cpu/int8_gemm/scalar.h"
#endif

#endif
