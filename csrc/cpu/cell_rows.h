// A cell over rows of units, as the scans know it: functions that read and write what stands in
// whole vectors, in the type A that is calculated in. So cells are compiled once for each such type
// of an instruction set (cells.cpp), and scans once for each storage type (kernels.cpp).
#pragma once

#include "../core/problem.h"

namespace fused_rnn::cpu {

// One step of one member's rows. Pointers stand at its first row and at unit 0, rows of states and
// of what is like them are `ld` apart.
template <class A>
struct ForwardStep {
  A* x;  // pre-activations from the input; `operand` changes its first gates
  int64_t ldx;
  const A* w;  // [P] diagonals
  int64_t w_stride;
  int64_t ld;
  const A* before;  // h before the step; where a projection follows, no cell looks at it
  A* after;         // the cell's h; `before` itself where nobody else reads that
  A* also;          // where h goes too, ld_also apart; or null
  int64_t ld_also;
  const A* c_before;        // null for a cell without
  A* c_after;               // likewise
  A* operand;               // of the second product, where there is one
  const A* operand_mask;    // what that is multiplied by, or null
  const A* candidate_mask;  // or null
  A* normed;                // the operand of a norm, normalised, and one slot further as it was
  int64_t ld_normed;
  A* saved;  // slots of a row, `slot` apart; null in inference
  int64_t ld_saved, slot;
  int own[2];  // the slots of the cell's own states, which need not be those after the step
};

// Some rows and units of it, with the product of the tile.
template <class A>
struct Tile {
  int64_t row, rows;
  int64_t unit;
  int vectors, panels;   // vectors of units in each of the panels
  int64_t x_at, x_gate;  // where the first unit stands in a row of x, and how far its gates
  const A* h;            // pre-activations from h, or a normed operand, at the first row and unit
  int64_t ldh, h_gate;
};

// One step of one row, backwards. Pointers stand at the row and at unit 0.
template <class A>
struct BackwardRow {
  int64_t begin, end;       // units
  int64_t slot;             // between gates, states and saved values
  const A* saved;           // what the cell saved
  const A* states;          // after the step
  const A* h_before;        // null where a projection follows
  const A* c_before;        // null for a cell without c
  const A* w;               // [P] diagonals
  const A* h_mask;          // what the operand of a second product was multiplied by, or null
  const A* candidate_mask;  // or null
  A* dh;                    // gradient of the h after the step, then of that before
  A* dc;                    // the same of c
  A* gates_x;               // gradients of the pre-activations, and behind them those of w
  A* gates_h;               // the same pointer where x and h are summed
  A* d_operand;             // of the second product, where there is one; of a norm like the operand
  const A* own;             // the cell's own states where zoneout made others of them, else null
  A zoneout[2];
  const uint8_t* zoneout_mask;
  int64_t zoneout_state;
  int64_t valid_c;  // units of a row
};

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

// What all types have of a cell; the rest is a CellRows.
struct AnyCell {
  CellInfo info;
};

template <class A>
struct CellRows : AnyCell {
  void (*forward)(const ForwardStep<A>&, const Tile<A>&);
  void (*operand)(const ForwardStep<A>&, const Tile<A>&);  // null for a cell without
  void (*backward)(const BackwardRow<A>&);
  void (*operand_backward)(const BackwardRow<A>&);
  // The operand of units [begin, end), from what was saved.
  void (*saved_operand)(const BackwardRow<A>&, int64_t begin, int64_t end, A* operand);
  CellFunctions<A> functions;
};

// Those of one instruction set in one type: what an object of cells.cpp has.
struct CellTable {
  const AnyCell* const* all;
  int count;
};
template <class A>
struct CellTableOf : CellTable {
  void (*sigmoid)(int64_t n, const A* x, A* y);  // for tests, like CellFunctions
  void (*tanh)(int64_t n, const A* x, A* y);
};

}  // namespace fused_rnn::cpu
