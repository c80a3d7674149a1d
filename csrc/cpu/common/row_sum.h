// The sum of a row of values.
#ifndef QK_ROW_SUM
#define QK_ROW_SUM

#include "cpu/common/vec.h"

namespace qkernels::QK_NAMESPACE {

// A sum in one order on every path: lane by lane over up to 64 vectors, then in fp64.
template <typename V>
class Sum {
 public:
  void add(V term) {
    held_ = held_ + term;
    if (++count_ < 64) return;
    add_lanes(total_, held_);
    held_ = zero<V>();
    count_ = 0;
  }
  double total() {
    add_lanes(total_, held_);
    return tree_sum(total_);
  }

 private:
  V held_ = zero<V>();
  int count_ = 0;
  double total_[16] = {};
};

}  // namespace qkernels::QK_NAMESPACE

#endif
