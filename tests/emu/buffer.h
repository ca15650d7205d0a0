// Memory that kernels see: the device's, or in the emulator a heap block of the very size.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/platform.cuh"

namespace fused_rnn::dev {

inline void must(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message().c_str());
  std::exit(2);
}

template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : size_(values.size()) {
#ifdef FUSED_RNN_EMULATE
    data_ = static_cast<T*>(std::malloc(bytes()));
#else
    must(status_of(cudaMalloc(&data_, bytes()), "cudaMalloc"));
#endif
    must(copy_bytes(data_, values.data(), bytes(), nullptr));
  }
  Buffer(size_t size, T value) : Buffer(std::vector<T>(size, value)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef FUSED_RNN_EMULATE
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }

  T* data() { return data_; }
  // After all that was launched.
  std::vector<T> host() const {
    must(wait_for(nullptr));
    std::vector<T> values(size_);
    must(copy_bytes(values.data(), data_, bytes(), nullptr));
    must(wait_for(nullptr));
    return values;
  }

 private:
  size_t bytes() const { return size_ * sizeof(T); }
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fused_rnn::dev
