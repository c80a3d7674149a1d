#include "cpu/int8_program/layout.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace qkernels {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kSlack = 64;  // what convolutions may read behind the last code
// Of one value of an image, with its border, and of each of its dims. Sizes in bytes stay far from what int64 holds.
constexpr int64_t kMostElements = int64_t{1} << 40, kMostSize = int64_t{1} << 31;

int64_t rounded_up(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void check_elements(const std::string& where, const Shape& shape) {
  int64_t elements = 1;
  for (int64_t size : {shape.channels, shape.size.w, shape.size.h, shape.size.d}) {
    QK_CHECK(size <= kMostSize && elements <= kMostElements / std::max<int64_t>(size, 1), where,
             ": got a value of shape ", text(shape), "; accepted: sizes up to 2^31 and, with the border, up to 2^40 ",
             "elements an image");
    elements *= std::max<int64_t>(size, 1);
  }
}

Size3 larger(Size3 a, Size3 b) { return {std::max(a.d, b.d), std::max(a.h, b.h), std::max(a.w, b.w)}; }

// A buffer of the arena, in use from step `first` to step `last`.
struct Buffer {
  int root;
  int64_t bytes, offset;
  size_t first, last;
};

// Gives large buffers their memory first: each lies as low as the buffers in use at the same time allow. Returns the
// arena's size.
int64_t color(std::vector<Buffer>& buffers) {
  std::vector<Buffer*> order;
  for (Buffer& buffer : buffers) order.push_back(&buffer);
  std::stable_sort(order.begin(), order.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  std::vector<const Buffer*> placed;  // by offset
  int64_t size = 0;
  for (Buffer* buffer : order) {
    int64_t offset = 0;
    for (const Buffer* other : placed) {
      if (other->last < buffer->first || buffer->last < other->first) continue;
      if (offset + buffer->bytes <= other->offset) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    buffer->offset = offset;
    size = std::max(size, offset + buffer->bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                   [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; }),
                  buffer);
  }
  return size;
}

}  // namespace

std::string text(const Shape& shape) {
  std::string result = "[N, " + std::to_string(shape.channels);
  const int64_t sizes[] = {shape.size.d, shape.size.h, shape.size.w};
  for (int i = 3 - shape.rank; i < 3; ++i) result += ", " + std::to_string(sizes[i]);
  return result + "]";
}

Places::Places(const Plan& plan, Layout& layout)
    : plan_(plan),
      layout_(layout),
      before_(plan.values.size()),
      after_(plan.values.size()),
      joined_(plan.values.size()) {
  for (size_t v = 0; v < plan.values.size(); ++v) members_.push_back({static_cast<int>(v), 0});
}

void Places::want_border(int value, Size3 before, Size3 after) {
  const size_t v = static_cast<size_t>(value);
  before_[v] = larger(before_[v], before);
  after_[v] = larger(after_[v], after);
}

void Places::view(int value, int of, int64_t first) {
  const Member& whole = member(of);
  members_[static_cast<size_t>(value)] = {whole.root, whole.first + first};
  done();
}

bool Places::join(int part, int whole, int64_t first) {
  if (member(part).root != part || joined_[static_cast<size_t>(part)]) return false;
  joined_[static_cast<size_t>(part)] = true;
  for (Member& member : members_)
    if (member.root == part) member = {whole, member.first + first};
  return true;
}

void Places::assign(const std::vector<bool>& channels_last) {
  const size_t values = plan_.values.size(), steps = plan_.steps.size();
  layout_.places.assign(values, {});
  layout_.borders.assign(steps, {});
  layout_.free.assign(steps, false);
  for (step_ = 0; step_ < steps; ++step_) plan_.steps[step_]->place(*this);
  for (size_t v = 0; v < values; ++v) {
    const size_t root = static_cast<size_t>(members_[v].root);
    before_[root] = larger(before_[root], before_[v]);
    after_[root] = larger(after_[root], after_[v]);
  }
  assign_tensors(channels_last);
  assign_arena();
  for (size_t v = 0; v < values; ++v) {
    const Member& member = members_[v];
    if (member.root != static_cast<int>(v)) layout_.places[v] = layout_.places[static_cast<size_t>(member.root)];
    layout_.places[v].first = member.first;
  }
}

// Finds what can stay in the inputs' memory, and what can be written to the outputs' at once.
void Places::assign_tensors(const std::vector<bool>& channels_last) {
  std::vector<bool> in_place(plan_.values.size(), true);  // whether every reader takes any order of dims
  std::vector<int> readers(plan_.values.size(), 0), writer(plan_.values.size(), -1);
  for (size_t s = 0; s < plan_.steps.size(); ++s) {
    const Step& step = *plan_.steps[s];
    for (int value : step.writes) writer[static_cast<size_t>(value)] = static_cast<int>(s);
    if (layout_.free[s]) continue;
    for (int value : step.reads) {
      const size_t root = static_cast<size_t>(member(value).root);
      ++readers[root];
      if (!step.reads_any_order || value != static_cast<int>(root)) in_place[root] = false;
    }
  }
  for (const auto& [index, value] : plan_.inputs) {
    const size_t v = static_cast<size_t>(value);
    const bool row = layout_.shapes[v].rank == 0;  // whose channels are neighbours
    if (member(value).root != value || !(in_place[v] || row) || readers[v] == 0) continue;
    layout_.places[v].memory = Place::Memory::input;
    layout_.places[v].index = static_cast<int>(index);
    layout_.free[static_cast<size_t>(writer[v])] = in_place[v];  // else the step looks for NaNs
  }
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    const OutputInfo& output = plan_.outputs[i];
    const size_t v = static_cast<size_t>(output.value);
    Place& place = layout_.places[v];
    if (plan_.values[v].codes() || member(output.value).root != output.value || place.memory != Place::Memory::arena)
      continue;
    const Shape& shape = layout_.shapes[v];
    const bool innermost = channels_last[i] || shape.pixels() == 1 || shape.channels == 1;
    const Step& step = *plan_.steps[static_cast<size_t>(writer[v])];
    if (!innermost && !(readers[v] == 1 && step.writes_any_order)) continue;
    place.memory = Place::Memory::output;
    place.index = static_cast<int>(i);
    place.stride_n = shape.channels * shape.pixels();
    place.stride_c = innermost ? 1 : shape.pixels();
    place.stride_w = innermost ? shape.channels : 1;
    place.stride_h = place.stride_w * shape.size.w;
    place.stride_d = place.stride_h * shape.size.h;
    layout_.free[static_cast<size_t>(output.step)] = true;
  }
}

void Places::assign_arena() {
  constexpr size_t kNever = std::numeric_limits<size_t>::max();
  const size_t values = plan_.values.size();
  std::vector<size_t> first(values, kNever), last(values, 0);
  for (size_t s = 0; s < plan_.steps.size(); ++s) {
    if (layout_.free[s]) continue;
    const Step& step = *plan_.steps[s];
    for (const std::vector<int>* touched : {&step.reads, &step.writes})
      for (int value : *touched) {
        const size_t root = static_cast<size_t>(member(value).root);
        first[root] = std::min(first[root], s);
        last[root] = s;
      }
  }
  const auto is_buffer = [&](size_t v) {
    return member(static_cast<int>(v)).root == static_cast<int>(v) &&
           layout_.places[v].memory == Place::Memory::arena && first[v] != kNever;
  };
  // A sum that is written over one of its terms finds its memory in the cache: ResNet-50 gains 5 %.
  std::vector<size_t> lies_on(values);
  std::iota(lies_on.begin(), lies_on.end(), size_t{0});
  for (size_t s = 0; s < plan_.steps.size(); ++s) {
    const Step& step = *plan_.steps[s];
    if (step.overwrites < 0 || layout_.free[s]) continue;
    const size_t term = static_cast<size_t>(step.overwrites), sum = static_cast<size_t>(step.overwrites_with);
    if (!is_buffer(term) || !is_buffer(sum) || last[term] != s || first[sum] != s) continue;
    lies_on[sum] = lies_on[term];
    last[lies_on[term]] = last[sum];
  }
  std::vector<Buffer> buffers;
  for (size_t v = 0; v < values; ++v) {
    Place& place = layout_.places[v];
    if (!is_buffer(v)) continue;
    const Shape& shape = layout_.shapes[v];
    const bool codes = plan_.values[v].codes();
    const Size3 before = before_[v], after = after_[v];
    const Size3 padded = {before.d + shape.size.d + after.d, before.h + shape.size.h + after.h,
                          before.w + shape.size.w + after.w};
    check_elements(plan_.steps[first[v]]->where, {shape.rank, shape.channels, padded});
    place.stride_w = shape.channels;
    place.stride_h = place.stride_w * padded.w;
    place.stride_d = place.stride_h * padded.h;
    const int64_t element = codes ? 1 : static_cast<int64_t>(sizeof(float));
    const int64_t image = place.stride_d * padded.d * element;
    const int64_t bytes = rounded_up(image) + kSlack;
    place.inside = (before.d * place.stride_d + before.h * place.stride_h + before.w * place.stride_w) * element;
    place.stride_n = bytes / element;
    if (lies_on[v] == v) buffers.push_back({static_cast<int>(v), bytes, 0, first[v], last[v]});
    const Size3 all = larger(before, after);
    if (codes && (all.d | all.h | all.w)) layout_.borders[first[v]].push_back({static_cast<int>(v), before, after});
  }
  layout_.bytes = color(buffers);
  for (const Buffer& buffer : buffers) layout_.places[static_cast<size_t>(buffer.root)].buffer = buffer.offset;
  for (size_t v = 0; v < values; ++v) layout_.places[v].buffer = layout_.places[lies_on[v]].buffer;
}

std::shared_ptr<const Layout> make_layout(const Plan& plan, const LayoutKey& key) {
  auto layout = std::make_shared<Layout>();
  layout->shapes.resize(plan.values.size());
  std::vector<int64_t> begins;  // of each input's sizes in the key
  for (size_t at = 0; at < key.sizes.size(); at += static_cast<size_t>(key.sizes[at]))
    begins.push_back(static_cast<int64_t>(at));
  for (const auto& [index, value] : plan.inputs) {
    const int64_t* sizes = key.sizes.data() + begins[static_cast<size_t>(index)];
    const int64_t dims = sizes[0];
    const auto size = [&](int64_t dim) { return dim < 2 ? int64_t{1} : sizes[dim]; };
    Shape& shape = layout->shapes[static_cast<size_t>(value)];
    shape = {static_cast<int>(dims - 2), sizes[1], {size(dims - 3), size(dims - 2), size(dims - 1)}};
  }
  Shapes shapes(*layout);
  for (const auto& step : plan.steps) {
    step->infer(shapes);
    for (int value : step->writes) check_elements(step->where, shapes.of(value));
  }
  std::vector<bool> channels_last;
  for (const OutputInfo& output : plan.outputs)
    channels_last.push_back(output.like_input && key.channels_last &&
                            layout->shapes[static_cast<size_t>(output.value)].rank + 2 == key.sizes[0]);
  Places(plan, *layout).assign(channels_last);
  layout->channels_last = channels_last;
  for (const Shape& shape : layout->shapes) layout->elements += shape.channels * shape.pixels();
  for (const ConstantUse& use : plan.constants) layout->elements += use.kind == ConstantKind::int8 ? use.numel : 0;
  return layout;
}

}  // namespace qkernels
