// The kernels of each instruction set, and which set this process uses.
#pragma once

#include <vector>

#include "cell_rows.h"
#include "strategy.h"

namespace fused_rnn::cpu {

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

// The kernels of one instruction set in one storage type: what one object of kernels.cpp has.
struct Kernels {
  const CellTable* cells;  // CellRows of what the type is calculated in
  void (*forward)(const AnyCell&, const ForwardProblem&, const Plan&, const Runtime&);
  void (*backward)(const AnyCell&, const BackwardProblem&, const Plan&, const Runtime&);
  Packing packing;
  // The product of the scans with nothing around it, for measuring the roof: out[rows, columns] =
  // a[rows, K] w, with w packed and columns a multiple of 64. Steps go through w forth and back.
  // In float32, elsewhere null.
  void (*multiply)(int64_t step, int64_t rows, int64_t K, int64_t columns, const float* a,
                   const float* w, float* out);
};

struct Isa {
  const char* name;
  const Kernels* types[4];  // [DType]; null where setup.py has built none, but for float32

  const Kernels* operator[](DType type) const { return types[int(type)]; }
};

// The names of the sets that have kernels here, widest first.
std::vector<const char*> compiled_isas();

// The widest set this machine runs, no wider than ATEN_CPU_CAPABILITY asks for. Decided once. In a
// type that it has no kernels for, it has those of the next set that does.
const Isa& chosen_isa();

// The name of a type, as torch has it.
const char* name_of(DType type);

// The tag that frozen weights have where they can be used.
PackedTag tag_for(const CellInfo& cell, DType dtype, const WeightSizes& sizes);

// Null where there is no such cell, or nothing in that type.
const AnyCell* find_cell(const char* name, DType type);

}  // namespace fused_rnn::cpu
