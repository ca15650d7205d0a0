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
struct ElmanRNN {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 0;
  static constexpr bool kSumsGates = true;

  template <class V>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const V* /*prev*/, V* state,
                                   V* /*saved*/) {
    state[0] = Activation::value(x[0] + h[0]);
  }

  template <class V>
  FUSED_RNN_HD static void backward(const V* /*saved*/, const V* /*prev*/, const V* state,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev) {
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

static_assert(Cell<RNNTanh> && Cell<RNNRelu>);

}  // namespace fused_rnn
