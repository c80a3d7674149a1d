// Counts how often the emulated library asks torch for a tensor's device, for a test: hidden, these functions stand
// before torch's own for this library alone.
#include <dlfcn.h>
#include <stdint.h>

extern "C" __attribute__((visibility("default"))) unsigned long emulated_device_questions = 0;

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
