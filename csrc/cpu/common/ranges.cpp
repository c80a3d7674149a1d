#include "cpu/common/ranges.h"

#define QK_BODY "cpu/common/ranges_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {

Ranges ranges_of(const Tensor& x, const IndexedRuns& runs) {
  Ranges ranges{std::vector<float>(runs.channels), std::vector<float>(runs.channels)};
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    std::vector<Arithmetic<S>> low(runs.channels), high(runs.channels);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    QK_DISPATCH_ISA(range(runs, x.numel(), in, low.data(), high.data()));
    std::copy(low.begin(), low.end(), ranges.low.begin());
    std::copy(high.begin(), high.end(), ranges.high.begin());
  });
  return ranges;
}

}  // namespace qkernels
