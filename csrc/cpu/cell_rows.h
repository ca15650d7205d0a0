// A cell over rows of units: all that the scans know of it. They call it by pointer, so that they
// are compiled once for each storage type and not for each cell.
#pragma once

#include "../cells/registry.h"
#include "../core/problem.h"
#include "simd.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// One step of one member's rows. Pointers stand at its first row and at unit 0, rows are ld...
// apart.
template <class S>
struct ForwardStep {
  using A = Accumulate<S>;
  using O = Operand<S>;  // what is the left operand of a product
  A* x;                  // pre-activations from the input; `operand` changes its first gates
  int64_t ldx;
  const A* w;  // [P] diagonals
  int64_t w_stride;
  const O* before;  // h before the step; null where a projection follows, which only LSTMs have
  O* after;         // h after it, as the output holds it
  int64_t ld_state;
  A* c;  // null for a cell without
  int64_t ldc;
  O* own;          // the cell's own h where a projection follows, else null
  O* operand;      // of the second product, where there is one
  int64_t ld_own;  // of both
  A* normed;       // the operand of a norm, normalised, and one slot further as it was
  int64_t ld_normed;
  S* y;  // the output
  int64_t ldy;
  const int64_t* y_order;  // of rows in y, null where they follow one another
  const int64_t* order;    // of rows in the caller's tensors, likewise
  int64_t valid;           // units of y
  S* all_c;                // c for the caller, null when not wanted
  int64_t ld_all_c, valid_c;
  const A* h_mask;  // [rows, ld_state] what h is multiplied by for W_hh, into `masked`; or null
  O* masked;
  bool zoned;
  A zoneout[2];                 // the share of h and c that stays
  const uint8_t* zoneout_mask;  // or which units of them, [S*H] of a row; null where there is none
  int64_t ld_zoneout, zoneout_state;
  A* saved;  // slots of a row, `slot` apart; null in inference
  int64_t ld_saved, slot;
  int own_slot;  // the first of what is not a state, but the cell's own result

  int64_t place(int64_t row) const { return order ? order[row] : row; }
};

// Some rows and units of it, with the product of the tile.
template <class A>
struct Tile {
  int64_t row, rows;
  int64_t unit;
  int vectors;           // of units
  int64_t x_at, x_gate;  // where the first unit stands in a row of x, and how far its gates
  const A* h;            // pre-activations from h, or a normed operand, at the first row and unit
  int64_t ldh, h_gate;
};

// One step of one row, backwards. Pointers stand at the row and at unit 0.
template <class A>
struct BackwardRow {
  int64_t begin, end;  // units
  int64_t slot;        // between gates, states and saved values
  const A* saved;      // what the cell saved
  const A* states;     // after the step
  const A* h_before;   // null where a projection follows
  const A* c_before;   // null for a cell without c
  const A* w;          // [P] diagonals
  A* dh;               // gradient of the h after the step, then of that before
  A* dc;               // the same of c
  A* gates_x;          // gradients of the pre-activations, and behind them those of w
  A* gates_h;          // the same pointer where x and h are summed
  A* d_operand;        // of the second product, where there is one; of a norm like the operand
  const A* own;        // the cell's own states where zoneout made others of them, else null
  A zoneout[2];
  const uint8_t* zoneout_mask;
  int64_t zoneout_state;
  int64_t valid;  // units of a row
};

template <class S>
struct CellRows {
  using A = Accumulate<S>;
  CellInfo info;
  void (*forward)(const ForwardStep<S>&, const Tile<A>&);
  void (*operand)(const ForwardStep<S>&, const Tile<A>&);  // null for a cell without
  void (*backward)(const BackwardRow<A>&);
  void (*operand_backward)(const BackwardRow<A>&);
  // A vector of the operand, that of unit u, from what was saved.
  void (*saved_operand)(const BackwardRow<A>&, int64_t u, A* operand);
};

// h of a row and of the units from u on goes to the output, and on to the next step: as the output
// holds it, and times its mask for the product.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> emit_h(const ForwardStep<S>& step, int64_t row, int64_t u,
                                              Vector<Accumulate<S>> h) {
  const int64_t at = row * step.ld_state + u;
  h = round_to<S>(h);
  store(step.after + at, h);
  if (step.h_mask) store(step.masked + at, h * load(step.h_mask + at));
  store_partial(step.y + (step.y_order ? step.y_order[row] : row) * step.ldy + u, h,
                step.valid - u);
  return h;
}

// Units [u, u + lanes) of a mask.
template <class A>
FUSED_RNN_INLINE Vector<A> load_mask(const uint8_t* mask, int64_t n) {
  A lanes[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = lane < n && mask[lane] ? A(1) : A(0);
  return load(lanes);
}

template <class Cell, class S>
void forward_rows(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  using A = Accumulate<S>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  constexpr int G = Cell::kGates;
  const int64_t x_gate = tile.x_gate, h_gate = tile.h_gate, slot_size = step.slot;
  for (int v = 0; v < tile.vectors; ++v) {
    const int64_t u = tile.unit + v * L;
    const A* gx = step.x + tile.row * step.ldx + tile.x_at + v * L;
    const A* gh = tile.h + v * L;
    const auto* before = step.before ? step.before + tile.row * step.ld_state + u : nullptr;
    A* c = Cell::kStates > 1 ? step.c + tile.row * step.ldc + u : nullptr;
    auto* own = step.own ? step.own + tile.row * step.ld_own + u : nullptr;
    A* slot = step.saved ? step.saved + tile.row * step.ld_saved + u : nullptr;
    V w[Cell::kDiagonals + 1];
    for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(step.w + p * step.w_stride + u);
    for (int64_t i = tile.row; i < tile.row + tile.rows; ++i) {
      V x[G], h[G], prev[Cell::kStates], state[Cell::kStates], saved[Cell::kSaved + 1];
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) {
        x[g] = load(gx + g * x_gate);
        if (g >= Cell::kFirstGates) h[g] = load(gh + (g - Cell::kFirstGates) * h_gate);
      }
      if constexpr (Cell::kNormedOperand)
        for (int i = 0; i < 2; ++i) h[i] = load(gh + i * h_gate);
      prev[0] = before ? load(before) : V{};
      if constexpr (Cell::kStates > 1) prev[1] = load(c);
      Cell::forward(x, h, w, prev, state, saved);
      if (step.zoned) {
        const uint8_t* mask =
            step.zoneout_mask ? step.zoneout_mask + step.place(i) * step.ld_zoneout + u : nullptr;
#pragma GCC unroll 2
        for (int s = 0; s < Cell::kStates; ++s) {
          if (slot) store(slot + (step.own_slot + s) * slot_size, state[s]);
          state[s] =
              mask ? math::select(load_mask<A>(mask + s * step.zoneout_state, step.valid - u) != 0,
                                  prev[s], state[s])
                   : state[s] + step.zoneout[s] * (prev[s] - state[s]);
        }
      }
      if constexpr (Cell::kStates > 1) {
        store(c, state[1]);
        c += step.ldc;
        if (step.all_c)
          store_partial(step.all_c + step.place(i) * step.ld_all_c + u, state[1], step.valid_c - u);
      }
      if (own) {
        store(own, state[0]);
        own += step.ld_own;
      } else {
        state[0] = emit_h(step, i, u, state[0]);
      }
      if (slot) {
        store(own ? slot + step.own_slot * slot_size : slot, state[0]);
#pragma GCC unroll 8
        for (int s = 1; s < Cell::kStates; ++s) store(slot + s * slot_size, state[s]);
#pragma GCC unroll 8
        for (int s = 0; s < Cell::kSaved; ++s)
          store(slot + (Cell::kStates + s) * slot_size, saved[s]);
        slot += step.ld_saved;
      }
      gx += step.ldx;
      gh += tile.ldh;
      if (before) before += step.ld_state;
    }
  }
}

template <class Cell, class S>
void operand_rows(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  using V = Vector<Accumulate<S>>;
  constexpr int L = kLanes<Accumulate<S>>;
  constexpr int F = Cell::kFirstGates;
  for (int v = 0; v < tile.vectors; ++v)
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = tile.row + i, u = tile.unit + v * L;
      Accumulate<S>* gx = step.x + row * step.ldx + tile.x_at + v * L;
      const Accumulate<S>* gh = tile.h + i * tile.ldh + v * L;
      V x[F], h[F], first[F];
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) {
        x[g] = load(gx + g * tile.x_gate);
        h[g] = load(gh + g * tile.h_gate);
      }
      V prev[Cell::kStates];
      prev[0] = step.before ? load(step.before + row * step.ld_state + u) : V{};
      if constexpr (Cell::kStates > 1) prev[1] = load(step.c + row * step.ldc + u);
      const V operand = Cell::operand(x, h, prev, first);
      if constexpr (Cell::kNormedOperand)
        store(step.normed + row * step.ld_normed + step.slot + u, operand);
      else
        store(step.operand + row * step.ld_own + u, operand);
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) store(gx + g * tile.x_gate, first[g]);
    }
}

template <class Cell, class A>
FUSED_RNN_INLINE void load_before(const BackwardRow<A>& at, int64_t u, Vector<A>* saved,
                                  Vector<A>* prev) {
#pragma GCC unroll 8
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load(at.saved + i * at.slot + u);
  prev[0] = at.h_before ? load(at.h_before + u) : Vector<A>{};
  if constexpr (Cell::kStates > 1) prev[1] = load(at.c_before + u);
}

template <class Cell, class A>
void backward_row(const BackwardRow<A>& at) {
  using V = Vector<A>;
  constexpr int G = Cell::kGates;
  for (int64_t u = at.begin; u < at.end; u += kLanes<A>) {
    V saved[Cell::kSaved + 1], prev[Cell::kStates], state[Cell::kStates], d_state[Cell::kStates];
    V w[Cell::kDiagonals + 1], dw[Cell::kDiagonals + 1];
    // A gate that waits for the operand is written later.
    V dx[G] = {}, dh[G] = {}, d_prev[Cell::kStates];
    load_before<Cell>(at, u, saved, prev);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kStates; ++i)
      state[i] = load((at.own ? at.own : at.states) + i * at.slot + u);
    d_state[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_state[1] = load(at.dc + u);
    V kept[Cell::kStates] = {};  // gradients of the states before by way of zoneout
    if (at.own) {
#pragma GCC unroll 2
      for (int s = 0; s < Cell::kStates; ++s) {
        kept[s] = d_state[s] *
                  (at.zoneout_mask
                       ? load_mask<A>(at.zoneout_mask + s * at.zoneout_state + u, at.valid - u)
                       : V{} + at.zoneout[s]);
        d_state[s] -= kept[s];
      }
    }
    for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(at.w + p * at.slot + u);
    Cell::backward(saved, w, prev, state, d_state, dx, dh, d_prev, dw);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      store(at.gates_x + g * at.slot + u, dx[g]);
      if constexpr (!Cell::kSumsGates) store(at.gates_h + g * at.slot + u, dh[g]);
    }
    if constexpr (Cell::kNormedOperand)
      for (int i = 0; i < 2; ++i) store(at.d_operand + i * at.slot + u, dh[i]);
    for (int p = 0; p < Cell::kDiagonals; ++p) store(at.gates_x + (G + p) * at.slot + u, dw[p]);
    store(at.dh + u, at.own ? d_prev[0] + kept[0] : d_prev[0]);
    if constexpr (Cell::kStates > 1) store(at.dc + u, at.own ? d_prev[1] + kept[1] : d_prev[1]);
  }
}

template <class Cell, class A>
void operand_backward_row(const BackwardRow<A>& at) {
  using V = Vector<A>;
  constexpr int G = Cell::kGates;
  static_assert(Cell::kSumsGates);
  for (int64_t u = at.begin; u < at.end; u += kLanes<A>) {
    V saved[Cell::kSaved + 1], prev[Cell::kStates], dx[G], d_prev[Cell::kStates];
    load_before<Cell>(at, u, saved, prev);
    d_prev[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_prev[1] = load(at.dc + u);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) dx[g] = load(at.gates_x + g * at.slot + u);
    Cell::operand_backward(saved, prev, load(at.d_operand + u), dx, dx, d_prev);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) store(at.gates_x + g * at.slot + u, dx[g]);
    store(at.dh + u, d_prev[0]);
    if constexpr (Cell::kStates > 1) store(at.dc + u, d_prev[1]);
  }
}

template <class Cell, class A>
void saved_operand(const BackwardRow<A>& at, int64_t u, A* operand) {
  Vector<A> saved[Cell::kSaved + 1], prev[Cell::kStates];
  load_before<Cell>(at, u, saved, prev);
  store(operand, Cell::saved_operand(saved, prev));
}

template <class Cell, class S>
constexpr CellRows<S> rows_of_cell() {
  using A = Accumulate<S>;
  CellRows<S> rows{info_of<Cell>(), forward_rows<Cell, S>, nullptr, backward_row<Cell, A>, nullptr,
                   nullptr};
  if constexpr (kHasOperand<Cell>) {
    rows.operand = operand_rows<Cell, S>;
    rows.operand_backward = operand_backward_row<Cell, A>;
    rows.saved_operand = saved_operand<Cell, A>;
  }
  return rows;
}

template <class Cell, class S>
inline constexpr CellRows<S> kCellRows = rows_of_cell<Cell, S>();

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
