// The steps of a recurrent layer on the CPU: checks, and the split of each step over threads. Products are those of
// int8_gemm/; gates are in int8_recurrent_kernels.h.
#include "cpu/int8_recurrent.h"

#include "cpu/common/int8_ops.h"
#include "cpu/common/phases.h"

#define QK_BODY "cpu/int8_recurrent_kernels.h"
#define QK_USES_VNNI
#include "cpu/common/foreach_isa.h"

namespace qkernels {

const RecurrentKernels& recurrent_kernels() { return QK_OF_ACTIVE_ISA(kRecurrentKernels); }

namespace {

// What one call computes. Steps are numbered in the order in which they run.
struct Layer {
  Recurrence mode;
  int64_t n, hidden;
  std::vector<int64_t> rows, begin;  // of each step: how many rows, and where they begin among all
  const float *gates, *first_h;
  float *y, *c;  // c: of all rows, moved on in place
  CellQparams cell;
  int64_t parts;  // rows of codes that stand for a row of h: 1, or 3 if it is not quantized (see int8_recurrent.h)
  const int8_t* data;
  RowQparams qparams;
  PanelOutput output;

  int64_t width() const { return gates_of(mode) * hidden; }
  int64_t steps() const { return static_cast<int64_t>(rows.size()); }
  // Rows of a step below this have an h of the step before; the others begin here, as sequences do backwards.
  int64_t carried(int64_t step) const { return step == 0 ? 0 : std::min(rows[step], rows[step - 1]); }
  const float* h_before(int64_t step, int64_t row) const {
    return row < carried(step) ? y + (begin[step - 1] + row) * hidden : first_h + row * hidden;
  }

  // Calls f(first row, count) for runs of rows whose h before this step lies in one piece.
  template <typename F>
  void in_pieces(int64_t step, int64_t row, int64_t end, F f) const {
    const int64_t cut = std::clamp(carried(step), row, end);
    if (row < cut) f(row, cut - row);
    if (cut < end) f(cut, end - cut);
  }
};

// Tasks are blocks of hidden units, with all their gates, times blocks of rows. So a thread that claims the same tasks
// at each step reads the same weights.
constexpr int64_t kBlockRows = 48;
// Multiply-accumulates of a step, with 3 more rows for reading the weights, that are worth a thread.
constexpr int64_t kStepWork = 1 << 19;

// Where panels do not end with gates, a step is two phases: all products, and then all gates.
class Worker {
 public:
  Worker(const Layer& layer, float* shared_sums)
      : l_(layer), int8_(int8_kernels()), kernels_(recurrent_kernels()), shared_(shared_sums) {
    stride_ = code_row_stride(l_.hidden);
    const int64_t blocks = (l_.n + kBlockRows - 1) / kBlockRows;
    codes_.resize(static_cast<size_t>(l_.parts * l_.n * stride_));
    scales_.resize(static_cast<size_t>(l_.parts * l_.n));
    quantized_.assign(static_cast<size_t>(blocks), -1);
    const int64_t at_once = std::min(l_.n, kBlockRows) * kPanel;
    if (l_.parts > 1) parts_.resize(static_cast<size_t>(l_.parts * at_once));
    if (!shared_) sums_.resize(static_cast<size_t>(gates_of(l_.mode) * at_once));
  }

  void operator()(int64_t phase, int64_t task) {
    const int64_t step = shared_ ? phase / 2 : phase, blocks = (l_.n + kBlockRows - 1) / kBlockRows;
    const int64_t row = task % blocks * kBlockRows, end = std::min(l_.rows[step], row + kBlockRows);
    if (row >= end) return;  // sequences have ended
    const int64_t unit = task / blocks * kPanel;
    if (!shared_) {
      const int64_t units = std::min<int64_t>(kPanel, l_.hidden - unit), row_floats = gates_of(l_.mode) * kPanel;
      for (int gate = 0; gate < gates_of(l_.mode); ++gate)
        multiply(step, row, end, gate * l_.hidden + unit, units, sums_.data() + gate * kPanel, row_floats);
      advance(step, row, end, unit, units, sums_.data(), row_floats, kPanel);
    } else if (phase % 2 == 0) {
      const int64_t channels = std::min<int64_t>(kPanel, l_.width() - unit);
      if (channels > 0) multiply(step, row, end, unit, channels, shared_ + row * l_.width() + unit, l_.width());
    } else if (unit < l_.hidden) {
      const int64_t units = std::min<int64_t>(kPanel, l_.hidden - unit);
      advance(step, row, end, unit, units, shared_ + row * l_.width() + unit, l_.width(), l_.hidden);
    }
  }

 private:
  void quantize(int64_t step, int64_t row, int64_t end) {
    int64_t& last = quantized_[static_cast<size_t>(row / kBlockRows)];
    if (last == step) return;
    last = step;
    for (int64_t r = row; r < end; ++r) {
      const float* h = l_.h_before(step, r);
      uint8_t* codes = codes_.data() + l_.parts * r * stride_;
      float* scales = scales_.data() + l_.parts * r;
      if (l_.parts == 1) {
        scales[0] = int8_.quantize_row(h, Element::f32, l_.hidden, l_.qparams, int8_.flip, codes);
      } else {
        scales[2] = kernels_.split_row(h, l_.hidden, int8_.flip, codes, stride_);
        scales[1] = 256 * scales[2];
        scales[0] = 256 * scales[1];
      }
    }
  }

  void multiply(int64_t step, int64_t row, int64_t end, int64_t channel, int64_t channels, float* out,
                int64_t out_row) {
    quantize(step, row, end);
    PanelOutput o = at(l_.output, 0, channel);
    o.out = out;
    o.row_stride = out_row;
    o.channels = channels;
    o.scale_a = scales_.data() + l_.parts * row;
    if (l_.parts > 1) {
      o.out = parts_.data();
      o.row_stride = kPanel;
      o.bias = nullptr;
    }
    const int8_t* panel = l_.data + channel / kPanel * panel_bytes(l_.hidden);
    const uint8_t* codes = codes_.data() + l_.parts * row * stride_;
    int8_.multiply(codes, stride_, l_.parts * (end - row), panel, l_.hidden, o);
    if (l_.parts > 1)
      kernels_.add_parts(parts_.data(), end - row, channels, l_.output.bias ? l_.output.bias + channel : nullptr, out,
                         out_row);
  }

  void advance(int64_t step, int64_t row, int64_t end, int64_t unit, int64_t units, const float* sums, int64_t sums_row,
               int64_t sums_gate) {
    l_.in_pieces(step, row, end, [&](int64_t r, int64_t count) {
      const int64_t at = l_.begin[step] + r;
      Units u{};
      u.input = l_.gates + at * l_.width() + unit;
      u.input_row = l_.width();
      u.input_gate = l_.hidden;
      u.hidden = sums + (r - row) * sums_row;
      u.hidden_row = sums_row;
      u.hidden_gate = sums_gate;
      u.h = l_.h_before(step, r) + unit;
      u.c = l_.c ? l_.c + r * l_.hidden + unit : nullptr;
      u.out = l_.y + at * l_.hidden + unit;
      u.state_row = l_.hidden;
      kernels_.advance(l_.mode, u, count, units, l_.cell);
    });
  }

  const Layer& l_;
  const Int8Kernels& int8_;
  const RecurrentKernels& kernels_;
  float* shared_;  // the products of a step [N, gates * hidden], or null
  int64_t stride_;
  std::vector<uint8_t> codes_;  // of h, each thread its own: that costs less than to wait for each other
  std::vector<float> scales_, parts_, sums_;
  std::vector<int64_t> quantized_;  // by block of rows: the step whose h codes_ holds
};

Recurrence mode_of(const std::string& name) {
  if (name == "LSTM") return Recurrence::lstm;
  if (name == "GRU") return Recurrence::gru;
  if (name == "RNN_TANH") return Recurrence::tanh;
  if (name == "RNN_RELU") return Recurrence::relu;
  fail("mode: got '", name, "'; accepted: LSTM, GRU, RNN_TANH, RNN_RELU");
}

void check_floats(const char* name, const Tensor& t, int64_t dims, const std::string& shape) {
  check_cpu(name, t);
  QK_CHECK(t.scalar_type() == ScalarType::Float, name, ": got ", dtype_name(t.scalar_type()),
           "; accepted: torch.float32");
  QK_CHECK(t.dim() == dims, name, ": got shape ", shape_of(t), "; accepted: ", shape);
}

std::string text_of(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "[") << sizes[i];
  return text.str() + "]";
}

std::vector<int64_t> rows_of_steps(const std::vector<int64_t>& sizes, int64_t rows, int64_t n) {
  if (sizes.empty() || (sizes.size() == 1 && sizes[0] == n)) {
    QK_CHECK(n ? rows % n == 0 : rows == 0, "gates: got ", rows, " rows; accepted: a multiple of the ", n,
             " rows of states, or sizes");
    return std::vector<int64_t>(static_cast<size_t>(n ? rows / n : 0), n);
  }
  int64_t before = n, sum = 0;
  for (const int64_t size : sizes) {
    QK_CHECK(before >= size && size >= 1, "sizes: got ", text_of(sizes), "; accepted: from at most ", n,
             ", the rows of states, down to at least 1");
    sum += before = size;
  }
  QK_CHECK(sum == rows, "sizes: got a sum of ", sum, "; accepted: the rows of gates, ", rows);
  return sizes;
}

CellQparams cell_qparams(const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point, int64_t cell_min,
                         int64_t cell_max) {
  if (!scale) return {};
  const RowQparams q = static_qparams("cell", *scale, zero_point, cell_min, cell_max);
  return {true, q.inverse, q.scale, q.zero_point, q.low, q.high};
}

std::tuple<Tensor, Tensor> int8_recurrent(const Tensor& gates_any, const Tensor& states_any,
                                          const std::vector<int64_t>& sizes, const Text& mode, const Tensor& data,
                                          const Tensor& colsum, const Tensor& scale, const std::optional<Tensor>& bias,
                                          bool float_hidden, const std::optional<Tensor>& hidden_scale,
                                          const std::optional<Tensor>& hidden_zero_point, int64_t quant_min,
                                          int64_t quant_max, const std::optional<Tensor>& cell_scale,
                                          const std::optional<Tensor>& cell_zero_point, int64_t cell_min,
                                          int64_t cell_max, bool reverse) {
  Layer l{};
  l.mode = mode_of(mode);
  const int64_t count = l.mode == Recurrence::lstm ? 2 : 1;
  const std::string shape_of_states = "[" + std::to_string(count) + ", N, H]";
  check_floats("gates", gates_any, 2, "[rows, gates·H]");
  check_floats("states", states_any, 3, shape_of_states);
  QK_CHECK(states_any.size(0) == count, "states: got shape ", shape_of(states_any), "; accepted: ", shape_of_states);
  l.n = states_any.size(1);
  l.hidden = states_any.size(2);
  QK_CHECK(gates_any.size(1) == l.width(), "gates: got shape ", shape_of(gates_any), "; accepted: [rows, ", l.width(),
           "]");
  check_k("states", l.hidden);
  const auto channel_scale = float_vector("scale", scale, l.width(), -1, false, "[N]");
  std::optional<Values<float>> offset;
  if (bias) offset = float_vector("bias", *bias, l.width(), -1, false, "[N]");
  check_colsum(colsum, l.width());
  check_packed(data, l.width(), l.hidden);
  l.parts = float_hidden ? 3 : 1;
  int32_t zero_point = 0;
  if (float_hidden) {
    QK_CHECK(!hidden_scale && !hidden_zero_point,
             "hidden_scale, hidden_zero_point: got a tensor with float_hidden; accepted: None");
  } else {
    QK_CHECK(hidden_scale || !hidden_zero_point,
             "hidden_zero_point: got a tensor without hidden_scale; accepted: both, or neither");
    l.qparams = hidden_scale ? static_qparams("hidden", *hidden_scale, hidden_zero_point, quant_min, quant_max)
                             : input_qparams({}, {}, quant_min, quant_max);
    zero_point = static_cast<int32_t>(l.qparams.zero_point);
  }
  QK_CHECK(!cell_scale || l.mode == Recurrence::lstm, "cell_scale: got a tensor with mode='", mode,
           "'; accepted: None");
  l.cell = cell_qparams(cell_scale, cell_zero_point, cell_min, cell_max);
  const int64_t all_rows = gates_any.size(0);
  l.rows = rows_of_steps(sizes, all_rows, l.n);
  record_isa(int8_kernels().isa);

  const Tensor gates = to_contiguous(gates_any), states = to_contiguous(states_any);
  Tensor y = empty({all_rows, l.hidden}, ScalarType::Float), last = empty({count, l.n, l.hidden}, ScalarType::Float);
  const int64_t of_state = l.n * l.hidden;
  float* ended = static_cast<float*>(last.data_ptr());
  if (of_state) std::memcpy(ended, states.data_ptr(), static_cast<size_t>(count * of_state) * sizeof(float));
  if (all_rows == 0 || l.hidden == 0) return {y, last};

  l.gates = static_cast<const float*>(gates.data_ptr());
  l.first_h = static_cast<const float*>(states.data_ptr());
  l.y = static_cast<float*>(y.data_ptr());
  l.c = count == 2 ? ended + of_state : nullptr;
  l.data = static_cast<const int8_t*>(data.data_ptr());
  l.output.scale_b = channel_scale.data;
  l.output.bias = offset ? offset->data : nullptr;
  l.output.type = Element::f32;
  l.output.channels = l.width();
  l.output.scale_a_step = 1;
  l.output.colsum = static_cast<const int32_t*>(colsum.data_ptr());
  l.output.zero_point = &zero_point;
  l.output.wide = is_wide(std::abs(zero_point), l.hidden);
  int64_t begin = 0;
  for (const int64_t rows : l.rows) {
    l.begin.push_back(begin);
    begin += rows;
  }
  if (reverse) {
    std::reverse(l.rows.begin(), l.rows.end());
    std::reverse(l.begin.begin(), l.begin.end());
  }

  const bool two_phases = gates_of(l.mode) > 1 && l.hidden % kPanel != 0;
  Tensor shared = empty({two_phases ? l.n * l.width() : 0}, ScalarType::Float);
  float* shared_sums = two_phases ? static_cast<float*>(shared.data_ptr()) : nullptr;
  const int64_t row_blocks = (l.n + kBlockRows - 1) / kBlockRows;
  const int64_t tasks = panels(two_phases ? l.width() : l.hidden) * row_blocks;
  const int64_t work = l.width() * l.hidden * (l.parts * std::min(l.n, kBlockRows) + 3) * row_blocks;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, work / kStepWork));
  Phases(l.steps() * (two_phases ? 2 : 1), tasks, threads).run([&] { return Worker(l, shared_sums); });

  for (int64_t step = 0; step < l.steps(); ++step) {  // a row's last h is that of the last step that holds it
    const int64_t next = step + 1 < l.steps() ? l.rows[step + 1] : 0;
    if (next < l.rows[step])
      std::memcpy(ended + next * l.hidden, l.y + (l.begin[step] + next) * l.hidden,
                  static_cast<size_t>((l.rows[step] - next) * l.hidden) * sizeof(float));
  }
  return {y, last};
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("int8_recurrent", TORCH_BOX(&qkernels::int8_recurrent)); }
