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

template <int Width, typename Sink>
inline void convolve_to(const DepthwiseRow& row, const DepthwiseTask& task, const BlockValues<Width>& values,
                        const CodeRule& rule) {
  const Parts<Width> parts(row);
#if QK_PATH == QK_PATH_AVX512VNNI
  if (fits_registers(row)) return convolve_in_registers<Width, Sink>(row, task, parts, values, rule);
#endif
  convolve_in_strips<Width, Sink>(row, task, parts, values, rule);
}

template <int Width>
void convolve_width(const DepthwiseRow& row, const DepthwiseTask& task) {
  const BlockValues<Width> values(task.output, task.channels);
  const ConvOutput& o = task.output;
  if (FloatSink<Width>::fits(o)) return convolve_to<Width, FloatSink<Width> >(row, task, values, CodeRule());
  if (!values.finite || !gives_clamped_codes(o))
    return convolve_to<Width, GeneralSink<Width> >(row, task, values, CodeRule());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const CodeRule rule(o.in_scale, o.codes_q.inverse, o.codes_q.zero_point, byte_of(-kInfinity, o),
                      byte_of(kInfinity, o));
  convolve_to<Width, CodeSink<Width> >(row, task, values, rule);
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
