// Counts what the emulated library asks of torch, for tests: devices of tensors, and memory. Hidden, these functions
// stand before torch's own for this library alone.
#include <dlfcn.h>
#include <stdint.h>

extern "C" __attribute__((visibility("default"))) unsigned long emulated_device_questions = 0, emulated_allocations = 0;

static int32_t ask(const char* name, void* tensor, int32_t* answer) {
  ++emulated_device_questions;
  return reinterpret_cast<int32_t (*)(void*, int32_t*)>(dlsym(RTLD_NEXT, name))(tensor, answer);
}

extern "C" __attribute__((visibility("hidden"))) int32_t aoti_torch_get_device_type(void* tensor, int32_t* answer) {
  return ask(__func__, tensor, answer);
}

extern "C" __attribute__((visibility("hidden"))) int32_t aoti_torch_get_device_index(void* tensor, int32_t* answer) {
  return ask(__func__, tensor, answer);
}

extern "C" __attribute__((visibility("hidden"))) int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes,
                                                                                  const int64_t* strides, int32_t dtype,
                                                                                  int32_t device, int32_t index,
                                                                                  void** out) {
  ++emulated_allocations;
  using Real = int32_t (*)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
  return reinterpret_cast<Real>(dlsym(RTLD_NEXT, __func__))(dims, sizes, strides, dtype, device, index, out);
}
