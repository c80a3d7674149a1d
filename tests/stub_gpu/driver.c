// A CUDA driver that accepts every launch and does nothing, so that Triton's JIT, its launchers and its tensor maps run
// on a machine without a GPU. It refuses of the host's side what sm_90 refuses: grids, blocks, shared memory, tensor
// maps.
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { MOST_SHARED = 232448, MOST_THREADS = 1024, MOST_BLOCKS = 65535, BOX = 256, BAD = 1 };

API unsigned long stub_launches = 0;

API int cuInit(unsigned flags) { return 0; }
API int cuGetErrorString(int code, const char** text) {
  *text = "refused by the stub driver: beyond a limit of sm_90";
  return 0;
}
API int cuDeviceGet(int* device, int index) {
  *device = index;
  return 0;
}
API int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10: *value = 32; break;     // lanes of a warp
    case 12: *value = 65536; break;  // registers of a block
    case 16: *value = 132; break;    // multiprocessors
    case 75: *value = 9; break;      // compute capability 9.0
    case 76: *value = 0; break;
    case 81: *value = MOST_SHARED + 1024; break;
    case 97: *value = MOST_SHARED; break;
    default: *value = 1000;
  }
  return 0;
}
API int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}
API int cuCtxSetCurrent(void* context) { return 0; }
API int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)1;
  return 0;
}
API int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)2;
  return 0;
}
API int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)3;
  return 0;
}
API int cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? MOST_THREADS : attribute == 4 ? 64 : 0;  // threads, registers
  return 0;
}
API int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
API int cuFuncSetCacheConfig(void* function, int config) { return 0; }
API int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  *(uint64_t*)value = pointer;
  return 0;
}
API int cuCtxGetLimit(uint64_t* value, int limit) {
  *value = 0;
  return 0;
}
API int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
API int cuOccupancyMaxActiveClusters(int* count, void* function, void* config) {
  *count = 1;
  return 0;
}

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
} Config;

API int cuLaunchKernelEx(const Config* config, void* function, void** params, void** extra) {
  ++stub_launches;
  return config->grid_y > MOST_BLOCKS || config->grid_z > MOST_BLOCKS || config->block_x > MOST_THREADS ||
         config->shared > MOST_SHARED;
}

API int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* dims,
                               const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                               int swizzle, int promotion, int fill) {
  if ((uintptr_t)base % 16) return BAD;
  for (unsigned i = 0; i < rank; ++i) {
    if (box[i] == 0 || box[i] > BOX || dims[i] == 0 || dims[i] > (1ull << 32)) return BAD;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= (1ull << 40))) return BAD;
  }
  const unsigned size = type == 0 ? 1 : type == 1 || type == 6 || type == 9 ? 2 : 4;
  const unsigned inner = box[0] * size;
  // A swizzle of 32, 64 or 128 bytes is as wide as the box at least.
  if (inner % 16 || (swizzle && inner > (16u << swizzle))) return BAD;
  memset(map, 0, 128);
  return 0;
}
