// qkernels._host: what this machine's CPU can do, which path the CPU kernels take, and how they were built.
// Free of torch, so that it loads and reports even where the op library does not.
#include <pybind11/pybind11.h>

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
}
