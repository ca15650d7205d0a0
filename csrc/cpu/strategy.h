// Who does what in a scan. Pure functions of sizes, so they are tested without running anything.
#pragma once

#include <stdint.h>

#include "../core/problem.h"

namespace fused_rnn::cpu {

// How threads share a stack. Two directions always have a team each where there are two threads;
// the split says how the members of a team share a direction.
enum class Split {
  kNone,    // one thread
  kRows,    // each member has some sequences and all units: no waiting inside the sequence
  kUnits,   // each member has some units of every sequence: one barrier per step
  kLayers,  // each thread has some layers, and follows the layer below by a chunk of steps
};
constexpr int kSplits = 4;
constexpr const char* kSplitNames[kSplits] = {"none", "rows", "units", "layers"};

// What is packed for the tile. Both ways of packing give the same bits.
enum class Pack {
  kNothing,  // one row after another is multiplied by the weights as they are
  kWeights,  // before the first step, for all that use them
  kRows,     // of each product: the tile takes its rows from the weights as they are
};
constexpr const char* kPackNames[] = {"nothing", "weights", "rows"};

// What a choice may depend on besides the problem.
struct Machine {
  int threads = 1;
  bool busy = false;     // one thread, because other programs have the cores
  int64_t l2 = 1 << 20;  // bytes, of a core
  // Where a member's units may begin: at its multiples. Frozen panels are shared as a whole.
  int64_t unit_step = kUnitPad;
  const Split* forced = nullptr;
};

// This machine as it is now, with the split that force_split() has set.
Machine this_machine(int threads);
// Null: choose freely.
void force_split(const Split* split);

struct Plan {
  int threads = 1;  // in all
  Split split = Split::kNone;
  int64_t unit_step = kUnitPad;
  int blocks = 1;  // of sequences, walked one after another through all of time
  Pack pack_ih = Pack::kNothing;
  Pack pack_hh = Pack::kNothing;
  bool fetch_weights = false;  // ahead, where they are packed: a core's L2 does not hold its own
  int64_t chunk_steps = 1;     // steps whose input product is made at once
  const char* reason = "";
  // Why the others were passed over, null for the chosen one.
  const char* against[kSplits] = {};
  // Whether the forced split can run at all: where not, against[] says why.
  bool possible = true;
};

Plan plan_forward(const Stack& stack, const CellInfo& cell, const Machine& machine);
// What is summed over time does not depend on the number of threads.
Plan plan_backward(const Stack& stack, const CellInfo& cell, const Machine& machine);

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Part `index` of [0, count) in `parts` nearly equal parts whose borders are multiples of `unit`.
Range part_of(int64_t count, int64_t unit, int index, int parts);

// Divides rows of a batch into `parts` ranges that follow one another, equal in what they have of
// the steps `time` where sequences differ in length. Every call of next() gives one.
class RowParts {
 public:
  RowParts(const Steps& steps, int parts, Range rows, Range time);
  RowParts(const Steps& steps, int parts) : RowParts(steps, parts, {0, steps.B}, {0, steps.T}) {}
  Range next();

 private:
  int64_t length(int64_t row) const;

  const Steps& steps_;
  const int parts_;
  const Range rows_;
  const Range time_;
  int64_t total_ = 0;  // steps of all rows
  int index_ = 0;
  int64_t row_;
  int64_t walked_ = 0;  // steps of the rows before row_
};

// Rows of the largest of `parts` parts.
int64_t largest_part(const Steps& steps, int parts);

// The members of a team of `threads` ids that work on direction `dir` of `dirs`.
Range team_of(int threads, int64_t dirs, int64_t dir);

}  // namespace fused_rnn::cpu
