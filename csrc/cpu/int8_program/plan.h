// A plan: the text that says what int8_program computes, as steps. qkernels/ops/int8_program.py describes the language.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/int8_conv/int8_conv.h"
#include "tensor.h"

namespace qkernels {

struct Frame;
class Shapes;
class Places;

struct Step {
  virtual ~Step() = default;
  // Gives each value that the step makes its shape, or refuses the shapes that it reads.
  virtual void infer(Shapes& shapes) const = 0;
  // Asks for borders, and says which values can share memory.
  virtual void place(Places&) const {}
  // Computes one frame's images. It throws nothing, since it may run inside a parallel region.
  virtual void run(const Frame& frame) const = 0;

  std::string where;               // for errors
  std::vector<int> reads, writes;  // values
  // Whether the channels of what it reads, or writes as floats, may lie any distance apart.
  bool reads_any_order = false, writes_any_order = false;
  // Floats that `overwrites_with` may lie on if no later step reads them: each is read before it is written. Or -1.
  int overwrites = -1, overwrites_with = -1;
};

// What a step makes: floats, or codes of a quantizer.
struct ValueInfo {
  int quantizer = -1;
  bool codes() const { return quantizer >= 0; }
};

struct QuantizerInfo {
  int scale, zero_point;  // constants; zero_point may be -1
  int low, high;
};

enum class ConstantKind { floats, int8, int32, integer, any };

// What a plan wants of a constant.
struct ConstantUse {
  std::string where;
  int index;
  ConstantKind kind;
  int64_t numel;    // or -1:
  int channels_of;  // as many as this value has channels
  bool finite;      // where one element is not finite, all outputs are NaN
};

struct EqualConstants {
  std::string where;
  int a, b;
};

struct OutputInfo {
  int value, step;
  bool like_input;  // in the memory format of the first input
};

struct Plan {
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<ValueInfo> values;
  std::vector<QuantizerInfo> quantizers;
  std::vector<ConstantUse> constants;
  std::vector<EqualConstants> equal;
  std::map<int64_t, int> inputs;  // index -> value
  std::vector<OutputInfo> outputs;
};

// Throws an error that names the line of what it does not understand.
std::unique_ptr<Plan> parse_plan(const std::string& text);

// The values, sizes and constants of one line. Steps are made from it: each reads the keys that it knows, and what is
// left over is an error.
class Line {
 public:
  Line(Plan& plan, std::map<std::string, int>& names, std::map<int64_t, int>& quantizers, const std::string& text,
       int number);

  const std::string& name() const { return name_; }
  const std::string& where() const { return where_; }
  Plan& plan() { return plan_; }

  bool has(const std::string& key) const { return values_.count(key) > 0; }
  std::string text(const std::string& key);
  std::string text(const std::string& key, const std::string& missing) { return has(key) ? text(key) : missing; }
  int64_t integer(const std::string& key, int64_t least, int64_t most);
  int64_t integer(const std::string& key, int64_t least, int64_t most, int64_t missing) {
    return has(key) ? integer(key, least, most) : missing;
  }
  bool flag(const std::string& key) { return integer(key, 0, 1, 0) != 0; }
  float number(const std::string& key);
  Size3 sizes(const std::string& key, int64_t least);
  Size3 sizes(const std::string& key, int64_t least, int64_t missing) {
    return has(key) ? sizes(key, least) : Size3{missing, missing, missing};
  }
  ActivationStep activation(const std::string& key);

  // Values. -1 where a key is missing that may be.
  int read(const std::string& key) { return read_name(key, text(key)); }
  int read_if(const std::string& key) { return has(key) ? read(key) : -1; }
  int read_codes(const std::string& key);
  std::vector<int> read_list(const std::string& key);
  int make_floats(const std::string& key) { return make(key, -1); }
  int make_codes(const std::string& key, int quantizer) { return make(key, quantizer); }
  int make_like(const std::string& key, int value) {
    return make(key, plan_.values[static_cast<size_t>(value)].quantizer);
  }

  int quantizer(const std::string& key);
  void define_quantizer();
  int constant(const std::string& key, ConstantKind kind, int64_t numel, bool finite, int channels_of = -1);
  int constant_if(const std::string& key, ConstantKind kind, int64_t numel, bool finite, int channels_of = -1) {
    return has(key) ? constant(key, kind, numel, finite, channels_of) : -1;
  }

  // Hands over what the line read and made.
  void finish(Step& step);
  void finish();

  template <typename... Args>
  [[noreturn]] void refuse(const Args&... args) const {
    fail(where_, ": ", args...);
  }

 private:
  int read_name(const std::string& key, const std::string& name);
  int make(const std::string& key, int quantizer);

  Plan& plan_;
  std::map<std::string, int>& names_;
  std::map<int64_t, int>& quantizers_;
  std::string name_, where_;
  std::map<std::string, std::string> values_;
  std::map<std::string, bool> used_;
  std::vector<int> reads_, writes_;
};

// Where results go that may be kept as floats, as codes, or both.
struct Kept {
  int floats = -1, codes = -1;
};
Kept kept(Line& line);

}  // namespace qkernels
