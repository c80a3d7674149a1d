// What libtorch_cuda has and a libtorch without CUDA lacks: enough to load the CUDA library and see what it registers,
// and to run its kernels on the emulator. For tests only: in a real process these would hide torch's own.
#include <stdint.h>

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
