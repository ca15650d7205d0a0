// What a cell is: the mathematics of one unit at one time step. It knows nothing of memory, storage
// types, time or devices, and includes nothing but core/math.h.
//
//   kName                 the name the op is called with
//   kGates                G, rows of weight_hh per unit; an enum names them in torch's row order
//   kStates               S, what is carried from step to step, h first
//   kSaved                values kept for backward besides the states
//   kSumsGates            x and h enter only as x[g] + h[g], so their gradients are the same
//
//   forward(x, h, prev, state, saved)
//     x[G]        pre-activations from the input, bias_ih included
//     h[G]        pre-activations from the previous h, bias_hh included
//     prev[S]     the states before, state[S] the states after (written)
//     saved       written
//   backward(saved, prev, state, d_state, dx, dh, d_prev)
//     d_state[S]  gradients of the states after
//     dx[G], dh[G]  gradients of x and h (written); with kSumsGates dh is dx and is left alone
//     d_prev[S]   gradients of the states before (written), without the part that flows through h
//
// Both are templates over the arithmetic type V (see core/math.h). An argument is read before the
// result in its place is written: `state` may be `prev`, and `d_prev` may be `d_state`.
//
// The derivative of tanh is written (1 - y)(1 + y): 1 - y^2 loses its digits near saturation unless
// the compiler contracts it.
#pragma once

#include "../core/math.h"

namespace fused_rnn {

template <class C, class V>
concept CellOver = requires(const V* in, V* out) {
  C::forward(in, in, in, out, out);
  C::backward(in, in, in, in, out, out, out);
};

template <class C>
concept Cell = __is_empty(C) && CellOver<C, float> && CellOver<C, double> && requires {
  static_cast<const char*>(C::kName);
  static_cast<bool>(C::kSumsGates);
  requires C::kGates > 0 && C::kStates > 0 && C::kSaved >= 0;
};

}  // namespace fused_rnn
