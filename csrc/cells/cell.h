// What a cell is: the mathematics of one unit at one time step. It knows nothing of memory, storage
// types, time or devices, and includes nothing but core/math.h.
//
//   kName                 the name the op is called with
//   kGates                G, rows of weight_hh per unit; an enum names them in torch's row order
//   kStates               S, what is carried from step to step, h first
//   kSaved                values kept for backward besides the states
//   kSumsGates            x and h enter only as x[g] + h[g], so their gradients are the same
//   kCandidate            there is a candidate for the new state, which dropout may act on
//
//   forward(x, h, w, prev, state, saved)
//     x[G]        pre-activations from the input, bias_ih included
//     h[G]        pre-activations from the previous h, bias_hh included
//     w[P]        recurrent weights of the unit to itself; with kCandidate they come in any type
//                 that `masked` knows
//     prev[S]     the states before, state[S] the states after (written)
//     saved       written
//   backward(saved, w, prev, state, d_state, dx, dh, d_prev, dw)
//     d_state[S]  gradients of the states after
//     dx[G], dh[G]  gradients of x and h (written); with kSumsGates dh is dx and is left alone
//     d_prev[S]   gradients of the states before (written), without the part that flows through h
//     dw[P]       gradients of w at this step (written)
//
// All are templates over the arithmetic type V (see core/math.h). An argument is read before the
// result in its place is written: `state` may be `prev`, and `d_prev` may be `d_state`.
//
// The derivative of tanh is written (1 - y)(1 + y): 1 - y^2 loses its digits near saturation unless
// the compiler contracts it.
#pragma once

#include "../core/math.h"

namespace fused_rnn {

// What most cells have in common; a cell says otherwise by a constant of the same name.
struct CellDefaults {
  static constexpr int kDiagonals = 0;      // P, recurrent weights of a unit to itself (peepholes)
  static constexpr bool kRecurrent = true;  // whether there is a matrix weight_hh at all
  static constexpr bool kCandidate = false;
  // A cell may multiply weight_hh by h for its first gates only, and for the others by an operand
  // that depends on these. Then it has three more functions,
  //
  //   operand(x, h, w, prev, first)   the operand; first[kFirstGates] (written) is what forward
  //                                   finds in the place of x[g], and h[g] is not read there
  //   saved_operand(saved, w, prev)   the same for backward
  //   operand_backward(saved, w, prev, d_operand, dx, dh, d_prev)
  //                                   called after backward: the gradients that wait for that of
  //                                   the operand are written to dx and dh, or added to d_prev
  static constexpr int kFirstGates = 0;

  // Layer normalisation of the two products, before the biases are added: of this many gates
  // together, and of the others together. The cell is given x and h as they are after it.
  static constexpr int kNormGates = 0;
  // The operand is not multiplied but normalised. All gates are first ones, forward is given
  // h[0], the operand normalised, and h[1], as it was, and backward writes their gradients to dh.
  static constexpr bool kNormedOperand = false;
};

// Dropout of the candidate (Semeniuta, Severyn and Barth, 2016): what it is multiplied by, m, comes
// with w, and where nothing is to be dropped there is no such multiplication.
template <class V>
struct WithMask {
  const V* w;
  V m;
  FUSED_RNN_HD V operator[](int p) const { return w[p]; }
};
template <class V>
FUSED_RNN_HD V masked(const V* /*w*/, V value) {
  return value;
}
template <class V>
FUSED_RNN_HD V masked(const WithMask<V>& w, V value) {
  return w.m * value;
}

// Norms of one product, and which of them a gate is in.
template <class C>
constexpr int kNorms = C::kNormGates == 0          ? 0
                       : C::kNormGates < C::kGates ? 2
                                                   : 1;
template <class C>
FUSED_RNN_HD constexpr int norm_of(int gate) {
  return gate < C::kNormGates ? 0 : 1;
}

template <class C>
constexpr bool kHasOperand = C::kFirstGates > 0;
template <class C>
constexpr bool kTwoProducts = kHasOperand<C> && !C::kNormedOperand;

template <class C, class V>
concept CellOver = requires(const V* in, V* out) {
  C::forward(in, in, in, in, out, out);
  C::backward(in, in, in, in, in, out, out, out, out);
};

template <class C, class V>
concept CandidateOver = requires(const V* in, V* out, WithMask<V> w) {
  C::forward(in, in, w, in, out, out);
  C::backward(in, w, in, in, in, out, out, out, out);
};

template <class C, class V>
concept OperandOver = requires(const V* in, V* out, V v) {
  v = C::operand(in, in, in, in, out);
  v = C::saved_operand(in, in, in);
  C::operand_backward(in, in, in, v, out, out, out);
};

template <class C>
concept Cell = __is_empty(C) && CellOver<C, float> && CellOver<C, double> && requires {
  static_cast<const char*>(C::kName);
  static_cast<bool>(C::kSumsGates);
  static_cast<bool>(C::kRecurrent);
  requires !C::kCandidate || CandidateOver<C, float>;
  requires C::kGates > 0 && C::kStates > 0 && C::kSaved >= 0 && C::kDiagonals >= 0;
  requires C::kFirstGates == 0 || OperandOver<C, float>;
  requires C::kFirstGates < C::kGates + C::kNormedOperand;
  requires C::kNormGates >= 0 && C::kNormGates <= C::kGates;
};

}  // namespace fused_rnn
