// Linked into every library: the version and a digest of the sources it was built from, and the torch whose headers
// it was compiled with. qkernels.library searches the file for the first before loading, because loading a stale
// library already registers its kernels.
#define QK_EXPORT extern "C" __attribute__((visibility("default"), used))

QK_EXPORT const char qkernels_build_id[] = "qkernels-build-id:" QKERNELS_BUILD_ID ";";
QK_EXPORT const char* qkernels_build_torch() { return QKERNELS_BUILD_TORCH; }
