// Reductions per channel in two stages. They give the same bits on every run: each stage adds up in a fixed order, and
// nothing is added atomically. Stage 1 reads x once and writes one pair of values for each piece of work, which is
// either of these:
//   pieces   a stretch of one run, which 1 to 32 lanes or a block reduce: for scales per tensor, row or group, and NCHW
//   columns  a column of short runs that repeat ([*, C], channels last): the lanes of a warp read 32 vectors side by
//            side, and the eight warps of a block read eight rows
// Stage 2 merges the pairs of each channel. Where each channel has only one pair, stage 1 gives the result itself.
//
// An Op has the types T (of arithmetic), Total (of results) and Loaded; kWidth, the elements of a vector; kQuantizes,
// whether it takes parameters; of_columns(), the Op for reductions by columns; identity() and merge(a, b); wanted(),
// whether there is anything to do; load<kWhole>(at, first, last); terms<kWhole>(at, first, last, loaded, params, out),
// which sets out to one pair for each element, where params(k) are the parameters of element k; and
// result(channel, Pair<Total>), which takes the result of a channel.
#pragma once

#include "sweep.cuh"

namespace qkernels {

constexpr int kColumnRows = kThreads / kWarp;

inline int power_of_two_from(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// What stage 2 merges, and with how many lanes for each channel.
struct Combine {
  int64_t channels, slots;  // slots: pairs of one channel, per_run for each of its runs
  Divider per_run;
  int lanes;

  Combine(int64_t channels, int64_t slots, int64_t per_run)
      : channels(channels),
        slots(slots),
        per_run(per_run),
        lanes(slots > 4 * kWarp ? kThreads : power_of_two_from(std::min<int64_t>(slots, kWarp))) {}
  int64_t blocks() const { return ceil_div(channels, kThreads / lanes); }
};

// How stage 1 cuts the runs of x into pieces.
struct Pieces {
  int64_t inner, piece, count;
  Divider per_run;
  int lanes;
  bool aligned, direct;

  // N: elements of a vector. wanted: how many blocks fill the GPU.
  Pieces(const Runs& runs, int64_t N, int64_t wanted, bool aligned) : inner(runs.inner), aligned(aligned) {
    const int64_t longest = 16 * N * kThreads;    // elements of a piece: a lane adds up to 16 vectors in fp32
    const int64_t turn = kUnroll * N * kThreads;  // elements that a block takes at a time
    const int64_t split =
        std::max(ceil_div(inner, longest), std::min(ceil_div(wanted, runs.count), ceil_div(inner, turn)));
    const int64_t unit = split > 1 ? turn : N;
    piece = ceil_div(ceil_div(inner, split), unit) * unit;
    per_run = Divider(ceil_div(inner, piece));
    count = runs.count * per_run.divisor;
    const int64_t vectors = ceil_div(std::min(piece, inner), N) + (inner % N != 0);
    lanes = vectors > 8 * kWarp ? kThreads : power_of_two_from(std::min<int64_t>(vectors, kWarp));
    direct = count == runs.channels;
  }
  int64_t blocks() const { return ceil_div(count, kThreads / lanes); }
  Combine combine(const Runs& runs) const { return Combine(runs.channels, count / runs.channels, per_run.divisor); }
};

template <typename To, typename From>
__device__ __forceinline__ Pair<To> cast_pair(Pair<From> p) {
  return {static_cast<To>(p.a), static_cast<To>(p.b)};
}

// Reduces the pieces that fall to block number `block` of `blocks`.
template <typename Op, typename C>
__device__ __forceinline__ void add_pieces(const Op& op, const Qparams<typename Op::T>& q, const C& channels,
                                           const Pieces& s, Pair<typename Op::T>* partial, int64_t block,
                                           int64_t blocks) {
  using T = typename Op::T;
  constexpr int N = Op::kWidth;
  const int shift = __ffs(s.lanes) - 1;
  const int lane = threadIdx.x & (s.lanes - 1), group = threadIdx.x >> shift, groups = kThreads >> shift;
  for (int64_t begin = block * groups; begin < s.count; begin += blocks * groups) {
    const int64_t item = begin + group;
    const bool valid = item < s.count;
    int64_t from = 0, to = 0, channel = 0;
    Params<T> p{};
    if (valid) {
      const int64_t run = s.per_run.divide(item);
      from = run * s.inner + (item - run * s.per_run.divisor) * s.piece;
      const int64_t end = (run + 1) * s.inner;
      to = from + s.piece < end ? from + s.piece : end;
      channel = channels.of_run(run);
      if constexpr (Op::kQuantizes) p = q.of(channel);
    }
    const auto params = [&](int) -> const Params<T>& { return p; };
    Pair<T> sum = Op::identity();
    const auto add = [&](const Pair<T>(&terms)[N]) {
      Pair<T> tree[N];
#pragma unroll
      for (int k = 0; k < N; ++k) tree[k] = terms[k];
#pragma unroll
      for (int step = N / 2; step > 0; step /= 2)
#pragma unroll
        for (int k = 0; k < step; ++k) tree[k] = Op::merge(tree[k], tree[k + step]);
      sum = Op::merge(sum, tree[0]);
    };
    const int64_t end = (to + N - 1) / N, whole_from = (from + N - 1) / N, whole_to = s.aligned ? to / N : 0;
    for (int64_t v = from / N + lane; v < end;) {
      Pair<T> terms[N];
      if (v >= whole_from && v + (kUnroll - 1) * s.lanes < whole_to) {
        typename Op::Loaded loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = op.template load<true>((v + u * s.lanes) * N, 0, N);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          op.template terms<true>((v + u * s.lanes) * N, 0, N, loaded[u], params, terms);
          add(terms);
        }
        v += kUnroll * s.lanes;
        continue;
      }
      if (v >= whole_from && v < whole_to) {
        op.template terms<true>(v * N, 0, N, op.template load<true>(v * N, 0, N), params, terms);
      } else {
        const int first = from > v * N ? static_cast<int>(from - v * N) : 0;
        const int last = to < (v + 1) * N ? static_cast<int>(to - v * N) : N;
        op.template terms<false>(v * N, first, last, op.template load<false>(v * N, first, last), params, terms);
      }
      add(terms);
      v += s.lanes;
    }
    sum = merge_lanes(sum, s.lanes, [](Pair<T> a, Pair<T> b) { return Op::merge(a, b); });
    if (lane == 0 && valid) {
      if (s.direct) {
        op.result(channel, cast_pair<typename Op::Total>(sum));
      } else {
        partial[item] = sum;
      }
    }
  }
}

// How many blocks a multiprocessor shall hold. This bounds the registers of a thread: with 3 blocks it has 80.
template <typename Op>
constexpr int kPieceBlocks = kFrugal || !Op::kQuantizes || Op::kWidth < 8 ? 3 : 2;

template <typename Op>
__global__ void __launch_bounds__(kThreads, kPieceBlocks<Op>)
    pieces_kernel(Op op, Qparams<typename Op::T> q, DeviceRuns channels, Pieces s, Pair<typename Op::T>* partial) {
  let_next_start();
  if (op.wanted()) add_pieces(op, q, channels, s, partial, blockIdx.x, gridDim.x);
}

// x as rows that begin with the same channel.
struct Columns {
  int64_t numel, rows, vectors;  // vectors of a row, which is a whole number of periods of the channels
  bool aligned, direct;
};

template <typename Op>
__global__ void __launch_bounds__(kThreads, 3)
    columns_kernel(Op op, Qparams<typename Op::T> q, DeviceRuns channels, Columns s, Pair<typename Op::T>* partial) {
  using T = typename Op::T;
  constexpr int N = Op::kWidth, kTogether = kFrugal && sizeof(typename Op::Loaded) == 16 ? 6 : 4;  // rows in flight
  let_next_start();
  if (!op.wanted()) return;
  const int lane = threadIdx.x % kWarp, depth = threadIdx.x / kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane, width = s.vectors * N;
  const bool valid = column < s.vectors;
  Params<T> own[N];
  Pair<T> sum[N];
#pragma unroll
  for (int k = 0; k < N; ++k) sum[k] = Op::identity();
  if constexpr (Op::kQuantizes) {
    if (valid) fill(channels.inner, channels, q, column * N, s.numel, own);
  }
  const auto params = [&](int k) -> const Params<T>& { return own[k]; };
  const int64_t step = int64_t{gridDim.y} * kColumnRows;
  for (int64_t row = int64_t{blockIdx.y} * kColumnRows + depth; valid && row < s.rows;) {
    const int64_t at = row * width + column * N;
    Pair<T> terms[N];
    if (s.aligned && at + (kTogether - 1) * step * width + N <= s.numel) {
      typename Op::Loaded loaded[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) loaded[u] = op.template load<true>(at + u * step * width, 0, N);
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        op.template terms<true>(at + u * step * width, 0, N, loaded[u], params, terms);
#pragma unroll
        for (int k = 0; k < N; ++k) sum[k] = Op::merge(sum[k], terms[k]);
      }
      row += kTogether * step;
      continue;
    }
    const int64_t rest = s.numel - at;
    const int last = rest >= N ? N : rest > 0 ? static_cast<int>(rest) : 0;
    op.template terms<false>(at, 0, last, op.template load<false>(at, 0, last), params, terms);
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = Op::merge(sum[k], terms[k]);
    row += step;
  }
  __shared__ Pair<T> of_depth[kColumnRows][kWarp * N];
#pragma unroll
  for (int k = 0; k < N; ++k) of_depth[depth][k * kWarp + lane] = sum[k];
  __syncthreads();
  for (int i = threadIdx.x; i < kWarp * N; i += kThreads) {
    const int k = i / kWarp;
    const int64_t vector = int64_t{blockIdx.x} * kWarp + i % kWarp;
    if (vector >= s.vectors) continue;
    Pair<T> total = of_depth[0][i];
    for (int d = 1; d < kColumnRows; ++d) total = Op::merge(total, of_depth[d][i]);
    const int64_t element = vector * N + k;
    if (s.direct) {
      op.result(channels.of_element(element), cast_pair<typename Op::Total>(total));
    } else {
      partial[blockIdx.y * width + element] = total;
    }
  }
}

template <typename Op, typename C>
__device__ __forceinline__ void add_partials(const Op& op, const C& channels, const Combine& s,
                                             const Pair<typename Op::T>* partial, int64_t block, int64_t blocks) {
  using Total = typename Op::Total;
  constexpr int kReads = 4;  // reads in flight: one takes as long as all else here
  const int shift = __ffs(s.lanes) - 1;
  const int lane = threadIdx.x & (s.lanes - 1), group = threadIdx.x >> shift, groups = kThreads >> shift;
  for (int64_t begin = block * groups; begin < s.channels; begin += blocks * groups) {
    const int64_t c = begin + group;
    const bool valid = c < s.channels;
    Pair<Total> sum = cast_pair<Total>(Op::identity());
    for (int64_t first = lane; valid && first < s.slots; first += kReads * s.lanes) {
      Pair<typename Op::T> read[kReads];
#pragma unroll
      for (int u = 0; u < kReads; ++u) {
        const int64_t slot = first + u * s.lanes, k = s.per_run.divide(slot);
        const int64_t at = channels.run_of(c, k) * s.per_run.divisor + (slot - k * s.per_run.divisor);
        read[u] = slot < s.slots ? partial[at] : Op::identity();
      }
#pragma unroll
      for (int u = 0; u < kReads; ++u) sum = Op::merge(sum, cast_pair<Total>(read[u]));
    }
    sum = merge_lanes(sum, s.lanes, [](Pair<Total> a, Pair<Total> b) { return Op::merge(a, b); });
    if (lane == 0 && valid) op.result(c, sum);
  }
}

template <typename Op>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Op op, DeviceRuns channels, Combine s, const Pair<typename Op::T>* partial) {
  wait_for_previous();
  if (op.wanted()) add_partials(op, channels, s, partial, blockIdx.x, gridDim.x);
}

template <typename Op>
void combine(const Gpu& gpu, const Op& op, const Runs& runs, const Combine& s, const Pair<typename Op::T>* partial) {
  gpu.launch_early(combine_kernel<Op>, s.blocks(), 1, kThreads, op, DeviceRuns(runs), s, partial);
}

inline int64_t blocks_wanted(const Gpu& gpu) { return int64_t{gpu.processors()} * 8; }  // enough to fill the GPU

// Whether x is better reduced by columns than by pieces. N: elements of a vector.
inline bool in_columns(const Runs& runs, int64_t numel, int64_t N) {
  return runs.channels > 1 && runs.inner < 2 * N && numel / (runs.period * runs.inner) >= 8;
}

// Memory for the pairs that stage 1 writes.
template <typename P>
class Workspace {
 public:
  Workspace(int64_t pairs, Device device) {
    if (pairs) held_ = empty({pairs * static_cast<int64_t>(sizeof(P))}, ScalarType::Byte, device);
  }
  P* data() const { return held_ ? static_cast<P*>(held_->mutable_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> held_;
};

template <typename Op>
void reduce_columns(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
                    bool aligned) {
  constexpr int64_t N = Op::kWidth;
  constexpr int64_t kMostDepth = 64;  // rows that a thread adds up in fp32
  const int64_t pattern = runs.period * runs.inner;
  Columns s{numel, 0, pattern / gcd(pattern, N), aligned, false};
  // A row holds several periods where they are short, so that few lanes are left without a column.
  s.vectors *= std::max<int64_t>(1, std::min(8 * kWarp / s.vectors, numel / N / s.vectors));
  const int64_t width = s.vectors * N, across = ceil_div(s.vectors, kWarp);
  s.rows = ceil_div(numel, width);
  const int64_t full = std::max(ceil_div(blocks_wanted(gpu), across), ceil_div(s.rows, kColumnRows * kMostDepth));
  const int64_t down = std::min<int64_t>({full, ceil_div(s.rows, kColumnRows), 65535});
  s.direct = down == 1 && width == runs.channels;
  const Workspace<Pair<typename Op::T>> partial(s.direct ? 0 : down * width, gpu.device());
  gpu.launch(columns_kernel<Op>, across, down, kThreads, op, q, DeviceRuns(runs), s, partial.data());
  if (!s.direct)
    combine(gpu, op, runs, Combine(runs.channels, down * width / runs.channels, runs.inner), partial.data());
}

// `runs` describes x, which has numel elements.
template <typename Op>
void reduce_channels(const Gpu& gpu, const Op& op, const Qparams<typename Op::T>& q, const Runs& runs, int64_t numel,
                     bool aligned) {
  using P = Pair<typename Op::T>;
  constexpr int64_t N = Op::kWidth;
  if (runs.channels == 0) return;
  if (numel == 0) return combine(gpu, op, runs, Combine(runs.channels, 0, 1), static_cast<const P*>(nullptr));
  if (in_columns(runs, numel, N)) return reduce_columns(gpu, op.of_columns(), q, runs, numel, aligned);
  const Pieces s(runs, N, blocks_wanted(gpu), aligned);
  const Workspace<P> partial(s.direct ? 0 : s.count, gpu.device());
  gpu.launch(pieces_kernel<Op>, s.blocks(), 1, kThreads, op, q, DeviceRuns(runs), s, partial.data());
  if (!s.direct) combine(gpu, op, runs, s.combine(runs), partial.data());
}

}  // namespace qkernels
