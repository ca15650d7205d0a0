// The kernels of a cell over the rows of one step: one thread, one unit of one row.
#pragma once

#include "norm_kernels.cuh"
#include "persistent_kernels.cuh"

namespace fused_rnn::cuda {

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 4) void forward_step(ForwardStep<A> s) {
  constexpr int F = Cell::kFirstGates;
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    forward_unit<Cell>(
        s, b, u, [&](int g) { return s.gates_h[(b * (Cell::kGates - F) + g - F) * s.H + u]; });
  });
}

// Warps of a block: forward they have units of their own, backward parts of one long sum.
constexpr int kForwardWarps = kThreads / dev::kWarp;
constexpr int kBackwardWarps = 16;
constexpr int kForwardThreads = kForwardWarps * dev::kWarp;
constexpr int kBackwardThreads = kBackwardWarps * dev::kWarp;

// With the product, for few rows: one warp, one unit of all rows. The lanes share the sum, and
// then the rows.
template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kForwardThreads,
                                         4) void fused_forward_step(ForwardStep<A> s) {
  constexpr int G = Cell::kGates;
  const int lane = dev::lane_index();
  for (int64_t u = int64_t(dev::block_index().x) * kForwardWarps + dev::warp_index(); u < s.H;
       u += int64_t(dev::grid_size().x) * kForwardWarps) {
    A sums[G][kFusedRows] = {};
    with_type<A>(s.type, s.weight_hh, [&](const auto* w) {
      const auto* h = static_cast<decltype(w)>(s.h_operand);
      for (int64_t k = lane; k < s.R; k += dev::kWarp) {
        A weights[G];
        for (int g = 0; g < G; ++g) weights[g] = dev::widen(w[(g * s.H + u) * s.R + k]);
        for (int b = 0; b < kFusedRows; ++b) {
          if (b >= s.rows) continue;  // not out of the loop, which is to be unrolled
          const A operand = dev::widen(h[b * s.R + k]);
          for (int g = 0; g < G; ++g) sums[g][b] += weights[g] * operand;
        }
      }
    });
    A mine[G] = {};  // of row `lane`
    for (int b = 0; b < kFusedRows; ++b) {
      if (b >= s.rows) continue;
      for (int g = 0; g < G; ++g) {
        const A sum = sum_of_lanes(sums[g][b]);
        if (lane == b) mine[g] = sum;
      }
    }
    if (lane < s.rows) forward_unit<Cell>(s, lane, u, [&](int g) { return mine[g]; });
  }
}

template <class Cell, class A>
FUSED_RNN_KERNEL void operand_step(ForwardStep<A> s) {
  constexpr int F = Cell::kFirstGates;
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    const A operand =
        operand_unit<Cell>(s, b, u, [&](int g) { return s.gates_h[(b * F + g) * s.H + u]; });
    store(s.type, s.operand, b * s.H + u, operand);
  });
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 4) void backward_step(BackwardStep<A> s) {
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) { backward_unit<Cell>(s, b, u); });
}

// With the product that leads to it, for few rows: one block, as many units of all rows as a warp
// has lanes. The warps share the sums, and then the rows.
template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kBackwardThreads,
                                         1) void fused_backward_step(BackwardStep<A> s) {
  const int lane = dev::lane_index(), warp = dev::warp_index();
  const int64_t rows = s.rows < s.incoming.first ? s.rows : s.incoming.first;
  const int64_t K = Cell::kGates * s.H;
  A* partial = dev::shared<A>();  // [warps, rows, lanes]
  for (int64_t first = int64_t(dev::block_index().x) * dev::kWarp; first < s.H;
       first += int64_t(dev::grid_size().x) * dev::kWarp) {
    const int64_t u = first + lane;
    A sums[kFusedRows] = {};
    if (u < s.H)
      with_type<A>(s.type, s.weight_hh, [&](const auto* w) {
        const auto* gates = static_cast<decltype(w)>(s.d_walked);
        for (int64_t k = warp; k < K; k += kBackwardWarps) {
          const A weight = dev::widen(w[k * s.R + u]);
          for (int b = 0; b < kFusedRows; ++b) {
            if (b >= rows) continue;
            sums[b] += dev::widen(gates[b * K + k]) * weight;
          }
        }
      });
    for (int b = 0; b < kFusedRows; ++b)
      partial[(warp * kFusedRows + b) * dev::kWarp + lane] = sums[b];
    dev::sync_block();
    for (int b = warp; b < s.rows && u < s.H; b += kBackwardWarps) {
      A product = 0;
      for (int part = 0; part < kBackwardWarps; ++part)
        product += partial[(part * kFusedRows + b) * dev::kWarp + lane];
      backward_unit<Cell>(s, b, u, BackwardInput<Cell, A>(s, b, u),
                          IncomingH<A>(s.incoming, b, u, s.R)(product));
    }
    dev::sync_block();  // before the next units' sums
  }
}

// Blocks of so many warps, each for some of the units.
inline dev::LaunchConfig over_units(int64_t units, int64_t units_per_block, int warps,
                                    size_t shared_bytes) {
  const int64_t blocks = (units + units_per_block - 1) / units_per_block;
  dev::LaunchConfig config;
  config.block = {warps * dev::kWarp, 1, 1};
  config.grid = {int(blocks < kMaxBlocksY ? blocks : kMaxBlocksY), 1, 1};
  config.shared_bytes = shared_bytes;
  return config;
}

template <class Cell, class A>
FUSED_RNN_KERNEL void operand_backward_step(BackwardStep<A> s) {
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    operand_backward_unit<Cell>(s, b, u, s.d_operand[b * s.H + u]);
  });
}

template <class Cell, class A>
void fill_launches(CellLaunches<A>& cell) {
  cell.forward = [](const ForwardStep<A>& s, dev::Stream stream) {
    return dev::launch<forward_step<Cell, A>>(over(s.rows, s.H), stream, s);
  };
  cell.backward = [](const BackwardStep<A>& s, dev::Stream stream) {
    return dev::launch<backward_step<Cell, A>>(over(s.rows, s.H), stream, s);
  };
  if constexpr (Cell::kRecurrent && !kTwoProducts<Cell>) {
    cell.fused_forward = [](const ForwardStep<A>& s, dev::Stream stream) {
      return dev::launch<fused_forward_step<Cell, A>>(
          over_units(s.H, kForwardWarps, kForwardWarps, 0), stream, s);
    };
    cell.fused_backward = [](const BackwardStep<A>& s, dev::Stream stream) {
      const size_t shared = size_t(kBackwardWarps) * kFusedRows * dev::kWarp * sizeof(A);
      return dev::launch<fused_backward_step<Cell, A>>(
          over_units(s.H, dev::kWarp, kBackwardWarps, shared), stream, s);
    };
    if constexpr (sizeof(A) == sizeof(float) && has_persistent(Cell::kName))
      fill_persistent<Cell>(cell);
  }
  if constexpr (kTwoProducts<Cell>) {
    cell.operand = [](const ForwardStep<A>& s, dev::Stream stream) {
      return dev::launch<operand_step<Cell, A>>(over(s.rows, s.H), stream, s);
    };
    cell.operand_backward = [](const BackwardStep<A>& s, dev::Stream stream) {
      return dev::launch<operand_backward_step<Cell, A>>(over(s.rows, s.H), stream, s);
    };
  }
}

template <class Cell, class A>
CellLaunches<A> launches_of() {
  CellLaunches<A> cell{};
  cell.info = info_of<Cell>();
  if constexpr (Cell::kNormGates > 0)
    fill_normed_launches<Cell>(cell);
  else
    fill_launches<Cell>(cell);
  return cell;
}

template <class A, class... Cs>
const CellLaunches<A>* find_among(TypeList<Cs...>, const char* name) {
  static const CellLaunches<A> cells[] = {launches_of<Cs, A>()...};
  for (const CellLaunches<A>& cell : cells)
    if (same_name(cell.info.name, name)) return &cell;
  return nullptr;
}

}  // namespace fused_rnn::cuda
