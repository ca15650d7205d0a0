// The scans, forward and backward, on one instruction set in one storage type: setup.py compiles
// this file once for each pair, with the set's flags and name (avx2) in FUSED_RNN_ISA, the type's
// (Float32) in FUSED_RNN_TYPE, and the set that has its cells in FUSED_RNN_CELLS.
#include "backward.h"
#include "forward.h"
#include "isa.h"

namespace fused_rnn::cpu::FUSED_RNN_CELLS {
extern const CellTableOf<float> k_float;
extern const CellTableOf<double> k_double;
}  // namespace fused_rnn::cpu::FUSED_RNN_CELLS

namespace fused_rnn::cpu::FUSED_RNN_ISA {
namespace {

using Float32 = float;
using Float64 = double;
using Storage = FUSED_RNN_TYPE;

template <class A>
void multiply(int64_t step, int64_t rows, int64_t K, int64_t columns, const A* a, const A* w,
              A* out) {
  for_panels_at_once<A>(rows, K, 1, 0, columns, turn(step),
                        [&](int64_t column, int vectors, int panels, int64_t) {
                          packed_product<A, A>(0, rows, K, a, K, w + column * K, nullptr, vectors,
                                               panels, nullptr, 0, out + column, columns);
                        });
}

template <class A>
constexpr const CellTable* table() {
  if constexpr (std::is_same_v<A, double>)
    return &FUSED_RNN_CELLS::k_double;
  else
    return &FUSED_RNN_CELLS::k_float;
}

constexpr Kernels all_kernels() {
  Kernels kernels{table<Accumulate<Storage>>(),
                  forward<Storage>,
                  backward<Storage>,
                  {panel_step<Storage>, packed_bytes<Storage>, pack_weights<Storage>},
                  nullptr};
  if constexpr (std::is_same_v<Storage, float>) kernels.multiply = multiply<float>;
  return kernels;
}

}  // namespace

#define FUSED_RNN_CONCAT(a, b) a##b
#define FUSED_RNN_KERNELS(type) FUSED_RNN_CONCAT(k, type)
extern const Kernels FUSED_RNN_KERNELS(FUSED_RNN_TYPE);
constexpr Kernels FUSED_RNN_KERNELS(FUSED_RNN_TYPE) = all_kernels();

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
