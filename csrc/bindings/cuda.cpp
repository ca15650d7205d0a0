// What the CUDA schedule borrows from torch: its stream, its allocator, its matrix products.
#ifdef FUSED_RNN_CUDA
#include "cuda.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../cuda/persistent.h"
#include "../cuda/stepwise.h"
#include "memory.h"
#include "stable.h"

namespace fused_rnn {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType scalar_type(DType type) {
  switch (type) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
  }
  return ScalarType::Float;
}

// torch::stable has this entry in the library of torch that is built for CUDA and is loaded then:
// linked, it would keep ours from loading with any other torch.
dev::Stream current_stream([[maybe_unused]] int32_t device) {
  void* stream = nullptr;
#ifndef FUSED_RNN_EMULATE
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* entry = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Get>(entry);
  }();
  if (!get) throw std::runtime_error("fused_rnn: this torch does not tell its CUDA stream");
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
#endif
  return stream;
}

// Memory and products of one call.
class Host {
 public:
  explicit Host(int32_t device)
      : place_(kEmulates ? DeviceType::CPU : DeviceType::CUDA, kEmulates ? 0 : device) {
    device_.stream = current_stream(device);
    device_.host = this;
    device_.allocate = [](void* host, size_t bytes) {
      return static_cast<Host*>(host)->allocate(bytes);
    };
    device_.multiply = [](void* host, const cuda::Matrix& a, const cuda::Matrix& b,
                          const cuda::Matrix& out) {
      static_cast<Host*>(host)->multiply(a, b, out);
    };
  }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  const cuda::Device& device() const { return device_; }

 private:
  // torch's allocator hands memory that is given back on a stream to what comes later on it.
  void* allocate(size_t bytes) {
    const int64_t size = int64_t(bytes), stride = 1;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        1, &size, &stride, aoti_torch_dtype_uint8(),
        kEmulates ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), place_.index(),
        &handle));
    memory_.emplace_back(handle);
    void* data = memory_.back().data_ptr();
    if (kEmulates) new_memory(data, bytes);
    return data;
  }

  Tensor view(const cuda::Matrix& m) const {
    int64_t sizes[] = {m.rows, m.cols};
    int64_t strides[] = {m.ld, 1};
    if (m.transposed) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2}, place_, scalar_type(m.type));
  }

  // Most matrices of a step are those of the step before.
  const Tensor& cached(const cuda::Matrix& m) {
    for (const auto& [known, tensor] : recent_)
      if (known == m) return tensor;
    if (recent_.size() < kRecent)
      recent_.emplace_back(m, view(m));
    else
      recent_[next_] = {m, view(m)};
    const Tensor& tensor = recent_[next_].second;
    next_ = (next_ + 1) % kRecent;
    return tensor;
  }

  // By torch, so that its switches (TF32 and others), its handles and its workspaces serve.
  void multiply(const cuda::Matrix& a, const cuda::Matrix& b, const cuda::Matrix& out) {
    using torch::stable::detail::from;
    const bool widens = out.type != a.type;
    if (kEmulates && widens) {
      const Tensor left = torch::stable::to(view(a), ScalarType::Float);
      const Tensor right = torch::stable::to(view(b), ScalarType::Float);
      std::array<StableIValue, 3> stack{from(left), from(right), from(view(out))};
      return call("aten::mm", "out", stack.data());
    }
    // By value: a view that is looked up later may take the place of one looked up before.
    const Tensor left = cached(a), right = cached(b), result = cached(out);
    if (!widens) {
      std::array<StableIValue, 3> stack{from(left), from(right), from(result)};
      return call("aten::mm", "out", stack.data());
    }
    std::array<StableIValue, 4> stack{from(left), from(right), from(ScalarType::Float),
                                      from(result)};
    call("aten::mm", "dtype_out", stack.data());
  }

  static void call(const char* op, const char* overload, StableIValue* stack) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // what comes back is owned
  }

  static constexpr size_t kRecent = 8;
  const torch::stable::Device place_;
  cuda::Device device_;
  std::vector<Tensor> memory_;
  std::vector<std::pair<cuda::Matrix, Tensor>> recent_;
  size_t next_ = 0;
};

// Calls body(device) with the device made current.
template <class Body>
void on_device(int32_t index, Body body) {
#ifndef FUSED_RNN_EMULATE
  const torch::stable::accelerator::DeviceGuard guard(index);
#endif
  const Host host(index);
  body(host.device());
}

}  // namespace

void run_on_cuda(const char* cell, DType type, const ForwardProblem& problem, int32_t device) {
  on_device(device, [&](const cuda::Device& d) { cuda::stepwise_forward(cell, type, problem, d); });
}

void run_on_cuda(const char* cell, DType type, const BackwardProblem& problem, int32_t device) {
  on_device(device,
            [&](const cuda::Device& d) { cuda::stepwise_backward(cell, type, problem, d); });
}

void copy_on_cuda(const void* from, void* to, size_t bytes, int32_t device) {
  on_device(device, [&](const cuda::Device& d) { cuda::copy_or_clear(from, to, bytes, d); });
}

}  // namespace fused_rnn

// For tests, by ctypes: set cuda::chunk_bytes, cuda::fused_rows or cuda::forced_schedule, and
// return what it was.
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_chunk_bytes(int64_t bytes) {
  return std::exchange(fused_rnn::cuda::chunk_bytes, bytes);
}
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_fused_rows(int64_t rows) {
  return std::exchange(fused_rnn::cuda::fused_rows, rows);
}
extern "C" __attribute__((visibility("default"))) int64_t fused_rnn_schedule(int64_t schedule) {
  return fused_rnn::cuda::forced_schedule.exchange(int(schedule));
}
#endif
