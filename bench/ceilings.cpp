// What a benchmark divides by: int8 dot products that touch registers only, and memory read end to end.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <chrono>

#include "cpu/common/isa.h"

namespace qkernels {
namespace {

// Dot products are in assembly, since a compiler may spill the sums or take the products out of the loop; whatever the
// registers hold is summed. Each function returns the operations of one call, a multiplication and an addition being two.
constexpr int64_t kRounds = 4096;

#if defined(__x86_64__)
#define QK_EIGHT(what) what(0) what(1) what(2) what(3) what(4) what(5) what(6) what(7)

double dots_avx512vnni() {
  int64_t rounds = kRounds;
#define QK_DOT(i) "vpdpbusd %%zmm15, %%zmm14, %%zmm" #i "\n\t"
  __asm__ volatile("1:\n\t" QK_EIGHT(QK_DOT) "dec %0\n\tjnz 1b"
                   : "+r"(rounds)
                   :
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
#undef QK_DOT
  return 8 * 128.0 * kRounds;
}

double dots_avx2() {
  int64_t rounds = kRounds;
#define QK_DOT(i) "vpmaddwd %%ymm15, %%ymm14, %%ymm8\n\tvpaddd %%ymm8, %%ymm" #i ", %%ymm" #i "\n\t"
  __asm__ volatile("1:\n\t" QK_EIGHT(QK_DOT) "dec %0\n\tjnz 1b"
                   : "+r"(rounds)
                   :
                   : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8");
#undef QK_DOT
  return 8 * 32.0 * kRounds;
}

QK_TARGET_AVX512VNNI_BEGIN
int64_t read_avx512(const char* data, int64_t bytes) {
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(data + i + j * 64));
  alignas(64) int64_t lanes[8];
  _mm512_store_si512(lanes, _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
  return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3] ^ lanes[4] ^ lanes[5] ^ lanes[6] ^ lanes[7];
}
QK_TARGET_END
#endif

#ifdef QK_HAS_AMX
double dots_amx() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = 16;
    config.row_bytes[t] = 64;
  }
  tile_config(config);
  for (int64_t round = 0; round < kRounds; ++round) {
    tile_dot<0, 4, 6>();
    tile_dot<1, 4, 7>();
    tile_dot<2, 5, 6>();
    tile_dot<3, 5, 7>();
  }
  tile_release();
  return 4 * 2.0 * 16 * 16 * 64 * kRounds;
}
#endif

double dots_scalar() {
  int32_t sums[8] = {};
  for (int64_t round = 0; round < kRounds; ++round)
    for (int32_t& sum : sums) {
      int32_t code = 1;
      __asm__ volatile("" : "+r"(code));
      sum += code * code;
    }
  int32_t total = 0;
  for (int32_t sum : sums) total += sum;
  volatile int32_t kept = total;
  (void)kept;
  return 8 * 2.0 * kRounds;
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace
}  // namespace qkernels

using namespace qkernels;

// Operations per second of int8 dot products in registers, by the instructions of the int8 GEMM on path `path`.
extern "C" double dot_ceiling(int path, double seconds) {
  const Isa isa = static_cast<Isa>(path);
  double ops = 0, start = seconds_now(), now = start;
  while (now < start + seconds) {
#if defined(__x86_64__)
#ifdef QK_HAS_AMX
    if (isa >= Isa::amx)
      ops += dots_amx();
    else
#endif
      ops += isa >= Isa::avx512vnni ? dots_avx512vnni() : isa >= Isa::avx2 ? dots_avx2() : dots_scalar();
#else
    (void)isa;
    ops += dots_scalar();
#endif
    now = seconds_now();
  }
  return ops / (now - start);
}

// Bytes per second of memory read end to end.
extern "C" double read_ceiling(const char* data, int64_t bytes) {
  const double start = seconds_now();
  int64_t sum = 0;
#if defined(__x86_64__)
  if (supported_isa() >= Isa::avx512vnni) {
    sum = read_avx512(data, bytes);
  } else
#endif
  {
    const int64_t* words = reinterpret_cast<const int64_t*>(data);
    for (int64_t i = 0; i < bytes / 8; ++i) sum ^= words[i];
  }
  volatile int64_t kept = sum;
  (void)kept;
  return static_cast<double>(bytes) / (seconds_now() - start);
}
