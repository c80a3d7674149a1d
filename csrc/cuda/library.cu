// What this library was compiled for: qkernels.library searches the file for it before loading.
extern "C" __attribute__((visibility("default"), used)) const char qkernels_cuda_arches[] =
    "qkernels-cuda-arches:" QKERNELS_CUDA_ARCHES;
