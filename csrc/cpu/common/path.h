// Every file that foreach_isa.h compiles once per path includes this file, outside of any namespace, and puts its own
// code into namespace qkernels::QK_NAMESPACE. Such a file parses alone too, as the scalar path.
//
// A file that several kernel files include has a guard, which end_of_path.h removes.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/common/isa.h"
#include "element.h"

#ifndef QK_PATH
#define QK_PATH QK_PATH_SCALAR
#endif

#undef QK_NAMESPACE
#if QK_PATH == QK_PATH_SCALAR
#define QK_NAMESPACE scalar
#elif QK_PATH == QK_PATH_AVX2
#define QK_NAMESPACE avx2
#elif QK_PATH == QK_PATH_AVX512
#define QK_NAMESPACE avx512
#else
#define QK_NAMESPACE avx512vnni
#endif
