#include "strategy.h"

#include "pressure.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>

namespace fused_rnn::cpu {
namespace {

// What a core does in a microsecond, to an order of magnitude: operations of the tile (0.7e5 to
// 2.5e5), bytes of weights streamed for one row (4e4 to 1e5).
constexpr double kFlopsPerMicrosecond = 1.5e5;
constexpr double kBytesPerMicrosecond = 7e4;
// Opening a parallel region costs 1-2 us; a barrier 0.1 us and, when a core is shared, much more.
constexpr double kWorthARegion = 20.0;
constexpr double kWorthABarrier = 0.6;
// The same where a split without barriers could be taken instead.
constexpr double kBetterWithBarriers = 2.0;
// Rows per thread from which a thread has sequences of its own: a tile of three is nearly as fast
// as a higher one, and nobody waits.
constexpr int64_t kRowsWorthAThread = 3;
// A layer waits for the one below at every chunk: so many chunks keep all threads busy most of the
// time, and a chunk of fewer steps would use W_ih badly.
constexpr int64_t kWavefrontChunks = 16;
constexpr int64_t kWavefrontSteps = 16;
// Packing reads and writes a weight once. It pays from about this many rows on where the copy stays
// in L2, and later where it does not.
constexpr int64_t kRowsWorthPacking = 8;
constexpr int64_t kRowsWorthPackingLarge = 48;
// One row streams packed weights 1.35 times as fast as rows, from L2 and L3 alike, and from memory
// no slower. Packing costs two passes: it pays from about 10 steps on.
constexpr int64_t kStepsWorthPacking = 16;
// Steps that use W_hh too seldom for packing it, where there are rows enough to pack these.
constexpr int64_t kStepsWithoutPacking = 4;
// Rows of the input product made at once, and of the blocks a large batch is walked in: enough to
// use W_ih well from L2, few enough for the gates to stay there.
constexpr int64_t kForwardRows = 64;
// Rows of one weight-gradient product: the gradient is read and written once per chunk.
constexpr int64_t kBackwardRows = 256;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Steps per chunk: chunks of equal length, each of at most `rows` rows (but one step at least).
int64_t chunk_steps(int64_t T, int64_t B, int64_t rows) {
  const int64_t most = std::max<int64_t>(1, rows / std::max<int64_t>(1, B));
  return std::max<int64_t>(1, ceil_div(T, ceil_div(T, most)));
}

// Everything the choice looks at. Threads and splits are those of one direction.
struct Question {
  const Stack& stack;
  int threads;         // per direction
  int64_t unit_parts;  // units can be divided into
  int barriers;        // of a step, where units are divided
  double step_us;      // one step of one direction on one thread
  double all_us;       // the whole stack on one thread

  Question(const Stack& s, const CellInfo& cell, int in_all, int64_t unit_step, double passes)
      : stack(s),
        threads(std::max(1, in_all / int(s.dirs))),
        unit_parts(ceil_div(pad_units(s.H), unit_step)),
        barriers(cell.stages()) {
    const int64_t recurrent = cell.recurrent ? s.R : 1;
    const double weights =
        double(cell.gates * s.H) * double(recurrent + s.input_size(s.layers - 1));
    const double rows = double(s.steps.N) / double(std::max<int64_t>(s.steps.T, 1));
    // W_hh, whatever the rows.
    const double streamed = double(s.weight_bytes * cell.gates * s.H * recurrent);
    step_us = passes * std::max(2.0 * weights * rows / kFlopsPerMicrosecond,
                                streamed / kBytesPerMicrosecond);
    all_us = step_us * double(s.steps.T * s.layers * s.dirs);
  }

  // Null, or why a split cannot run.
  const char* cannot(Split split) const {
    switch (split) {
      case Split::kNone:
        return nullptr;
      case Split::kRows:
        if (stack.steps.B < 2) return "there is one sequence";
        break;
      case Split::kUnits:
        if (stack.projected()) return "a projection reads all units of a step";
        if (unit_parts < 2) return "there are too few units";
        break;
      case Split::kLayers:
        if (stack.layers < 2) return "there is one layer";
        if (stack.dirs > 1) return "a layer starts after both directions of the one below";
        break;
    }
    return threads < 2 ? "there is one thread per direction" : nullptr;
  }

  // Null, or why a split that can run does not pay.
  const char* not_worth(Split split) const {
    if (all_us < kWorthARegion) return "the whole call is less work than starting threads";
    switch (split) {
      case Split::kUnits:
        if (step_us / threads <
            barriers *
                (runs(Split::kRows) || runs(Split::kLayers) ? kBetterWithBarriers : kWorthABarrier))
          return "a step is less work than a barrier";
        break;
      case Split::kLayers:
        if (stack.steps.T < kWavefrontChunks * 2)
          return "the sequence is too short for layers to follow one another";
        break;
      default:
        break;
    }
    return nullptr;
  }

  bool runs(Split split) const { return !cannot(split) && !not_worth(split); }
};

constexpr const char* kReasons[kSplits] = {
    "", "each thread has sequences of its own",
    "each thread has units of its own, with a barrier per step",
    "each thread has layers of its own, a chunk of steps behind the one below"};

Plan choose(const Stack& s, const CellInfo& cell, const Machine& machine, double passes,
            bool share_weights) {
  const int threads = machine.busy ? 1 : machine.threads;
  const Question question(s, cell, threads, machine.unit_step, passes);
  Plan plan;
  plan.unit_step = machine.unit_step;
  const auto take = [&](Split split, const char* reason) {
    plan.split = split;
    plan.reason = reason;
    plan.against[int(split)] = nullptr;
    const int most = int(split == Split::kRows     ? s.steps.B
                         : split == Split::kUnits  ? question.unit_parts
                         : split == Split::kLayers ? s.layers
                                                   : 1);
    plan.threads = std::min(question.threads, most);
    if (s.dirs == 2 && threads >= 2 && (machine.forced || question.all_us >= kWorthARegion)) {
      if (split == Split::kNone) plan.reason = "one thread per direction";
      plan.threads *= 2;
    }
  };
  if (machine.forced) {
    const char* obstacle = question.cannot(*machine.forced);
    plan.against[int(*machine.forced)] = obstacle;
    plan.possible = !obstacle;
    if (plan.possible) take(*machine.forced, "forced");
    return plan;
  }
  bool fits[kSplits];
  for (int i = 0; i < kSplits; ++i) {
    plan.against[i] = question.cannot(Split(i));
    if (!plan.against[i]) plan.against[i] = question.not_worth(Split(i));
    fits[i] = !plan.against[i];
  }
  // High tiles and no waiting first; then what shares a step's weights among the caches of the
  // cores; layers where a step is too little work for that; low tiles last. Weights that are seldom
  // used are better shared than read by each.
  const int64_t uneven =
      question.unit_parts < 4 * question.threads ? question.unit_parts % question.threads : 0;
  // Of a ragged batch the sequences that a step has on average.
  const bool high =
      s.steps.N >= kRowsWorthAThread * question.threads * s.steps.T && !(share_weights && !uneven);
  const Split order[] = {high ? Split::kRows : Split::kUnits, Split::kUnits, Split::kLayers,
                         Split::kRows};
  for (const Split split : order)
    if (fits[int(split)]) {
      take(split, kReasons[int(split)]);
      for (int i = 0; i < kSplits; ++i)
        if (Split(i) != split && !plan.against[i]) plan.against[i] = "another split is faster here";
      return plan;
    }
  take(Split::kNone, machine.busy  ? "other programs keep the cores busy"
                     : threads < 2 ? "one thread is allowed"
                                   : "no split of the work pays");
  return plan;
}

// Whether anything is packed decides the order of a sum, so it does not depend on the threads.
Pack worth_packing(int64_t bytes, int64_t rows, const Machine& machine) {
  const bool worth = rows >= (bytes > machine.l2 ? kRowsWorthPackingLarge : kRowsWorthPacking);
  return worth ? Pack::kWeights : Pack::kNothing;
}

void choose_packing(const Stack& s, const CellInfo& cell, const Machine& machine, Plan& plan) {
  const int64_t column = s.weight_bytes * cell.gates * s.H;
  plan.pack_ih = worth_packing(column * s.input_size(s.layers - 1), s.steps.N, machine);
  plan.pack_hh = worth_packing(column * s.R, s.steps.N, machine);
  const int64_t members = plan.split == Split::kUnits ? team_of(plan.threads, s.dirs, 0).size() : 1;
  plan.fetch_weights = column * (s.R + s.input_size(s.layers - 1)) / members > machine.l2;
}

// Whether so many rows are worth packing in place of weights: those of 16 bits cannot be, and few
// would leave too many lanes of vectors empty.
bool worth_packing_rows(const Stack& s, int64_t rows) {
  constexpr int64_t kTogether = 16;  // lanes of the vectors of a tile, with AVX2
  return s.weight_bytes >= 4 && rows >= kTogether - 2 && rows <= kForwardRows &&
         4 * rows >= 3 * kTogether * ceil_div(rows, kTogether);
}

// Whether the rows of a forward step are packed and not W_hh, which too few steps will use.
bool packs_rows_of_steps(const Stack& s, const CellInfo& cell) {
  return worth_packing_rows(s, s.steps.B) && s.steps.T <= kStepsWithoutPacking && !s.projected() &&
         cell.recurrent && !cell.two_products();
}

int64_t wavefront_chunk(const Stack& s, const Plan& plan) {
  return std::min(plan.chunk_steps,
                  std::max(kWavefrontSteps, ceil_div(s.steps.T, kWavefrontChunks)));
}

std::atomic<int> forced_split{-1};

// Bytes of a core's L2.
int64_t l2_size() {
  const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return size > 0 ? size : Machine{}.l2;
}

}  // namespace

Machine this_machine(int threads) {
  static constexpr Split kAll[kSplits] = {Split::kNone, Split::kRows, Split::kUnits,
                                          Split::kLayers};
  static const int64_t l2 = l2_size();
  Machine machine{.threads = threads, .l2 = l2};
  if (const int forced = forced_split.load(std::memory_order_relaxed); forced >= 0) {
    machine.forced = &kAll[forced];
  } else {
    machine.busy = threads > 1 && pressure().high(now_ns());
  }
  return machine;
}

void force_split(const Split* split) {
  forced_split.store(split ? int(*split) : -1, std::memory_order_relaxed);
}

Plan plan_forward(const Stack& stack, const CellInfo& cell, const Machine& machine) {
  const int64_t B = stack.steps.B, T = stack.steps.T, N = stack.steps.N;
  const bool packs_rows = packs_rows_of_steps(stack, cell);
  Plan plan = choose(stack, cell, machine, 1.0, packs_rows);
  choose_packing(stack, cell, machine, plan);
  if (B == 1) plan.pack_hh = T >= kStepsWorthPacking ? Pack::kWeights : Pack::kNothing;
  if (packs_rows) plan.pack_hh = Pack::kRows;
  const int64_t ih_bytes =
      stack.weight_bytes * cell.gates * stack.H * stack.input_size(stack.layers - 1);
  if (worth_packing_rows(stack, N) && (T <= kStepsWithoutPacking || ih_bytes > machine.l2))
    plan.pack_ih = Pack::kRows;
  if (stack.frozen()) plan.pack_ih = plan.pack_hh = Pack::kWeights;
  int64_t rows = B;
  if (plan.split == Split::kNone || plan.split == Split::kRows) {
    const int64_t members = std::max<int64_t>(1, team_of(plan.threads, stack.dirs, 0).size());
    plan.blocks = int(std::max<int64_t>(1, ceil_div(B, members * kForwardRows)));
    rows = ceil_div(B, members * plan.blocks);
  }
  plan.chunk_steps = chunk_steps(T, rows, kForwardRows);
  if (plan.split == Split::kLayers) plan.chunk_steps = wavefront_chunk(stack, plan);
  return plan;
}

Plan plan_backward(const Stack& stack, const CellInfo& cell, const Machine& machine) {
  Plan plan = choose(stack, cell, machine, 2.0, false);
  choose_packing(stack, cell, machine, plan);
  plan.blocks = int(std::max<int64_t>(1, ceil_div(stack.steps.B, kBackwardRows)));
  plan.chunk_steps =
      chunk_steps(stack.steps.T, ceil_div(stack.steps.B, plan.blocks), kBackwardRows);
  if (stack.layers > 1 && stack.dirs == 1) plan.chunk_steps = wavefront_chunk(stack, plan);
  return plan;
}

Range part_of(int64_t count, int64_t unit, int index, int parts) {
  const int64_t blocks = (count + unit - 1) / unit;
  const auto border = [&](int64_t i) { return std::min(count, blocks * i / parts * unit); };
  return {border(index), border(index + 1)};
}

RowParts::RowParts(const Steps& steps, int parts, Range rows, Range time)
    : steps_(steps), parts_(parts), rows_(rows), time_(time), row_(rows.begin) {
  for (int64_t row = rows.begin; steps_.lengths && row < rows.end; ++row) total_ += length(row);
}

// Steps of a row inside `time`.
int64_t RowParts::length(int64_t row) const {
  return std::clamp<int64_t>(steps_.lengths[row] - time_.begin, 0, time_.size());
}

Range RowParts::next() {
  const int64_t begin = row_;
  ++index_;
  if (!steps_.lengths) {
    row_ = rows_.begin + rows_.size() * index_ / parts_;
  } else if (index_ == parts_) {
    row_ = rows_.end;
  } else {
    // A row belongs to the part in which its middle step lies, counting sequence by sequence.
    while (row_ < rows_.end && walked_ + length(row_) / 2 < total_ * index_ / parts_)
      walked_ += length(row_++);
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
