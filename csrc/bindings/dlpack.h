// What is used here of DLPack 1.x, by which Python's array libraries exchange memory:
// https://dmlc.github.io/dlpack/latest/python_spec.html. Layout and names are the standard's; the
// header that torch has of it goes by torch's version, this one by the version in the table.
#pragma once

#include <cstdint>

namespace fused_rnn::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCPU = 1;

struct DLPackVersion {
  uint32_t major;
  uint32_t minor;
};

struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};

struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;

  bool operator==(const DLDataType&) const = default;
};
constexpr uint8_t kSigned = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6;  // codes

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* prev_api;
  int (*managed_tensor_allocator)(DLTensor*, DLManagedTensorVersioned**, void*,
                                  void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, DLManagedTensorVersioned**);
  // Steals the tensor.
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned*, void**);
  // Owns nothing: what the DLTensor points to belongs to the object. May be missing.
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);
  int (*current_work_stream)(int32_t, int32_t, void**);
};

}  // namespace fused_rnn::dlpack
