// The kernels of each instruction set, and which set this process uses.
#pragma once

#include "../core/problem.h"
#include "strategy.h"

namespace fused_rnn::cpu {

// The pointwise functions of this instruction set, for tests: arrays of n values per gate, state,
// diagonal or saved value, and m for the candidate, where a cell has one. The matrix of a second
// product is taken for one: h has what is added.
template <class A>
struct CellFunctions {
  void (*forward)(int64_t n, const A* x, const A* h, const A* w, const A* m, const A* prev,
                  A* state, A* saved);
  void (*backward)(int64_t n, const A* saved, const A* w, const A* m, const A* prev, const A* state,
                   const A* d_state, A* dx, A* dh, A* d_prev, A* dw);
};

struct CellKernels {
  CellInfo info;
  void (*forward[4])(const ForwardProblem&, const Plan&, const Runtime&);  // [DType]
  void (*backward[4])(const BackwardProblem&, const Plan&, const Runtime&);
  CellFunctions<float> as_float;
  CellFunctions<double> as_double;
};

// What stands at the head of frozen weights: all that they were packed for, compared as bytes.
struct PackedTag {
  char layout[16];  // of the block, as packed.h has it
  char isa[16];
  char cell[32];
  char dtype[16];
  int64_t I, H, R, projected;
};

// Packs the weights of one layer and direction into a block of so many bytes, behind its tag.
struct Packing {
  int64_t (*panel_step)(const CellInfo&);  // Machine::unit_step of a scan over them
  size_t (*bytes)(const CellInfo&, const WeightSizes&);
  void (*pack)(const CellInfo&, const WeightSizes&, const Weights&, void* block);
};

struct MathFunctions {
  const char* name;
  void (*as_float)(int64_t n, const float* x, float* y);
  void (*as_double)(int64_t n, const double* x, double* y);
};

struct Isa {
  const char* name;
  const Isa* base;  // the set that what is null here is taken from, or null
  const CellKernels* cells;
  int cell_count;
  const MathFunctions* math;
  int math_count;
  Packing packing[4];  // [DType]
  // The product of the scans with nothing around it, for measuring the roof: out[rows, columns] =
  // a[rows, K] w, with w packed and columns a multiple of 64. Steps go through w forth and back.
  void (*multiply)(int64_t step, int64_t rows, int64_t K, int64_t columns, const float* a,
                   const float* w, float* out);
};

// Compiled sets, widest first. Of their contents only the name may be looked at: chosen_isa() has
// what a base adds.
const Isa* const* compiled_isas(int* count);

// The widest set this machine runs, no wider than ATEN_CPU_CAPABILITY asks for. Decided once.
const Isa& chosen_isa();

// The tag that frozen weights have where they can be used.
PackedTag tag_for(const CellInfo& cell, DType dtype, const WeightSizes& sizes);

// Null where there is no such cell.
const CellKernels* find_cell(const char* name);

}  // namespace fused_rnn::cpu
