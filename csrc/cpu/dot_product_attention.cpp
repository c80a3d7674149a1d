// Attention in fp32 on the CPU; the kernels are in dot_product_attention_kernels.h.
#include "cpu/dot_product_attention.h"

#include "tensor.h"

#define QK_BODY "cpu/dot_product_attention_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

void check_rows(const char* name, const Tensor& t, const Tensor& q) {
  QK_CHECK(device_of(t) == device_of(q), name, ": got a tensor on ", device_name(device_of(t)),
           "; accepted: q's device, ", device_name(device_of(q)));
  QK_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 4, name, ": got ", dtype_name(t.scalar_type()),
           " of shape ", shape_of(t), "; accepted: torch.float32 [batch, heads, rows, size]");
}

HeadRows head_rows(const Tensor& t) {
  return {static_cast<const float*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.size(3)};
}

Tensor with_dense_rows(const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : to_contiguous(t); }

Tensor dot_product_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, bool causal, double scale) {
  check_rows("q", q_any, q_any);
  check_rows("k", k_any, q_any);
  check_rows("v", v_any, q_any);
  const int64_t batch = q_any.size(0), heads = q_any.size(1), rows = q_any.size(2), size = q_any.size(3);
  const int64_t heads_of_keys = k_any.size(1), keys = k_any.size(2), width = v_any.size(3);
  QK_CHECK(
      k_any.size(0) == batch && heads_of_keys > 0 && heads % heads_of_keys == 0 && keys > 0 && k_any.size(3) == size,
      "k: got shape ", shape_of(k_any), "; accepted: [", batch, ", a divisor of ", heads, ", at least 1, ", size, "]");
  QK_CHECK(v_any.size(0) == batch && v_any.size(1) == heads_of_keys && v_any.size(2) == keys, "v: got shape ",
           shape_of(v_any), "; accepted: k's shape but for the last dim, ", shape_of(k_any));
  const std::vector<int64_t> sizes = {batch, heads, rows, width};
  const std::vector<int64_t> strides = {
      std::max<int64_t>(rows, 1) * std::max<int64_t>(heads, 1) * std::max<int64_t>(width, 1),
      std::max<int64_t>(width, 1), std::max<int64_t>(heads, 1) * std::max<int64_t>(width, 1), 1};
  Tensor out = empty_strided({sizes.data(), sizes.size()}, {strides.data(), strides.size()}, ScalarType::Float);
  const Tensor q = with_dense_rows(q_any), k = with_dense_rows(k_any), v = with_dense_rows(v_any);
  const Attention a{batch,
                    heads,
                    heads_of_keys,
                    rows,
                    keys,
                    head_rows(q),
                    head_rows(k),
                    head_rows(v),
                    static_cast<float*>(out.data_ptr()),
                    static_cast<float>(scale),
                    causal};
  if (out.numel() == 0) return out;
  QK_DISPATCH_ISA(attend(a));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("dot_product_attention", TORCH_BOX(&dot_product_attention)); }

}  // namespace qkernels
