// The walk over segments of output pixels, what all of them share, and their epilogue.
#ifndef QK_CONV_SEGMENTS
#define QK_CONV_SEGMENTS

#include "cpu/int8_conv/conv_epilogue.h"
#include "cpu/int8_conv/conv_transpose.h"
#include "cpu/int8_conv/conv_work.h"

namespace qkernels::QK_NAMESPACE {
namespace {

struct Segment {
  Offsets at;
  int64_t width;
};

struct Row {
  Offsets at;
  int64_t depth, height;
};

inline void advance(const ConvWork& work, Row& row) {
  row.at = row.at + work.outer_steps[2];
  if (++row.height < work.outer[2]) return;
  row.height = 0;
  row.at = row.at + work.outer_steps[2] * -work.outer[2] + work.outer_steps[1];
  if (++row.depth < work.outer[1]) return;
  row.depth = 0;
  row.at = row.at + work.outer_steps[1] * -work.outer[1] + work.outer_steps[0];
}

// Segments are numbered so that neighbours have equal widths as far as possible: where a row's segments differ, those
// of two rows alternate.
inline void list_segments(const ConvWork& work, int64_t first, int64_t last, Segment* segments) {
  const int64_t of_row = work.segments_of_row(), width = work.width / of_row, wider = work.width % of_row;
  const int64_t together = wider ? 2 : 1;
  int64_t number = first / (together * of_row) * together, at = first % (together * of_row);
  const int64_t height = number % work.outer[2], above = number / work.outer[2], depth = above % work.outer[1];
  const Offsets start = work.outer_steps[0] * (above / work.outer[1]) + work.outer_steps[1] * depth;
  Row rows[2];
  rows[0] = {start + work.outer_steps[2] * height, depth, height};
  rows[1] = rows[0];
  advance(work, rows[1]);
  for (int64_t i = first; i < last; ++i) {
    const bool alternate = wider && number + 1 < work.rows();
    const int64_t begin = alternate ? at / 2 : at;
    segments[i - first] = {rows[alternate && at & 1].at + work.step * (begin * width + std::min(begin, wider)),
                           width + (begin < wider)};
    if (++at == (alternate ? 2 : 1) * of_row) {
      at = 0;
      number += together;
      rows[0] = rows[1];
      if (wider) advance(work, rows[0]);
      rows[1] = rows[0];
      advance(work, rows[1]);
    }
  }
}

// How many codes are multiplied with one panel before the next one: they stay in the second-level cache. If the weights
// stay there too, it is a few segments, so that all channels of a pixel are written soon after each other: floats of
// 256 channels took 5 times as long without.
constexpr int64_t kCodesAtOnce = 384 << 10, kSmallWeights = 512 << 10, kFewSegments = 8, kSegmentsAtOnce = 256;

template <typename Block>
inline void for_each_block(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t panels,
                           const Block& block) {
  const int64_t bytes = std::max<int64_t>(1, work.step.x * work.width / work.segments_of_row());
  const int64_t most = panels * work.panel_bytes <= kSmallWeights
                           ? kFewSegments
                           : std::clamp<int64_t>(kCodesAtOnce / bytes / 2 * 2, 2, kSegmentsAtOnce);
  Segment segments[kSegmentsAtOnce];
  for (int64_t i = first_segment; i < last_segment; i += most) {
    const int64_t n = std::min(most, last_segment - i);
    list_segments(work, i, i + n, segments);
    block(segments, n);
  }
}

// What all segments of a call share.
struct Shared {
  const ConvWork& work;
  Finish finish_segment;
  std::vector<PanelValues> panels;  // from first_panel on
  int64_t first_panel;
#if QK_PATH != QK_PATH_SCALAR
  bool has_clamped;
  ClampedCodes clamped;
#endif
#if QK_PATH == QK_PATH_AVX512VNNI
  bool has_floats;
  TileFloats floats;
#endif
  std::vector<uint8_t> gathered;

  Shared(const ConvWork& w, int64_t first, int64_t last)
      : work(w), finish_segment(run_of<FinishSegment>(*w.output)), first_panel(first) {
    panels.reserve(static_cast<size_t>(last - first));
    for (int64_t number = first; number < last; ++number) {
      const int64_t block = number / work.block_panels;
      const int64_t channel = block * work.block_out + number % work.block_panels * kPanel;
      const int64_t end = std::min(work.out_channels, (block + 1) * work.block_out);
      panels.emplace_back(work, channel, std::min<int64_t>(kPanel, end - channel));
    }
#if QK_PATH != QK_PATH_SCALAR
    has_clamped = has_clamped_codes(work);
    clamped = has_clamped ? clamped_codes(work) : ClampedCodes{};
#endif
#if QK_PATH == QK_PATH_AVX512VNNI
    has_floats = has_tile_floats(work);
    floats = has_floats ? tile_floats(work) : TileFloats{};
#endif
    if (work.gather) gathered.resize(static_cast<size_t>(2 * kSegment * work.run_groups * 4));
  }

#if QK_PATH != QK_PATH_SCALAR
  void place_codes(int segment, const Offsets& at, const PanelValues& panel) {
    const ConvOutput& o = *work.output;
    clamped.codes[segment] = o.codes.data + at.codes + panel.first;
    clamped.residual[segment] = o.residual_codes ? o.residual_codes + at.residual + panel.first : nullptr;
  }
#endif

#if QK_PATH == QK_PATH_AVX512VNNI
  void place_floats(int segment, const Offsets& at, const PanelValues& panel) {
    const ConvOutput& o = *work.output;
    floats.floats[segment] = o.floats ? o.floats + at.floats + panel.first : nullptr;
    floats.residual[segment] = o.residual ? o.residual + at.residual + panel.first : nullptr;
    floats.codes[segment] = o.codes.data ? o.codes.data + at.codes + panel.first : nullptr;
  }
#endif
};

// The epilogue of a segment, with floats of any strides.
inline void finish(const Shared& shared, const int32_t* sums, int64_t width, const PanelValues& panel,
                   const Offsets& at) {
  const ConvWork& work = shared.work;
  const ConvOutput& o = *work.output;
  const int64_t residual = at.residual + panel.first;
  float* const floats = o.floats ? o.floats + at.floats + panel.first * o.floats_c : nullptr;
  PixelResults out = {floats,
                      o.codes.data ? o.codes.data + at.codes + panel.first : nullptr,
                      o.residual ? o.residual + residual : nullptr,
                      o.residual_codes ? o.residual_codes + residual : nullptr,
                      work.step.floats,
                      work.step.codes,
                      work.step.residual};
  if (!floats || o.floats_c == 1) return shared.finish_segment(sums, width, panel, work, out);
  constexpr int64_t kAtOnce = 8;  // pixels that store_by_channel takes
  if (width > kAtOnce) {
    finish(shared, sums, kAtOnce, panel, at);
    return finish(shared, sums + kAtOnce * kPanel, width - kAtOnce, panel, at + work.step * kAtOnce);
  }
  alignas(64) float by_pixel[kAtOnce * kPanel];
  out.floats = by_pixel;
  out.floats_step = kPanel;
  shared.finish_segment(sums, width, panel, work, out);
  store_by_channel(by_pixel, kPanel, width, panel.channels, floats, o.floats_c, work.step.floats);
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE

#endif
