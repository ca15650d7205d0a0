// Compiled, not run: every cell as device code, from the same headers as the CPU kernels.
#include "cells/registry.h"

namespace {

using namespace fused_rnn;

template <class C, class E>
__global__ void run_cell(E* x, const E* h, const E* w, const E* prev, const E* d_state, E* state,
                         E* saved, E* dx, E* dh, E* d_prev, E* dw) {
  const auto run = [&](const auto& weights) {
    if constexpr (kHasOperand<C>) saved[0] = C::operand(x, h, weights, prev, x);
    C::forward(x, h, weights, prev, state, saved);
    C::backward(saved, weights, prev, state, d_state, dx, dh, d_prev, dw);
    if constexpr (kHasOperand<C>)
      C::operand_backward(saved, weights, prev, C::saved_operand(saved, weights, prev), dx, dh,
                          d_prev);
  };
  run(w);
  if constexpr (C::kCandidate) run(WithMask<E>{w, w[C::kDiagonals]});
}

}  // namespace

// Somebody has to want the kernels.
void* volatile wanted;

struct Want {
  template <class C>
  void operator()() const {
    wanted = reinterpret_cast<void*>(run_cell<C, float>);
    wanted = reinterpret_cast<void*>(run_cell<C, double>);
  }
};

void want_every_kernel() {
  for_each_cell(Cells{}, Want{});
}
