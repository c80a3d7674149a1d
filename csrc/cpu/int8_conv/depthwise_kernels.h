// The depthwise kernels of one path.
#include "cpu/int8_conv/depthwise_layout.h"
#if QK_PATH == QK_PATH_SCALAR
#include "cpu/int8_conv/depthwise_scalar.h"
#else
#include "cpu/int8_conv/depthwise_strips.h"
#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int8_conv/depthwise_registers.h"
#endif

namespace qkernels::QK_NAMESPACE {
namespace {

constexpr Isa kDepthwiseIsa = static_cast<Isa>(QK_PATH);

template <int Width, bool Direct>
inline void convolve_to(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                        const BlockValues& values, const CodeRule& rule) {
#if QK_PATH == QK_PATH_AVX512VNNI
  if (fits_registers(row)) return convolve_in_registers<Width, Direct>(row, task, parts, values, rule);
#endif
  convolve_in_strips<Width, Direct>(row, task, parts, values, rule);
}

template <int Width>
void convolve_width(const DepthwiseRow& row, const DepthwiseTask& task) {
  const Parts<Width> parts(row);
  BlockValues values;
  set_values<Width>(values, task.output, task.channels);
  if (can_code_directly(task.output, values))
    convolve_to<Width, true>(row, task, parts, values, code_rule(task.output));
  else
    convolve_to<Width, false>(row, task, parts, values, CodeRule());
}

void convolve_rows(const DepthwiseRow& row, const DepthwiseTask& task) {
  if (task.width == 16) return convolve_width<16>(row, task);
#if QK_PATH == QK_PATH_AVX2
  // 64 channels are two vectors.
  for (int64_t first = 0; first < task.channels; first += 32) {
    DepthwiseTask half = task;
    half.codes += first;
    half.weights += first;
    half.channels = std::min<int64_t>(32, task.channels - first);
    half.output = moved(task.output, 0, first);
    convolve_width<32>(row, half);
  }
#else
  if (task.width == 32) return convolve_width<32>(row, task);
  convolve_width<64>(row, task);
#endif
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
#endif
