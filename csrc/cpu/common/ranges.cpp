#include "cpu/common/ranges.h"

#define QK_BODY "cpu/common/ranges_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {

Ranges ranges_of(const Tensor& x, const View& view) {
  Ranges ranges{std::vector<float>(view.channels), std::vector<float>(view.channels)};
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    std::vector<Arithmetic<S>> low(view.channels), high(view.channels);
    const S* in = static_cast<const S*>(x.const_data_ptr());
    QK_DISPATCH_ISA(range(view, x.numel(), in, low.data(), high.data()));
    std::copy(low.begin(), low.end(), ranges.low.begin());
    std::copy(high.begin(), high.end(), ranges.high.begin());
  });
  return ranges;
}

}  // namespace qkernels
