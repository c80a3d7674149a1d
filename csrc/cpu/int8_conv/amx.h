// The convolution of the amx path: products by tiles, and the avx512vnni path's epilogues.
#include "cpu/int8_conv/conv_segments.h"
#include "cpu/int8_conv/conv_tile.h"
#include "cpu/int8_gemm/amx.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#ifdef QK_HAS_AMX
// Segments whose pixels lie in one tile: their inputs are evenly spaced, as those of neighbouring rows of an image are.
// The rows of a tile between two segments are computed for nothing.
struct PixelTile {
  int64_t x;
  int64_t first, last;  // segments
  int64_t rows;
};

inline int64_t list_tiles(const ConvWork& work, const Segment* segments, int64_t n, PixelTile* tiles) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t width = segments[i].width;
    if (count) {
      PixelTile& last = tiles[count - 1];
      const int64_t apart = segments[i].at.x - last.x;
      if (work.step.x > 0 && apart >= last.rows * work.step.x && apart % work.step.x == 0 &&
          apart / work.step.x + width <= kAmxRows) {
        last.last = i + 1;
        last.rows = apart / work.step.x + width;
        continue;
      }
    }
    tiles[count++] = {segments[i].at.x, i, i + 1, width};
  }
  return count;
}

// What all tiles of a call share.
struct SharedAmx : Shared {
  AmxRun run;
  AmxTiles tiles;
  std::vector<AmxStep> steps;  // of a panel
  std::vector<int8_t> padded;  // the last weights of each panel's runs
  int64_t last_pixel;          // the offset of the last one in x

  SharedAmx(const ConvWork& w, int64_t first, int64_t last) : Shared(w, first, last), run(w.run_groups), tiles(run) {
    steps.resize(static_cast<size_t>(work.runs * run.tiles));
    last_pixel = (work.width - 1) * work.step.x;
    for (int d = 0; d < 3; ++d) last_pixel += (work.outer[d] - 1) * work.outer_steps[d].x;
    if (!run.padded()) return;
    padded.resize(static_cast<size_t>((last - first) * work.runs * run.tile_bytes()));
    for (int64_t panel = first; panel < last; ++panel)
      for (int64_t r = 0; r < work.runs; ++r) {
        const int64_t group = r * work.run_groups + work.run_groups - run.last;
        run.pad(work.data + panel * work.panel_bytes + group * kPanel * 4, padded_of(panel, r));
      }
  }

  int8_t* padded_of(int64_t panel, int64_t r) {
    return padded.data() + ((panel - first_panel) * work.runs + r) * run.tile_bytes();
  }

  void set_steps(int64_t panel) {
    AmxStep* step = steps.data();
    for (int64_t r = 0; r < work.runs; ++r) {
      const int8_t* weights = work.data + panel * work.panel_bytes + r * work.run_groups * kPanel * 4;
      for (int64_t t = 0; t < run.tiles; ++t)
        *step++ = {work.offsets[r] + t * run.groups * 4, weights + t * run.tile_bytes()};
      if (run.padded()) step[-1].weights = padded_of(panel, r);
    }
  }
};

template <bool kResidual>
inline void finish_codes(const int32_t* sums, int64_t width, const PanelValues& panel, const ClampedCodes& to) {
  const CodesOfSums<kResidual> of(panel, to);
  const auto words = [&](int64_t pixel) QK_INLINE {
    const int32_t* at = sums + pixel * kPanel;
    const uint8_t* residual = kResidual ? to.residual[0] + pixel * to.residual_step : nullptr;
    return of.words(_mm512_load_si512(at), _mm512_load_si512(at + 16), residual);
  };
  for (int64_t pixel = 0; pixel < width; pixel += 2) {
    const __m512i two = of.bytes(words(pixel), words(std::min(pixel + 1, width - 1)));
    of.store(_mm512_castsi512_si256(two), to.codes[0] + pixel * to.step);
    if (pixel + 1 < width) of.store(_mm512_extracti64x4_epi64(two, 1), to.codes[0] + (pixel + 1) * to.step);
  }
}

// One panel and a list of tiles of at most `most` rows.
void convolve_panel(SharedAmx& shared, const Segment* segments, const PixelTile* tiles, int64_t n, int64_t most,
                    int64_t number) {
  const ConvWork& work = shared.work;
  const PanelValues& panel = shared.panels[static_cast<size_t>(number - shared.first_panel)];
  const uint8_t* x = work.x + number / work.block_panels * work.block_in;
  alignas(64) int32_t sums[2 * kAmxRows * kPanel];
  const bool clamped = shared.has_clamped && panel.bounded;
  shared.clamped.inside = panel.inside();
  shared.set_steps(number);
  // Other configurations cost as much as many products. So tiles of fewer rows read more pixels too, if there are any.
  const auto enough = [&](const PixelTile& tile) { return tile.x + (most - 1) * work.step.x <= shared.last_pixel; };
  for (int64_t i = 0; i < n;) {
    const int64_t count = i + 1 < n && enough(tiles[i]) && enough(tiles[i + 1]) ? 2 : 1;
    shared.tiles.set_rows(enough(tiles[i]) ? most : tiles[i].rows);
    const uint8_t* rows[2] = {x + tiles[i].x, x + tiles[i + count - 1].x};
    multiply_tiles(count, panel.channels > 16, rows, work.step.x, shared.steps.data(),
                   static_cast<int64_t>(shared.steps.size()), panel.start, sums);
    for (int64_t t = 0; t < count; ++t, ++i)
      for (int64_t s = tiles[i].first; s < tiles[i].last; ++s) {
        const Segment& segment = segments[s];
        const int64_t row = work.step.x ? (segment.at.x - tiles[i].x) / work.step.x : 0;
        const int32_t* of_segment = sums + (t * kAmxRows + row) * kPanel;
        if (!clamped) {
          finish(shared, of_segment, segment.width, panel, segment.at);
          continue;
        }
        shared.place_codes(0, segment.at, panel);
        if (shared.clamped.residual[0])
          finish_codes<true>(of_segment, segment.width, panel, shared.clamped);
        else
          finish_codes<false>(of_segment, segment.width, panel, shared.clamped);
      }
  }
}

void convolve_amx(const ConvWork& work, int64_t first_segment, int64_t last_segment, int64_t first_panel,
                  int64_t last_panel) {
  SharedAmx shared(work, first_panel, last_panel);
  PixelTile tiles[kSegmentsAtOnce];
  for_each_block(work, first_segment, last_segment, last_panel - first_panel, [&](const Segment* segments, int64_t n) {
    const int64_t count = list_tiles(work, segments, n, tiles);
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, tiles[i].rows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      convolve_panel(shared, segments, tiles, count, most, panel);
  });
}

// Whether tiles take less time than dot products. A tile is one segment here, although several may share one.
inline bool worth_amx(const ConvWork& work) {
  if (work.gather) return false;
  const int64_t groups = work.runs * work.run_groups / (work.first_half ? 2 : 1);
  return amx_pays(work.segments(), work.runs * AmxRun(work.run_groups).tiles, work.rows() * work.width, groups);
}
#endif

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
