// Depthwise convolution a strip of a row at a time: the strip's columns are interleaved once, so that each serves all
// outputs that read it; then tiles of neighbouring outputs are multiplied with each weight.
#include <memory>
#include <numeric>

#include "cpu/int8_conv/depthwise_block.h"

#if QK_PATH != QK_PATH_SCALAR
namespace qkernels::QK_NAMESPACE {
namespace {

constexpr int64_t kStrip = 16;             // most outputs of a strip
constexpr int64_t kStripBytes = 20 << 10;  // of interleaved codes: they share a first-level cache with sums and weights

// The columns of 4 rows that are interleaved for a strip, in memory [4][columns] vectors. Output i reads for product k
// the column i * output_step + k * product_step.
struct StripGroup {
  const uint8_t* data;
  int64_t products, columns, output_step, product_step;
  int64_t run, in_run, from_run_to_run;  // columns of evenly spaced pixels, and the pixels between them

  StripGroup(const DepthwiseGroup& group, int64_t stride, int64_t outputs) : data(nullptr), products(group.products) {
    const int64_t unit = std::gcd(stride, group.dilation);
    output_step = stride / unit;
    product_step = group.dilation / unit;
    columns = run = (outputs - 1) * output_step + (products - 1) * product_step + 1;
    in_run = unit;
    from_run_to_run = 0;
    if (columns <= outputs * products) return;
    // With strides or dilations beyond the kernel no two outputs share a column.
    output_step = 1;
    product_step = run = outputs;
    columns = outputs * products;
    in_run = stride;
    from_run_to_run = group.dilation;
  }

  int64_t bytes() const { return columns * 4 * kVectorBytes; }
};

// Interleaves the columns of a strip that begins at `pixel`.
template <int Width>
inline void interleave_columns(const DepthwiseRow& row, const DepthwiseGroup& group, const uint8_t* codes,
                               int64_t pixel, const StripGroup& strip, const Parts<Width>& parts, uint8_t* to) {
  const int64_t last = row.last - parts.first[Parts<Width>::kCount - 1] * row.stride;
  const int64_t vector_step = strip.columns * kVectorBytes;
  const bool single = group.row_pixels[1] > 0;
  for (int64_t first = 0; first < strip.columns; first += strip.run, pixel += strip.from_run_to_run) {
    int64_t at = pixel;
    for (int64_t c = 0; c < strip.run; ++c, at += strip.in_run, to += kVectorBytes) {
      const uint8_t* from = codes + std::min(at, last) * row.pixel_bytes;
      Codes rows[4];
      for (int r = 0; r < 4; ++r) {
        if (single) from = codes + std::min(at + group.row_pixels[r], last) * row.pixel_bytes;
        rows[r] = load_codes<Width>(from + group.row_bytes[r], parts.bytes);
      }
      Interleaved v[4];
      interleave(rows, v);
      for (int q = 0; q < 4; ++q) store(to + q * vector_step, v[q]);
    }
  }
}

// Adds the products of a group whose columns are neighbours, each loaded once for all outputs that read it.
template <int Products, int Stride, int N>
QK_INLINE inline void add_dense_group(Sums (&sums)[N], const uint8_t* column, const uint8_t* weights) {
  Weights w[Products];
#pragma GCC unroll 8
  for (int k = 0; k < Products; ++k) w[k] = load_interleaved(weights + k * 4 * kVectorBytes);
#pragma GCC unroll 32
  for (int c = 0; c < (N - 1) * Stride + Products; ++c) {
    const Interleaved v = load_interleaved(column + c * kVectorBytes);
#pragma GCC unroll 8
    for (int k = 0; k < Products; ++k)
      if ((c - k) % Stride == 0 && c >= k && c - k < N * Stride)
        sums[(c - k) / Stride] = multiply_add(sums[(c - k) / Stride], v, w[k]);
  }
}

// Does so if the group has as many products, and returns whether it did.
template <int Products, int N>
QK_INLINE inline bool add_dense(Sums (&sums)[N], const StripGroup& group, const uint8_t* column,
                                const uint8_t* weights) {
  if (group.products != Products || group.product_step != 1 || group.output_step > 2) return false;
  if (group.output_step == 1)
    add_dense_group<Products, 1>(sums, column, weights);
  else
    add_dense_group<Products, 2>(sums, column, weights);
  return true;
}

// The sums of N outputs from the one with number `first` on: what is at `from` and all products of the groups. Weights
// are [product][4] vectors; sums are kChannels apart, and `from` from_step.
using Tile = void (*)(const StripGroup* groups, int64_t n_groups, int64_t first, const uint8_t* weights,
                      const int32_t* from, int64_t from_step, int32_t* to);

template <int N>
void tile(const StripGroup* groups, int64_t n_groups, int64_t first, const uint8_t* weights, const int32_t* from,
          int64_t from_step, int32_t* to) {
  for (int q = 0; q < 4; ++q, weights += kVectorBytes, from += kLanes * 4, to += kLanes * 4) {
    Sums sums[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sums[i] = load_sums(from + i * from_step);
    const uint8_t* w = weights;
    for (int64_t g = 0; g < n_groups; ++g) {
      const StripGroup& group = groups[g];
      const int64_t output_step = group.output_step * kVectorBytes, product_step = group.product_step * kVectorBytes;
      const uint8_t* column = group.data + q * group.columns * kVectorBytes + first * output_step;
      if (add_dense<3>(sums, group, column, w) ||
          (kManyRegisters && (add_dense<5>(sums, group, column, w) || add_dense<7>(sums, group, column, w)))) {
        w += group.products * 4 * kVectorBytes;
        continue;
      }
      for (int64_t k = 0; k < group.products; ++k, column += product_step, w += 4 * kVectorBytes) {
        const Weights weight = load_interleaved(w);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) sums[i] = multiply_add(sums[i], load_interleaved(column + i * output_step), weight);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(to + i * kChannels, sums[i]);
  }
}

template <int... N>
constexpr std::array<Tile, sizeof...(N)> make_tiles(std::integer_sequence<int, N...>) {
  return {tile<N + 1>...};
}
constexpr auto kTiles = make_tiles(std::make_integer_sequence<int, kMostOutputs>());

// Tiles of equal size: 9 outputs are 5 + 4 and not 8 + 1.
inline void add_products(const StripGroup* groups, int64_t n_groups, int64_t outputs, const uint8_t* weights,
                         const int32_t* from, int64_t from_step, int32_t* sums) {
  const int64_t tiles = (outputs + kMostOutputs - 1) / kMostOutputs;
  for (int64_t i = 0, first = 0, n; i < tiles; ++i, first += n) {
    n = (outputs - first) / (tiles - i);
    kTiles[static_cast<size_t>(n - 1)](groups, n_groups, first, weights, from + first * from_step, from_step,
                                       sums + first * kChannels);
  }
}

inline uint8_t* aligned(uint8_t* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

template <int Width, typename Sink>
void convolve_in_strips(const DepthwiseRow& row, const DepthwiseTask& task, const Parts<Width>& parts,
                        const BlockValues<Width>& values, const CodeRule& rule) {
  const int64_t strips = (parts.outputs + kStrip - 1) / kStrip, most = (parts.outputs + strips - 1) / strips;
  const int64_t n_groups = static_cast<int64_t>(row.groups.size());
  std::vector<StripGroup> groups;
  int64_t bytes = kStripBytes;
  for (const DepthwiseGroup& group : row.groups) {
    groups.emplace_back(group, row.stride, most);
    bytes = std::max(bytes, groups.back().bytes());
  }
  const int64_t weight_bytes = row.products * 4 * kVectorBytes;
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[static_cast<size_t>(bytes + weight_bytes + 64)]);
  uint8_t *const weights = aligned(scratch.get()), *const strip = weights + weight_bytes;
  for (int64_t i = 0; i < row.products * 4; ++i)
    store(weights + i * kVectorBytes, load_weights<Width>(task.weights + i * task.width));
  alignas(64) int32_t sums[kStrip * kChannels];

  for (int64_t h = 0; h < task.rows; ++h) {
    const uint8_t* codes = task.codes + h * task.row_step;
    Sink sink{parts, values, rule, moved(task.output, h, 0)};
    for (int64_t i = 0, output = 0, outputs; i < strips; ++i, output += outputs) {
      outputs = (parts.outputs - output) / (strips - i);
      const uint8_t* w = weights;
      for (int64_t g = 0, end = 0; g < n_groups; g = end) {
        uint8_t* to = strip;
        do {
          groups[end].data = to;
          interleave_columns(row, row.groups[end], codes, output * row.stride, groups[end], parts, to);
          to += groups[end].bytes();
        } while (++end < n_groups && to - strip + groups[end].bytes() <= bytes);
        add_products(groups.data() + g, end - g, outputs, w, g == 0 ? values.sums_start : sums, g == 0 ? 0 : kChannels,
                     sums);
        for (; g < end; ++g) w += groups[g].products * 4 * kVectorBytes;
      }
      for (int64_t j = 0; j < outputs; ++j) {
        Sums of_output[4];
        for (int q = 0; q < 4; ++q) of_output[q] = load_sums(sums + j * kChannels + q * kLanes * 4);
        sink(output + j, of_output);
      }
    }
  }
}

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
#endif
