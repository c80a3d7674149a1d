// Linked into every module: the version and a digest of the sources it was built from. qkernels.library searches the
// file for it before loading, because loading a stale library already registers its kernels.
extern "C" __attribute__((visibility("default"), used)) const char qkernels_build_id[] =
    "qkernels-build-id:" QKERNELS_BUILD_ID ";";
