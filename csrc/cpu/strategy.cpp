#include "strategy.h"

#include <algorithm>

namespace fused_rnn::cpu {
namespace {

// A core does about this many floating point operations per microsecond in the tile (AVX-512, 2.0e5
// on Zen 5, 1.1e5 on Zen 4). Only orders of magnitude matter here.
constexpr double kFlopsPerMicrosecond = 1.5e5;
// Opening a parallel region costs 1-2 us; a barrier 0.1 us and, when a core is shared, much more.
constexpr double kWorthARegion = 20.0;
constexpr double kWorthABarrier = 2.0;
// Packing reads and writes a weight once. It pays from about this many rows on where the copy stays
// in L2, and later where it does not.
constexpr int64_t kRowsWorthPacking = 8;
constexpr int64_t kRowsWorthPackingLarge = 48;
constexpr int64_t kLarge = 1 << 18;  // elements of a weight
// Rows of the input product made at once: enough to use W_ih well from L2, few enough to stay
// there.
constexpr int64_t kForwardChunkRows = 64;
// Rows of one weight-gradient product: the gradient is read and written once per chunk.
constexpr int64_t kBackwardChunkRows = 256;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Steps per chunk: chunks of equal length, each of at most `rows` rows (but one step at least).
int64_t chunk_steps(int64_t T, int64_t B, int64_t rows) {
  const int64_t most = std::max<int64_t>(1, rows / std::max<int64_t>(1, B));
  return std::max<int64_t>(1, ceil_div(T, ceil_div(T, most)));
}

bool worth_packing(int64_t weight, int64_t rows) {
  return rows >= (weight > kLarge ? kRowsWorthPackingLarge : kRowsWorthPacking);
}

Plan split(const Stack& s, int64_t gates, int max_threads, double work) {
  const double per_row = 2.0 * double(gates * s.H) * double(s.R + s.input_size(s.layers - 1));
  const double sequence =
      work * per_row * double(s.steps.N) / kFlopsPerMicrosecond;  // us, one layer and direction
  const double step = sequence / double(std::max<int64_t>(s.steps.T, 1));

  Plan plan;
  const int64_t w_ih = gates * s.H * s.input_size(s.layers - 1), w_hh = gates * s.H * s.R;
  plan.pack_ih = worth_packing(w_ih, s.steps.N);
  plan.pack_hh = worth_packing(w_hh, s.steps.N);
  if (max_threads <= 1) {
    plan.reason = "one thread is allowed";
    return plan;
  }
  if (sequence * double(s.dirs) < kWorthARegion) {
    plan.reason = "the whole sequence is less work than starting threads";
    return plan;
  }
  // Threads per direction. Fewer threads than directions: one thread walks both.
  const int per_dir = int(std::max<int64_t>(1, max_threads / s.dirs));
  const int64_t unit_blocks = pad_units(s.H) / kUnitPad;
  if (s.steps.B >= 8 * per_dir || (s.projected() && s.steps.B >= 2)) {
    plan.split = Split::kRows;
    plan.threads = int(std::min<int64_t>(per_dir, s.steps.B));
    plan.reason = "each thread has sequences of its own";
  } else if (!s.projected() && step / per_dir >= kWorthABarrier && unit_blocks >= 2) {
    plan.split = Split::kUnits;
    plan.threads = int(std::min<int64_t>(per_dir, unit_blocks));
    plan.reason = "each thread has units of its own, with a barrier per step";
  } else if (s.steps.B >= 2) {
    plan.split = Split::kRows;
    plan.threads = int(std::min<int64_t>(per_dir, s.steps.B));
    plan.reason = "a step is less work than a barrier, so each thread has sequences of its own";
  } else {
    plan.reason = "a step is less work than a barrier, and there is one sequence";
  }
  if (plan.threads == 1) plan.split = Split::kNone;
  if (s.dirs == 2 && max_threads >= 2) {
    plan.threads *= 2;
    if (plan.split == Split::kNone) plan.reason = "one thread per direction";
  }
  return plan;
}

}  // namespace

Plan plan_forward(const Stack& stack, int64_t gates, int max_threads) {
  Plan plan = split(stack, gates, max_threads, 1.0);
  const int64_t B = stack.steps.B, T = stack.steps.T;
  // One sequence reads W_hh once per step either way; from beyond L2, rows come as fast as panels.
  if (B == 1 && gates * stack.H * stack.R > kLarge) plan.pack_hh = false;
  if (plan.split == Split::kUnits) {
    plan.chunk_steps = chunk_steps(T, B, kForwardChunkRows);
    return plan;
  }
  const int64_t members = std::max<int64_t>(1, team_of(plan.threads, stack.dirs, 0).size());
  plan.blocks = int(std::max<int64_t>(1, ceil_div(B, members * kForwardChunkRows)));
  plan.chunk_steps = chunk_steps(T, ceil_div(B, members * plan.blocks), kForwardChunkRows);
  return plan;
}

Plan plan_backward(const Stack& stack, int64_t gates, int max_threads) {
  Plan plan = split(stack, gates, max_threads, 2.0);
  // The sums over time depend on the chunks, hence nothing here may depend on the threads.
  plan.blocks = int(std::max<int64_t>(1, ceil_div(stack.steps.B, kBackwardChunkRows)));
  plan.chunk_steps =
      chunk_steps(stack.steps.T, ceil_div(stack.steps.B, plan.blocks), kBackwardChunkRows);
  return plan;
}

Range part_of(int64_t count, int64_t unit, int index, int parts) {
  const int64_t blocks = (count + unit - 1) / unit;
  const auto border = [&](int64_t i) { return std::min(count, blocks * i / parts * unit); };
  return {border(index), border(index + 1)};
}

Range RowParts::next() {
  const int64_t begin = row_;
  ++index_;
  if (!steps_.lengths) {
    row_ = steps_.B * index_ / parts_;
  } else if (index_ == parts_) {
    row_ = steps_.B;
  } else {
    // A row belongs to the part in which its middle step lies, counting sequence by sequence.
    while (row_ < steps_.B && walked_ + steps_.lengths[row_] / 2 < steps_.N * index_ / parts_)
      walked_ += steps_.lengths[row_++];
  }
  return {begin, row_};
}

int64_t largest_part(const Steps& steps, int parts) {
  if (!steps.lengths) return (steps.B + parts - 1) / parts;
  RowParts rows(steps, parts);
  int64_t largest = 0;
  for (int i = 0; i < parts; ++i) largest = std::max(largest, rows.next().size());
  return largest;
}

Range team_of(int threads, int64_t dirs, int64_t dir) {
  // With fewer threads than directions, thread 0 is the team of each.
  if (threads < dirs) return {0, threads};
  return {threads * dir / dirs, threads * (dir + 1) / dirs};
}

}  // namespace fused_rnn::cpu
