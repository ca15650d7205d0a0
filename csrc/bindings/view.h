// What the ops read of a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Of one of torch's, or of memory on the CPU; either outlives it.
class View {
 public:
  View(const Tensor& tensor)
      : tensor_(&tensor),
        data_(tensor.data_ptr()),
        type_(tensor.scalar_type()),
        dim_(size_t(tensor.dim())),
        sizes_(tensor.sizes().data()),
        strides_(tensor.strides().data()) {}
  View(void* data, ScalarType type, size_t dim, const int64_t* sizes, const int64_t* strides)
      : data_(data), type_(type), dim_(dim), sizes_(sizes), strides_(strides) {}

  void* data_ptr() const { return data_; }
  ScalarType scalar_type() const { return type_; }
  int64_t dim() const { return int64_t(dim_); }
  std::span<const int64_t> sizes() const { return {sizes_, dim_}; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int64_t stride(int64_t i) const { return strides_[i]; }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes()) product *= size;
    return product;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t i = dim_; i-- > 0; expected *= sizes_[i])
      if (sizes_[i] != 1 && strides_[i] != expected) return numel() == 0;
    return true;
  }
  bool is_cpu() const { return !tensor_ || tensor_->is_cpu(); }
  bool is_cuda() const { return tensor_ && tensor_->is_cuda(); }
  int32_t get_device_index() const { return tensor_ ? tensor_->get_device_index() : 0; }
  // Only torch copies its tensors: a caller with bare memory has another way to ask.
  Tensor contiguous() const {
    if (!tensor_) throw std::runtime_error("fused_rnn: the memory is not contiguous");
    return torch::stable::contiguous(*tensor_);
  }
  void zero() const {
    if (!tensor_) throw std::runtime_error("fused_rnn: the memory is not torch's");
    Tensor tensor = *tensor_;
    torch::stable::zero_(tensor);
  }

 private:
  const Tensor* tensor_ = nullptr;
  void* data_;
  ScalarType type_;
  size_t dim_;
  const int64_t* sizes_;
  const int64_t* strides_;
};

using MaybeView = std::optional<View>;

struct Views : std::vector<View> {
  using vector::vector;
  Views(const std::vector<Tensor>& tensors) : vector(tensors.begin(), tensors.end()) {}
};

}  // namespace fused_rnn
