// The list of constants of a call, as torch hands it over. TORCH_BOX would serve, but some 300 constants as Tensor
// objects take 20 us.
#pragma once

#include <string>
#include <vector>

#include "tensor.h"

namespace qkernels {

// A list of tensors, owned, of which only the memory and its description are read.
class TensorList {
 public:
  explicit TensorList(StableIValue list);
  ~TensorList();
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return handles_.size(); }
  int32_t dtype(size_t i) const;  // torch's number
  int64_t numel(size_t i) const;
  bool is_contiguous(size_t i) const;
  const void* data(size_t i) const;
  std::string description(size_t i) const;

 private:
  StableListHandle list_;
  std::vector<AtenTensorHandle> handles_;
};

}  // namespace qkernels
