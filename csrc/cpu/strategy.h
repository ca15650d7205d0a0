// Who does what in a scan. Pure functions of sizes, so they are tested without running anything.
#pragma once

#include <stdint.h>

#include "../core/problem.h"

namespace fused_rnn::cpu {

// How the members of a team share one direction of one layer.
enum class Split {
  kNone,   // one thread
  kRows,   // each member has some sequences and all units: no waiting inside the sequence
  kUnits,  // each member has some units of every sequence: one barrier per step
};

struct Plan {
  int threads = 1;  // in all; directions share them evenly
  Split split = Split::kNone;
  int blocks = 1;        // of sequences, walked one after another through all of time
  bool pack_ih = false;  // repack the weights for the tile, or read them as they are
  bool pack_hh = false;
  int64_t chunk_steps = 1;  // steps whose input product is made at once
  const char* reason = "";
};

// `gates` counts rows of weight_hh per unit.
Plan plan_forward(const Stack& stack, int64_t gates, int max_threads);
// The same split serves backward; its chunks are those of the weight-gradient products.
Plan plan_backward(const Stack& stack, int64_t gates, int max_threads);

struct Range {
  int64_t begin;
  int64_t end;
  int64_t size() const { return end - begin; }
};

// Part `index` of [0, count) in `parts` nearly equal parts whose borders are multiples of `unit`.
Range part_of(int64_t count, int64_t unit, int index, int parts);

// Divides the rows of a batch into `parts` ranges that follow one another, equal in steps where
// sequences differ in length. Every call of next() gives one.
class RowParts {
 public:
  RowParts(const Steps& steps, int parts) : steps_(steps), parts_(parts) {}
  Range next();

 private:
  const Steps& steps_;
  const int parts_;
  int index_ = 0;
  int64_t row_ = 0;
  int64_t walked_ = 0;  // steps of the rows before row_
};

// Rows of the largest of `parts` parts.
int64_t largest_part(const Steps& steps, int parts);

// The members of a team of `threads` ids that work on direction `dir` of `dirs`.
Range team_of(int threads, int64_t dirs, int64_t dir);

}  // namespace fused_rnn::cpu
