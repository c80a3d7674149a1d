// The gates of LSTM, GRU and RNN, and products of floats and int8 codes, on one path.
#include "cpu/common/activation_kernels.h"
#include "cpu/int8_recurrent.h"

namespace qkernels::QK_NAMESPACE {
namespace {

#if QK_PATH == QK_PATH_AVX512VNNI
// Two vectors side by side. The chains of operations of one are so long that those of the next come too late to
// overlap: the gates of 16 x 512 units of an LSTM took 54 us by one vector at a time, and 18 by two (Zen 4).
struct F32Pair {
  using Scalar = float;
  struct Mask {
    F32::Mask a, b;
  };
  F32 a, b;
  static F32Pair set1(float value) { return {F32::set1(value), F32::set1(value)}; }
  static F32Pair load(const float* p) { return {F32::load(p), F32::load(p + 16)}; }
  void store(float* p) const {
    a.store(p);
    b.store(p + 16);
  }
};
inline F32Pair operator+(F32Pair x, F32Pair y) { return {x.a + y.a, x.b + y.b}; }
inline F32Pair operator-(F32Pair x, F32Pair y) { return {x.a - y.a, x.b - y.b}; }
inline F32Pair operator*(F32Pair x, F32Pair y) { return {x.a * y.a, x.b * y.b}; }
inline F32Pair operator/(F32Pair x, F32Pair y) { return {x.a / y.a, x.b / y.b}; }
inline F32Pair min(F32Pair bound, F32Pair x) { return {min(bound.a, x.a), min(bound.b, x.b)}; }
inline F32Pair max(F32Pair bound, F32Pair x) { return {max(bound.a, x.a), max(bound.b, x.b)}; }
inline F32Pair round(F32Pair x) { return {round(x.a), round(x.b)}; }
inline F32Pair max_abs(F32Pair acc, F32Pair x) { return {max_abs(acc.a, x.a), max_abs(acc.b, x.b)}; }
inline F32Pair power_of_two(F32Pair n) { return {power_of_two(n.a), power_of_two(n.b)}; }
inline F32Pair::Mask inside(F32Pair x, F32Pair low, F32Pair high) {
  return {inside(x.a, low.a, high.a), inside(x.b, low.b, high.b)};
}
inline F32Pair select(F32Pair::Mask m, F32Pair x, F32Pair y) { return {select(m.a, x.a, y.a), select(m.b, x.b, y.b)}; }

using Wide = F32Pair;
constexpr int64_t kWide = 32;
#else
using Wide = F32;
constexpr int64_t kWide = 16;
#endif

template <typename V, typename... Tail>
inline V lstm(const V (&gate)[4], float* cell, const CellQparams& q, Tail... tail) {
  V c = V::load(cell, tail...);
  if (q.quantizes) {
    const V zero_point = V::set1(q.zero_point);
    const V code = round(c * V::set1(q.inverse)) + zero_point;
    c = (min(V::set1(q.high), max(V::set1(q.low), code)) - zero_point) * V::set1(q.scale);
  }
  c = times_sigmoid(c, gate[1]) + tanh_times_sigmoid(gate[2], gate[0]);
  c.store(cell, tail...);
  return tanh_times_sigmoid(c, gate[3]);
}

// The new states of the units of one vector, or of the first of them.
template <typename V, Recurrence mode, typename... Tail>
QK_INLINE inline void advance_units(const Units& u, const float* input, const float* hidden, int64_t at,
                                    const CellQparams& cell, Tail... tail) {
  const auto of_input = [&](int gate) { return V::load(input + gate * u.input_gate, tail...); };
  const auto of_state = [&](int gate) { return V::load(hidden + gate * u.hidden_gate, tail...); };
  V h;
  if constexpr (mode == Recurrence::lstm) {
    const V gates[4] = {of_input(0) + of_state(0), of_input(1) + of_state(1), of_input(2) + of_state(2),
                        of_input(3) + of_state(3)};
    h = lstm(gates, u.c + at, cell, tail...);
  } else if constexpr (mode == Recurrence::gru) {
    const V reset = of_input(0) + of_state(0), keep = of_input(1) + of_state(1);
    const V n = tanh(of_input(2) + times_sigmoid(of_state(2), reset));
    h = n + times_sigmoid(V::load(u.h + at, tail...) - n, keep);
  } else if constexpr (mode == Recurrence::tanh) {
    h = tanh(of_input(0) + of_state(0));
  } else {
    h = max(zero<V>(), of_input(0) + of_state(0));
  }
  h.store(u.out + at, tail...);
}

template <Recurrence mode>
void advance_as(const Units& u, int64_t rows, int64_t units, const CellQparams& cell) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* input = u.input + row * u.input_row;
    const float* hidden = u.hidden + row * u.hidden_row;
    const int64_t first = row * u.state_row;
    int64_t done = 0;
    for (; done + kWide <= units; done += kWide)
      advance_units<Wide, mode>(u, input + done, hidden + done, first + done, cell);
    for_each_16(units - done, [&](int64_t i, auto... tail) QK_INLINE {
      advance_units<F32, mode>(u, input + done + i, hidden + done + i, first + done + i, cell, tail...);
    });
  }
}

void advance(Recurrence mode, const Units& u, int64_t rows, int64_t units, const CellQparams& cell) {
  switch (mode) {
    case Recurrence::lstm: return advance_as<Recurrence::lstm>(u, rows, units, cell);
    case Recurrence::gru: return advance_as<Recurrence::gru>(u, rows, units, cell);
    case Recurrence::tanh: return advance_as<Recurrence::tanh>(u, rows, units, cell);
    default: return advance_as<Recurrence::relu>(u, rows, units, cell);
  }
}

#if QK_PATH == QK_PATH_SCALAR
inline F32 multiply_add(F32 a, F32 b, F32 sum) { return sum + a * b; }
constexpr int kRows = 1, kChannels = 2;
#elif QK_PATH == QK_PATH_AVX2
inline F32 multiply_add(F32 a, F32 b, F32 sum) {
  return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
}
constexpr int kRows = 2, kChannels = 2;  // 8 registers of sums
#else
inline F32 multiply_add(F32 a, F32 b, F32 sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
constexpr int kRows = 4, kChannels = 4;  // 16 registers of sums
#endif

inline float sum_lanes(F32 a) {
  float lane[16];
  a.store(lane);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

template <int MR, int NC>
inline void dot_products(const float* h, int64_t k, const int8_t* codes, float (&sums)[MR][NC]) {
  F32 acc[MR][NC];
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NC; ++c) acc[r][c] = zero<F32>();
  for_each_16(k, [&](int64_t i, auto... tail) QK_INLINE {
    F32 values[MR];
    for (int r = 0; r < MR; ++r) values[r] = F32::load(h + r * k + i, tail...);
    for (int c = 0; c < NC; ++c) {
      const F32 w = F32::load(codes + c * k + i, tail...);
      for (int r = 0; r < MR; ++r) acc[r][c] = multiply_add(values[r], w, acc[r][c]);
    }
  });
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NC; ++c) sums[r][c] = sum_lanes(acc[r][c]);
}

template <int MR, int NC>
inline void multiply_block(const float* h, int64_t k, const int8_t* codes, const float* scale, const float* bias,
                           float* out, int64_t out_row) {
  float sums[MR][NC];
  dot_products<MR, NC>(h, k, codes, sums);
  for (int r = 0; r < MR; ++r)
    for (int c = 0; c < NC; ++c) out[r * out_row + c] = sums[r][c] * scale[c] + (bias ? bias[c] : 0.0f);
}

void multiply_float(const float* h, int64_t rows, int64_t k, const int8_t* codes, int64_t channels, const float* scale,
                    const float* bias, float* out, int64_t out_row) {
  for (int64_t c = 0; c < channels;) {
    const bool wide = channels - c >= kChannels;
    const float* own_bias = bias ? bias + c : nullptr;
    for (int64_t r = 0; r < rows;) {
      const bool high = rows - r >= kRows;
      const auto run = [&](auto block) {
        block(h + r * k, k, codes + c * k, scale + c, own_bias, out + r * out_row + c, out_row);
      };
      if (high && wide)
        run(multiply_block<kRows, kChannels>);
      else if (wide)
        run(multiply_block<1, kChannels>);
      else
        run(multiply_block<1, 1>);
      r += high && wide ? kRows : 1;
    }
    c += wide ? kChannels : 1;
  }
}

constexpr RecurrentKernels kRecurrentKernels = {advance, multiply_float};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
