// The tile of the path: its constants, and tile<kAffine, MR> and float_tile<kAffine, MR> for MR rows and one panel.
#include "cpu/common/path.h"

#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int4_gemm/avx512vnni_low_bits.h"
#elif QK_PATH == QK_PATH_AVX2
#include "cpu/int4_gemm/avx2.h"
#else
#include "cpu/int4_gemm/scalar.h"
#endif
