#include "cpu/int8_program/plan.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>

#include "cpu/int8_program/steps.h"

namespace qkernels {
namespace {

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == by)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

bool to_integer(const std::string& text, int64_t& value) {
  char* end = nullptr;
  errno = 0;
  value = std::strtoll(text.c_str(), &end, 10);
  return !text.empty() && end == text.c_str() + text.size() && errno == 0;
}

bool to_number(const std::string& text, float& value) {
  char* end = nullptr;
  const double wide = std::strtod(text.c_str(), &end);  // rounds once more, as torch does with Python's numbers
  value = static_cast<float>(wide);
  return !text.empty() && end == text.c_str() + text.size();
}

}  // namespace

Line::Line(Plan& plan, std::map<std::string, int>& names, std::map<int64_t, int>& quantizers, const std::string& text,
           int number)
    : plan_(plan), names_(names), quantizers_(quantizers) {
  const std::vector<std::string> parts = split(text, ' ');
  name_ = parts[0];
  where_ = "plan: line " + std::to_string(number) + " (" + name_ + ")";
  for (size_t i = 1; i < parts.size(); ++i) {
    const size_t at = parts[i].find('=');
    if (at == std::string::npos || at == 0) refuse("got '", parts[i], "'; accepted: key=value");
    const std::string key = parts[i].substr(0, at);
    if (!values_.emplace(key, parts[i].substr(at + 1)).second) refuse(key, ": got two values; accepted: one");
  }
}

std::string Line::text(const std::string& key) {
  const auto found = values_.find(key);
  if (found == values_.end()) refuse("got no ", key, "; accepted: ", key, "=…");
  used_[key] = true;
  return found->second;
}

int64_t Line::integer(const std::string& key, int64_t least, int64_t most) {
  const std::string value = text(key);
  int64_t number = 0;
  if (!to_integer(value, number) || number < least || number > most)
    refuse(key, ": got '", value, "'; accepted: an integer from ", least, " to ", most);
  return number;
}

float Line::number(const std::string& key) {
  const std::string value = text(key);
  float number = 0;
  if (!to_number(value, number)) refuse(key, ": got '", value, "'; accepted: a number");
  return number;
}

Size3 Line::sizes(const std::string& key, int64_t least) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const std::string value = text(key);
  const std::vector<std::string> parts = split(value, ',');
  int64_t numbers[3] = {};
  bool good = parts.size() == 3;
  for (size_t i = 0; good && i < 3; ++i)
    good = to_integer(parts[i], numbers[i]) && least <= numbers[i] && numbers[i] < kMost;
  if (!good)
    refuse(key, ": got '", value, "'; accepted: 3 integers for depth, height and width, with commas, at least ", least);
  return {numbers[0], numbers[1], numbers[2]};
}

ActivationStep Line::activation(const std::string& key) {
  if (!has(key)) return {};
  struct Known {
    const char* name;
    Activation kind;
    size_t parameters;
  };
  static constexpr Known kKnown[] = {{"relu", Activation::relu, 0},
                                     {"clamp", Activation::clamp, 2},
                                     {"leaky_relu", Activation::leaky_relu, 1},
                                     {"hardswish", Activation::hardswish, 0},
                                     {"hardsigmoid", Activation::hardsigmoid, 0},
                                     {"silu", Activation::silu, 0},
                                     {"gelu", Activation::gelu, 0},
                                     {"gelu_tanh", Activation::gelu_tanh, 0},
                                     {"sigmoid", Activation::sigmoid, 0},
                                     {"tanh", Activation::tanh, 0}};
  const std::string value = text(key);
  const std::vector<std::string> parts = split(value, ':');
  for (const Known& known : kKnown) {
    if (parts[0] != known.name || parts.size() != known.parameters + 1) continue;
    float numbers[2] = {0, 0};
    bool good = true;
    for (size_t i = 0; i < known.parameters; ++i)
      good = good && to_number(parts[i + 1], numbers[i]) && !std::isnan(numbers[i]);
    if (good) return {known.kind, numbers[0], numbers[1]};
  }
  refuse(key, ": got '", value,
         "'; accepted: relu, clamp:low:high, leaky_relu:slope, hardswish, hardsigmoid, silu, gelu, gelu_tanh, "
         "sigmoid, tanh");
}

int Line::read_name(const std::string& key, const std::string& name) {
  const auto found = names_.find(name);
  if (found == names_.end()) refuse(key, ": got '", name, "'; accepted: a value that an earlier line makes");
  reads_.push_back(found->second);
  return found->second;
}

int Line::read_codes(const std::string& key) {
  const int value = read(key);
  if (!plan_.values[static_cast<size_t>(value)].codes())
    refuse(key, ": got the floats '", values_[key], "'; accepted: codes");
  return value;
}

std::vector<int> Line::read_list(const std::string& key) {
  std::vector<int> values;
  for (const std::string& name : split(text(key), ',')) values.push_back(read_name(key, name));
  return values;
}

int Line::make(const std::string& key, int quantizer) {
  const std::string name = text(key);
  int64_t number = 0;
  const char kind = quantizer < 0 ? 'f' : 'q';
  if (name.empty() || name[0] != kind || !to_integer(name.substr(1), number) || number < 0)
    refuse(key, ": got '", name, "'; accepted: ", kind, " and a number, since it holds ",
           quantizer < 0 ? "floats" : "codes");
  const int value = static_cast<int>(plan_.values.size());
  if (!names_.emplace(name, value).second)
    refuse(key, ": got '", name, "', which an earlier line makes; accepted: a new name");
  plan_.values.push_back({quantizer});
  writes_.push_back(value);
  return value;
}

int Line::quantizer(const std::string& key) {
  const auto found = quantizers_.find(integer(key, 0, std::numeric_limits<int64_t>::max()));
  if (found == quantizers_.end()) refuse(key, ": got '", values_[key], "'; accepted: a quantizer of an earlier line");
  return found->second;
}

void Line::define_quantizer() {
  const int64_t id = integer("id", 0, std::numeric_limits<int64_t>::max());
  if (!quantizers_.emplace(id, static_cast<int>(plan_.quantizers.size())).second)
    refuse("id: got ", id, ", which an earlier line defines; accepted: a new one");
  QuantizerInfo info{};
  info.scale = constant("scale", ConstantKind::floats, 1, true);
  info.zero_point = constant_if("zero_point", ConstantKind::integer, 1, false);
  info.low = static_cast<int>(integer("low", -128, 126));
  info.high = static_cast<int>(integer("high", info.low + 1, 127));
  plan_.quantizers.push_back(info);
}

int Line::constant(const std::string& key, ConstantKind kind, int64_t numel, bool finite, int channels_of) {
  const int index = static_cast<int>(integer(key, 0, 1 << 30));
  plan_.constants.push_back({where_ + ": " + key, index, kind, numel, channels_of, finite});
  return index;
}

void Line::finish() {
  for (const auto& [key, value] : values_)
    if (!used_.count(key)) refuse("got the key '", key, "'; accepted: a key of this step");
}

void Line::finish(Step& step) {
  finish();
  step.where = where_;
  step.reads = reads_;
  step.writes = writes_;
}

Kept kept(Line& line) {
  Kept result;
  if (line.has("out")) result.floats = line.make_floats("out");
  if (line.has("codes")) result.codes = line.make_codes("codes", line.quantizer("q"));
  if (result.floats < 0 && result.codes < 0) line.refuse("got neither out nor codes; accepted: one, or both");
  return result;
}

std::unique_ptr<Plan> parse_plan(const std::string& text) {
  auto plan = std::make_unique<Plan>();
  std::map<std::string, int> names;
  std::map<int64_t, int> quantizers;
  int number = 0;
  for (const std::string& one : split(text, '\n')) {
    ++number;
    if (one.empty()) continue;
    Line line(*plan, names, quantizers, one, number);
    const auto maker = step_makers().find(line.name());
    if (maker == step_makers().end()) {
      std::string known;
      for (const auto& [name, make] : step_makers()) known += (known.empty() ? "" : ", ") + name;
      fail("plan: line ", number, ": got the step '", line.name(), "'; accepted: ", known);
    }
    if (auto step = maker->second(line)) {
      line.finish(*step);
      plan->steps.push_back(std::move(step));
    } else {
      line.finish();
    }
  }
  for (size_t i = 0; i < plan->outputs.size(); ++i)
    QK_CHECK(plan->outputs[i].value >= 0, "plan: got no output with index ", i, "; accepted: every index from 0 on");
  return plan;
}

}  // namespace qkernels
