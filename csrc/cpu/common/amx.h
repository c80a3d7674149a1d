// The matrix tiles of x86 (AMX): whether this process may use them, and a function for each instruction.
//
// The instructions are written in assembly, which every compiler takes without a target. Compilers keep nothing in
// tiles themselves.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#define QK_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qkernels {

#ifdef QK_HAS_AMX
// Asks Linux for the tiles' 8 KiB of state, which it gives to no process that does not ask. It says no where the
// hardware, a hypervisor or an old kernel lacks them, or where a stack for signals is too small for them.
inline bool amx_allowed() {
  static const bool allowed = [] {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kInt8)) != (kTile | kInt8)) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of <asm/prctl.h>, and the number of the state
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
}

// What each of the 8 tiles is: rows of up to 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Sets all tiles to zero too. Takes about 60 ns.
inline void tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

// Leaves nothing that a switch of threads would have to save.
inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows from `data` on, `step` bytes apart. Where they cross cache lines this takes up to 6 times as long.
template <int kTile>
inline void tile_load(const void* data, int64_t step) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(data), "r"(step) : "memory");
}

template <int kTile>
inline void tile_store(void* data, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(data), "r"(step) : "memory");
}

// sums[row][column] += codes[row][k][i] * weights[k][column][i] over k and i < 4: unsigned times signed bytes, in int32
// that wraps around.
template <int kSums, int kCodes, int kWeights>
inline void tile_dot() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kCodes), "i"(kWeights));
}
#else
inline bool amx_allowed() { return false; }
#endif

}  // namespace qkernels
