#pragma once

#include "cell.h"

namespace fused_rnn {

// Gated recurrent unit (Cho et al., 2014) as torch.nn has it: the reset gate acts on the product
// W_hn h + b_hn, not on h, so that one product serves all gates. In all GRUs here h' has m n in the
// place of n where the candidate is dropped out.
//
//   r = sigmoid(x_r + h_r)    z = sigmoid(x_z + h_z)
//   n = tanh(x_n + r h_n)
//   h' = (1 - z) n + z h
struct GRU : CellDefaults {
  static constexpr const char* kName = "gru";
  enum Gate { R, Z, N };
  enum Saved { kHn = 3 };  // h_n, after the activated gates
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 4;
  static constexpr bool kSumsGates = false;  // h_n enters as r h_n
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& w, const V* prev, V* state,
                                   V* saved) {
    const V hn = h[N];
    const V r = math::sigmoid(x[R] + h[R]);
    const V z = math::sigmoid(x[Z] + h[Z]);
    const V n = math::tanh(x[N] + r * hn);
    const V kept = masked(w, n);
    state[0] = kept + z * (prev[0] - kept);
    saved[R] = r;
    saved[Z] = z;
    saved[N] = n;
    saved[kHn] = hn;
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& w, const V* prev, const V* /*state*/,
                                    const V* d_state, V* dx, V* dh, V* d_prev, V* /*dw*/) {
    const V r = saved[R], z = saved[Z], n = saved[N], hn = saved[kHn];
    const V d = d_state[0];
    const V dn = d * masked(w, 1 - z) * (1 - n) * (1 + n);
    const V dr = dn * hn * r * (1 - r);
    const V dz = d * (prev[0] - masked(w, n)) * z * (1 - z);
    dx[R] = dh[R] = dr;
    dx[Z] = dh[Z] = dz;
    dx[N] = dn;
    dh[N] = dn * r;
    d_prev[0] = d * z;
  }
};

// Gated recurrent unit as Cho et al. (2014) wrote it: the reset gate acts on h, before the product.
//
//   r = sigmoid(x_r + h_r)    z = sigmoid(x_z + h_z)
//   n = tanh(x_n + W_hn (r h) + b_hn)
//   h' = (1 - z) n + z h
struct GRUResetBefore : CellDefaults {
  static constexpr const char* kName = "gru_reset_before";
  enum Gate { R, Z, N };
  static constexpr int kGates = 3;
  static constexpr int kFirstGates = 2;  // r and z; n is a product with r h
  static constexpr int kStates = 1;
  static constexpr int kSaved = 3;
  static constexpr bool kSumsGates = true;
  static constexpr bool kCandidate = true;

  template <class V, class W>
  FUSED_RNN_HD static V operand(const V* x, const V* h, const W& /*w*/, const V* prev, V* first) {
    const V r = math::sigmoid(x[R] + h[R]);
    const V z = math::sigmoid(x[Z] + h[Z]);
    first[R] = r;
    first[Z] = z;
    return r * prev[0];
  }

  template <class V, class W>
  FUSED_RNN_HD static void forward(const V* x, const V* h, const W& w, const V* prev, V* state,
                                   V* saved) {
    const V z = x[Z];
    const V n = math::tanh(x[N] + h[N]);
    saved[R] = x[R];
    saved[Z] = z;
    saved[N] = n;
    const V kept = masked(w, n);
    state[0] = kept + z * (prev[0] - kept);
  }

  template <class V, class W>
  FUSED_RNN_HD static V saved_operand(const V* saved, const W& /*w*/, const V* prev) {
    return saved[R] * prev[0];
  }

  template <class V, class W>
  FUSED_RNN_HD static void backward(const V* saved, const W& w, const V* prev, const V* /*state*/,
                                    const V* d_state, V* dx, V* /*dh*/, V* d_prev, V* /*dw*/) {
    const V z = saved[Z], n = saved[N];
    const V d = d_state[0];
    dx[N] = d * masked(w, 1 - z) * (1 - n) * (1 + n);
    dx[Z] = d * (prev[0] - masked(w, n)) * z * (1 - z);
    d_prev[0] = d * z;
  }

  template <class V, class W>
  FUSED_RNN_HD static void operand_backward(const V* saved, const W& /*w*/, const V* prev,
                                            V d_operand, V* dx, V* /*dh*/, V* d_prev) {
    const V r = saved[R];
    dx[R] = d_operand * prev[0] * r * (1 - r);
    d_prev[0] += d_operand * r;
  }
};

// GRU with layer normalisation (Ba, Kiros and Hinton, 2016): W_ih x and W_hh h are normalised
// before the biases are added, r and z together and n by itself.
struct LayerNormGRU : GRU {
  static constexpr const char* kName = "layer_norm_gru";
  static constexpr int kNormGates = 2;
};

static_assert(Cell<GRU> && Cell<GRUResetBefore> && Cell<LayerNormGRU>);

}  // namespace fused_rnn
