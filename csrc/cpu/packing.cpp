// pack_bits and unpack_bits on the CPU: checks and the split over threads; the loops are in packing_kernels.h.
#include <atomic>
#include <cstring>
#include <type_traits>

#include "element.h"
#include "tensor.h"

#define QK_BODY "cpu/packing_kernels.h"
#include "cpu/common/foreach_isa.h"

namespace qkernels {
namespace {

constexpr int64_t kGrain = 32768;  // codes that are worth waking a second thread for

int64_t packed_length(int64_t k, int64_t bits) { return (k * bits + 7) / 8; }

void check_bits(int64_t bits) { QK_CHECK(2 <= bits && bits <= 4, "bits: got ", bits, "; accepted: 2, 3, 4"); }

// Calls f(row) for all rows, in parallel.
template <typename F>
void for_each_row(int64_t rows, int64_t k, F f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(k, 1)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) f(row);
                              });
}

Tensor pack_bits(const Tensor& q_any, int64_t bits) {
  check_bits(bits);
  check_cpu("q", q_any);
  QK_CHECK(q_any.scalar_type() == ScalarType::Char, "q: got ", dtype_name(q_any.scalar_type()),
           "; accepted: torch.int8");
  QK_CHECK(q_any.dim() >= 1, "q: got 0 dims; accepted: [..., K]");
  const Tensor q = to_contiguous(q_any);
  std::vector<int64_t> sizes = to_vector(q.sizes());
  const int64_t k = sizes.back(), length = packed_length(k, bits), rows = k ? q.numel() / k : 0;
  sizes.back() = length;
  Tensor packed = empty(sizes, ScalarType::Byte);
  const int8_t* codes = static_cast<const int8_t*>(q.data_ptr());
  uint8_t* out = static_cast<uint8_t*>(packed.data_ptr());
  std::atomic<bool> bad{false};
  for_each_row(rows, k, [&](int64_t row) {
    bool found = false;
    QK_DISPATCH_ISA(pack_row(codes + row * k, k, static_cast<int>(bits), out + row * length, &found));
    if (found) bad.store(true, std::memory_order_relaxed);
  });
  if (bad.load()) {
    const int64_t low = -(int64_t{1} << (bits - 1)), high = -low - 1;
    int64_t least = high, most = low;
    for (int64_t i = 0; i < q.numel(); ++i) {
      least = std::min<int64_t>(least, codes[i]);
      most = std::max<int64_t>(most, codes[i]);
    }
    fail("q: got ", least < low ? least : most, "; accepted: the codes of ", bits, " bits, ", low, " to ", high);
  }
  return packed;
}

Tensor unpack_bits(const Tensor& packed_any, int64_t bits, int64_t k) {
  check_bits(bits);
  check_cpu("packed", packed_any);
  QK_CHECK(packed_any.scalar_type() == ScalarType::Byte, "packed: got ", dtype_name(packed_any.scalar_type()),
           "; accepted: torch.uint8");
  const int64_t length = packed_length(std::max<int64_t>(k, 0), bits);
  QK_CHECK(packed_any.dim() >= 1 && k >= 0 && packed_any.size(packed_any.dim() - 1) == length, "packed: got shape ",
           shape_of(packed_any), "; accepted: [..., ", length, "], what K = ", k, " codes of ", bits, " bits take");
  const Tensor packed = to_contiguous(packed_any);
  std::vector<int64_t> sizes = to_vector(packed.sizes());
  sizes.back() = k;
  Tensor q = empty(sizes, ScalarType::Char);
  const uint8_t* in = static_cast<const uint8_t*>(packed.data_ptr());
  int8_t* codes = static_cast<int8_t*>(q.data_ptr());
  for_each_row(k ? q.numel() / k : 0, k, [&](int64_t row) {
    QK_DISPATCH_ISA(unpack_row(in + row * length, k, static_cast<int>(bits), codes + row * k));
  });
  return q;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&qkernels::pack_bits));
  m.impl("unpack_bits", TORCH_BOX(&qkernels::unpack_bits));
}
