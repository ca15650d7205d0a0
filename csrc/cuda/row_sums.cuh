// One block, one row: how its threads walk the units, and sums over them.
#pragma once

#include "elements.cuh"

namespace fused_rnn::cuda {

// At most so many threads have a row, and so many sums of it are taken at a time.
constexpr int kRowThreads = 512;
constexpr int kMostSums = 4;

// How many threads a block has hangs on the units alone, and so does the order of every sum.
template <class A>
dev::LaunchConfig over_rows(int64_t rows, int64_t units) {
  const int64_t warps = (units + dev::kWarp - 1) / dev::kWarp;
  dev::LaunchConfig config;
  config.block.x = int(warps * dev::kWarp < kRowThreads ? warps * dev::kWarp : kRowThreads);
  config.grid.x = int(rows < kMaxBlocksY ? rows : kMaxBlocksY);
  config.shared_bytes = 2 * kMostSums * sizeof(A) * size_t(config.block.x / dev::kWarp);
  return config;
}

template <class Body>
FUSED_RNN_DEVICE void for_each_row(int64_t rows, Body body) {
  for (int64_t row = dev::block_index().x; row < rows; row += dev::grid_size().x) body(row);
}

// Those of this thread.
template <class Body>
FUSED_RNN_DEVICE void for_each_unit(int64_t units, Body body) {
  for (int64_t u = dev::thread_rank(); u < units; u += dev::block_size().x) body(u);
}

// Sums over the threads of a block, which all come here together and get the same bits. Two places
// in turn: a sum is overwritten by the next but one, behind a barrier that nobody passes before all
// have read it.
template <class A>
class RowSums {
 public:
  template <int kCount>
  FUSED_RNN_DEVICE void operator()(A (&sums)[kCount]) {
    static_assert(kCount <= kMostSums && kRowThreads <= dev::kWarp * dev::kWarp);
    const int warps = dev::block_size().x / dev::kWarp;
    const int lane = dev::lane_index(), warp = dev::warp_index();
    A* partial = dev::shared<A>() + turn_ * kMostSums * warps;  // [sums, warps]
    turn_ = 1 - turn_;
    for (int i = 0; i < kCount; ++i) {
      const A sum = sum_of_lanes(sums[i]);
      if (lane == 0) partial[i * warps + warp] = sum;
    }
    dev::sync_block();
    for (int i = 0; i < kCount; ++i)
      sums[i] = sum_of_lanes(lane < warps ? partial[i * warps + lane] : A(0));
  }

 private:
  int turn_ = 0;
};

}  // namespace fused_rnn::cuda
