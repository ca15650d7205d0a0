// A cell over the rows of one step, forward and backward: one thread, one unit of one row. What is
// formula here stands in csrc/cells.
#pragma once

#include "../cells/registry.h"
#include "states.cuh"

namespace fused_rnn::cuda {

// product(g) is what W_hh h adds to gate g, without bias.
template <class Cell, class A, class Product>
FUSED_RNN_DEVICE void forward_unit(const ForwardStep<A>& s, int64_t b, int64_t u, Product product) {
  constexpr int G = Cell::kGates;
  const int64_t H = s.H;
  A x[G], h[G] = {}, w[Cell::kDiagonals + 1], prev[Cell::kStates], state[Cell::kStates],
          saved[Cell::kSaved + 1];
  for (int g = 0; g < G; ++g) {
    x[g] = s.gates_x[(b * G + g) * H + u];
    // The first gates of two products are behind their bias already.
    if (g < Cell::kFirstGates) continue;
    x[g] += load_or_zero<A>(s.type, s.bias_ih, g * H + u);
    h[g] = load_or_zero<A>(s.type, s.bias_hh, g * H + u);
    if constexpr (Cell::kRecurrent) h[g] += product(g);
  }
  for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load<A>(s.type, s.diag, p * H + u);
  // A projected cell (LSTM) does not read the h before it except through W_hh.
  prev[0] = s.own ? A(0) : load<A>(s.type, s.h, b * s.R + u);
  if constexpr (Cell::kStates > 1) prev[1] = s.c[b * H + u];
  Cell::forward(x, h, w, prev, state, saved);

  A* slots = s.saved ? s.saved + b * s.ld_saved + u : nullptr;
  if (s.zoneout.any) {
    const auto* mask = static_cast<const uint8_t*>(s.zoneout.mask.data);
    for (int k = 0; k < Cell::kStates; ++k) {
      if (slots) slots[(s.own_slot + k) * s.slot] = state[k];
      if (!mask)
        state[k] += A(s.zoneout.share[k]) * (prev[k] - state[k]);
      else if (mask[s.zoneout.mask.at(b) + k * H + u])
        state[k] = prev[k];
    }
  }
  if constexpr (Cell::kStates > 1) {
    s.c[b * H + u] =
        s.next(b) ? load_or_zero<A>(s.type, s.initial.c.data, s.initial.c.at(b) + u) : state[1];
    if (s.all_c.data) store(s.type, s.all_c.data, s.all_c.at(b) + u, state[1]);
    if (b >= s.ends && s.c_n.data) store(s.type, s.c_n.data, s.c_n.at(b) + u, state[1]);
  }
  if (s.own)
    store(s.type, s.own, b * H + u, state[0]);
  else
    state[0] = emit_h(s, b, u, state[0]);
  if (!slots) return;
  slots[s.own ? s.own_slot * s.slot : 0] = state[0];
  for (int k = 1; k < Cell::kStates; ++k) slots[k * s.slot] = state[k];
  for (int k = 0; k < Cell::kSaved; ++k) slots[(Cell::kStates + k) * s.slot] = saved[k];
}

template <class Cell, class A>
FUSED_RNN_DEVICE void operand_unit(const ForwardStep<A>& s, int64_t b, int64_t u) {
  constexpr int G = Cell::kGates, F = Cell::kFirstGates;
  const int64_t H = s.H;
  A x[F], h[F], first[F];
  for (int g = 0; g < F; ++g) {
    x[g] = s.gates_x[(b * G + g) * H + u] + load_or_zero<A>(s.type, s.bias_ih, g * H + u);
    h[g] = s.gates_h[(b * F + g) * H + u] + load_or_zero<A>(s.type, s.bias_hh, g * H + u);
  }
  const A prev[] = {load<A>(s.type, s.h, b * s.R + u)};
  store(s.type, s.operand, b * H + u, Cell::operand(x, h, prev, first));
  for (int g = 0; g < F; ++g) s.gates_x[(b * G + g) * H + u] = first[g];
}

// The states before the step, and what the cell saved there.
template <class Cell, class A>
FUSED_RNN_DEVICE void load_before(const BackwardStep<A>& s, int64_t b, int64_t u, A* saved,
                                  A* prev) {
  for (int k = 0; k < Cell::kSaved; ++k)
    saved[k] = s.saved[b * s.ld_saved + (Cell::kStates + k) * s.slot + u];
  const bool begins = s.begins(b);
  if (!begins && b < s.before_rows) {
    for (int k = 0; k < Cell::kStates; ++k) prev[k] = s.before[b * s.ld_saved + k * s.slot + u];
    return;
  }
  const bool initial = !begins || s.begins_initial;
  prev[0] =
      initial && u < s.R ? load_or_zero<A>(s.type, s.initial.h.data, s.initial.h.at(b) + u) : A(0);
  if constexpr (Cell::kStates > 1)
    prev[1] = initial ? load_or_zero<A>(s.type, s.initial.c.data, s.initial.c.at(b) + u) : A(0);
}

// d_h() is the gradient of h after the step.
template <class Cell, class A, class Gradient>
FUSED_RNN_DEVICE void backward_unit(const BackwardStep<A>& s, int64_t b, int64_t u, Gradient d_h) {
  constexpr int G = Cell::kGates;
  const int64_t H = s.H;
  A saved[Cell::kSaved + 1], prev[Cell::kStates], state[Cell::kStates], d_state[Cell::kStates];
  A w[Cell::kDiagonals + 1], dw[Cell::kDiagonals + 1];
  // A gate that waits for the operand is written later.
  A dx[G] = {}, dh[G] = {}, d_prev[Cell::kStates];
  load_before<Cell>(s, b, u, saved, prev);
  for (int k = 0; k < Cell::kStates; ++k)
    state[k] = s.saved[b * s.ld_saved + (s.own_slot + k) * s.slot + u];
  d_state[0] = d_h();
  if constexpr (Cell::kStates > 1) d_state[1] = incoming_c(s.incoming, b, u, H);

  A kept[Cell::kStates] = {};  // gradients of the states before by way of zoneout
  if (s.zoneout.any) {
    const auto* mask = static_cast<const uint8_t*>(s.zoneout.mask.data);
    for (int k = 0; k < Cell::kStates; ++k) {
      const A share =
          mask ? A(mask[s.zoneout.mask.at(b) + k * H + u] ? 1 : 0) : A(s.zoneout.share[k]);
      kept[k] = d_state[k] * share;
      d_state[k] -= kept[k];
    }
  }
  for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load<A>(s.type, s.diag, p * H + u);
  Cell::backward(saved, w, prev, state, d_state, dx, dh, d_prev, dw);
  for (int g = 0; g < G; ++g) {
    store(s.type, s.d_gates_x, (b * G + g) * H + u, dx[g]);
    if constexpr (!Cell::kSumsGates) store(s.type, s.d_gates_h, (b * G + g) * H + u, dh[g]);
  }
  if constexpr (Cell::kDiagonals > 0)
    if (s.d_diag)
      for (int p = 0; p < Cell::kDiagonals; ++p)
        s.d_diag[(b * Cell::kDiagonals + p) * H + u] = dw[p];
  if (s.incoming.direct) s.incoming.direct[b * s.R + u] = d_prev[0] + kept[0];
  if constexpr (Cell::kStates > 1) s.incoming.dc[b * H + u] = d_prev[1] + kept[1];
  if (s.h_before && u < s.R)
    store(s.type, s.h_before, b * s.R + u,
          s.incoming.h_mask.data
              ? prev[0] * load<A>(s.type, s.incoming.h_mask.data, s.incoming.h_mask.at(b) + u)
              : prev[0]);
  if constexpr (kTwoProducts<Cell>)
    if (s.operand) store(s.type, s.operand, b * H + u, Cell::saved_operand(saved, prev));
}

template <class Cell, class A>
FUSED_RNN_DEVICE void operand_backward_unit(const BackwardStep<A>& s, int64_t b, int64_t u) {
  constexpr int G = Cell::kGates;
  static_assert(Cell::kSumsGates && Cell::kStates == 1);
  A saved[Cell::kSaved + 1], prev[1], dx[G], d_prev[] = {s.incoming.direct[b * s.R + u]};
  load_before<Cell>(s, b, u, saved, prev);
  for (int g = 0; g < G; ++g) dx[g] = load<A>(s.type, s.d_gates_x, (b * G + g) * s.H + u);
  Cell::operand_backward(saved, prev, s.d_operand[b * s.H + u], dx, dx, d_prev);
  for (int g = 0; g < G; ++g) store(s.type, s.d_gates_x, (b * G + g) * s.H + u, dx[g]);
  s.incoming.direct[b * s.R + u] = d_prev[0];
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 4) void forward_step(ForwardStep<A> s) {
  constexpr int F = Cell::kFirstGates;
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    forward_unit<Cell>(
        s, b, u, [&](int g) { return s.gates_h[(b * (Cell::kGates - F) + g - F) * s.H + u]; });
  });
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
        A sum = sums[g][b];
        for (int step = dev::kWarp / 2; step > 0; step /= 2) sum += dev::shuffle_xor(sum, step);
        if (lane == b) mine[g] = sum;
      }
    }
    if (lane < s.rows) forward_unit<Cell>(s, lane, u, [&](int g) { return mine[g]; });
  }
}

template <class Cell, class A>
FUSED_RNN_KERNEL void operand_step(ForwardStep<A> s) {
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) { operand_unit<Cell>(s, b, u); });
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 4) void backward_step(BackwardStep<A> s) {
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    backward_unit<Cell>(s, b, u, [&] {
      return s.d_own ? s.d_own[b * s.H + u] : incoming_h(s.incoming, b, u, s.R);
    });
  });
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
      const auto product = [&] {
        A sum = 0;
        for (int part = 0; part < kBackwardWarps; ++part)
          sum += partial[(part * kFusedRows + b) * dev::kWarp + lane];
        return sum;
      };
      backward_unit<Cell>(s, b, u, [&] { return incoming_h(s.incoming, b, u, s.R, product); });
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
  for_each_element(s.rows, s.H,
                   [&](int64_t b, int64_t u) { operand_backward_unit<Cell>(s, b, u); });
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
  // Layer normalisation takes sums over the units of a row, which no kernel here has yet.
  if constexpr (Cell::kNormGates == 0) fill_launches<Cell>(cell);
  return cell;
}

template <class A, class... Cs>
const CellLaunches<A>* find_among(TypeList<Cs...>, const char* name) {
  static const CellLaunches<A> cells[] = {launches_of<Cs, A>()...};
  for (const CellLaunches<A>& cell : cells)
    if (same_name(cell.info.name, name)) return cell.forward ? &cell : nullptr;
  return nullptr;
}

}  // namespace fused_rnn::cuda
