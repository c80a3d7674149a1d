// Sizes of a plan's values for given sizes of the inputs, and where each value lies in memory. Nothing here depends on
// the number of images: a layout serves every batch.
#pragma once

#include <string>
#include <vector>

#include "cpu/int8_program/plan.h"

namespace qkernels {

struct Shape {
  int rank = 0;  // spatial dims of the tensor: those before them have size 1
  int64_t channels = 0;
  Size3 size = {1, 1, 1};

  int64_t pixels() const { return size.d * size.h * size.w; }
};

inline bool operator==(const Size3& a, const Size3& b) { return a.d == b.d && a.h == b.h && a.w == b.w; }

// For errors: [N, C, …] as a tensor of this rank has it.
std::string text(const Shape& shape);

// Where a value lies. Strides are in elements: bytes for codes, floats for floats; an image's channels are `stride_c`
// apart, which is 1 but in tensors that are not the op's own.
struct Place {
  enum class Memory { arena, input, output } memory = Memory::arena;
  int index = 0;       // of the input or output
  int64_t buffer = 0;  // arena: the buffer's offset for one image, in bytes; n images begin at n times this
  int64_t inside = 0;  // arena: from the begin of an image's memory to its first pixel, in bytes
  int64_t first = 0;   // the value's first channel in this memory
  int64_t stride_n = 0, stride_c = 1, stride_d = 0, stride_h = 0, stride_w = 0;
};

// The border of a buffer of codes is filled once, before the first step that writes to the buffer.
struct Border {
  int value;  // stands for the whole buffer: the value that owns it
  Size3 before, after;
};

struct Layout {
  std::vector<Shape> shapes;
  std::vector<Place> places;
  std::vector<std::vector<Border>> borders;  // for each step
  std::vector<bool> free;                    // for each step: nothing is to do, since its result lies where it belongs
  std::vector<bool> channels_last;           // for each output
  int64_t bytes = 0;                         // of the arena, for one image
  int64_t elements = 0;                      // of an image's values, and of the weights
};

// What Step::infer sees.
class Shapes {
 public:
  explicit Shapes(Layout& layout) : layout_(layout) {}
  const Shape& of(int value) const { return layout_.shapes[static_cast<size_t>(value)]; }
  void set(int value, const Shape& shape) {
    if (value >= 0) layout_.shapes[static_cast<size_t>(value)] = shape;
  }
  void set(const Kept& kept, const Shape& shape) {
    set(kept.floats, shape);
    set(kept.codes, shape);
  }

 private:
  Layout& layout_;
};

// What Step::place sees.
class Places {
 public:
  Places(const Plan& plan, Layout& layout);

  const Shape& shape(int value) const { return layout_.shapes[static_cast<size_t>(value)]; }
  // The step reads codes beyond the image's edge.
  void want_border(int value, Size3 before, Size3 after);
  // `value` is the channels of `of` from `first` on. Nothing has to be copied then.
  void view(int value, int of, int64_t first);
  // `part` becomes the channels of `whole` from `first` on. False: it lies elsewhere already.
  bool join(int part, int whole, int64_t first);
  // The present step has nothing to do.
  void done() { layout_.free[step_] = true; }

  // Calls place() of all steps, then gives every buffer its memory. `last` says which outputs are channels_last.
  void assign(const std::vector<bool>& channels_last);

 private:
  struct Member {
    int root;       // the value that owns the memory
    int64_t first;  // the member's first channel there
  };
  const Member& member(int value) const { return members_[static_cast<size_t>(value)]; }
  void assign_tensors(const std::vector<bool>& channels_last);
  void assign_arena();

  const Plan& plan_;
  Layout& layout_;
  size_t step_ = 0;
  std::vector<Member> members_;
  std::vector<Size3> before_, after_;
  std::vector<bool> joined_;
};

struct LayoutKey {
  std::vector<int64_t> sizes;  // of the inputs, each with its number of dims in the place of the batch
  bool channels_last;
  bool operator==(const LayoutKey& other) const { return channels_last == other.channels_last && sizes == other.sizes; }
};

std::shared_ptr<const Layout> make_layout(const Plan& plan, const LayoutKey& key);

}  // namespace qkernels
