// What this machine's CPU can do, which path the kernels take, and how the library was built: plain C functions, which
// qkernels/host.py calls, so that one library serves every version of Python.
#include <iterator>

#include "cpu/common/isa.h"

#define QK_EXPORT extern "C" __attribute__((visibility("default")))

using namespace qkernels;

// A path's name; null beyond the last.
QK_EXPORT const char* qkernels_isa_name(int isa) {
  return isa < static_cast<int>(std::size(kIsaNames)) ? kIsaNames[isa] : nullptr;
}
QK_EXPORT int qkernels_supported_isa() { return static_cast<int>(supported_isa()); }
QK_EXPORT int qkernels_active_isa() { return isa_state.active; }
QK_EXPORT void qkernels_set_active_isa(int isa) { isa_state.active = isa; }
QK_EXPORT int qkernels_last_isa() { return isa_state.last; }
QK_EXPORT void qkernels_clear_last_isa() { isa_state.last = -1; }

QK_EXPORT const char* qkernels_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}
