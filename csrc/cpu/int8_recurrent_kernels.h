// The gates of LSTM, GRU and RNN, and floats as three rows of codes, on one path.
#include "cpu/common/activation_kernels.h"
#include "cpu/int8_gemm/int8_gemm.h"
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

// The three bytes of an integer q within kLargestParts, most significant first: q = 65536 a + 256 b + c, each from -128
// to 127. Every step is exact, as fp32 holds all integers below 2^24, and the halves leave no ties.
inline void split(F32 q, F32 (&parts)[3]) {
  parts[0] = round((q + F32::set1(128.5f)) * F32::set1(1.0f / 65536));
  const F32 rest = q - parts[0] * F32::set1(65536);
  parts[1] = round((rest + F32::set1(0.5f)) * F32::set1(1.0f / 256));
  parts[2] = rest - parts[1] * F32::set1(256);
}

float split_row(const float* h, int64_t k, uint8_t flip, uint8_t* rows, int64_t stride) {
  F32 largest = zero<F32>();
  for_each_16(k, [&](int64_t i, auto... tail) QK_INLINE { largest = max_abs(largest, F32::load(h + i, tail...)); });
  const float amax = lane_max_abs(largest);
  if (!(amax <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
  float unit = std::max(amax / kLargestParts, std::numeric_limits<float>::min());
  uint32_t bits;
  std::memcpy(&bits, &unit, 4);
  bits = (bits + 0x7fffff) & 0xff800000;  // the next power of two
  std::memcpy(&unit, &bits, 4);
  const F32 inverse = F32::set1(1 / unit), low = F32::set1(-kLargestParts), high = F32::set1(kLargestParts);
  for_each_16(k, [&](int64_t i, auto... tail) QK_INLINE {
    F32 parts[3];
    split(min(high, max(low, round(F32::load(h + i, tail...) * inverse))), parts);
    for (int part = 0; part < 3; ++part) {
      uint8_t* bytes = rows + part * stride + i;
      if (flip)
        (parts[part] + F32::set1(128)).store(bytes, tail...);
      else
        parts[part].store(reinterpret_cast<int8_t*>(bytes), tail...);
    }
  });
  return unit;
}

void add_parts(const float* parts, int64_t rows, int64_t channels, const float* bias, float* out, int64_t out_row) {
  for (int64_t row = 0; row < rows; ++row, parts += 3 * kPanel, out += out_row)
    for_each_16(channels, [&](int64_t i, auto... tail) QK_INLINE {
      F32 sum = F32::load(parts + i, tail...) + F32::load(parts + kPanel + i, tail...);
      sum = sum + F32::load(parts + 2 * kPanel + i, tail...);
      if (bias) sum = sum + F32::load(bias + i, tail...);
      sum.store(out + i, tail...);
    });
}

constexpr RecurrentKernels kRecurrentKernels = {advance, split_row, add_parts};

}  // namespace
}  // namespace qkernels::QK_NAMESPACE
