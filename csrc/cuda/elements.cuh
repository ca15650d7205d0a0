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
