// A cell over rows of units: all that the scans know of it. They call it by pointer, so that they
// are compiled once for each storage type and not for each cell.
#pragma once

#include <type_traits>

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
  const O* before;  // h before the step
  O* after;         // h after it, as the output holds it
  int64_t ld_state;
  A* c;  // null for a cell without
  int64_t ldc;
  O* own;      // the cell's own h where a projection follows, which only LSTMs have, else null
  O* operand;  // of the second product, where there is one
  const A* candidate_mask;  // or null
  int64_t ld_own;           // of the three
  A* normed;                // the operand of a norm, normalised, and one slot further as it was
  int64_t ld_normed;
  S* y;  // the output
  int64_t ldy;
  const int64_t* y_order;  // of rows in y, null where they follow one another
  const int64_t* order;    // of rows in the caller's tensors, likewise
  int64_t valid;           // units of y
  S* all_c;                // c for the caller, null when not wanted
  int64_t ld_all_c, valid_c;
  const A* h_mask;  // [rows, ld_state] what h is multiplied by for W_hh, into `masked`, and the
                    // operand of a second product; or null
  O* masked;
  bool zoned;
  A zoneout[2];                 // the share of h and c that stays
  const uint8_t* zoneout_mask;  // or which units of them, of a row those of h and then those of c;
                                // null where there is none
  int64_t ld_zoneout, zoneout_state;
  A* saved;  // slots of a row, `slot` apart; null in inference
  int64_t ld_saved, slot;
  int own_slot;  // the first of what is not a state, but the cell's own result

  int64_t place(int64_t row) const { return order ? order[row] : row; }
  S* y_row(int64_t row) const { return y + (y_order ? y_order[row] : row) * ldy; }
};

// Some rows and units of it, with the product of the tile.
template <class A>
struct Tile {
  int64_t row, rows;
  int64_t unit;
  int vectors, panels;   // vectors of units in each of the panels
  int64_t x_at, x_gate;  // where the first unit stands in a row of x, and how far its gates
  const A* h;            // pre-activations from h, or a normed operand, at the first row and unit
  int64_t ldh, h_gate;
};

// One step of one row, backwards. Pointers stand at the row and at unit 0.
template <class A>
struct BackwardRow {
  int64_t begin, end;       // units
  int64_t slot;             // between gates, states and saved values
  const A* saved;           // what the cell saved
  const A* states;          // after the step
  const A* h_before;        // null where a projection follows
  const A* c_before;        // null for a cell without c
  const A* w;               // [P] diagonals
  const A* h_mask;          // what the operand of a second product was multiplied by, or null
  const A* candidate_mask;  // or null
  A* dh;                    // gradient of the h after the step, then of that before
  A* dc;                    // the same of c
  A* gates_x;               // gradients of the pre-activations, and behind them those of w
  A* gates_h;               // the same pointer where x and h are summed
  A* d_operand;             // of the second product, where there is one; of a norm like the operand
  const A* own;             // the cell's own states where zoneout made others of them, else null
  A zoneout[2];
  const uint8_t* zoneout_mask;
  int64_t zoneout_state;
  int64_t valid_c;  // units of a row
};

template <class S>
struct CellRows {
  using A = Accumulate<S>;
  CellInfo info;
  void (*forward)(const ForwardStep<S>&, const Tile<A>&);
  void (*operand)(const ForwardStep<S>&, const Tile<A>&);  // null for a cell without
  void (*backward)(const BackwardRow<A>&);
  void (*operand_backward)(const BackwardRow<A>&);
  // The operand of units [begin, end), from what was saved.
  void (*saved_operand)(const BackwardRow<A>&, int64_t begin, int64_t end, A* operand);
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
  store_partial(step.y_row(row) + u, h, step.valid - u);
  return h;
}

// Units [u, u + lanes) of a mask.
template <class A>
FUSED_RNN_INLINE Vector<A> load_mask(const uint8_t* mask, int64_t n) {
  A lanes[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = lane < n && mask[lane] ? A(1) : A(0);
  return load(lanes);
}

// The share of state `s` that zoneout keeps, of the units from u on; n are valid.
template <class A>
FUSED_RNN_INLINE Vector<A> zoneout_share(const BackwardRow<A>& at, int s, int64_t u, int64_t n) {
  if (!at.zoneout_mask) return Vector<A>{} + at.zoneout[s];
  return load_mask<A>(at.zoneout_mask + s * at.zoneout_state + u, n);
}

// Vectors of units that are equally far from one another.
struct Line {
  int64_t count;
  int64_t row, unit, x, h;  // of the first, in step.x and tile.h
  int64_t next_row, next_unit, next_x, next_h;

  void skip(int64_t vectors) {
    count -= vectors;
    row += vectors * next_row;
    unit += vectors * next_unit;
    x += vectors * next_x;
    h += vectors * next_h;
  }
};

// Calls body(line) for what makes up a tile: down the rows of a panel, or from panel to panel,
// which are panel_x and panel_h apart, where that is longer.
template <class A, class Body>
FUSED_RNN_INLINE void for_lines(const Tile<A>& tile, int64_t ldx, int64_t panel_x, int64_t panel_h,
                                Body body) {
  const bool down = tile.rows > tile.panels;
  const int64_t width = tile.vectors * kLanes<A>;
  const int64_t across = down ? panel_x : ldx, across_h = down ? panel_h : tile.ldh;
  for (int64_t i = 0; i < (down ? tile.panels : tile.rows); ++i)
    for (int64_t u = 0; u < width; u += kLanes<A>) {
      const int64_t row = tile.row + (down ? 0 : i), unit = tile.unit + u + (down ? i * width : 0);
      const int64_t x = tile.row * ldx + tile.x_at + u + i * across, h = u + i * across_h;
      body(down ? Line{tile.rows, row, unit, x, h, 1, 0, ldx, tile.ldh}
                : Line{tile.panels, row, unit, x, h, 0, width, panel_x, panel_h});
    }
}

// What state `s` becomes by zoneout, for a row and the units from u on; n are valid.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> zone_out(const ForwardStep<S>& step, int s, int64_t row,
                                                int64_t u, int64_t n, Vector<Accumulate<S>> before,
                                                Vector<Accumulate<S>> after) {
  if (!step.zoneout_mask) return after + step.zoneout[s] * (before - after);
  const uint8_t* mask =
      step.zoneout_mask + step.place(row) * step.ld_zoneout + s * step.zoneout_state + u;
  return math::select(load_mask<Accumulate<S>>(mask, n) != 0, before, after);
}

// What follows from the new states of a vector, whatever the call wants of them.
template <class Cell, class S, class V>
void settle(const ForwardStep<S>& step, int64_t row, int64_t u, V* state, const V* saved) {
  using A = Accumulate<S>;
  A* slot = step.saved ? step.saved + row * step.ld_saved + u : nullptr;
  if (step.zoned) {
    for (int s = 0; slot && s < Cell::kStates; ++s)
      store(slot + (step.own_slot + s) * step.slot, state[s]);
    if (!step.own)
      state[0] = zone_out(step, 0, row, u, step.valid - u,
                          load(step.before + row * step.ld_state + u), state[0]);
    if constexpr (Cell::kStates > 1)
      state[1] =
          zone_out(step, 1, row, u, step.valid_c - u, load(step.c + row * step.ldc + u), state[1]);
  }
  if constexpr (Cell::kStates > 1) {
    store(step.c + row * step.ldc + u, state[1]);
    if (step.all_c)
      store_partial(step.all_c + step.place(row) * step.ld_all_c + u, state[1], step.valid_c - u);
  }
  if (step.own)
    store(step.own + row * step.ld_own + u, state[0]);
  else
    state[0] = emit_h(step, row, u, state[0]);
  if (!slot) return;
  store(step.own ? slot + step.own_slot * step.slot : slot, state[0]);
  for (int s = 1; s < Cell::kStates; ++s) store(slot + s * step.slot, state[s]);
  for (int s = 0; s < Cell::kSaved; ++s) store(slot + (Cell::kStates + s) * step.slot, saved[s]);
}

// The weights of a unit as the cell takes them. With kMasked the mask is behind the diagonals.
template <class Cell, bool kMasked, class V>
FUSED_RNN_INLINE auto weights_of(const V* w) {
  if constexpr (kMasked)
    return WithMask<V>{w, w[Cell::kDiagonals]};
  else
    return w;
}

// Calls body(masked), of a type whose value tells whether there is a mask of the candidate: code
// that has none to apply is compiled without.
template <class Cell, class Body>
FUSED_RNN_INLINE void with_mask(const void* candidate_mask, Body body) {
  if constexpr (Cell::kCandidate)
    if (candidate_mask) return body(std::true_type{});
  body(std::false_type{});
}

// What a call wants of a step: the states, of whole vectors; what backward reads as well; or
// whatever settle() knows. Code that also had the rest at hand would hold more than fits registers.
enum class Want { kStates, kSaved, kAnything };

// The step over a line; with a mask of the candidate one vector at a time.
template <class Cell, bool kMasked, Want kWant, class S>
FUSED_RNN_INLINE void forward_line(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile,
                                   Line line) {
  using A = Accumulate<S>;
  using V = Vector<A>;
  constexpr int G = Cell::kGates;
  constexpr bool kHasC = Cell::kStates > 1;
  constexpr bool kPlain = kWant != Want::kAnything;
  const auto first = [&](auto* base, int64_t ld) {
    return base ? base + line.row * ld + line.unit : base;
  };
  const auto next = [&](int64_t ld) { return line.next_row * ld + line.next_unit; };
  // All of it in registers: the compiler takes what is written here for what `step` holds.
  const A* x_at = step.x + line.x;
  const A* h_at = tile.h + line.h;
  const auto* before = first(step.own ? nullptr : step.before, step.ld_state);
  auto* after = first(step.after, step.ld_state);
  A* c = first(step.c, step.ldc);
  S* y = first(step.y, step.ldy);
  A* slot = first(step.saved, step.ld_saved);
  const int64_t next_state = next(step.ld_state), next_c = next(step.ldc), next_y = next(step.ldy),
                next_slot = next(step.ld_saved);
  const int64_t x_gate = tile.x_gate, h_gate = tile.h_gate, slot_size = step.slot;
  // The next vectors of the line.
  const auto advance = [&]<class P>(P) __attribute__((always_inline)) {
    constexpr int n = sizeof(P) / sizeof(V);
    P x[G], h[G], w[Cell::kDiagonals + 1], prev[Cell::kStates], state[Cell::kStates],
        saved[Cell::kSaved + 1];
    prev[0] = kPlain || before ? load_as<P>(before, next_state) : P{};
    if constexpr (kHasC) prev[1] = load_as<P>(c, next_c);
    for (int p = 0; p < Cell::kDiagonals; ++p)
      w[p] = load_as<P>(step.w + p * step.w_stride + line.unit, line.next_unit);
    if constexpr (kMasked)
      w[Cell::kDiagonals] = load(step.candidate_mask + line.row * step.ld_own + line.unit);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      x[g] = load_as<P>(x_at + g * x_gate, line.next_x);
      if (g >= Cell::kFirstGates)
        h[g] = load_as<P>(h_at + (g - Cell::kFirstGates) * h_gate, line.next_h);
    }
    if constexpr (Cell::kNormedOperand)
      for (int i = 0; i < 2; ++i) h[i] = load_as<P>(h_at + i * h_gate, line.next_h);

    Cell::forward(x, h, weights_of<Cell, kMasked>(w), prev, state, saved);

    if constexpr (kPlain) {
      state[0] = round_to<S>(state[0]);
      store_as(after, next_state, state[0]);
      store_as(y, next_y, state[0]);
      if constexpr (kHasC) store_as(c, next_c, state[1]);
      if constexpr (kWant == Want::kSaved) {
#pragma GCC unroll 2
        for (int s = 0; s < Cell::kStates; ++s) store_as(slot + s * slot_size, next_slot, state[s]);
#pragma GCC unroll 8
        for (int s = 0; s < Cell::kSaved; ++s)
          store_as(slot + (Cell::kStates + s) * slot_size, next_slot, saved[s]);
        slot += n * next_slot;
      }
      after += n * next_state;
      y += n * next_y;
    } else {
      for (int i = 0; i < n; ++i) {
        V states[Cell::kStates], values[Cell::kSaved + 1];
        for (int s = 0; s < Cell::kStates; ++s) states[s] = vector_of(state[s], i);
        for (int s = 0; s < Cell::kSaved; ++s) values[s] = vector_of(saved[s], i);
        settle<Cell>(step, line.row, line.unit, states, values);
        line.row += line.next_row;
        line.unit += line.next_unit;
      }
    }
    x_at += n * line.next_x;
    h_at += n * line.next_h;
    if (kPlain || before) before += n * next_state;
    if constexpr (kHasC) c += n * next_c;
    if constexpr (kPlain && Cell::kDiagonals) line.unit += n * line.next_unit;
  };
  int64_t left = line.count;
  if constexpr (!kMasked) {
    if constexpr (kPlain && kBundle > 2)
      for (; left >= kBundle; left -= kBundle) advance(Bundle<V, kBundle>{});
    for (; left >= 2; left -= 2) advance(Bundle<V, 2>{});
  }
  for (; left > 0; --left) advance(V{});
}

// Not inline: rare, and large.
template <class Cell, bool kMasked, class S>
void settled_line(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile, Line line) {
  forward_line<Cell, kMasked, Want::kAnything>(step, tile, line);
}

template <class Cell, bool kMasked, class S>
void forward_tile(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  constexpr int L = kLanes<Accumulate<S>>;
  constexpr int kGatesOfH = Cell::kGates - Cell::kFirstGates;
  const int64_t panel_h = Cell::kNormedOperand ? tile.vectors * L  // one value
                                               : kGatesOfH * tile.h_gate;
  const bool plain = !step.zoned && !step.own && !step.all_c && !step.h_mask && !step.y_order;
  for_lines(tile, step.ldx, Cell::kGates * tile.x_gate, panel_h,
            [&](Line line) __attribute__((always_inline)) {
              if (!kMasked && plain) {
                Line whole = line;  // vectors: the last may reach beyond the units
                while (whole.count > 0 &&
                       whole.unit + (whole.count - 1) * whole.next_unit + L > step.valid)
                  --whole.count;
                step.saved ? forward_line<Cell, false, Want::kSaved>(step, tile, whole)
                           : forward_line<Cell, false, Want::kStates>(step, tile, whole);
                line.skip(whole.count);
              }
              if (line.count) settled_line<Cell, kMasked>(step, tile, line);
            });
}

template <class Cell, class S>
void forward_rows(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  with_mask<Cell>(step.candidate_mask,
                  [&](auto masked) { forward_tile<Cell, masked.value>(step, tile); });
}

template <class Cell, bool kMasked, class S>
void operand_tile(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  using V = Vector<Accumulate<S>>;
  constexpr int F = Cell::kFirstGates;
  for_lines(tile, step.ldx, Cell::kGates * tile.x_gate, F * tile.h_gate, [&](Line line) {
    for (; line.count > 0; --line.count) {
      const int64_t row = line.row, u = line.unit;
      Accumulate<S>* gx = step.x + line.x;
      const Accumulate<S>* gh = tile.h + line.h;
      V x[F], h[F], first[F];
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) {
        x[g] = load(gx + g * tile.x_gate);
        h[g] = load(gh + g * tile.h_gate);
      }
      V w[Cell::kDiagonals + 1], prev[Cell::kStates];
      prev[0] = step.own ? V{} : load(step.before + row * step.ld_state + u);
      if constexpr (Cell::kStates > 1) prev[1] = load(step.c + row * step.ldc + u);
      for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(step.w + p * step.w_stride + u);
      if constexpr (kMasked)
        w[Cell::kDiagonals] = load(step.candidate_mask + row * step.ld_own + u);
      V operand = Cell::operand(x, h, weights_of<Cell, kMasked>(w), prev, first);
      if constexpr (Cell::kNormedOperand) {
        store(step.normed + row * step.ld_normed + step.slot + u, operand);
      } else {
        if (step.h_mask) operand *= load(step.h_mask + row * step.ld_state + u);
        store(step.operand + row * step.ld_own + u, operand);
      }
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) store(gx + g * tile.x_gate, first[g]);
      line.row += line.next_row;
      line.unit += line.next_unit;
      line.x += line.next_x;
      line.h += line.next_h;
    }
  });
}

template <class Cell, class S>
void operand_rows(const ForwardStep<S>& step, const Tile<Accumulate<S>>& tile) {
  with_mask<Cell>(step.candidate_mask,
                  [&](auto masked) { operand_tile<Cell, masked.value>(step, tile); });
}

template <class Cell, bool kMasked, class A>
FUSED_RNN_INLINE void load_before(const BackwardRow<A>& at, int64_t u, Vector<A>* saved,
                                  Vector<A>* w, Vector<A>* prev) {
#pragma GCC unroll 8
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load(at.saved + i * at.slot + u);
  prev[0] = at.h_before ? load(at.h_before + u) : Vector<A>{};
  if constexpr (Cell::kStates > 1) prev[1] = load(at.c_before + u);
  for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(at.w + p * at.slot + u);
  if constexpr (kMasked) w[Cell::kDiagonals] = load(at.candidate_mask + u);
}

template <class Cell, bool kMasked, class A>
void backward_units(const BackwardRow<A>& at) {
  using V = Vector<A>;
  constexpr int G = Cell::kGates;
  for (int64_t u = at.begin; u < at.end; u += kLanes<A>) {
    V saved[Cell::kSaved + 1], prev[Cell::kStates], state[Cell::kStates], d_state[Cell::kStates];
    V w[Cell::kDiagonals + 1], dw[Cell::kDiagonals + 1];
    // A gate that waits for the operand is written later.
    V dx[G] = {}, dh[G] = {}, d_prev[Cell::kStates];
    load_before<Cell, kMasked>(at, u, saved, w, prev);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kStates; ++i)
      state[i] = load((at.own ? at.own : at.states) + i * at.slot + u);
    d_state[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_state[1] = load(at.dc + u);
    V kept[Cell::kStates] = {};  // gradients of the states before by way of zoneout
    if (at.own) {
#pragma GCC unroll 2
      for (int s = 0; s < Cell::kStates; ++s) {
        if (s == 0 && !at.h_before) continue;
        kept[s] = d_state[s] * zoneout_share(at, s, u, at.valid_c - u);
        d_state[s] -= kept[s];
      }
    }
    Cell::backward(saved, weights_of<Cell, kMasked>(w), prev, state, d_state, dx, dh, d_prev, dw);
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
void backward_row(const BackwardRow<A>& at) {
  with_mask<Cell>(at.candidate_mask, [&](auto masked) { backward_units<Cell, masked.value>(at); });
}

template <class Cell, bool kMasked, class A>
void operand_backward_units(const BackwardRow<A>& at) {
  using V = Vector<A>;
  constexpr int G = Cell::kGates;
  static_assert(Cell::kSumsGates);
  for (int64_t u = at.begin; u < at.end; u += kLanes<A>) {
    V saved[Cell::kSaved + 1], w[Cell::kDiagonals + 1], prev[Cell::kStates];
    V dx[G], d_prev[Cell::kStates];
    load_before<Cell, kMasked>(at, u, saved, w, prev);
    d_prev[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_prev[1] = load(at.dc + u);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) dx[g] = load(at.gates_x + g * at.slot + u);
    V d_operand = load(at.d_operand + u);
    if (kTwoProducts<Cell> && at.h_mask) d_operand *= load(at.h_mask + u);
    Cell::operand_backward(saved, weights_of<Cell, kMasked>(w), prev, d_operand, dx, dx, d_prev);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) store(at.gates_x + g * at.slot + u, dx[g]);
    store(at.dh + u, d_prev[0]);
    if constexpr (Cell::kStates > 1) store(at.dc + u, d_prev[1]);
  }
}

template <class Cell, class A>
void operand_backward_row(const BackwardRow<A>& at) {
  with_mask<Cell>(at.candidate_mask,
                  [&](auto masked) { operand_backward_units<Cell, masked.value>(at); });
}

template <class Cell, class A>
void saved_operand(const BackwardRow<A>& at, int64_t begin, int64_t end, A* operand) {
  with_mask<Cell>(at.candidate_mask, [&](auto masked) {
    for (int64_t u = begin; u < end; u += kLanes<A>) {
      Vector<A> saved[Cell::kSaved + 1], w[Cell::kDiagonals + 1], prev[Cell::kStates];
      load_before<Cell, masked.value>(at, u, saved, w, prev);
      Vector<A> value = Cell::saved_operand(saved, weights_of<Cell, masked.value>(w), prev);
      if (kTwoProducts<Cell> && at.h_mask) value *= load(at.h_mask + u);
      store(operand + u - begin, value);
    }
  });
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
