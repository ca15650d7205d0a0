#pragma once

#include "cell.h"

namespace fused_rnn {

// An activation y = f(a): its value, and the gradient of a from y and the gradient of y.
struct Tanh {
  template <class V>
  FUSED_RNN_HD static V value(V a) {
    return math::tanh(a);
  }
  template <class V>
  FUSED_RNN_HD static V backward(V y, V dy) {
    return dy * (1 - y) * (1 + y);
  }
};

struct Relu {
  template <class V>
  FUSED_RNN_HD static V value(V a) {
    return math::relu(a);
  }
  template <class V>
  FUSED_RNN_HD static V backward(V y, V dy) {
    return math::select(y <= 0, V{}, dy);
  }
};

// Simple recurrent network (Elman, 1990):
//
//   h' = f(x + h)
template <class Activation>
struct ElmanRNN : CellDefaults {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 0;
  static constexpr bool kSumsGates = true;

  template <class V>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const V* /*w*/, const V* /*prev*/,
                                   V* state, V* /*saved*/) {
    state[0] = Activation::value(x[0] + h[0]);
  }

  template <class V>
  FUSED_RNN_HD static void backward(const V* /*saved*/, const V* /*w*/, const V* /*prev*/,
                                    const V* state, const V* d_state, V* dx, V* /*dh*/, V* d_prev,
                                    V* /*dw*/) {
    dx[0] = Activation::backward(state[0], d_state[0]);
    d_prev[0] = V{};
  }
};

struct RNNTanh : ElmanRNN<Tanh> {
  static constexpr const char* kName = "rnn_tanh";
};
struct RNNRelu : ElmanRNN<Relu> {
  static constexpr const char* kName = "rnn_relu";
};

// Independently recurrent network (Li et al., 2018): a unit sees its own past and no other's.
//
//   h' = f(x + w h + b_hh)
template <class Activation>
struct IndependentRNN : CellDefaults {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 0;
  static constexpr int kDiagonals = 1;
  static constexpr bool kRecurrent = false;
  static constexpr bool kSumsGates = true;

  template <class V>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const V* w, const V* prev, V* state,
                                   V* /*saved*/) {
    state[0] = Activation::value(x[0] + h[0] + w[0] * prev[0]);
  }

  template <class V>
  FUSED_RNN_HD static void backward(const V* /*saved*/, const V* w, const V* prev, const V* state,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev, V* dw) {
    const V da = Activation::backward(state[0], d_state[0]);
    dx[0] = da;
    dw[0] = da * prev[0];
    d_prev[0] = da * w[0];
  }
};

struct IndRNNTanh : IndependentRNN<Tanh> {
  static constexpr const char* kName = "indrnn_tanh";
};
struct IndRNNRelu : IndependentRNN<Relu> {
  static constexpr const char* kName = "indrnn_relu";
};

static_assert(Cell<RNNTanh> && Cell<RNNRelu> && Cell<IndRNNTanh> && Cell<IndRNNRelu>);

}  // namespace fused_rnn
