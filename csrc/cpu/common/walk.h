// How kernels visit a tensor run by run, for any granularity; included once per path by the kernel bodies.

// Calls f(i) for every 16 of n elements, then f(i, count) for the rest: the arguments that V::load, V::store and the
// parameters below take after the pointer, so that f says once what is done to a vector.
template <typename F>
inline void for_each_16(int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i);
  if (i < n) f(i, n - i);
}

// Runs shorter than a vector would waste it: their parameters are laid out element by element instead.
constexpr int64_t kShortRun = 16;
constexpr int64_t kPattern = 1024;

// The same parameters for every element of a run.
template <typename V>
struct Uniform {
  V inv_, scale_, zero_point_;
  explicit Uniform(const typename Quantizer<typename V::Scalar>::Params& p)
      : inv_(V::set1(p.inv)), scale_(V::set1(p.scale)), zero_point_(V::set1(p.zero_point)) {}
  V inv(int64_t) const { return inv_; }
  V scale(int64_t) const { return scale_; }
  V zero_point(int64_t) const { return zero_point_; }
  V inv(int64_t, int64_t) const { return inv_; }
  V scale(int64_t, int64_t) const { return scale_; }
  V zero_point(int64_t, int64_t) const { return zero_point_; }
};

// Parameters of their own for every element.
template <typename V>
struct PerElement {
  const typename V::Scalar *inv_, *scale_, *zero_point_;
  V inv(int64_t i) const { return V::load(inv_ + i); }
  V scale(int64_t i) const { return V::load(scale_ + i); }
  V zero_point(int64_t i) const { return V::load(zero_point_ + i); }
  V inv(int64_t i, int64_t n) const { return V::load(inv_ + i, n); }
  V scale(int64_t i, int64_t n) const { return V::load(scale_ + i, n); }
  V zero_point(int64_t i, int64_t n) const { return V::load(zero_point_ + i, n); }
};

// Element-by-element parameters of a stretch of at most kPattern elements of short runs.
template <typename T>
struct Expanded {
  T inv[kPattern], scale[kPattern], zero_point[kPattern];

  void fill(const Quantizer<T>& q, const View& view, int64_t at, int64_t n) {
    int64_t run = at / view.inner % view.period, within = at % view.inner;
    const auto* p = &q.of(view.channel(run));
    for (int64_t i = 0; i < n; ++i) {
      inv[i] = p->inv;
      scale[i] = p->scale;
      zero_point[i] = p->zero_point;
      if (++within == view.inner && i + 1 < n) {
        within = 0;
        if (++run == view.period) run = 0;
        p = &q.of(view.channel(run));
      }
    }
  }
  template <typename V>
  PerElement<V> from(int64_t i) const {
    return {inv + i, scale + i, zero_point + i};
  }
};

// Calls f(first element, count, parameters) for every stretch of x in [0, numel), in parallel. Tasks begin at
// multiples of 1024 elements, so that a mask's bytes are never shared between threads.
template <typename V, typename F>
void for_each_stretch(const View& view, const Quantizer<typename V::Scalar>& q, int64_t numel, F f) {
  using T = typename V::Scalar;
  constexpr int64_t kBlock = 1024;
  const int64_t row = view.period * view.inner;
  const bool is_short = view.inner < kShortRun && view.channels > 1;
  // A row that fits the pattern is repeated in it, so that stretches are long even where a row is not.
  const int64_t repeated = row <= kPattern ? kPattern / std::max<int64_t>(row, 1) * row : 0;
  torch::stable::parallel_for(0, (numel + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t first, int64_t last) {
    int64_t at = first * kBlock;
    const int64_t end = std::min(last * kBlock, numel);
    if (!is_short) {
      int64_t run = at / view.inner;
      int64_t in_period = run % view.period;
      while (at < end) {
        const int64_t n = std::min((run + 1) * view.inner, end) - at;
        f(at, n, Uniform<V>(q.of(view.channel(in_period))));
        at += n;
        ++run;
        if (++in_period == view.period) in_period = 0;
      }
    } else {
      Expanded<T> params;
      if (repeated) params.fill(q, view, 0, repeated);
      while (at < end) {
        const int64_t from = repeated ? at % repeated : 0;
        const int64_t n = std::min((repeated ? repeated : kPattern) - from, end - at);
        if (!repeated) params.fill(q, view, at, n);
        f(at, n, params.template from<V>(from));
        at += n;
      }
    }
  });
}

// One bit per element, low bit first; elements are added 16 at a time or as a tail.
class BitWriter {
 public:
  BitWriter(uint8_t* bytes, int64_t element) : out_(bytes ? bytes + element / 8 : nullptr), fill_(element % 8) {
    // A stretch that begins inside a byte continues what the stretch before it, in the same task, began.
    if (fill_ && bytes) held_ = *out_ & ((1u << fill_) - 1);
  }
  void add(uint32_t bits, int n) {
    held_ |= bits << fill_;
    fill_ += n;
    while (fill_ >= 8) {
      *out_++ = static_cast<uint8_t>(held_);
      held_ >>= 8;
      fill_ -= 8;
    }
  }
  void finish() {
    if (fill_) *out_ = static_cast<uint8_t>(held_);
  }

 private:
  uint8_t* out_;
  uint32_t held_ = 0;
  int fill_;
};

// Reductions per channel, deterministic whatever the number of threads: fixed pieces, added up in order.
constexpr int64_t kPiece = 16384;  // elements of a run that one partial result covers
constexpr int64_t kRows = 256;     // rows of short runs that one partial result covers
constexpr int64_t kTile = 64;      // columns of a row that are kept in registers at a time

// Op gives a Partial, `identity`, `merge`, `piece(at, n, channel)` for an even run, and
// `column(at, row, rows, n, lanes)` for up to 16 adjacent columns over rows that lie `row` elements apart.
// Then `result(channel, partial)` is called once for each channel.
template <typename Op>
void reduce_channels(const View& view, int64_t numel, const Op& op) {
  using Partial = typename Op::Partial;
  const int64_t row = view.period * view.inner;
  if (view.inner >= kShortRun || view.channels == 1) {
    const int64_t pieces = (view.inner + kPiece - 1) / kPiece;
    const int64_t items = view.runs * pieces;
    std::vector<Partial> partial(items);
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(view.inner, kPiece));
    torch::stable::parallel_for(0, items, grain, [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t run = item / pieces, from = item % pieces * kPiece;
        partial[item] =
            op.piece(run * view.inner + from, std::min(kPiece, view.inner - from), view.channel(run % view.period));
      }
    });
    std::vector<Partial> total(view.channels, Op::identity());
    int64_t in_period = 0;
    for (int64_t run = 0; run < view.runs; ++run) {
      Partial& sum = total[view.channel(in_period)];
      for (int64_t i = 0; i < pieces; ++i) Op::merge(sum, partial[run * pieces + i]);
      if (++in_period == view.period) in_period = 0;
    }
    for (int64_t c = 0; c < view.channels; ++c) op.result(c, total[c]);
    return;
  }
  // Short runs: a tile of whole runs, column by column over a block of rows.
  const int64_t rows = numel / row;
  const int64_t blocks = (rows + kRows - 1) / kRows;
  const int64_t tile_runs = kTile / view.inner;
  const int64_t tiles = (view.period + tile_runs - 1) / tile_runs;
  std::vector<Partial> partial(blocks * view.period);
  const int64_t grain = std::max<int64_t>(1, kGrain / (std::min(rows, kRows) * kTile));
  torch::stable::parallel_for(0, blocks * tiles, grain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / tiles, run = item % tiles * tile_runs;
      const int64_t runs = std::min(tile_runs, view.period - run);
      const int64_t height = std::min(kRows, rows - block * kRows);
      const int64_t columns = runs * view.inner;
      Partial lanes[kTile];
      for (int64_t column = 0; column < columns; column += 16)
        op.column(block * kRows * row + run * view.inner + column, row, height, std::min<int64_t>(16, columns - column),
                  lanes + column);
      for (int64_t r = 0; r < runs; ++r) {
        Partial sum = lanes[r * view.inner];
        for (int64_t i = 1; i < view.inner; ++i) Op::merge(sum, lanes[r * view.inner + i]);
        partial[block * view.period + run + r] = sum;
      }
    }
  });
  std::vector<Partial> total(view.channels, Op::identity());
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t run = 0; run < view.period; ++run)
      Op::merge(total[view.channel(run)], partial[block * view.period + run]);
  for (int64_t c = 0; c < view.channels; ++c) op.result(c, total[c]);
}
