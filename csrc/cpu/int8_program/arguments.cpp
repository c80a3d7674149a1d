#include "cpu/int8_program/arguments.h"

namespace qkernels {

TensorList::TensorList(StableIValue list) : list_(torch::stable::detail::to<StableListHandle>(list)) {
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size));
  handles_.reserve(size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue element{};
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &element));
    handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(element));
  }
}

TensorList::~TensorList() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  torch_delete_list(list_);
}

int32_t TensorList::dtype(size_t i) const {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handles_[i], &dtype));
  return dtype;
}

int64_t TensorList::numel(size_t i) const {
  int64_t numel = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handles_[i], &numel));
  return numel;
}

bool TensorList::is_contiguous(size_t i) const {
  bool contiguous = false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handles_[i], &contiguous));
  return contiguous;
}

const void* TensorList::data(size_t i) const {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handles_[i], &data));
  return data;
}

std::string TensorList::description(size_t i) const {
  AtenTensorHandle copy = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handles_[i], &copy));
  const Tensor tensor(copy);
  return std::string(tensor.is_contiguous() ? "" : "strided ") + dtype_name(tensor.scalar_type()) + " of shape " +
         shape_of(tensor);
}

}  // namespace qkernels
