// The convolution kernels of one path: the walk over segments and panels.
#include "cpu/int8_conv/conv_epilogue.h"
#include "cpu/int8_conv/conv_tile.h"
#include "cpu/int8_conv/conv_transpose.h"
#include "cpu/int8_conv/conv_work.h"

namespace qkernels::QK_NAMESPACE {
namespace {

using Tile = void (*)(const TileInput&, const int8_t*, const int32_t*, int32_t*);

template <int Segments, int... H>
constexpr std::array<Tile, sizeof...(H)> tiles_of(std::integer_sequence<int, H...>) {
  return {conv_tile<H + 1, Segments>...};
}
constexpr std::array<std::array<Tile, kSegment>, 2> kConvTiles = {
    tiles_of<1>(std::make_integer_sequence<int, kSegment>()), tiles_of<2>(std::make_integer_sequence<int, kSegment>())};

#if QK_PATH == QK_PATH_AVX512VNNI
using TileOfCodes = void (*)(const TileInput&, const int8_t*, const PanelValues&, const ClampedCodes&);

template <int Segments, int... H>
constexpr std::array<TileOfCodes, sizeof...(H)> tiles_of_codes(std::integer_sequence<int, H...>) {
  return {conv_tile_codes<H + 1, Segments>...};
}
constexpr std::array<std::array<TileOfCodes, kSegment>, 2> kTilesOfCodes = {
    tiles_of_codes<1>(std::make_integer_sequence<int, kSegment>()),
    tiles_of_codes<2>(std::make_integer_sequence<int, kSegment>())};
#endif

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

// Copies the runs of a segment's pixels to rows of packed K.
inline void gather(const ConvWork& work, const uint8_t* pixel, int64_t width, uint8_t* rows) {
  const int64_t together = work.runs / work.packed_runs, packed = k_groups(work.packed_run) * 4;
  for (int64_t i = 0; i < width; ++i, pixel += work.step.x, rows += work.run_groups * 4)
    for (int64_t r = 0; r < work.runs; ++r)
      std::memcpy(rows + r / together * packed + r % together * work.run, pixel + work.offsets[r],
                  static_cast<size_t>(work.run));
}

// What all segments of a call share.
struct Shared {
  const ConvWork& work;
  Finish finish_segment;
  std::vector<PanelValues> panels;  // from first_panel on
  int64_t first_panel;
#if QK_PATH == QK_PATH_AVX512VNNI
  bool has_clamped;
  ClampedCodes clamped;
#endif
  std::vector<uint8_t> gathered;

  Shared(const ConvWork& w, int64_t first, int64_t last)
      : work(w), finish_segment(run_of<FinishSegment>(*w.output)), first_panel(first) {
    panels.reserve(static_cast<size_t>(last - first));
    for (int64_t number = first; number < last; ++number) {
      const int64_t block = number / work.block_panels;
      const int64_t channel = block * work.block_out + number % work.block_panels * kPanel;
      const int64_t end = std::min(work.out_channels, (block + 1) * work.block_out);
      panels.emplace_back(*work.output, channel, std::min<int64_t>(kPanel, end - channel), work.wide);
    }
#if QK_PATH == QK_PATH_AVX512VNNI
    has_clamped = has_clamped_codes(work);
    clamped = has_clamped ? clamped_codes(work) : ClampedCodes{};
#endif
    if (work.gather) gathered.resize(static_cast<size_t>(2 * kSegment * work.run_groups * 4));
  }
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
  alignas(64) float by_pixel[(kSegment + 1) * kPanel];
  out.floats = by_pixel;
  out.floats_step = kPanel;
  shared.finish_segment(sums, width, panel, work, out);
  store_by_channel(by_pixel, kPanel, width, panel.channels, floats, o.floats_c, work.step.floats);
}

// One panel and a list of segments.
void convolve_panel(Shared& shared, const Segment* segments, int64_t n, int64_t number) {
  const ConvWork& work = shared.work;
  const PanelValues& panel = shared.panels[static_cast<size_t>(number - shared.first_panel)];
  const int8_t* weights = work.data + number * work.panel_bytes;
  const uint8_t* x = work.x + number / work.block_panels * work.block_in;
  alignas(64) int32_t sums[2 * kSegment * kPanel];
  const int64_t zero = 0, row_bytes = work.run_groups * 4;
  TileInput in = {{}, work.step.x, work.offsets, work.runs, work.run_groups, work.first_half};
  if (work.gather) in = {{}, row_bytes, &zero, 1, work.run_groups, 0};
#if QK_PATH == QK_PATH_AVX512VNNI
  const bool clamped = shared.has_clamped && panel.finite;
  shared.clamped.inside = panel.channels == kPanel ? ~0u : (1u << panel.channels) - 1;
#endif
  for (int64_t i = 0; i < n;) {
    const int count = i + 1 < n && segments[i].width == segments[i + 1].width ? 2 : 1;
    const int64_t width = segments[i].width;
    for (int s = 0; s < count; ++s) {
      in.pixels[s] = x + segments[i + s].at.x;
      if (work.gather) {
        uint8_t* to = shared.gathered.data() + s * kSegment * row_bytes;
        gather(work, in.pixels[s], width, to);
        in.pixels[s] = to;
      }
    }
    const size_t c = static_cast<size_t>(count - 1), h = static_cast<size_t>(width - 1);
#if QK_PATH == QK_PATH_AVX512VNNI
    if (clamped) {
      for (int s = 0; s < count; ++s)
        shared.clamped.codes[s] = work.output->codes.data + segments[i + s].at.codes + panel.first;
      kTilesOfCodes[c][h](in, weights, panel, shared.clamped);
      i += count;
      continue;
    }
#endif
    kConvTiles[c][h](in, weights, panel.start, sums);
    for (int s = 0; s < count; ++s) finish(shared, sums + s * width * kPanel, width, panel, segments[i + s].at);
    i += count;
  }
}

// How many codes are multiplied with one panel before the next one: they stay in the second-level cache. If the weights
// stay there too, it is a few segments, so that all channels of a pixel are written soon after each other: floats of
// 256 channels took 5 times as long without.
constexpr int64_t kCodesAtOnce = 384 << 10, kSmallWeights = 512 << 10, kFewSegments = 8, kSegmentsAtOnce = 256;

void convolve(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
              int64_t last_panel) {
  const int64_t bytes = std::max<int64_t>(1, work.step.x * work.width / work.segments_of_row());
  const int64_t most = (last_panel - first_panel) * work.panel_bytes <= kSmallWeights
                           ? kFewSegments
                           : std::clamp<int64_t>(kCodesAtOnce / bytes / 2 * 2, 2, kSegmentsAtOnce);
  Shared shared(work, first_panel, last_panel);
  Segment segments[kSegmentsAtOnce];
  for (int64_t i = first_segment; i < last_segment; i += most) {
    const int64_t n = std::min(most, last_segment - i);
    list_segments(work, i, i + n, segments);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) convolve_panel(shared, segments, n, panel);
  }
}

constexpr ConvKernels kConvKernels = {
#if QK_PATH == QK_PATH_SCALAR
    Isa::scalar,
#elif QK_PATH == QK_PATH_AVX2
    Isa::avx2,
#else
    Isa::avx512vnni,
#endif
    convolve};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
