// One thread, one element of some rows: how kernels walk rows and units, and what they load and
// store there.
#pragma once

#include "platform.cuh"
#include "step.h"

namespace fused_rnn::cuda {

// Element i of a tensor in storage type `type`, in the type that is accumulated in. The type is
// asked for at run time, the same for all threads, so that there is one kernel for all of them.
template <class A>
FUSED_RNN_DEVICE A load(DType type, const void* data, int64_t i) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return static_cast<const double*>(data)[i];
  } else {
    if (type == DType::kBFloat16) return dev::widen(static_cast<const dev::bfloat16*>(data)[i]);
    if (type == DType::kFloat16) return dev::widen(static_cast<const dev::half*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
}

template <class A>
FUSED_RNN_DEVICE void store(DType type, void* data, int64_t i, A value) {
  if constexpr (sizeof(A) == sizeof(double)) {
    static_cast<double*>(data)[i] = value;
  } else {
    if (type == DType::kBFloat16)
      static_cast<dev::bfloat16*>(data)[i] = dev::narrow<dev::bfloat16>(value);
    else if (type == DType::kFloat16)
      static_cast<dev::half*>(data)[i] = dev::narrow<dev::half>(value);
    else
      static_cast<float*>(data)[i] = value;
  }
}

// The same where other blocks of the launch wait for the value. Its bits are never those of
// kNothing, which memory is filled with: whoever finds something else there has the value. Halves
// are stored one by one and loaded in words: PTX has no rule for that, GPUs write the bytes.
constexpr uint32_t kNothing = 0xffffffffu;  // of 16 bits the half of it; a NaN in every type

template <class A>
FUSED_RNN_DEVICE void publish(DType type, void* data, int64_t i, A value) {
  const auto put = [&]<class E>(E* to, E bits) {
    dev::store_relaxed(to, bits == E(kNothing) ? E(kNothing >> 1) : bits);
  };
  if constexpr (sizeof(A) == sizeof(double)) {
    static_cast<double*>(data)[i] = value;  // nobody waits: see plan_persistent
  } else if (type == DType::kFloat32) {
    put(static_cast<uint32_t*>(data) + i, __builtin_bit_cast(uint32_t, value));
  } else if (type == DType::kBFloat16) {
    put(static_cast<uint16_t*>(data) + i,
        __builtin_bit_cast(uint16_t, dev::narrow<dev::bfloat16>(value)));
  } else {
    put(static_cast<uint16_t*>(data) + i,
        __builtin_bit_cast(uint16_t, dev::narrow<dev::half>(value)));
  }
}

// What is left of a value in that type.
template <class A>
FUSED_RNN_DEVICE A round_to(DType type, A value) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (type == DType::kBFloat16) return dev::widen(dev::narrow<dev::bfloat16>(value));
    if (type == DType::kFloat16) return dev::widen(dev::narrow<dev::half>(value));
  }
  return value;
}

// Calls body(pointer) with the storage type of the data.
template <class A, class Body>
FUSED_RNN_DEVICE void with_type(DType type, const void* data, Body body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(static_cast<const double*>(data));
  } else {
    if (type == DType::kBFloat16)
      body(static_cast<const dev::bfloat16*>(data));
    else if (type == DType::kFloat16)
      body(static_cast<const dev::half*>(data));
    else
      body(static_cast<const float*>(data));
  }
}

// An element that was loaded, in the bits that it has in memory. Whoever converts it waits for it,
// so where the load is to be under way meanwhile that comes as late as it can.
template <class A>
class Late {
 public:
  Late() = default;
  FUSED_RNN_DEVICE Late(DType type, const void* data, int64_t i) {
    if (sizeof(A) == sizeof(float) && (type == DType::kBFloat16 || type == DType::kFloat16))
      half_ = static_cast<const uint16_t*>(data)[i];
    else
      whole_ = static_cast<const A*>(data)[i];
  }
  FUSED_RNN_DEVICE A value(DType type) const {
    if constexpr (sizeof(A) == sizeof(float)) {
      if (type == DType::kBFloat16) return dev::widen(__builtin_bit_cast(dev::bfloat16, half_));
      if (type == DType::kFloat16) return dev::widen(__builtin_bit_cast(dev::half, half_));
    }
    return whole_;
  }

 private:
  A whole_ = 0;
  uint16_t half_ = 0;
};

// The same of a tensor that may not be there, which is zeros.
template <class A>
FUSED_RNN_DEVICE A load_or_zero(DType type, const void* data, int64_t i) {
  return data ? load<A>(type, data, i) : A(0);
}

// A thread for each element of [rows, units] in blocks of kThreads, as wide as the units allow. A
// grid has limits: what is beyond them is walked by the same threads.
constexpr int kThreads = 128;
constexpr int64_t kMaxBlocksX = 1024;
constexpr int64_t kMaxBlocksY = 32768;

inline dev::LaunchConfig over(int64_t rows, int64_t units) {
  int width = 1;
  while (width < kThreads && width < units) width *= 2;
  const int height = kThreads / width;
  const auto blocks = [](int64_t count, int64_t each, int64_t most) {
    const int64_t n = (count + each - 1) / each;
    return int(n < most ? n : most);
  };
  dev::LaunchConfig config;
  config.block = {width, height, 1};
  config.grid = {blocks(units, width, kMaxBlocksX), blocks(rows, height, kMaxBlocksY), 1};
  return config;
}

// Calls body(row, unit) for all of them, whatever the grid.
template <class Body>
FUSED_RNN_DEVICE void for_each_element(int64_t rows, int64_t units, Body body) {
  const dev::Index thread = dev::thread_index(), block = dev::block_index();
  const dev::Index size = dev::block_size(), grid = dev::grid_size();
  for (int64_t row = int64_t(block.y) * size.y + thread.y; row < rows;
       row += int64_t(grid.y) * size.y)
    for (int64_t unit = int64_t(block.x) * size.x + thread.x; unit < units;
         unit += int64_t(grid.x) * size.x)
      body(row, unit);
}

// Of a warp, to all its lanes, and to all the same bits: what two lanes exchange they add up.
template <class A>
FUSED_RNN_DEVICE A sum_of_lanes(A v) {
  for (int step = dev::kWarp / 2; step > 0; step /= 2) v += dev::shuffle_xor(v, step);
  return v;
}

}  // namespace fused_rnn::cuda
