// Linked into every library: its build id, which is the version and a digest of the sources, and the torch whose
// headers it was compiled with. qkernels/loading.py finds the build id in the file before it loads the library, because
// loading a stale library already registers its kernels.
#define QK_EXPORT extern "C" __attribute__((visibility("default"), used))

QK_EXPORT const char qkernels_build_id[] = "qkernels-build-id:" QKERNELS_BUILD_ID ";";
QK_EXPORT const char* qkernels_build_torch() { return QKERNELS_BUILD_TORCH; }
