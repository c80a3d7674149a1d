// quantize_dynamic_transposed on the CPU: checks and memory layout. The kernels are in
// quantize_transposed_kernels.h.
#include <utility>

#include "cpu/common/philox.h"
#include "cpu/common/qparams.h"

#define QK_BODY "cpu/quantize_transposed_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

// Codes whose rows begin at multiples of 16 bytes.
Tensor empty_codes(int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {(columns + 15) / 16 * 16, 1};
  return empty_strided({sizes, 2}, {strides, 2}, ScalarType::Char);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_dynamic_transposed(const Tensor& x_any, int64_t quant_max,
                                                                       std::optional<int64_t> seed, int64_t offset,
                                                                       std::optional<Tensor> offset_tensor) {
  check_cpu("x", x_any);
  check_floating("x", x_any);
  QK_CHECK(x_any.dim() == 2, "x: got shape ", shape_of(x_any), "; accepted: 2 dims");
  QK_CHECK(1 <= quant_max && quant_max <= 127, "quant_max: got ", quant_max, "; accepted: 1 to 127");
  std::optional<Philox> philox;
  if (seed) philox = generator(*seed, offset, offset_tensor);
  const auto rule = QparamsRule::dynamic(-quant_max, quant_max, true);
  const Tensor x = to_contiguous(x_any);
  const int64_t rows = x.size(0), columns = x.size(1);
  const ScalarType wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor q = empty_codes(rows, columns), q_t = empty_codes(columns, rows);
  Tensor scale = empty({rows, 1}, wide), scale_t = empty({columns, 1}, wide);
  dispatch_floating("x", x, [&](auto tag) {
    using S = decltype(tag);
    using T = Arithmetic<S>;
    const S* in = static_cast<const S*>(x.const_data_ptr());
    const Philox* numbers = philox ? &*philox : nullptr;
    T* s = static_cast<T*>(scale.mutable_data_ptr());
    T* s_t = static_cast<T*>(scale_t.mutable_data_ptr());
    int8_t* out = static_cast<int8_t*>(q.mutable_data_ptr());
    int8_t* out_t = static_cast<int8_t*>(q_t.mutable_data_ptr());
    QK_DISPATCH_ISA(
        quantize_transposed(in, rows, columns, rule, numbers, out, q.stride(0), s, out_t, q_t.stride(0), s_t));
  });
  return {q, scale, q_t, scale_t};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize_dynamic_transposed", TORCH_BOX(&quantize_dynamic_transposed));
}

}  // namespace qkernels
