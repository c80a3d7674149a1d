// The convolution kernels of one path: its tiles over segments and panels.
#include "cpu/int8_conv/conv_segments.h"
#include "cpu/int8_conv/conv_tile.h"
#if QK_PATH == QK_PATH_AVX512VNNI
#include "cpu/int8_conv/amx.h"
#endif

namespace qkernels::QK_NAMESPACE {
namespace {

using Tile = void (*)(const TileInput&, const int8_t*, const int32_t*, int32_t*);

template <int Segments, int... H>
constexpr std::array<Tile, sizeof...(H)> tiles_of(std::integer_sequence<int, H...>) {
  return {conv_tile<H + 1, Segments>...};
}
constexpr std::array<std::array<Tile, kSegment>, 2> kConvTiles = {
    tiles_of<1>(std::make_integer_sequence<int, kSegment>()), tiles_of<2>(std::make_integer_sequence<int, kSegment>())};

#if QK_PATH != QK_PATH_SCALAR
using TileOfCodes = void (*)(const TileInput&, const int8_t*, const PanelValues&, const ClampedCodes&);

template <int Segments, int... H>
constexpr std::array<TileOfCodes, sizeof...(H)> tiles_of_codes(std::integer_sequence<int, H...>) {
  return {conv_tile_codes<H + 1, Segments>...};
}
constexpr std::array<std::array<TileOfCodes, kSegment>, 2> kTilesOfCodes = {
    tiles_of_codes<1>(std::make_integer_sequence<int, kSegment>()),
    tiles_of_codes<2>(std::make_integer_sequence<int, kSegment>())};
#endif

#if QK_PATH == QK_PATH_AVX512VNNI
using TileOfFloats = void (*)(const TileInput&, const int8_t*, const PanelValues&, const TileFloats&);

template <int Segments, int... H>
constexpr std::array<TileOfFloats, sizeof...(H)> tiles_of_floats(std::integer_sequence<int, H...>) {
  return {conv_tile_floats<H + 1, Segments>...};
}
constexpr std::array<std::array<TileOfFloats, kSegment>, 2> kTilesOfFloats = {
    tiles_of_floats<1>(std::make_integer_sequence<int, kSegment>()),
    tiles_of_floats<2>(std::make_integer_sequence<int, kSegment>())};
#endif

// Copies the runs of a segment's pixels to rows of packed K.
inline void gather(const ConvWork& work, const uint8_t* pixel, int64_t width, uint8_t* rows) {
  const int64_t together = work.runs / work.packed_runs, packed = k_groups(work.packed_run) * 4;
  for (int64_t i = 0; i < width; ++i, pixel += work.step.x, rows += work.run_groups * 4)
    for (int64_t r = 0; r < work.runs; ++r)
      std::memcpy(rows + r / together * packed + r % together * work.run, pixel + work.offsets[r],
                  static_cast<size_t>(work.run));
}

// One panel and a list of segments.
void convolve_panel(Shared& shared, const Segment* segments, int64_t n, int64_t number) {
  const ConvWork& work = shared.work;
  const PanelValues& panel = shared.panels[static_cast<size_t>(number - shared.first_panel)];
  const int8_t* weights = work.data + number * work.panel_bytes;
  const uint8_t* x = work.x + number / work.block_panels * work.block_in;
  alignas(64) int32_t sums[2 * kSegment * kPanel];
  const int64_t zero = 0, row_bytes = work.run_groups * 4;
  TileInput in = {{},          work.step.x, work.offsets, work.runs, work.run_groups, work.first_half, panel.channels,
                  panel.colsum};
  if (work.gather) in = {{}, row_bytes, &zero, 1, work.run_groups, 0, panel.channels, panel.colsum};
#if QK_PATH != QK_PATH_SCALAR
  const bool clamped = shared.has_clamped && panel.bounded;
  shared.clamped.inside = panel.inside();
#endif
#if QK_PATH == QK_PATH_AVX512VNNI
  shared.floats.inside = panel.inside();
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
#if QK_PATH != QK_PATH_SCALAR
    if (clamped) {
      for (int s = 0; s < count; ++s) shared.place_codes(s, segments[i + s].at, panel);
      kTilesOfCodes[c][h](in, weights, panel, shared.clamped);
      i += count;
      continue;
    }
#endif
#if QK_PATH == QK_PATH_AVX512VNNI
    if (shared.has_floats) {
      for (int s = 0; s < count; ++s) shared.place_floats(s, segments[i + s].at, panel);
      kTilesOfFloats[c][h](in, weights, panel, shared.floats);
      i += count;
      continue;
    }
#endif
    kConvTiles[c][h](in, weights, panel.start, sums);
    for (int s = 0; s < count; ++s) finish(shared, sums + s * width * kPanel, width, panel, segments[i + s].at);
    i += count;
  }
}

void convolve(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
              int64_t last_panel) {
  Shared shared(work, first_panel, last_panel);
  for_each_block(work, first_segment, last_segment, last_panel - first_panel, [&](const Segment* segments, int64_t n) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) convolve_panel(shared, segments, n, panel);
  });
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
