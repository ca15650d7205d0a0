// The kernels of one instruction set: every cell of the registry, forward and backward, in every
// storage type. Included once by each kernels_*.cpp, which is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "isa.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {
namespace {

template <class Cell, class A>
void cell_forward(int64_t n, const A* x, const A* h, const A* prev, A* state, A* saved) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L) {
    Vector<A> vx[Cell::kGates], vh[Cell::kGates], vprev[Cell::kStates], vstate[Cell::kStates],
        vsaved[Cell::kSaved + 1];
    for (int g = 0; g < Cell::kGates; ++g) {
      vx[g] = load_partial(x + g * n + i, n - i);
      vh[g] = load_partial(h + g * n + i, n - i);
    }
    for (int s = 0; s < Cell::kStates; ++s) vprev[s] = load_partial(prev + s * n + i, n - i);
    Cell::forward(vx, vh, vprev, vstate, vsaved);
    for (int s = 0; s < Cell::kStates; ++s) store_partial(state + s * n + i, vstate[s], n - i);
    for (int s = 0; s < Cell::kSaved; ++s) store_partial(saved + s * n + i, vsaved[s], n - i);
  }
}

template <class Cell, class A>
void cell_backward(int64_t n, const A* saved, const A* prev, const A* state, const A* d_state,
                   A* dx, A* dh, A* d_prev) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L) {
    Vector<A> vsaved[Cell::kSaved + 1], vprev[Cell::kStates], vstate[Cell::kStates],
        vd[Cell::kStates];
    Vector<A> vdx[Cell::kGates], vdh[Cell::kGates], vdprev[Cell::kStates];
    for (int s = 0; s < Cell::kSaved; ++s) vsaved[s] = load_partial(saved + s * n + i, n - i);
    for (int s = 0; s < Cell::kStates; ++s) {
      vprev[s] = load_partial(prev + s * n + i, n - i);
      vstate[s] = load_partial(state + s * n + i, n - i);
      vd[s] = load_partial(d_state + s * n + i, n - i);
    }
    Cell::backward(vsaved, vprev, vstate, vd, vdx, vdh, vdprev);
    for (int g = 0; g < Cell::kGates; ++g) {
      store_partial(dx + g * n + i, vdx[g], n - i);
      store_partial(dh + g * n + i, Cell::kSumsGates ? vdx[g] : vdh[g], n - i);
    }
    for (int s = 0; s < Cell::kStates; ++s) store_partial(d_prev + s * n + i, vdprev[s], n - i);
  }
}

template <class Cell>
constexpr CellKernels kernels_of() {
  return {
      {Cell::kName, Cell::kGates, Cell::kStates, Cell::kSaved},
      {forward<Cell, float>, forward<Cell, double>, forward<Cell, BFloat16>,
       forward<Cell, Float16>},
      {backward<Cell, float>, backward<Cell, double>, backward<Cell, BFloat16>,
       backward<Cell, Float16>},
      {cell_forward<Cell, float>, cell_backward<Cell, float>},
      {cell_forward<Cell, double>, cell_backward<Cell, double>},
  };
}

template <class... Cs>
struct KernelTable {
  static constexpr int kCount = sizeof...(Cs);
  static constexpr CellKernels kCells[] = {kernels_of<Cs>()...};
};
template <class... Cs>
KernelTable<Cs...> table_of(TypeList<Cs...>);
using Table = decltype(table_of(Cells{}));

template <class A, class Function>
void map(int64_t n, const A* x, A* y, Function function) {
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store_partial(y + i, function(load_partial(x + i, n - i)), n - i);
}
template <class A>
void map_sigmoid(int64_t n, const A* x, A* y) {
  map(n, x, y, [](Vector<A> v) { return math::sigmoid(v); });
}
template <class A>
void map_tanh(int64_t n, const A* x, A* y) {
  map(n, x, y, [](Vector<A> v) { return math::tanh(v); });
}

constexpr MathFunctions kMath[] = {
    {"sigmoid", map_sigmoid<float>, map_sigmoid<double>},
    {"tanh", map_tanh<float>, map_tanh<double>},
};

void multiply(int64_t rows, int64_t K, int64_t columns, const float* a, const float* w,
              float* out) {
  for_panels<float, 1>(0, columns, [&](int64_t column, int vectors) {
    for_row_tiles<float, Left::kRows, Right::kPanel>(
        rows, vectors, [&](int64_t m, int64_t, TileFunction<float> tile) {
          tile(K, a + m * K, K, w + column * K, 0, nullptr, 0, out + m * columns + column, columns);
        });
  });
}

}  // namespace

extern const Isa kIsa;
const Isa kIsa{FUSED_RNN_ISA_NAME,
               Table::kCells,
               Table::kCount,
               kMath,
               int(sizeof(kMath) / sizeof(kMath[0])),
               multiply};

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
