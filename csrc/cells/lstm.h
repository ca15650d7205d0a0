#pragma once

#include "cell.h"

namespace fused_rnn {

// Long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate (Gers, Schmidhuber
// and Cummins, 2000) and without peepholes. With a = x + h:
//
//   i = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
//   c' = f c + i g
//   h' = o tanh(c')
struct LSTM {
  static constexpr const char* kName = "lstm";
  enum Gate { I, F, G, O };
  enum State { H, C };
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;  // the activated gates; tanh(c') is computed again from c'
  static constexpr bool kSumsGates = true;

  template <class V>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const V* prev, V* state, V* saved) {
    const V i = math::sigmoid(x[I] + h[I]);
    const V f = math::sigmoid(x[F] + h[F]);
    const V g = math::tanh(x[G] + h[G]);
    const V o = math::sigmoid(x[O] + h[O]);
    const V c = f * prev[C] + i * g;
    state[H] = o * math::tanh(c);
    state[C] = c;
    saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class V>
  FUSED_RNN_HD static void backward(const V* saved, const V* prev, const V* state, const V* d_state,
                                    V* dx, V* /*dh*/, V* d_prev) {
    const V i = saved[I], f = saved[F], g = saved[G], o = saved[O];
    const V c_before = prev[C];
    const V tanh_c = math::tanh(state[C]);
    const V dh = d_state[H];
    const V dc = d_state[C] + dh * o * (1 - tanh_c) * (1 + tanh_c);
    dx[I] = dc * g * i * (1 - i);
    dx[F] = dc * c_before * f * (1 - f);
    dx[G] = dc * i * (1 - g) * (1 + g);
    dx[O] = dh * tanh_c * o * (1 - o);
    d_prev[H] = V{};
    d_prev[C] = dc * f;
  }
};

static_assert(Cell<LSTM>);

}  // namespace fused_rnn
