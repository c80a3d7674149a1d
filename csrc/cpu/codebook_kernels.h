// Non-uniform quantization.
#include "cpu/codebook.h"
#include "cpu/common/sweep.h"

namespace qkernels::QK_NAMESPACE {

// Searches a codebook for 16 values at a time. `find` gives the indices of the nearest levels, and `level` the levels
// that indices stand for. This Searcher works lane by lane; below, F32 has one for each vector path.
template <typename V>
struct Searcher {
  using T = typename V::Scalar;
  struct Index {
    int32_t i[16];
  };
  const Codebook<T>& c;

  explicit Searcher(const Codebook<T>& codebook) : c(codebook) {}
  Index find(V v) const {
    Index node;
    for (int lane = 0; lane < 16; ++lane) node.i[lane] = 1;
    for (int step = 0; step < c.bits; ++step)
      for (int lane = 0; lane < 16; ++lane)
        node.i[lane] = 2 * node.i[lane] + static_cast<int32_t>(v.v[lane] > c.tree[node.i[lane]]);
    for (int lane = 0; lane < 16; ++lane) node.i[lane] -= 1 << c.bits;
    return node;
  }
  V level(Index index) const {
    V r;
    for (int lane = 0; lane < 16; ++lane) r.v[lane] = c.level[index.i[lane]];
    return r;
  }
  static V code(Index index) {
    V r;
    for (int lane = 0; lane < 16; ++lane) r.v[lane] = static_cast<T>(index.i[lane]);
    return r;
  }
  static Index index(V code) {
    Index r;
    for (int lane = 0; lane < 16; ++lane) r.i[lane] = static_cast<int32_t>(code.v[lane]);
    return r;
  }
};

#if QK_PATH == QK_PATH_AVX2

// table[i mod N] for up to 16 entries, by two permutations. From larger tables it is gathered.
template <int N>
inline __m256 look_up(const float* table, __m256i i) {
  if constexpr (N == 8) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), i);
  } else {
    static_assert(N == 16);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(look_up<8>(table, i), look_up<8>(table + 8, i), upper);
  }
}

template <>
struct Searcher<F32> {
  struct Index {
    __m256i lo, hi;
  };
  const Codebook<float>& c;

  explicit Searcher(const Codebook<float>& codebook) : c(codebook) {}
  static __m256i step(__m256i node, __m256 v, __m256 midpoint) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(v, midpoint, _CMP_GT_OQ));  // −1 where true
    return _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
  }
  __m256i find(__m256 v) const {
    __m256i node = step(_mm256_set1_epi32(1), v, _mm256_set1_ps(c.tree[1]));
    node = step(node, v, look_up<8>(c.tree, node));
    node = step(node, v, look_up<8>(c.tree, node));
    node = step(node, v, look_up<8>(c.tree + 8, node));
    for (int depth = 4; depth < c.bits; ++depth) node = step(node, v, _mm256_i32gather_ps(c.tree, node, 4));
    return _mm256_sub_epi32(node, _mm256_set1_epi32(1 << c.bits));
  }
  Index find(F32 v) const { return {find(v.lo), find(v.hi)}; }
  F32 level(Index i) const {
    if (c.bits == 4) return {look_up<16>(c.level, i.lo), look_up<16>(c.level, i.hi)};
    return {_mm256_i32gather_ps(c.level, i.lo, 4), _mm256_i32gather_ps(c.level, i.hi, 4)};
  }
  static F32 code(Index i) { return {_mm256_cvtepi32_ps(i.lo), _mm256_cvtepi32_ps(i.hi)}; }
  static Index index(F32 code) { return {_mm256_cvtps_epi32(code.lo), _mm256_cvtps_epi32(code.hi)}; }
};

#elif QK_PATH == QK_PATH_AVX512

// table[i mod N]: one permutation for each 32 entries, where a gather takes 16 loads.
template <int N>
inline __m512 look_up(const float* table, __m512i i) {
  if constexpr (N == 16) {
    // With a mask of all lanes, as GCC 12 warns of the plain one.
    return _mm512_maskz_permutexvar_ps(0xffff, i, _mm512_load_ps(table));
  } else if constexpr (N == 32) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), i, _mm512_load_ps(table + 16));
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(N / 2));
    return _mm512_mask_mov_ps(look_up<N / 2>(table, i), upper, look_up<N / 2>(table + N / 2, i));
  }
}

template <>
struct Searcher<F32> {
  using Index = __m512i;
  const Codebook<float>& c;

  explicit Searcher(const Codebook<float>& codebook) : c(codebook) {}
  static __m512i step(__m512i node, __m512 v, __m512 midpoint) {
    const __m512i one = _mm512_set1_epi32(1);
    const __m512i left = _mm512_add_epi32(node, node);
    return _mm512_mask_add_epi32(left, _mm512_cmp_ps_mask(v, midpoint, _CMP_GT_OQ), left, one);
  }
  Index find(F32 x) const {
    const __m512 v = x.v;
    __m512i node = step(_mm512_set1_epi32(1), v, _mm512_set1_ps(c.tree[1]));
    for (int depth = 1; depth < 4; ++depth) node = step(node, v, look_up<16>(c.tree, node));
    if (c.bits > 4) node = step(node, v, look_up<16>(c.tree + 16, node));
    if (c.bits > 5) node = step(node, v, look_up<32>(c.tree + 32, node));
    if (c.bits > 6) node = step(node, v, look_up<64>(c.tree + 64, node));
    if (c.bits > 7) node = step(node, v, look_up<128>(c.tree + 128, node));
    return _mm512_sub_epi32(node, _mm512_set1_epi32(1 << c.bits));
  }
  F32 level(Index i) const {
    switch (c.bits) {
      case 4: return {look_up<16>(c.level, i)};
      case 5: return {look_up<32>(c.level, i)};
      case 6: return {look_up<64>(c.level, i)};
      case 7: return {look_up<128>(c.level, i)};
      default: return {look_up<256>(c.level, i)};
    }
  }
  static F32 code(Index i) { return {_mm512_cvtepi32_ps(i)}; }
  static Index index(F32 code) { return _mm512_cvtps_epi32(code.v); }
};

#endif

template <typename V>
struct Ends {
  V low, high;
  explicit Ends(const Codebook<typename V::Scalar>& c) : low(V::set1(c.low())), high(V::set1(c.high())) {}
};

template <typename V, typename S, bool kMask, typename P>
inline void forward_stretch(const S* x, S* y, int64_t n, const P& p, const Searcher<V>& search, BitWriter* bits) {
  const Ends<V> b(search.c);
  for_each_16(n, [&](int64_t i, auto... tail) QK_INLINE {
    const V v = V::load(x + i, tail...) * p.inv(i, tail...);
    if constexpr (kMask) bits->add(bits_of(inside(v, b.low, b.high).bits(), tail...), lanes_of(tail...));
    (select(is_nan(v), v, search.level(search.find(v))) * p.scale(i, tail...)).store(y + i, tail...);
  });
}

template <typename S>
void forward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales, const Codebook<Arithmetic<S>>& codebook,
             int64_t numel, const S* x, S* y, uint8_t* mask) {
  using V = typename VecOf<S>::type;
  for_each_stretch<V>(runs, scales, numel, [&](int64_t at, int64_t n, const auto& p) {
    const Searcher<V> search(codebook);
    if (mask) {
      BitWriter bits(mask, at);
      forward_stretch<V, S, true>(x + at, y + at, n, p, search, &bits);
      bits.finish();
    } else {
      forward_stretch<V, S, false>(x + at, y + at, n, p, search, nullptr);
    }
  });
}

template <typename S>
void backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales, const Codebook<Arithmetic<S>>& codebook,
              int64_t numel, const S* grad, const S* x, S* dx) {
  using V = typename VecOf<S>::type;
  const Ends<V> b(codebook);
  for_each_stretch<V>(runs, scales, numel, [&](int64_t at, int64_t n, const auto& p) {
    for_each_16(n, [&](int64_t i, auto... tail) {
      const V v = V::load(x + at + i, tail...) * p.inv(i, tail...);
      select(inside(v, b.low, b.high), V::load(grad + at + i, tail...), zero<V>()).store(dx + at + i, tail...);
    });
  });
}

template <typename S>
void quantize(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales, const Codebook<Arithmetic<S>>& codebook,
              int64_t numel, const S* x, uint8_t* codes) {
  using V = typename VecOf<S>::type;
  for_each_stretch<V>(runs, scales, numel, [&](int64_t at, int64_t n, const auto& p) {
    const Searcher<V> search(codebook);
    for_each_16(n, [&](int64_t i, auto... tail) {
      uint8_t* out = codes + at + i;
      V v = V::load(x + at + i, tail...) * p.inv(i, tail...);
      v = select(is_nan(v), zero<V>(), v);
      search.code(search.find(v)).store(out, tail...);
      if (!codebook.ordered)
        for (int lane = 0; lane < lanes_of(tail...); ++lane) out[lane] = codebook.order[out[lane]];
    });
  });
}

template <typename S>
void dequantize(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales, const Codebook<Arithmetic<S>>& codebook,
                int64_t numel, const uint8_t* codes, S* y) {
  using V = typename VecOf<S>::type;
  const V last = V::set1(static_cast<Arithmetic<S>>(codebook.size - 1)), nan = V::set1(static_cast<Arithmetic<S>>(NAN));
  for_each_stretch<V>(runs, scales, numel, [&](int64_t at, int64_t n, const auto& p) {
    const Searcher<V> search(codebook);
    for_each_16(n, [&](int64_t i, auto... tail) {
      V code = V::load(codes + at + i, tail...);
      const auto known = inside(code, zero<V>(), last);
      code = min(last, code);  // the scalar path looks up what it is given
      const V value = select(known, search.level(search.index(code)), nan);
      (value * p.scale(i, tail...)).store(y + at + i, tail...);
    });
  });
}

// The sum of each level, over the elements of one task that are quantized to it. Lanes add to four tables in turn,
// since additions to one address wait for each other. Sums are fp64, since a task may be long.
struct LevelSums {
  double table[4][kMaxLevels];
  explicit LevelSums(int64_t levels) {
    for (auto& sums : table) std::fill(sums, sums + levels, 0.0);
  }
  template <typename V, typename Index>
  void add(Index index, V terms, int64_t n) {
    int32_t level[16];
    typename V::Scalar term[16];
    Searcher<V>::code(index).store(level);
    terms.store(term);
    for (int64_t lane = 0; lane < n; ++lane) table[lane & 3][level[lane]] += static_cast<double>(term[lane]);
  }
  void store(double* sums, int64_t levels) const {
    for (int64_t i = 0; i < levels; ++i) sums[i] = (table[0][i] + table[1][i]) + (table[2][i] + table[3][i]);
  }
};

// The learnable backward for the 16 elements from `at` on, or for the `tail` elements that are left; p has their
// parameters from i on. Writes dx, adds to the sums of levels, and returns each element's term of the scale. Lanes
// beyond the tail have dy = 0 and x = 0: they add 0, unless a parameter is NaN, which makes the sum NaN.
template <typename S, bool kCodebook>
struct LearnableTerms {
  using V = typename VecOf<S>::type;
  Searcher<V> search;
  Ends<V> b;
  const S *grad, *x;
  S* dx;

  template <typename P, typename... Tail>
  V operator()(int64_t at, const P& p, int64_t i, LevelSums& sums, Tail... tail) const {
    const V dy = V::load(grad + at, tail...);
    const V v = V::load(x + at, tail...) * p.inv(i, tail...);
    const auto in = inside(v, b.low, b.high);
    const V d = select(in, dy, zero<V>());  // selected and not multiplied: an infinite dy must not become NaN
    d.store(dx + at, tail...);
    const auto index = search.find(v);
    if constexpr (kCodebook) sums.add(index, dy * p.scale(i, tail...), lanes_of(tail...));
    return dy * (select(is_nan(v), v, search.level(index)) - select(in, v, zero<V>()));
  }
};

// The bits do not depend on the number of threads: tasks are fixed, and their sums are added up in order.
constexpr int64_t kTask = 32768;  // elements of a task of even runs
constexpr int64_t kTaskRows = 64;

template <typename S, bool kCodebook>
void learnable_backward_of(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales,
                           const Codebook<Arithmetic<S>>& codebook, int64_t numel, const S* grad, const S* x, S* dx,
                           std::vector<double>& dscale, std::vector<double>& dlevels) {
  using T = Arithmetic<S>;
  using V = typename VecOf<S>::type;
  const LearnableTerms<S, kCodebook> terms{Searcher<V>(codebook), Ends<V>(codebook), grad, x, dx};
  const int64_t levels = static_cast<int64_t>(dlevels.size());
  std::vector<double> of_levels;  // of each task
  int64_t tasks;
  if (runs.inner >= kShortRun || runs.channels == 1) {
    // Even runs: a task is kTask elements in memory order. The part of run r in task t has its sum at r + t.
    tasks = (numel + kTask - 1) / kTask;
    of_levels.resize(tasks * levels);
    std::vector<double> of_runs(tasks + runs.count);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        LevelSums sums(levels);
        const int64_t end = std::min((task + 1) * kTask, numel);
        for (int64_t at = task * kTask; at < end;) {
          const int64_t run = at / runs.inner, stop = std::min((run + 1) * runs.inner, end);
          const Uniform<V> p(scales.of(runs.channel(run % runs.period)));
          double lanes[16] = {};
          while (at < stop) {  // in fp32 over at most 64 vectors, then in fp64
            V acc = zero<V>();
            const int64_t pause = std::min(at + 1024, stop);
            for_each_16(pause - at, [&](int64_t i, auto... tail) { acc = acc + terms(at + i, p, 0, sums, tail...); });
            at = pause;
            add_lanes(lanes, acc);
          }
          of_runs[run + task] = tree_sum(lanes);
        }
        sums.store(of_levels.data() + task * levels, levels);
      }
    });
    for (int64_t run = 0; run < runs.count; ++run) {
      double& sum = dscale[runs.channel(run % runs.period)];
      const int64_t last = ((run + 1) * runs.inner - 1) / kTask;
      for (int64_t task = run * runs.inner / kTask; task <= last; ++task) sum += of_runs[run + task];
    }
  } else {
    // Short runs: a task is up to 64 rows of up to kPattern columns, whose sums stay in cache. A row here is one period
    // or several, so that it fills vectors even where a period does not.
    const int64_t period = runs.period * runs.inner;
    const int64_t row = std::max<int64_t>(1, 256 / period) * period;
    const int64_t rows = (numel + row - 1) / row;
    const int64_t width = std::min(row, kPattern / runs.inner * runs.inner);
    const int64_t across = (row + width - 1) / width, down = (rows + kTaskRows - 1) / kTaskRows;
    const int64_t row_runs = row / runs.inner;
    tasks = down * across;
    of_levels.resize(tasks * levels);
    std::vector<double> of_runs(down * row_runs);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        LevelSums sums(levels);
        const int64_t block = task / across, from = task % across * width;
        const int64_t columns = std::min(width, row - from);
        Expanded<T> params;
        params.fill(scales, runs, from, columns);
        alignas(64) T acc[kPattern] = {};
        const int64_t stop = std::min((block + 1) * kTaskRows, rows);
        for (int64_t r = block * kTaskRows; r < stop; ++r) {
          const int64_t at = r * row + from, n = std::min(columns, numel - at);  // the last row may end early
          const auto p = params.template from<V>(0);
          for_each_16(n, [&](int64_t i, auto... tail) {
            (V::load(acc + i) + terms(at + i, p, i, sums, tail...)).store(acc + i);
          });
        }
        for (int64_t i = 0; i < columns; ++i)
          of_runs[block * row_runs + (from + i) / runs.inner] += static_cast<double>(acc[i]);
        sums.store(of_levels.data() + task * levels, levels);
      }
    });
    for (int64_t block = 0; block < down; ++block)
      for (int64_t run = 0; run < row_runs; ++run)
        dscale[runs.channel(run % runs.period)] += of_runs[block * row_runs + run];
  }
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < levels; ++i) dlevels[i] += of_levels[task * levels + i];
}

template <typename S>
void learnable_backward(const IndexedRuns& runs, const Qparams<Arithmetic<S>>& scales,
                        const Codebook<Arithmetic<S>>& codebook, int64_t numel, const S* grad, const S* x, S* dx,
                        std::vector<double>& dscale, std::vector<double>& dlevels) {
  if (dlevels.empty()) {
    learnable_backward_of<S, false>(runs, scales, codebook, numel, grad, x, dx, dscale, dlevels);
  } else {
    learnable_backward_of<S, true>(runs, scales, codebook, numel, grad, x, dx, dscale, dlevels);
  }
}

}  // namespace qkernels::QK_NAMESPACE
