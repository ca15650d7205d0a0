// A cell, one unit of one row of a step: what a thread does between the sums over k and over rows.
// What is formula here stands in csrc/cells.
#pragma once

#include "../cells/registry.h"
#include "states.cuh"

namespace fused_rnn::cuda {

// The weights of a unit as its cell takes them: behind the diagonals w holds the mask of the
// candidate, or one.
template <class Cell, class Step, class A>
FUSED_RNN_DEVICE auto weights_of(const Step& s, int64_t b, int64_t u, A* w) {
  for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load<A>(s.type, s.diag, p * s.H + u);
  if constexpr (Cell::kCandidate) {
    const Rows& mask = s.candidate_mask;
    return WithMask<A>{w, mask.data ? load<A>(s.type, mask.data, mask.at(b) + u) : A(1)};
  } else {
    return static_cast<const A*>(w);
  }
}

// The biases of a unit; zeros where gates are normalised, which are behind them already.
template <class Cell, class A>
struct Biases {
  A ih[Cell::kGates] = {}, hh[Cell::kGates] = {};

  Biases() = default;
  FUSED_RNN_DEVICE Biases(const ForwardStep<A>& s, int64_t u) {
    if constexpr (Cell::kNormGates == 0)
      for (int g = 0; g < Cell::kGates; ++g) {
        ih[g] = load_or_zero<A>(s.type, s.bias_ih, g * s.H + u);
        hh[g] = load_or_zero<A>(s.type, s.bias_hh, g * s.H + u);
      }
  }
};

// What else a unit is computed from, but for the product: nothing here waits until it is asked for.
template <class Cell, class A>
struct ForwardInput {
  A x[Cell::kGates] = {}, c = 0;
  Late<A> h;

  ForwardInput() = default;
  FUSED_RNN_DEVICE ForwardInput(const ForwardStep<A>& s, int64_t b, int64_t u) {
    for (int g = 0; g < Cell::kGates; ++g) x[g] = s.gates_x[(b * Cell::kGates + g) * s.H + u];
    // A projected cell (LSTM) does not read the h before it except through W_hh.
    if (!s.own) h = Late<A>(s.type, s.h, b * s.R + u);
    if constexpr (Cell::kStates > 1) c = s.c[b * s.H + u];
  }
  FUSED_RNN_DEVICE void states(DType type, A* prev) const {
    prev[0] = h.value(type);
    if constexpr (Cell::kStates > 1) prev[1] = c;
  }
};

// product(g) is what W_hh h adds to gate g, without bias; where gates are normalised, it and the x
// of the gate are behind their biases already. Of a normed operand it is what the cell calls h.
template <class Cell, class A, class Product>
FUSED_RNN_DEVICE void forward_unit(const ForwardStep<A>& s, int64_t b, int64_t u,
                                   const ForwardInput<Cell, A>& in, const Biases<Cell, A>& biases,
                                   Product product) {
  constexpr int G = Cell::kGates;
  const int64_t H = s.H;
  A x[G], h[G] = {}, w[Cell::kDiagonals + 1], prev[Cell::kStates], state[Cell::kStates],
          saved[Cell::kSaved + 1];
  in.states(s.type, prev);
  for (int g = 0; g < G; ++g) {
    x[g] = in.x[g];
    // The first gates of two products are behind their bias already.
    if (g < Cell::kFirstGates) continue;
    if constexpr (Cell::kRecurrent) h[g] = product(g);
    x[g] += biases.ih[g];
    h[g] += biases.hh[g];
  }
  if constexpr (Cell::kNormedOperand)
    for (int i = 0; i < 2; ++i) h[i] = product(i);
  Cell::forward(x, h, weights_of<Cell>(s, b, u, w), prev, state, saved);

  A* slots = s.saved ? s.saved + b * s.ld_saved + u : nullptr;
  if (s.zoneout.any)
    for (int k = 0; k < Cell::kStates; ++k) {
      if (slots) slots[(s.own_slot + k) * s.slot] = state[k];
      if (k > 0 || !s.own) state[k] = zone_out(s.zoneout, k, b, k * s.R + u, prev[k], state[k]);
    }
  if (s.own)
    store(s.type, s.own, b * H + u, state[0]);
  else
    state[0] = emit_h(s, b, u, state[0]);
  if constexpr (Cell::kStates > 1) {
    s.c[b * H + u] =
        s.next(b) ? load_or_zero<A>(s.type, s.initial.c.data, s.initial.c.at(b) + u) : state[1];
    if (s.all_c.data) store(s.type, s.all_c.data, s.all_c.at(b) + u, state[1]);
    if (b >= s.ends && s.c_n.data) store(s.type, s.c_n.data, s.c_n.at(b) + u, state[1]);
  }
  if (!slots) return;
  slots[s.own ? s.own_slot * s.slot : 0] = state[0];
  for (int k = 1; k < Cell::kStates; ++k) slots[k * s.slot] = state[k];
  for (int k = 0; k < Cell::kSaved; ++k) slots[(Cell::kStates + k) * s.slot] = saved[k];
}

template <class Cell, class A, class Product>
FUSED_RNN_DEVICE void forward_unit(const ForwardStep<A>& s, int64_t b, int64_t u, Product product) {
  forward_unit<Cell>(s, b, u, ForwardInput<Cell, A>(s, b, u), Biases<Cell, A>(s, u), product);
}

// The operand; what becomes of the first gates goes to the place of x.
template <class Cell, class A, class Product>
FUSED_RNN_DEVICE A operand_unit(const ForwardStep<A>& s, int64_t b, int64_t u, Product product) {
  constexpr int G = Cell::kGates, F = Cell::kFirstGates;
  const int64_t H = s.H;
  const ForwardInput<Cell, A> in(s, b, u);
  const Biases<Cell, A> biases(s, u);
  A x[F], h[F], first[F], w[Cell::kDiagonals + 1], prev[Cell::kStates];
  for (int g = 0; g < F; ++g) {
    x[g] = in.x[g] + biases.ih[g];
    h[g] = product(g) + biases.hh[g];
  }
  in.states(s.type, prev);
  A operand = Cell::operand(x, h, weights_of<Cell>(s, b, u, w), prev, first);
  for (int g = 0; g < F; ++g) s.gates_x[(b * G + g) * H + u] = first[g];
  if constexpr (kTwoProducts<Cell>)
    if (s.h_mask.data) operand *= load<A>(s.type, s.h_mask.data, s.h_mask.at(b) + u);
  return operand;
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

// What the gradients of a unit are computed from, but for that of h, which comes by a product.
template <class Cell, class A>
struct BackwardInput {
  A saved[Cell::kSaved + 1] = {}, prev[Cell::kStates] = {}, state[Cell::kStates] = {}, d_c = 0;

  BackwardInput() = default;
  FUSED_RNN_DEVICE BackwardInput(const BackwardStep<A>& s, int64_t b, int64_t u) {
    load_before<Cell>(s, b, u, saved, prev);
    for (int k = 0; k < Cell::kStates; ++k)
      state[k] = s.saved[b * s.ld_saved + (s.own_slot + k) * s.slot + u];
    if constexpr (Cell::kStates > 1) d_c = incoming_c(s.incoming, b, u, s.H);
  }
};

// d_h is the gradient of h after the step.
template <class Cell, class A>
FUSED_RNN_DEVICE void backward_unit(const BackwardStep<A>& s, int64_t b, int64_t u,
                                    const BackwardInput<Cell, A>& in, A d_h) {
  constexpr int G = Cell::kGates;
  const int64_t H = s.H;
  const A *const saved = in.saved, *const prev = in.prev, *const state = in.state;
  A d_state[Cell::kStates], w[Cell::kDiagonals + 1], dw[Cell::kDiagonals + 1];
  // A gate that waits for the operand is written later.
  A dx[G] = {}, dh[G] = {}, d_prev[Cell::kStates];
  d_state[0] = d_h;
  if constexpr (Cell::kStates > 1) d_state[1] = in.d_c;

  A kept[Cell::kStates] = {};  // gradients of the states before by way of zoneout
  if (s.zoneout.any)
    for (int k = 0; k < Cell::kStates; ++k) {
      if (k == 0 && s.d_own) continue;
      kept[k] = d_state[k] * zoneout_share<A>(s.zoneout, k, b, k * s.R + u);
      d_state[k] -= kept[k];
    }
  const auto weights = weights_of<Cell>(s, b, u, w);
  Cell::backward(saved, weights, prev, state, d_state, dx, dh, d_prev, dw);
  for (int g = 0; g < G; ++g) {
    publish(s.gates_type, s.d_gates_h, (b * G + g) * H + u, Cell::kSumsGates ? dx[g] : dh[g]);
  }
  if constexpr (!Cell::kSumsGates)
    for (int g = 0; g < G; ++g) store(s.gates_type, s.d_gates_x, (b * G + g) * H + u, dx[g]);
  if constexpr (Cell::kDiagonals > 0)
    if (s.d_diag)
      for (int p = 0; p < Cell::kDiagonals; ++p)
        s.d_diag[(b * kUnitWeights<Cell> + p) * H + u] = dw[p];
  if (s.incoming.direct && !s.d_own) s.incoming.direct[b * s.R + u] = d_prev[0] + kept[0];
  if constexpr (Cell::kStates > 1) s.incoming.dc[b * H + u] = d_prev[1] + kept[1];
  if (s.h_before && u < s.R)
    store(s.type, s.h_before, b * s.R + u, prev[0] * mask_of_h(s.incoming, b, u));
  if constexpr (kTwoProducts<Cell>)
    if (s.operand)
      store(s.type, s.operand, b * H + u,
            Cell::saved_operand(saved, weights, prev) * mask_of_h(s.incoming, b, u));
  if constexpr (Cell::kNormedOperand) {
    for (int i = 0; i < 2; ++i) s.d_operand[(3 * b + i) * H + u] = dh[i];
    s.d_operand[(3 * b + 2) * H + u] = Cell::saved_operand(saved, weights, prev);
  }
}

// Where no product is in the kernel itself.
template <class Cell, class A>
FUSED_RNN_DEVICE void backward_unit(const BackwardStep<A>& s, int64_t b, int64_t u) {
  const BackwardInput<Cell, A> in(s, b, u);
  backward_unit<Cell>(s, b, u, in,
                      s.d_own ? s.d_own[b * s.H + u] : incoming_h(s.incoming, b, u, s.R));
}

template <class Cell, class A>
FUSED_RNN_DEVICE void operand_backward_unit(const BackwardStep<A>& s, int64_t b, int64_t u,
                                            A d_operand) {
  constexpr int G = Cell::kGates;
  static_assert(Cell::kSumsGates);
  A saved[Cell::kSaved + 1], w[Cell::kDiagonals + 1], prev[Cell::kStates];
  A dx[G], d_prev[Cell::kStates];
  load_before<Cell>(s, b, u, saved, prev);
  for (int g = 0; g < G; ++g) dx[g] = load<A>(s.gates_type, s.d_gates_x, (b * G + g) * s.H + u);
  A* const direct = s.incoming.direct && !s.d_own ? s.incoming.direct + b * s.R + u : nullptr;
  A* const dc = Cell::kStates > 1 ? s.incoming.dc + b * s.H + u : nullptr;
  d_prev[0] = direct ? *direct : A(0);
  if constexpr (Cell::kStates > 1) d_prev[1] = *dc;
  if constexpr (kTwoProducts<Cell>) d_operand *= mask_of_h(s.incoming, b, u);
  Cell::operand_backward(saved, weights_of<Cell>(s, b, u, w), prev, d_operand, dx, dx, d_prev);
  for (int g = 0; g < G; ++g) store(s.gates_type, s.d_gates_x, (b * G + g) * s.H + u, dx[g]);
  if (direct) *direct = d_prev[0];
  if constexpr (Cell::kStates > 1) *dc = d_prev[1];
}

}  // namespace fused_rnn::cuda
