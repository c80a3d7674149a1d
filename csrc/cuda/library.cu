// The architectures that this library was compiled for, and the CUDA version that compiled it. qkernels/loading.py
// finds both in the file without loading it.
#define QKERNELS_TEXT(value) #value
#define QKERNELS_TEXT_OF(macro) QKERNELS_TEXT(macro)
extern "C" __attribute__((visibility("default"), used)) const char qkernels_cuda_arches[] =
    "qkernels-cuda-arches:" QKERNELS_CUDA_ARCHES;
extern "C" __attribute__((visibility("default"), used)) const char qkernels_cuda_version[] =
    "qkernels-cuda-version:" QKERNELS_TEXT_OF(CUDART_VERSION);
