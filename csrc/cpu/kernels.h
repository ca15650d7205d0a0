// The kernels of one instruction set: every cell of the registry, forward and backward, in every
// storage type. Included once by each kernels_*.cpp, which is compiled with that set's flags.
#pragma once

#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "isa.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {
namespace {

template <class A>
FUSED_RNN_INLINE void load_all(Vector<A>* to, int count, const A* from, int64_t n, int64_t i) {
  for (int k = 0; k < count; ++k) to[k] = load_partial(from + k * n + i, n - i);
}
template <class A>
FUSED_RNN_INLINE void store_all(A* to, int count, const Vector<A>* from, int64_t n, int64_t i) {
  for (int k = 0; k < count; ++k) store_partial(to + k * n + i, from[k], n - i);
}

template <class Cell, class A>
void cell_forward(int64_t n, const A* x, const A* h, const A* w, const A* m, const A* prev,
                  A* state, A* saved) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vector<A> vx[Cell::kGates], vh[Cell::kGates], vw[Cell::kDiagonals + 1], vprev[Cell::kStates],
        vstate[Cell::kStates], vsaved[Cell::kSaved + 1];
    load_all(vx, Cell::kGates, x, n, i);
    load_all(vh, Cell::kGates, h, n, i);
    load_all(vw, Cell::kDiagonals, w, n, i);
    load_all(vprev, Cell::kStates, prev, n, i);
    load_all(vw + Cell::kDiagonals, int(Cell::kCandidate), m, n, i);
    const auto weights = weights_of<Cell, Cell::kCandidate>(vw);
    if constexpr (Cell::kNormedOperand) {
      vh[0] = vh[1] = Cell::operand(vx, vh, weights, vprev, vx);
    } else if constexpr (kTwoProducts<Cell>) {
      const Vector<A> operand = Cell::operand(vx, vh, weights, vprev, vx);
      for (int g = Cell::kFirstGates; g < Cell::kGates; ++g) vh[g] += operand;
    }
    Cell::forward(vx, vh, weights, vprev, vstate, vsaved);
    store_all(state, Cell::kStates, vstate, n, i);
    store_all(saved, Cell::kSaved, vsaved, n, i);
  }
}

template <class Cell, class A>
void cell_backward(int64_t n, const A* saved, const A* w, const A* m, const A* prev, const A* state,
                   const A* d_state, A* dx, A* dh, A* d_prev, A* dw) {
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vector<A> vsaved[Cell::kSaved + 1], vw[Cell::kDiagonals + 1], vprev[Cell::kStates],
        vstate[Cell::kStates], vd[Cell::kStates];
    Vector<A> vdx[Cell::kGates], vdh[Cell::kGates], vdprev[Cell::kStates],
        vdw[Cell::kDiagonals + 1];
    load_all(vsaved, Cell::kSaved, saved, n, i);
    load_all(vw, Cell::kDiagonals, w, n, i);
    load_all(vprev, Cell::kStates, prev, n, i);
    load_all(vstate, Cell::kStates, state, n, i);
    load_all(vd, Cell::kStates, d_state, n, i);
    load_all(vw + Cell::kDiagonals, int(Cell::kCandidate), m, n, i);
    const auto weights = weights_of<Cell, Cell::kCandidate>(vw);
    Cell::backward(vsaved, weights, vprev, vstate, vd, vdx, vdh, vdprev, vdw);
    if constexpr (kHasOperand<Cell>) {
      Vector<A> d_operand{};
      if constexpr (Cell::kNormedOperand) d_operand = vdh[0] + vdh[1];
      for (int g = Cell::kFirstGates; g < Cell::kGates; ++g)
        d_operand += Cell::kSumsGates ? vdx[g] : vdh[g];
      Cell::operand_backward(vsaved, weights, vprev, d_operand, vdx, vdh, vdprev);
    }
    store_all(dx, Cell::kGates, vdx, n, i);
    store_all(dh, Cell::kGates, Cell::kSumsGates ? vdx : vdh, n, i);
    store_all(d_prev, Cell::kStates, vdprev, n, i);
    store_all(dw, Cell::kDiagonals, vdw, n, i);
  }
}

// Of a set with a base only what is of its own: the types that its instructions are for.
#ifdef FUSED_RNN_BASE_ISA
template <class S>
constexpr bool kOwn = std::is_same_v<S, BFloat16>;
#else
template <class S>
constexpr bool kOwn = true;
#endif

template <class Cell, class S>
constexpr void add_type(CellKernels& kernels, DType type) {
  if constexpr (kOwn<S>) {
    kernels.forward[int(type)] = forward<Cell, S>;
    kernels.backward[int(type)] = backward<Cell, S>;
    if constexpr (std::is_same_v<S, float>)
      kernels.as_float = {cell_forward<Cell, S>, cell_backward<Cell, S>};
    if constexpr (std::is_same_v<S, double>)
      kernels.as_double = {cell_forward<Cell, S>, cell_backward<Cell, S>};
  }
}

template <class Cell>
constexpr CellKernels kernels_of() {
  CellKernels kernels{};
  kernels.info = info_of<Cell>();
  add_type<Cell, float>(kernels, DType::kFloat32);
  add_type<Cell, double>(kernels, DType::kFloat64);
  add_type<Cell, BFloat16>(kernels, DType::kBFloat16);
  add_type<Cell, Float16>(kernels, DType::kFloat16);
  return kernels;
}

template <class... Cs>
struct KernelTable {
  static constexpr int kCount = sizeof...(Cs);
  static constexpr CellKernels kCells[] = {kernels_of<Cs>()...};
};
template <class... Cs>
KernelTable<Cs...> table_of(TypeList<Cs...>);
using Table = decltype(table_of(Cells{}));

template <class S>
constexpr Packing packing_of() {
  if constexpr (kOwn<S>)
    return {panel_step<S>, packed_bytes<S>, pack_weights<S>};
  else
    return {};
}

#ifdef FUSED_RNN_BASE_ISA
constexpr const Isa* kBase = &FUSED_RNN_BASE_ISA::kIsa;
constexpr const MathFunctions* kMath = nullptr;
constexpr int kMathCount = 0;
constexpr void (*multiply)(int64_t, int64_t, int64_t, int64_t, const float*, const float*,
                           float*) = nullptr;
#else
constexpr const Isa* kBase = nullptr;

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
constexpr int kMathCount = int(sizeof(kMath) / sizeof(kMath[0]));

void multiply(int64_t step, int64_t rows, int64_t K, int64_t columns, const float* a,
              const float* w, float* out) {
  for_panels_at_once<float>(
      rows, K, 1, 0, columns, turn(step), [&](int64_t column, int vectors, int panels, int64_t) {
        packed_product<float, float>(0, rows, K, a, K, w + column * K, nullptr, vectors, panels,
                                     nullptr, 0, out + column, columns);
      });
}
#endif

}  // namespace

extern const Isa kIsa;
const Isa kIsa{
    FUSED_RNN_ISA_NAME,
    kBase,
    Table::kCells,
    Table::kCount,
    kMath,
    kMathCount,
    {packing_of<float>(), packing_of<double>(), packing_of<BFloat16>(), packing_of<Float16>()},
    multiply};

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
