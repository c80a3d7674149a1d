// The linear layer on int4 weights for up to 64 rows of x in a half type, where reading the weight takes most time.
//
// The weight is the left operand of the instruction m16n8k16, so that few rows of x waste little: a warp has 32 output
// channels and all rows of x. Codes become numbers in registers, exactly: the bits of a code replace the lowest bits of
// the number 1024 (fp16) or 128 (bf16), which is then subtracted. Tensor cores sum the products of a half block, which
// is `half` consecutive k of one group; then the group's scale multiplies the sum.
//
// In the weight's layout, halves (qkernels/layouts.py), a byte holds the codes of k and of k + half. A thread reads 16
// or 8 bytes of a channel. It multiplies their low bits by one half block of x, and their high bits by the next. Within
// a half block both operands take k in the same order, but not in ascending order: of the four bytes of a word, 0 and 2
// make one pair, and 1 and 3 the other.
//
// A tile is 128 channels by 128 k, and the tiles of the same channels are a column. Each block takes a stripe of
// consecutive tiles, which may go on from one column into the next; all but the last stripe have the same length. A
// block writes its sums of each column in fp32. A second kernel adds up the sums of all blocks in the order of k: the
// same bits every time.
#include "common.cuh"

namespace qkernels {
namespace {

constexpr int kBlock = 128;         // output channels of a tile
constexpr int kDepth = 128;         // k of a tile
constexpr int kBytes = kDepth / 2;  // of a channel in a tile
constexpr int kStrips = 2;          // of 16 channels each, for a warp
constexpr int kMostRows = 64;
constexpr int kMostShared = 99 << 10;  // bytes of shared memory that a block can have on every GPU

struct Linear {
  const void* x;             // [m, k]
  const uint8_t* data;       // [n, length]
  RealInput scale, minimum;  // [groups, n]; minimum's data may be null
  const int8_t* zero_point;  // [groups, n], or null
  RealInput bias;            // [n]; its data may be null
  RealOutput y;              // [m, n]
  float* partial;            // [block + column][rows][kBlock]: the sums of a block in a column
  int rows;                  // of a tile, m or more
  int m, n, k, length;
  int steps;             // tiles along k
  int halves_per_group;  // half blocks
  int64_t tiles;
  Divider per_column, per_block;  // tiles
};

// A tile in shared memory. Rows of x are padded, so that eight threads that read 16 bytes each at once read different
// banks. Rows of the weight need no padding for that.
template <typename S, int kHalf, int kRows>
struct alignas(16) Stage {
  static constexpr int kHalves = kDepth / kHalf;
  uint8_t data[kBytes / kHalf][kBlock][kHalf];
  S x[kRows][kDepth + (kHalf == 64 ? 8 : 32)];
  float scale[kHalves][kBlock];
  unsigned other[kHalves][kBlock];  // the minimum, or the number that dequantization adds for a zero point
};

template <int kRows>
constexpr int kStages = kRows == 64 ? 3 : 4;
template <int kRows>
constexpr int kThreadsOf = kRows == 64 ? 2 * kBlock : kBlock;  // two threads share 64 rows
template <int kRows>
constexpr int kBlocks = kRows == 8    ? 4
                        : kRows == 16 ? 3
                        : kRows == 32 ? 2
                                      : 1;  // that a multiprocessor holds, at least

// A code's four bits replace the lowest bits of this number, of which the last one counts 1.
template <typename S>
constexpr int kBase = std::is_same_v<S, Half> ? 1024 : 128;
template <typename S>
constexpr unsigned kBaseBits = std::is_same_v<S, Half> ? 0x64006400 : 0x43004300;
template <typename S>
constexpr unsigned kOne = std::is_same_v<S, Half> ? 0x3c003c00 : 0x3f803f80;

template <typename S>
__device__ __forceinline__ unsigned pair_of(float value) {
  const float values[2] = {value, value};
  const Vec<S, 2> pair = narrow<S>(values);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// Turns the codes at bits 0–3 and 16–19 into two numbers. It flips their sign bits, which adds 8 to each, and then adds
// `added`. All of this is exact where zero points are −8 to 7, as those of packed weights are.
template <typename S>
__device__ __forceinline__ unsigned dequantize_pair(unsigned word, unsigned added) {
  return fma_pair<S>(and_xor(word, 0x000f000f, kBaseBits<S> | 0x00080008), kOne<S>, added);
}

// A place in a stripe: a column, a tile of it, and the group of the tile's first half block.
struct Cursor {
  int column, step, group, left;  // left: half blocks of the group, from this one on

  __device__ __forceinline__ Cursor(const Linear& a, int64_t tile)
      : column(static_cast<int>(a.per_column.divide(tile))), step(static_cast<int>(tile) - column * a.steps) {}
  __device__ __forceinline__ void find_group(const Linear& a, int halves) {
    group = step * halves / a.halves_per_group;
    left = (group + 1) * a.halves_per_group - step * halves;
  }
};

template <typename S, int kHalf, int kRows, bool kMinimum>
class Stripe {
 public:
  using Tile = Stage<S, kHalf, kRows>;

  __device__ __forceinline__ Stripe(const Linear& linear, int64_t tile)
      : a_(linear), ahead_(linear, tile), policy_(evict_first()) {
    ahead_.find_group(a_, kHalves);
    clear();
  }

  // The scales and the zero points or minima of a tile for the channel of this thread, as they were read.
  struct Parameters {
    unsigned scale[Tile::kHalves], other[Tile::kHalves];
  };

  // Starts to read the next tile of the stripe.
  __device__ __forceinline__ void read(Tile& to, Parameters& parameters) {
    const int thread = static_cast<int>(threadIdx.x);
    const int first = ahead_.column * kBlock, byte = ahead_.step * kBytes + thread % 4 * 16;
    const int channel = first + thread / 4;
    const uint8_t* from = a_.data + static_cast<int64_t>(channel) * a_.length + byte;
    uint8_t* data = &to.data[thread % 4 * 16 / kHalf][thread / 4][thread % 4 * 16 % kHalf];
#pragma unroll
    for (int i = 0; i < 4; i += kShare) {
      const bool there = channel + 32 * i < a_.n && byte < a_.length;
      copy_async(data + 32 * i * kHalf, there ? from + static_cast<int64_t>(32 * i) * a_.length : a_.data, there,
                 policy_);
    }
    const int k = ahead_.step * kDepth + thread % 16 * 8;
#pragma unroll
    for (int i = 0; i < kRows / 8; i += kShare) {
      const int row = thread / 16 + 8 * i;
      const bool there = row < a_.m && k < a_.k;
      const S* x = static_cast<const S*>(a_.x);
      copy_async(&to.x[row][thread % 16 * 8], there ? x + static_cast<int64_t>(row) * a_.k + k : x, there);
    }
    const bool there = thread < kBlock && first + thread < a_.n;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int64_t at = static_cast<int64_t>(ahead_.group) * a_.n + first + thread;
      const bool used = there && (ahead_.step * kHalves + h) * kHalf < a_.k;
      parameters.scale[h] = used ? a_.scale.bits(at) : 0;
      if constexpr (kMinimum) {
        parameters.other[h] = used ? a_.minimum.bits(at) : 0;
      } else if (a_.zero_point) {
        parameters.other[h] = used ? static_cast<unsigned>(static_cast<int>(a_.zero_point[at])) : 0;
      }
      if (--ahead_.left == 0) {
        ++ahead_.group;
        ahead_.left = a_.halves_per_group;
      }
    }
    if (++ahead_.step == a_.steps) {
      ++ahead_.column;
      ahead_.step = ahead_.group = 0;
      ahead_.left = a_.halves_per_group;
    }
  }

  // Converts the parameters of a tile and writes them to shared memory.
  __device__ __forceinline__ void keep(Tile& to, const Parameters& parameters) const {
    if (threadIdx.x >= kBlock) return;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      to.scale[h][threadIdx.x] = a_.scale.value_of(parameters.scale[h]);
      if constexpr (kMinimum) {
        const float minimum = a_.minimum.value_of(parameters.other[h]);
        memcpy(&to.other[h][threadIdx.x], &minimum, sizeof minimum);
      } else if (a_.zero_point) {
        const int zero_point = static_cast<int>(parameters.other[h]);
        to.other[h][threadIdx.x] = pair_of<S>(static_cast<float>(-(kBase<S> + 8) - zero_point));
      }
    }
  }

  __device__ __forceinline__ void add(const Tile& tile) {
#pragma unroll(kMinimum ? 1 : kHalves / 2)  // with minima, unrolling takes more registers than there are
    for (int block = 0; block < kHalves / 2; ++block) {
      Vec<unsigned, kWords> words[kStrips][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          words[s][r] = load_vector<kWords>(
              reinterpret_cast<const unsigned*>(&tile.data[block][channel(s, r)][lane() % 4 * kWords * 4]));
      add_half<0>(tile, 2 * block, words);
      add_half<4>(tile, 2 * block + 1, words);
    }
  }

  // Writes the sums of a column for the second kernel, and begins anew.
  __device__ __forceinline__ void write(int column) {
    float* partial = a_.partial + (static_cast<int64_t>(blockIdx.x) + column) * kRows * kBlock;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = first_row() + 8 * t + lane() % 4 * 2 + c;
        if (row >= a_.m) continue;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
          for (int r = 0; r < 2; ++r) partial[row * kBlock + channel(s, r)] = sums_[s][t][2 * r + c];
      }
    clear();
  }

 private:
  static constexpr int kHalves = Tile::kHalves;
  static constexpr int kWords = kHalf / 16;  // that a thread reads of a channel and two half blocks
  static constexpr int kShare = kThreadsOf<kRows> / kBlock;
  static constexpr int kTiles = kRows / 8 / kShare;  // of 8 rows each, whose sums this thread holds

  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  // The first row and the channels of a tile that this thread holds sums of.
  __device__ static __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / kBlock * (8 * kTiles); }
  __device__ static __forceinline__ int channel(int strip, int r) {
    return static_cast<int>(threadIdx.x) % kBlock / kWarp * (16 * kStrips) + 16 * strip + 8 * r + lane() / 4;
  }

  // Adds one half block: that of the words' low bits (kShift 0) or of their high bits (kShift 4).
  template <int kShift>
  __device__ __forceinline__ void add_half(const Tile& tile, int half,
                                           const Vec<unsigned, kWords> (&words)[kStrips][2]) {
    float part[kStrips][kTiles][4] = {}, x_sum[kTiles][4] = {};
    unsigned added[kStrips][2];
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        added[s][r] = pair_of<S>(static_cast<float>(-kBase<S> - (kMinimum ? 0 : 8)));
        if (!kMinimum && a_.zero_point) added[s][r] = tile.other[half][channel(s, r)];
      }
#pragma unroll
    for (int w = 0; w < kWords; w += 2) {
      unsigned weight[2][kStrips][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            weight[i][s][j] = dequantize_pair<S>(words[s][j % 2].v[w + i] >> (kShift + j / 2 * 8), added[s][j % 2]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const auto x = load_vector<4>(reinterpret_cast<const unsigned*>(
            &tile.x[first_row() + 8 * t + lane() / 4][half * kHalf + lane() % 4 * (4 * kWords) + 4 * w]));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned pairs[2] = {__byte_perm(x.v[2 * i], x.v[2 * i + 1], 0x5410),
                                     __byte_perm(x.v[2 * i], x.v[2 * i + 1], 0x7632)};
#pragma unroll
          for (int s = 0; s < kStrips; ++s) mma<S>(part[s][t], weight[i][s], pairs);
          if constexpr (kMinimum) {
            constexpr unsigned kOnes[4] = {kOne<S>, kOne<S>, kOne<S>, kOne<S>};
            mma<S>(x_sum[t], kOnes, pairs);
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scale = tile.scale[half][channel(s, r)];
        float minimum = 0;
        if constexpr (kMinimum) memcpy(&minimum, &tile.other[half][channel(s, r)], sizeof minimum);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int c = 2 * r; c < 2 * r + 2; ++c) {
            float& sum = sums_[s][t][c];
            if constexpr (kMinimum) sum = fmaf(minimum, x_sum[t][c], sum);
            sum = fmaf(scale, part[s][t][c], sum);
          }
      }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int c = 0; c < 4; ++c) sums_[s][t][c] = 0;
  }

  const Linear& a_;
  Cursor ahead_;
  uint64_t policy_;
  float sums_[kStrips][kTiles][4];
};

template <typename S, int kHalf, int kRows, bool kMinimum>
__global__ void __launch_bounds__(kThreadsOf<kRows>, kBlocks<kRows>)
    int4_linear_kernel(const __grid_constant__ Linear a) {
  let_next_start();
  using Work = Stripe<S, kHalf, kRows, kMinimum>;
  constexpr int kFlight = kStages<kRows>;
  auto* stages = reinterpret_cast<typename Work::Tile*>(dynamic_shared());
  const int64_t length = a.per_block.divisor, first = blockIdx.x * length;
  const int count = static_cast<int>(length < a.tiles - first ? length : a.tiles - first);
  Work work(a, first);
  Cursor at(a, first);

  // The parameters of a tile are read when its copies start. An iteration later, when they have arrived, they are
  // written to shared memory.
  typename Work::Parameters parameters[kFlight - 1];
#pragma unroll
  for (int i = 0; i < kFlight - 1; ++i) {
    if (i < count) work.read(stages[i], parameters[i]);
    commit_copies();
  }
#pragma unroll
  for (int i = 0; i < kFlight - 2; ++i)
    if (i < count) work.keep(stages[i], parameters[i]);
  typename Work::Parameters& last = parameters[kFlight - 2];

  int slot = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    wait_copies<kFlight - 2>();
    __syncthreads();  // from here on all threads see this tile, and none still reads the one before
    const int before = slot == 0 ? kFlight - 1 : slot - 1, newest = before == 0 ? kFlight - 1 : before - 1;
    if (i + kFlight - 2 < count) work.keep(stages[newest], last);
    if (i + kFlight - 1 < count) work.read(stages[before], last);
    commit_copies();
    work.add(stages[slot]);
    slot = slot == kFlight - 1 ? 0 : slot + 1;
    if (++at.step == a.steps || i == count - 1) {
      work.write(at.column++);
      at.step = 0;
    }
  }
}

// Adds up the sums that blocks wrote for a row of x and a column, and writes y.
__global__ void __launch_bounds__(kBlock) int4_sum_kernel(const __grid_constant__ Linear a) {
  const int64_t column = blockIdx.x, row = blockIdx.y, n = column * kBlock + threadIdx.x, first = column * a.steps;
  const int64_t begin = a.per_block.divide(first), end = a.per_block.divide(first + a.steps - 1);
  wait_for_previous();
  if (n >= a.n) return;
  float sum = 0;
#pragma unroll 4
  for (int64_t block = begin; block <= end; ++block)
    sum += a.partial[((block + column) * a.rows + row) * kBlock + threadIdx.x];
  a.y.set(row * a.n + n, a.bias.data ? sum + a.bias.get(n) : sum);
}

template <typename S, int kHalf, int kRows, bool kMinimum>
void run(const Gpu& gpu, Linear a, Device device) {
  constexpr int kShared = kStages<kRows> * static_cast<int>(sizeof(Stage<S, kHalf, kRows>));
  static_assert(kShared <= kMostShared);
  const int64_t columns = ceil_div(a.n, kBlock);
  a.tiles = columns * a.steps;
  // The runtime reserves 1 KiB of shared memory for each block. A stripe has at least as many tiles as are in flight at
  // once, unless some multiprocessors would then have no stripe.
  const int resident = std::clamp(gpu.shared_of_processor() / (kShared + 1024), 1, kBlocks<kRows>);
  a.per_column = Divider(a.steps);
  a.per_block = Divider(std::max(ceil_div(a.tiles, int64_t{gpu.processors()} * resident),
                                 std::min<int64_t>(kStages<kRows>, ceil_div(a.tiles, gpu.processors()))));
  const int64_t blocks = ceil_div(a.tiles, a.per_block.divisor);
  const Tensor partial = empty({blocks + columns, kRows, kBlock}, ScalarType::Float, device);
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.rows = kRows;
  gpu.launch_shared(int4_linear_kernel<S, kHalf, kRows, kMinimum>, blocks, 1, kThreadsOf<kRows>, kShared, a);
  gpu.launch_early(int4_sum_kernel, columns, a.m, kBlock, a);
}

template <typename S, int kHalf, int kRows>
void run_kind(const Gpu& gpu, const Linear& a, Device device) {
  if (a.minimum.data) {
    run<S, kHalf, kRows, true>(gpu, a, device);
  } else {
    run<S, kHalf, kRows, false>(gpu, a, device);
  }
}

template <typename S, int kHalf>
void run_rows(const Gpu& gpu, const Linear& a, Device device) {
  if (a.m <= 8) return run_kind<S, kHalf, 8>(gpu, a, device);
  if (a.m <= 16) return run_kind<S, kHalf, 16>(gpu, a, device);
  if (a.m <= 32) return run_kind<S, kHalf, 32>(gpu, a, device);
  run_kind<S, kHalf, 64>(gpu, a, device);
}

template <typename S>
void run_half(const Gpu& gpu, const Linear& a, Device device, int half) {
  if (half == 64) return run_rows<S, 64>(gpu, a, device);
  run_rows<S, 32>(gpu, a, device);
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns, Device device) {
  QK_CHECK(t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == columns && t.is_contiguous(), name, ": got shape ",
           shape_of(t), "; accepted: contiguous [", rows, ", ", columns, "]");
  check_device(name, t, device);
}

bool is_half_or_float(ScalarType dtype) { return is_floating(dtype) && dtype != ScalarType::Double; }

// `t` itself if it is contiguous and begins at a multiple of 16 bytes, as memory from torch does; else such a copy.
Tensor to_aligned(const Tensor& t) {
  if (t.is_contiguous() && is_aligned({t.const_data_ptr()})) return t;
  Tensor copy = empty(to_vector(t.sizes()), t.scalar_type(), device_of(t));
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor int4_linear(const Tensor& x_any, const Tensor& data_any, const Tensor& scale, std::optional<Tensor> zero_point,
                   std::optional<Tensor> minimum, const Tensor& weight_sum, std::optional<Tensor> bias,
                   int64_t group_size, int64_t act_bits, std::optional<Tensor> input_scale,
                   std::optional<Tensor> input_zero_point, int64_t, int64_t, ScalarType out_dtype) {
  const ScalarType dtype = x_any.scalar_type();
  QK_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "x: got ", dtype_name(dtype),
           "; accepted: torch.bfloat16, torch.float16");
  QK_CHECK(act_bits == 16, "act_bits: got ", act_bits, "; accepted: 16");
  QK_CHECK(!input_scale && !input_zero_point, "input_scale: got a tensor; accepted with act_bits 16: None");
  QK_CHECK(is_half_or_float(out_dtype), "out_dtype: got ", dtype_name(out_dtype),
           "; accepted: torch.float32, torch.bfloat16, torch.float16");
  QK_CHECK(x_any.dim() >= 1, "x: got 0 dims; accepted: [..., K]");
  const int64_t k = x_any.sizes()[x_any.dim() - 1], n = weight_sum.numel();
  QK_CHECK(k > 0 && k % 8 == 0 && k < int64_t{1} << 24, "x: got K = ", k, "; accepted: multiples of 8 below 2^24");
  QK_CHECK(n <= int64_t{1} << 30, "weight_sum: got ", n, " elements; accepted: up to 2^30");
  const int64_t m = x_any.numel() / k;
  QK_CHECK(m <= kMostRows, "x: got ", m, " rows; accepted: up to ", kMostRows);
  QK_CHECK(group_size == k || (group_size > 0 && group_size % 32 == 0 && k % group_size == 0), "group_size: got ",
           group_size, "; accepted: K = ", k, ", or a multiple of 32 that divides it");
  const int half = group_size == k || group_size % 64 == 0 ? 64 : 32;
  const int64_t groups = k / group_size, length = ceil_div(k, 2 * half) * half;
  QK_CHECK(data_any.scalar_type() == ScalarType::Byte, "data: got ", dtype_name(data_any.scalar_type()),
           "; accepted: torch.uint8");
  const Gpu gpu(x_any);
  const Device device = gpu.device();
  check_matrix("data", data_any, n, length, device);
  check_matrix("scale", scale, groups, n, device);
  QK_CHECK(is_half_or_float(scale.scalar_type()), "scale: got ", dtype_name(scale.scalar_type()),
           "; accepted: torch.float32, torch.bfloat16, torch.float16");
  QK_CHECK(!zero_point || !minimum, "minimum: got a tensor beside zero_point; accepted: one of them");

  const Tensor x = to_aligned(x_any), data = to_aligned(data_any);
  Linear a{};
  a.x = x.const_data_ptr();
  a.data = static_cast<const uint8_t*>(data.const_data_ptr());
  a.scale = RealInput(scale);
  if (zero_point) {
    check_matrix("zero_point", *zero_point, groups, n, device);
    QK_CHECK(zero_point->scalar_type() == ScalarType::Char, "zero_point: got ", dtype_name(zero_point->scalar_type()),
             "; accepted: torch.int8");
    a.zero_point = static_cast<const int8_t*>(zero_point->const_data_ptr());
  }
  if (minimum) {
    check_matrix("minimum", *minimum, groups, n, device);
    QK_CHECK(minimum->scalar_type() == scale.scalar_type(), "minimum: got ", dtype_name(minimum->scalar_type()),
             "; accepted: scale's dtype, ", dtype_name(scale.scalar_type()));
    a.minimum = RealInput(*minimum);
  }
  Tensor bias_dense;
  if (bias) {
    check_floating("bias", *bias);
    QK_CHECK(bias->dim() == 1 && bias->numel() == n, "bias: got shape ", shape_of(*bias), "; accepted: [", n, "]");
    check_device("bias", *bias, device);
    bias_dense = to_contiguous(*bias);
    a.bias = RealInput(bias_dense);
  }
  std::vector<int64_t> sizes = to_vector(x_any.sizes());
  sizes.back() = n;
  Tensor y = empty(sizes, out_dtype, device);
  if (y.numel() == 0) return y;
  a.y = RealOutput(y);
  a.m = static_cast<int>(m);
  a.n = static_cast<int>(n);
  a.k = static_cast<int>(k);
  a.length = static_cast<int>(length);
  a.steps = static_cast<int>(ceil_div(k, kDepth));
  a.halves_per_group = static_cast<int>(ceil_div(group_size, half));
  if (groups == 1) a.halves_per_group = a.steps * (kDepth / half);  // counts those beyond K too
  if (dtype == ScalarType::Half) {
    run_half<Half>(gpu, a, device, half);
  } else {
    run_half<BFloat16>(gpu, a, device, half);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("int4_linear_cuda", TORCH_BOX(&int4_linear)); }

}  // namespace qkernels
