#include "cpu/int8_conv/planes.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/common/int8_ops.h"
#include "cpu/int8_conv/conv_layout.h"
#include "cpu/int8_conv/planes_work.h"

#define QK_BODY "cpu/int8_conv/planes_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

constexpr int64_t kCodesAtOnce = 16 << 10;  // half of the first-level cache
constexpr int64_t kTilePixels = 48;
constexpr int64_t kLeastPixels = 96;  // of 7² the last vector holds one

}  // namespace

bool takes_planes(const ConvGeometry& g, const ConvOutput& o) {
  const auto is = [](const Size3& size, int64_t all) { return size.d == all && size.h == all && size.w == all; };
  return QK_OF_ACTIVE_ISA(kConvolvePixels) && active_isa() < Isa::amx && g.groups == 1 && is(g.kernel, 1) &&
         is(g.stride, 1) && is(g.padding, 0) && o.floats_w == 1 && (g.out.h == 1 || o.floats_h == g.out.w) &&
         g.out.h * g.out.w >= kLeastPixels && !is_wide(std::abs(o.in_zero_point), g.in_channels);
}

bool convolve_planes(const ConvGeometry& g, const Planes& x, const Quantizer& q, const int8_t* data,
                     const ConvOutput& o, Team& team) {
  const ConvLayout layout(g);
  const size_t channels = static_cast<size_t>(g.out_channels), padded = (channels + 7) / 8 * 8;
  PlanesWork work = {data,
                     layout.bytes_of_panel(),
                     layout.run_groups(),
                     g.in_channels,
                     g.out_channels,
                     x.stride_c,
                     o.floats_c,
                     q,
                     o.in_scale,
                     std::vector<int32_t>(padded),
                     {},
                     {}};
  const uint32_t offset = 128u + static_cast<uint32_t>(o.in_zero_point);
  for (size_t c = 0; c < channels; ++c)
    work.start[c] = static_cast<int32_t>(0u - offset * static_cast<uint32_t>(o.colsum[c]));
  work.scale.assign(o.scale, o.scale + channels);
  // Adding -0 changes nothing, not even the sign of a zero.
  work.bias = o.bias ? std::vector<float>(o.bias, o.bias + channels) : std::vector<float>(channels, -0.0f);

  // Each image in parts of nearly equal numbers of whole vectors.
  const int64_t k = work.groups * 4, vectors = (x.pixels + 15) / 16;
  const int64_t at_once = std::max<int64_t>(kCodesAtOnce / k / kTilePixels * kTilePixels, kTilePixels) / 16;
  const int64_t threads = team.threads(), least = (vectors + at_once - 1) / at_once;
  const int64_t parts = x.batch % threads ? (least + threads - 1) / threads * threads : least;
  const auto convolve = QK_OF_ACTIVE_ISA(kConvolvePixels);
  std::atomic<bool> nan{false};
  team.parallel_for(
      x.batch * parts, grain(kMultiplyGrain, at_once * 16 * k * g.out_channels), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<uint8_t[]> codes(new uint8_t[static_cast<size_t>(at_once * 16 * k)]);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / parts, part = i % parts, first = part * vectors / parts * 16;
          const int64_t pixels = std::min((part + 1) * vectors / parts * 16, x.pixels) - first;
          if (convolve(work, x.data + n * x.stride_n + first, pixels, codes.get(), o.floats + n * o.floats_n + first))
            nan = true;
        }
      });
  return nan;
}

}  // namespace qkernels
