// The depthwise kernels of one path.
#include "cpu/int8_conv/depthwise_epilogue.h"
#include "cpu/int8_conv/depthwise_layout.h"
#if QK_PATH == QK_PATH_SCALAR
#include "cpu/int8_conv/depthwise_scalar.h"
#else
#include "cpu/int8_conv/depthwise_strips.h"
#endif
