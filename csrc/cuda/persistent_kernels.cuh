// All steps of a layer and direction in one launch. A block has some units with all their gates:
// their rows of W_hh stay in its shared memory, and h goes from block to block through two buffers
// in global memory, with a barrier of the grid between two steps.
#pragma once

#include <type_traits>

#include "cell_units.cuh"
#include "persistent.h"

namespace fused_rnn::cuda {

// What a block has in shared memory, as persistent.h sizes it. Elements of h and W_hh have `size`
// bytes.
struct PersistentShared {
  char* weights;    // S [gate rows, row bytes]: gates of a unit are `units` rows apart
  char* h;          // S [kRowsAtOnce, row bytes]
  float* partials;  // [warps, gate rows, kPartialStride]
  int64_t row_bytes;

  FUSED_RNN_DEVICE PersistentShared(int gate_rows, int64_t H, int64_t size)
      : weights(dev::shared<char>()), row_bytes(shared_row_bytes(H, size)) {
    h = weights + gate_rows * row_bytes;
    partials = reinterpret_cast<float*>(h + kRowsAtOnce * row_bytes);
  }
};

// sums += w h^T over the parts of k that this warp has, of one tile of gates and kRowsAtOnce rows
// of h; where a sum stands says M16N8K16::c, for each half of these rows.
template <class S>
FUSED_RNN_DEVICE void multiply_tile(float (&sums)[2][4], const char* w, const char* h,
                                    int64_t row_bytes, int H) {
  constexpr int kPart = dev::M16N8K16::K;
  static_assert(dev::M16N8K16::M == kGateTile && 2 * dev::M16N8K16::N == kRowsAtOnce);
  const int lane = dev::lane_index();
  for (int k = dev::warp_index() * kPart; k < H; k += kPersistentWarps * kPart) {
    if constexpr (sizeof(S) == 2) {
      // Matrices of 8 x 8: the quarters of a tile of w, first down; of h, first along k.
      uint32_t a[4], b[4];
      dev::load_matrices(a, w + lane % 16 * row_bytes + (k + lane / 16 * 8) * int(sizeof(S)));
      const int row = lane % 8 + lane / 16 * 8;
      dev::load_matrices(b, h + row * row_bytes + (k + lane / 8 % 2 * 8) * int(sizeof(S)));
      dev::mma_m16n8k16<S>(sums[0], a, {b[0], b[1]});
      dev::mma_m16n8k16<S>(sums[1], a, {b[2], b[3]});
    } else {
      struct alignas(16) Four {
        float v[4];
      };
      const auto four = [&](const char* rows, int row, int at) {
        return *reinterpret_cast<const Four*>(rows + row * row_bytes + at * int(sizeof(S)));
      };
      for (int at = k; at < k + kPart; at += 4) {
        Four gates[2], operand[2][2];
        for (int i = 0; i < 2; ++i) gates[i] = four(w, lane / 4 + i * 8, at);
        for (int half = 0; half < 2; ++half)
          for (int j = 0; j < 2; ++j) operand[half][j] = four(h, half * 8 + lane % 4 * 2 + j, at);
        for (int part = 0; part < 4; ++part)
          for (int half = 0; half < 2; ++half)
            for (int r = 0; r < 4; ++r)
              sums[half][r] += gates[r / 2].v[part] * operand[half][r % 2].v[part];
      }
    }
  }
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kPersistentThreads,
                                         2) void persistent_forward(ForwardSteps<A> steps) {
  constexpr int G = Cell::kGates;
  static_assert(sizeof(A) == sizeof(float));
  ForwardStep<A> s = steps.first;
  const int thread = dev::thread_rank(), lane = dev::lane_index(), warp = dev::warp_index();
  const int H = int(s.H), units = steps.units, gate_rows = steps.gate_rows;
  const int first = dev::block_index().x * units;
  const int mine = first + units < H ? units : H - first;
  const int size = s.type == DType::kFloat32 ? 4 : 2;
  const PersistentShared shared(gate_rows, H, size);

  for (int row = warp; row < G * units; row += kPersistentWarps) {
    if (row % units >= mine) continue;
    const int64_t from = (int64_t(row / units) * H + first + row % units) * H;
    const auto copy = [&](const auto* w) {
      auto* to = reinterpret_cast<std::remove_cvref_t<decltype(*w)>*>(shared.weights +
                                                                      row * shared.row_bytes);
      for (int k = lane; k < H; k += dev::kWarp) to[k] = w[from + k];
    };
    if (size == 4)
      copy(static_cast<const uint32_t*>(s.weight_hh));
    else
      copy(static_cast<const uint16_t*>(s.weight_hh));
  }

  const int pieces = H * size / 16;  // of a row of h, as they are copied
  for (int64_t step = 0; step < steps.count; ++step) {
    if (step > 0) {
      dev::sync_grid();
      s.gates_x += steps.gates_x;
      s.y.data = static_cast<char*>(s.y.data) + steps.y * size;
      if (s.saved) s.saved += steps.saved;
      const void* read = s.h;
      s.h = s.h_after;
      s.h_after = const_cast<void*>(read);
    }
    s.ends = steps.ends && step + 1 == steps.count ? 0 : s.rows;
    for (int64_t row = 0; row < s.rows; row += kRowsAtOnce) {
      const int rows = int(s.rows - row < kRowsAtOnce ? s.rows - row : int64_t(kRowsAtOnce));
      // Past L1, which may have what stood there two steps ago.
      for (int i = thread; i < rows * pieces; i += kPersistentThreads) {
        const int b = i / pieces, at = i % pieces * 16;
        dev::copy_async<16>(shared.h + b * shared.row_bytes + at,
                            static_cast<const char*>(s.h) + (row + b) * H * size + at);
      }
      dev::copy_async_commit();
      dev::copy_async_wait<0>();
      dev::sync_block();
      for (int tile = 0; tile < gate_rows; tile += kGateTile) {
        float sums[2][4] = {};
        with_type<A>(s.type, s.weight_hh, [&](const auto* w) {
          multiply_tile<std::remove_cvref_t<decltype(*w)>>(
              sums, shared.weights + tile * shared.row_bytes, shared.h, shared.row_bytes, H);
        });
        float* partial = shared.partials + (warp * gate_rows + tile) * kPartialStride;
        for (int half = 0; half < 2; ++half)
          for (int r = 0; r < 4; ++r) {
            const dev::Element e = dev::M16N8K16::c(lane, r);
            partial[e.row * kPartialStride + half * dev::M16N8K16::N + e.col] = sums[half][r];
          }
      }
      dev::sync_block();
      for (int i = thread; i < rows * mine; i += kPersistentThreads) {
        const int b = i / mine, unit = i % mine;
        forward_unit<Cell>(s, row + b, first + unit, [&](int g) {
          const float* partial = shared.partials + (g * units + unit) * kPartialStride + b;
          A sum = 0;
          for (int part = 0; part < kPersistentWarps; ++part)
            sum += partial[part * gate_rows * kPartialStride];
          return sum;
        });
      }
    }
  }
}

template <class Cell, class A>
dev::Status launch_persistent(const ForwardSteps<A>& steps, dev::Stream stream) {
  dev::LaunchConfig config;
  config.grid = {steps.blocks, 1, 1};
  config.block = {kPersistentThreads, 1, 1};
  config.shared_bytes = steps.shared_bytes;
  config.cooperative = true;
  return dev::launch<persistent_forward<Cell, A>>(config, stream, steps);
}

}  // namespace fused_rnn::cuda
