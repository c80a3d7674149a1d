// Ends one path of foreach_isa.h. The guards of shared kernel files are removed, so that the next path compiles these
// files again.
#undef QK_PATH
#undef QK_NAMESPACE

#undef QK_VEC
#undef QK_SWEEP
#undef QK_REDUCE
#undef QK_ROW_SUM
#undef QK_RANGES_KERNELS
#undef QK_ACTIVATION_KERNELS
#undef QK_FAKE_QUANTIZE_KERNELS
#undef QK_FAKE_QUANTIZE_LEARNABLE_KERNELS
#undef QK_QUANTIZE_KERNELS
#undef QK_INT8_EPILOGUE
#undef QK_CONV_EPILOGUE
#undef QK_CONV_SEGMENTS
#undef QK_CONV_TILE
#undef QK_CONV_TRANSPOSE
#undef QK_INT8_TILE
#undef QK_AVX2_PRODUCTS
#undef QK_INT4_GROUPS
#undef QK_CODES
#undef QK_CONV_OUTPUT
#undef QK_DEPTHWISE_BLOCK
#undef QK_DEPTHWISE_OUTPUT
#undef QK_DEPTHWISE_VECTORS
#undef QK_PROGRAM_NORM
#undef QK_PROGRAM_POINTWISE
#undef QK_PROGRAM_POOL
#undef QK_PROGRAM_TRANSPOSE
