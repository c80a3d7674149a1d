// The convolution kernels of one path: the walk over segments and panels.
#include "cpu/int8_conv/conv_epilogue.h"
#include "cpu/int8_conv/conv_tile.h"
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

struct Segment {
  int64_t row, first, width;
};

// Segments are numbered so that neighbours have equal widths as far as possible: where a row's segments differ, those
// of two rows alternate.
inline Segment segment(const ConvWork& work, int64_t number) {
  const int64_t count = work.segments_of_row(), width = work.width / count, wider = work.width % count;
  int64_t row = number / count, at = number % count;
  if (wider) {
    row = number / (2 * count) * 2;
    at = number % (2 * count);
    if (row + 1 < work.rows()) {
      row += at & 1;
      at /= 2;
    }
  }
  return {row, at * width + std::min(at, wider), width + (at < wider)};
}

inline int64_t offset(const WalkStrides& strides, const ConvWork& work, const Segment& s) {
  const int64_t h = s.row % work.outer[2], above = s.row / work.outer[2];
  return above / work.outer[1] * strides.outer[0] + above % work.outer[1] * strides.outer[1] + h * strides.outer[2] +
         s.first * strides.w;
}

// Copies the runs of a segment's pixels to rows of packed K.
inline void gather(const ConvWork& work, const uint8_t* pixel, int64_t width, uint8_t* rows) {
  const int64_t together = work.runs / work.packed_runs;
  for (int64_t i = 0; i < width; ++i, pixel += work.x_strides.w)
    for (int64_t r = 0; r < work.runs; ++r) {
      uint8_t* to =
          rows + i * work.run_groups * 4 + r / together * k_groups(work.packed_run) * 4 + r % together * work.run;
      std::memcpy(to, pixel + work.offsets[r], static_cast<size_t>(work.run));
    }
}

inline SegmentOutput output_of(const ConvWork& work, const Segment& s, int64_t channel) {
  const ConvOutput& o = *work.output;
  const int64_t residual = offset(work.residual, work, s) + channel;
  return {o.floats ? o.floats + offset(work.floats, work, s) + channel * o.floats_c : nullptr,
          o.codes.data ? o.codes.data + offset(work.codes, work, s) + channel : nullptr,
          o.residual ? o.residual + residual : nullptr, o.residual_codes ? o.residual_codes + residual : nullptr};
}

void convolve(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
              int64_t last_panel) {
  const int64_t zero = 0, row_bytes = work.run_groups * 4;
  std::vector<uint8_t> rows(work.gather ? static_cast<size_t>(2 * kSegment * row_bytes) : 0);
  alignas(64) int32_t sums[2 * kSegment * kPanel];
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t block = p / work.block_panels, at = p % work.block_panels * kPanel;
    const int64_t first = block * work.block_out + at;
    const int64_t end = std::min(work.out_channels, (block + 1) * work.block_out);
    const PanelValues panel(*work.output, first, std::min<int64_t>(kPanel, end - first), work.wide);
    const int8_t* weights = work.data + p * work.panel_bytes;
    const uint8_t* x = work.x + block * work.block_in;
    for (int64_t i = first_segment; i < last_segment;) {
      const Segment segments[2] = {segment(work, i), segment(work, std::min(i + 1, last_segment - 1))};
      const int64_t width = segments[0].width;
      const int count = i + 1 < last_segment && segments[1].width == width ? 2 : 1;
      TileInput in = {{}, work.x_strides.w, work.offsets, work.runs, work.run_groups};
      for (int s = 0; s < count; ++s) {
        in.pixels[s] = x + offset(work.x_strides, work, segments[s]);
        if (work.gather) {
          uint8_t* to = rows.data() + s * kSegment * row_bytes;
          gather(work, in.pixels[s], width, to);
          in.pixels[s] = to;
        }
      }
      if (work.gather) {
        in.step = row_bytes;
        in.offsets = &zero;
        in.runs = 1;
      }
      kConvTiles[static_cast<size_t>(count - 1)][static_cast<size_t>(width - 1)](in, weights, panel.start, sums);
      for (int s = 0; s < count; ++s)
        finish_segment(sums + s * width * kPanel, width, panel, work, output_of(work, segments[s], first));
      i += count;
    }
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
