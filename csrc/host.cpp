// qkernels._host: what this machine's CPU can do, which path the CPU kernels take, and how they were built.
// Free of torch, so that it loads and reports even where the op library does not.
#include <pybind11/pybind11.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <chrono>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace qkernels;

namespace {

std::string name(int isa) { return kIsaNames[isa]; }

void set_isa(const std::string& wanted) {
  std::string accepted;
  for (int i = 0; i <= static_cast<int>(supported_isa()); ++i) {
    if (wanted == kIsaNames[i]) {
      own_isa_state.active = i;
      return;
    }
    accepted += (i ? ", " : "") + name(i);
  }
  throw std::invalid_argument("isa: got '" + wanted + "'; this CPU runs " + accepted);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch"] = QKERNELS_BUILD_TORCH;
  info["torch_target"] = "2.10";
  return info;
}

// What a benchmark divides by: int8 dot products that touch registers only, by the instructions that the int8 GEMM
// takes on this path, and memory read end to end. In assembly, since a compiler may spill the sums or take the products
// out of the loop; whatever the registers hold is summed. Each returns the operations of one call, a multiplication and
// an addition being two.
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

double dot_ceiling(double seconds) {
  py::gil_scoped_release release;
  const int isa = own_isa_state.active;
  double ops = 0, start = seconds_now(), now = start;
  while (now < start + seconds) {
#if defined(__x86_64__)
    ops += isa >= static_cast<int>(Isa::avx512vnni) ? dots_avx512vnni()
           : isa >= static_cast<int>(Isa::avx2)     ? dots_avx2()
                                                    : dots_scalar();
#else
    (void)isa;
    ops += dots_scalar();
#endif
    now = seconds_now();
  }
  return ops / (now - start);
}

double read_ceiling(uintptr_t address, int64_t bytes) {
  py::gil_scoped_release release;
  const char* data = reinterpret_cast<const char*>(address);
  const double start = seconds_now();
  int64_t sum = 0;
#if defined(__x86_64__)
  if (supported_isa() >= Isa::avx512vnni) {
    sum = read_avx512(data, bytes);
  } else
#endif
  {
    const int64_t* words = reinterpret_cast<const int64_t*>(address);
    for (int64_t i = 0; i < bytes / 8; ++i) sum ^= words[i];
  }
  volatile int64_t kept = sum;
  (void)kept;
  (void)data;
  return static_cast<double>(bytes) / (seconds_now() - start);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features, the CPU path in use, and build information (no torch needed).";
  m.def("isa_names", [] {
    py::list names;
    for (const char* isa : kIsaNames) names.append(isa);
    return names;
  });
  m.def("supported_isa", [] { return name(static_cast<int>(supported_isa())); });
  m.def("active_isa", [] { return name(own_isa_state.active); });
  m.def("set_isa", &set_isa, py::arg("isa"),
        "Caps the path that CPU kernels take: scalar, avx2, avx512 or avx512vnni.");
  m.def(
      "last_isa",
      []() -> py::object {
        const int last = own_isa_state.last;
        return last < 0 ? py::object(py::none()) : py::object(py::str(name(last)));
      },
      "The path that the last CPU kernel took; None since clear_last_isa().");
  m.def("clear_last_isa", [] { own_isa_state.last = -1; });
  m.def(
      "isa_state", [] { return reinterpret_cast<uintptr_t>(&own_isa_state); },
      "Address of the shared state, for qkernels_bind_isa() of the op library.");
  m.def("build_info", &build_info);
  m.def("dot_ceiling", &dot_ceiling, py::arg("seconds"),
        "Operations per second of int8 dot products in registers, by the active path's instructions, on this thread.");
  m.def("read_ceiling", &read_ceiling, py::arg("address"), py::arg("bytes"),
        "Bytes per second of reading memory end to end on this thread.");
}
