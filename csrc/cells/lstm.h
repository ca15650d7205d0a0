#pragma once

#include "cell.h"

namespace fused_rnn {

// Long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate (Gers, Schmidhuber
// and Cummins, 2000) and without peepholes. With a = x + h, and in all LSTMs here m g in the place
// of g where the candidate is dropped out:
//
//   i = sigmoid(a_i)    f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
//   c' = f c + i g
//   h' = o tanh(c')
struct LSTM : CellDefaults {
  static constexpr const char* kName = "lstm";
  enum Gate { I, F, G, O };
  enum State { H, C };
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;  // the activated gates; tanh(c') is computed again from c'
  static constexpr bool kSumsGates = true;
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& w, const V* prev, V* state,
                                   V* saved) {
    const V i = math::sigmoid(x[I] + h[I]);
    const V f = math::sigmoid(x[F] + h[F]);
    const V g = math::tanh(x[G] + h[G]);
    const V o = math::sigmoid(x[O] + h[O]);
    const V c = math::sum_of_products(f, prev[C], i, masked(w, g));
    state[H] = o * math::tanh(c);
    state[C] = c;
    saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& w, const V* prev, const V* state,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev, V* /*dw*/) {
    const V i = saved[I], f = saved[F], g = saved[G], o = saved[O];
    const V c_before = prev[C];
    const V tanh_c = math::tanh(state[C]);
    const V dh = d_state[H];
    const V dc = d_state[C] + dh * o * (1 - tanh_c) * (1 + tanh_c);
    dx[I] = dc * masked(w, g) * i * (1 - i);
    dx[F] = dc * c_before * f * (1 - f);
    dx[G] = dc * masked(w, i) * (1 - g) * (1 + g);
    dx[O] = dh * tanh_c * o * (1 - o);
    d_prev[H] = V{};
    d_prev[C] = dc * f;
  }
};

// LSTM with peepholes (Gers and Schmidhuber, 2000): the gates see the cell state, i and f the one
// before, o the new one, each through a weight of the unit's own.
//
//   i = sigmoid(a_i + w_i c)    f = sigmoid(a_f + w_f c)    g = tanh(a_g)
//   c' = f c + i g
//   o = sigmoid(a_o + w_o c')
//   h' = o tanh(c')
struct PeepholeLSTM : CellDefaults {
  static constexpr const char* kName = "peephole_lstm";
  enum Gate { I, F, G, O };
  enum State { H, C };
  enum Diagonal { WI, WF, WO };
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;
  static constexpr int kDiagonals = 3;
  static constexpr bool kSumsGates = true;
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& w, const V* prev, V* state,
                                   V* saved) {
    const V i = math::sigmoid(x[I] + h[I] + w[WI] * prev[C]);
    const V f = math::sigmoid(x[F] + h[F] + w[WF] * prev[C]);
    const V g = math::tanh(x[G] + h[G]);
    const V c = math::sum_of_products(f, prev[C], i, masked(w, g));
    const V o = math::sigmoid(x[O] + h[O] + w[WO] * c);
    state[H] = o * math::tanh(c);
    state[C] = c;
    saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& w, const V* prev, const V* state,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev, V* dw) {
    const V i = saved[I], f = saved[F], g = saved[G], o = saved[O];
    const V c_before = prev[C], c = state[C];
    const V tanh_c = math::tanh(c);
    const V dh = d_state[H];
    const V d_o = dh * tanh_c * o * (1 - o);
    const V dc = d_state[C] + dh * o * (1 - tanh_c) * (1 + tanh_c) + d_o * w[WO];
    const V di = dc * masked(w, g) * i * (1 - i);
    const V df = dc * c_before * f * (1 - f);
    dx[I] = di;
    dx[F] = df;
    dx[G] = dc * masked(w, i) * (1 - g) * (1 + g);
    dx[O] = d_o;
    d_prev[H] = V{};
    d_prev[C] = dc * f + di * w[WI] + df * w[WF];
    dw[WI] = di * c_before;
    dw[WF] = df * c_before;
    dw[WO] = d_o * c;
  }
};

// LSTM whose input and forget gates are coupled, i = 1 - f (CIFG in Greff et al., 2017): what is
// forgotten makes room for what is new. With a = x + h:
//
//   f = sigmoid(a_f)    g = tanh(a_g)    o = sigmoid(a_o)
//   c' = f c + (1 - f) g
//   h' = o tanh(c')
struct CoupledLSTM : CellDefaults {
  static constexpr const char* kName = "coupled_lstm";
  enum Gate { F, G, O };
  enum State { H, C };
  static constexpr int kGates = 3;
  static constexpr int kStates = 2;
  static constexpr int kSaved = 3;
  static constexpr bool kSumsGates = true;
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& w, const V* prev, V* state,
                                   V* saved) {
    const V f = math::sigmoid(x[F] + h[F]);
    const V g = math::tanh(x[G] + h[G]);
    const V o = math::sigmoid(x[O] + h[O]);
    const V kept = masked(w, g);
    const V c = kept + f * (prev[C] - kept);
    state[H] = o * math::tanh(c);
    state[C] = c;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& w, const V* prev, const V* state,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev, V* /*dw*/) {
    const V f = saved[F], g = saved[G], o = saved[O];
    const V tanh_c = math::tanh(state[C]);
    const V dh = d_state[H];
    const V dc = d_state[C] + dh * o * (1 - tanh_c) * (1 + tanh_c);
    dx[F] = dc * (prev[C] - masked(w, g)) * f * (1 - f);
    dx[G] = dc * masked(w, 1 - f) * (1 - g) * (1 + g);
    dx[O] = dh * tanh_c * o * (1 - o);
    d_prev[H] = V{};
    d_prev[C] = dc * f;
  }
};

// LSTM with layer normalisation (Ba, Kiros and Hinton, 2016): W_ih x and W_hh h are normalised
// before the biases are added, each over all gates, and so is c' where h' sees it.
//
//   i, f, g, o as in LSTM
//   c' = f c + i g
//   h' = o tanh(norm(c'))
struct LayerNormLSTM : CellDefaults {
  static constexpr const char* kName = "layer_norm_lstm";
  enum Gate { I, F, G, O };
  enum State { H, C };
  enum Normed { kNormed, kAsItWas };  // c' as forward gets it
  enum Saved { kTanh = 4 };           // of the normalised c', after the activated gates
  static constexpr int kGates = 4;
  static constexpr int kNormGates = 4;
  static constexpr int kFirstGates = 4;
  static constexpr bool kNormedOperand = true;
  static constexpr int kStates = 2;
  static constexpr int kSaved = 5;
  static constexpr bool kSumsGates = true;
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static V operand(const V* x, const V* h, const W& w, const V* prev, V* first) {
    first[I] = math::sigmoid(x[I] + h[I]);
    first[F] = math::sigmoid(x[F] + h[F]);
    first[G] = math::tanh(x[G] + h[G]);
    first[O] = math::sigmoid(x[O] + h[O]);
    return saved_operand(first, w, prev);
  }

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& /*w*/, const V* /*prev*/,
                                   V* state, V* saved) {
    const V tanh_c = math::tanh(h[kNormed]);
    for (int g = 0; g < kGates; ++g) saved[g] = x[g];
    saved[kTanh] = tanh_c;
    state[H] = x[O] * tanh_c;
    state[C] = h[kAsItWas];
  }

  template <class V, class W>
  FUSED_RNN_HD static V saved_operand(const V* saved, const W& w, const V* prev) {
    return math::sum_of_products(saved[F], prev[C], saved[I], masked(w, saved[G]));
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& /*w*/, const V* /*prev*/,
                                    const V* /*state*/, const V* d_state, V* dx, V* dh, V* d_prev,
                                    V* /*dw*/) {
    const V o = saved[O], tanh_c = saved[kTanh];
    const V d = d_state[H];
    dx[O] = d * tanh_c * o * (1 - o);
    dh[kAsItWas] = d_state[C];
    dh[kNormed] = d * o * (1 - tanh_c) * (1 + tanh_c);
    d_prev[H] = V{};
    d_prev[C] = V{};
  }

  template <class V, class W>
  FUSED_RNN_HD static void operand_backward(const V* saved, const W& w, const V* prev, V dc, V* dx,
                                            V* /*dh*/, V* d_prev) {
    const V i = saved[I], f = saved[F], g = saved[G];
    dx[I] = dc * masked(w, g) * i * (1 - i);
    dx[F] = dc * prev[C] * f * (1 - f);
    dx[G] = dc * masked(w, i) * (1 - g) * (1 + g);
    d_prev[C] += dc * f;
  }
};

static_assert(Cell<LSTM> && Cell<PeepholeLSTM> && Cell<CoupledLSTM> && Cell<LayerNormLSTM>);

}  // namespace fused_rnn
