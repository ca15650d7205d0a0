// The kernels of each instruction set, and which set this process uses.
#pragma once

#include "../core/problem.h"
#include "strategy.h"

namespace fused_rnn::cpu {

// The pointwise functions of this instruction set, for tests: arrays of n values per gate, state,
// diagonal or saved value. The matrix of a second product is taken for one: h has what is added.
template <class A>
struct CellFunctions {
  void (*forward)(int64_t n, const A* x, const A* h, const A* w, const A* prev, A* state, A* saved);
  void (*backward)(int64_t n, const A* saved, const A* w, const A* prev, const A* state,
                   const A* d_state, A* dx, A* dh, A* d_prev, A* dw);
};

struct CellKernels {
  CellInfo info;
  void (*forward[4])(const ForwardProblem&, const Plan&, const Runtime&);  // [DType]
  void (*backward[4])(const BackwardProblem&, const Plan&, const Runtime&);
  CellFunctions<float> as_float;
  CellFunctions<double> as_double;
};

struct MathFunctions {
  const char* name;
  void (*as_float)(int64_t n, const float* x, float* y);
  void (*as_double)(int64_t n, const double* x, double* y);
};

struct Isa {
  const char* name;
  const CellKernels* cells;
  int cell_count;
  const MathFunctions* math;
  int math_count;
  // The product of the scans with nothing around it, for measuring the roof: out[rows, columns] =
  // a[rows, K] w, with w packed and columns a multiple of 64.
  void (*multiply)(int64_t rows, int64_t K, int64_t columns, const float* a, const float* w,
                   float* out);
};

// Compiled sets, widest first.
const Isa* const* compiled_isas(int* count);

// The widest set this machine runs, no wider than ATEN_CPU_CAPABILITY asks for. Decided once.
const Isa& chosen_isa();

// Null where there is no such cell.
const CellKernels* find_cell(const char* name);

}  // namespace fused_rnn::cpu
