// Every cell of the registry, forward and backward, on one instruction set in one storage type:
// setup.py compiles this file once for each pair, with the set's flags and name (avx2) in
// FUSED_RNN_ISA and the type's (Float32) in FUSED_RNN_TYPE.
#include "../cells/registry.h"
#include "backward.h"
#include "forward.h"
#include "isa.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {
namespace {

using Float32 = float;
using Float64 = double;
using Storage = FUSED_RNN_TYPE;

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

template <class Cell>
constexpr CellKernels kernels_of() {
  CellKernels kernels{info_of<Cell>(), forward<Cell, Storage>, backward<Cell, Storage>, {}, {}};
  if constexpr (std::is_same_v<Storage, float>)
    kernels.as_float = {cell_forward<Cell, float>, cell_backward<Cell, float>};
  if constexpr (std::is_same_v<Storage, double>)
    kernels.as_double = {cell_forward<Cell, double>, cell_backward<Cell, double>};
  return kernels;
}

template <class... Cs>
struct CellTable {
  static constexpr CellKernels kCells[] = {kernels_of<Cs>()...};
};
template <class... Cs>
CellTable<Cs...> table_of(TypeList<Cs...>);
using Table = decltype(table_of(Cells{}));

template <class A, class Function>
void map(int64_t n, const A* x, A* y, Function function) {
  for (int64_t i = 0; i < n; i += kLanes<A>)
    store_partial(y + i, function(load_partial(x + i, n - i)), n - i);
}
template <class A>
constexpr MathFunctions<A> math_functions() {
  return {
      [](int64_t n, const A* x, A* y) {
        map(n, x, y, [](Vector<A> v) { return math::sigmoid(v); });
      },
      [](int64_t n, const A* x, A* y) { map(n, x, y, [](Vector<A> v) { return math::tanh(v); }); }};
}

template <class A>
void multiply(int64_t step, int64_t rows, int64_t K, int64_t columns, const A* a, const A* w,
              A* out) {
  for_panels_at_once<A>(rows, K, 1, 0, columns, turn(step),
                        [&](int64_t column, int vectors, int panels, int64_t) {
                          packed_product<A, A>(0, rows, K, a, K, w + column * K, nullptr, vectors,
                                               panels, nullptr, 0, out + column, columns);
                        });
}

constexpr Kernels all_kernels() {
  Kernels kernels{};
  kernels.cells = Table::kCells;
  kernels.cell_count = int(sizeof(Table::kCells) / sizeof(CellKernels));
  kernels.packing = {panel_step<Storage>, packed_bytes<Storage>, pack_weights<Storage>};
  if constexpr (std::is_same_v<Storage, float>) {
    kernels.as_float = math_functions<float>();
    kernels.multiply = multiply<float>;
  }
  if constexpr (std::is_same_v<Storage, double>) kernels.as_double = math_functions<double>();
  return kernels;
}

}  // namespace

#define FUSED_RNN_CONCAT(a, b) a##b
#define FUSED_RNN_KERNELS(type) FUSED_RNN_CONCAT(k, type)
extern const Kernels FUSED_RNN_KERNELS(FUSED_RNN_TYPE);
constexpr Kernels FUSED_RNN_KERNELS(FUSED_RNN_TYPE) = all_kernels();

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
