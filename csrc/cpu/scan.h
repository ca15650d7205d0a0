// What the forward and the backward scan share: memory, members of a team, rows of sequences.
#pragma once

#include "../core/arena.h"
#include "cell_rows.h"
#include "denormals.h"
#include "norm.h"
#include "pack.h"
#include "strategy.h"
#include "team.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// One thread's share of a direction, for one block of sequences.
struct Member {
  int index;    // in its team
  int size;     // of the team
  Range rows;   // sequences
  Range units;  // in padded units
};

// What forward and backward share: sizes, and threads in teams, one team per direction. Problem is
// ForwardProblem or BackwardProblem.
template <class Problem>
class Scan {
 protected:
  Scan(const CellInfo& cell, const Problem& problem, const Plan& plan)
      : info_(cell),
        p_(problem),
        plan_(plan),
        steps_(problem.steps),
        Hp_(pad_units(problem.H)),
        Rp_(pad_units(problem.R)),
        slots_(saved_slots(problem, cell)),
        widest_(problem.layers > 1 && problem.dirs * problem.R > problem.I
                    ? problem.dirs * problem.R
                    : problem.I),
        part_rows_(largest_part(problem.steps, row_parts(int(team(0).size())))),
        everyone_(plan.threads),
        barriers_{Barrier(int(team(0).size())), Barrier(int(team(1).size()))} {}

  void lay_out_teams(Arena& arena) {
    progress_ = arena.take<Counter>(by_layers() ? p_.layers : 0);
    for (int64_t layer = 0; progress_ && layer < p_.layers; ++layer) progress_[layer] = Counter();
    for (int64_t d = 0; d < p_.dirs; ++d) {
      const int size = int(team(d).size());
      members_[d] = arena.take<Member>(plan_.blocks * size);
      if (!members_[d]) continue;
      RowParts parts(steps_, row_parts(size));
      Range rows{};
      for (int i = 0; i < plan_.blocks * size; ++i) {
        const int index = i % size;
        if (!by_units() || index == 0) rows = parts.next();
        members_[d][i] = {
            index, size, rows,
            by_units() ? part_of(Hp_, plan_.unit_step, index, size) : Range{0, units_}};
      }
    }
  }

  // Parts that the sequences are divided into: a block of a unit split has one.
  int row_parts(int team_size) const { return plan_.blocks * (by_units() ? 1 : team_size); }

  // The rows that a member prepares at the start of a block, whoever works on them then.
  Range rows_to_start(const Member& member) const {
    if (!by_units()) return member.rows;
    const Range part = part_of(member.rows.size(), 1, member.index, member.size);
    return {member.rows.begin + part.begin, member.rows.begin + part.end};
  }

  bool by_units() const { return plan_.split == Split::kUnits; }
  // Where threads have layers of their own, each is a team by itself.
  bool by_layers() const { return plan_.split == Split::kLayers; }
  Range team(int64_t d) const {
    return by_layers() ? Range{0, 1} : team_of(plan_.threads, p_.dirs, d);
  }

  // Memory of a direction, and of a layer where several run at once.
  int64_t slots_of_work() const { return by_layers() ? plan_.threads : p_.dirs; }
  int64_t slot_of_work(int64_t layer, int64_t d) const {
    return by_layers() ? layer % plan_.threads : d;
  }
  // Sequences between layers that are alive at the same time.
  int64_t betweens() const { return by_layers() || p_.layers <= 2 ? p_.layers - 1 : 2; }

  // The members of one team that one thread stands for: none, once another has taken over.
  struct Crew {
    int64_t d;
    Range members;
    int block = 0;
  };

  // Calls body(crew) for each direction in whose team the thread with ids [begin, end) has members.
  // All threads go through the directions in the same order, so none waits for one that waits for
  // it.
  template <class Body>
  void for_my_crews(int begin, int end, Body body) {
    for (int64_t d = 0; d < p_.dirs; ++d) {
      const Range ids = team(d);
      const int64_t first = begin > ids.begin ? begin : ids.begin;
      const int64_t last = end < ids.end ? end : ids.end;
      if (first >= last) continue;
      Crew crew{d, barriers_[d].left({first - ids.begin, last - ids.begin})};
      body(crew);
    }
  }

  // Calls body(layer, crew) for the layers, in the order given, of the thread with ids [begin,
  // end).
  template <class Body>
  void for_my_layers(int begin, int end, int64_t first, int64_t step, Body body) {
    for (int64_t layer = first; layer >= 0 && layer < p_.layers; layer += step) {
      const int64_t id = layer % plan_.threads;
      if (id < begin || id >= end) continue;
      Crew crew{0, {0, 1}};
      body(layer, crew);
    }
  }
  // A chunk, `done` steps into a block, is begun when the layer before has ended it.
  void follow(int64_t layer, int64_t block, int64_t done) const {
    if (!by_layers() || layer < 0 || layer >= p_.layers) return;
    const int64_t chunks = (steps_.T + plan_.chunk_steps - 1) / plan_.chunk_steps;
    progress_[layer].wait_for(int(block * chunks + done / plan_.chunk_steps + 1));
  }
  void lead(int64_t layer) {
    if (by_layers()) progress_[layer].increment();
  }

  template <class Body>
  void each_member(const Crew& crew, Body body) {
    const Member* members = members_[crew.d] + crew.block * team(crew.d).size();
    for (int64_t i = crew.members.begin; i < crew.members.end; ++i) body(members[i]);
  }

  // Calls body(stages) for those of a step: one by one where units are divided, whose members wait
  // for each other after every one, and else all at once.
  template <class Body>
  void each_stage(Crew& crew, Body body) {
    const int at_once = by_units() ? 1 : info_.stages();
    for (int stage = 0; stage < info_.stages(); stage += at_once) {
      body(Range{stage, stage + at_once});
      if (by_units()) wait_for_team(crew);
    }
  }

  void wait_for_team(Crew& crew) { crew.members = barriers_[crew.d].wait(crew.members); }
  void wait_for_everyone(int begin, int end) { everyone_.wait(end - begin); }

  // How many of a member's sequences are alive at step t.
  int64_t alive(const Member& member, int64_t t) const { return alive(member.rows, t); }
  int64_t alive(Range sequences, int64_t t) const {
    const int64_t rows = steps_.rows(t);
    const int64_t end = rows < sequences.end ? rows : sequences.end;
    return end > sequences.begin ? end - sequences.begin : 0;
  }

  // The sequences of a team's block.
  Range rows_of_block(const Crew& crew) const {
    const int64_t size = team(crew.d).size();
    const Member* members = members_[crew.d] + crew.block * size;
    return {members[0].rows.begin, members[size - 1].rows.end};
  }

  // Whether a new sequence begins, walking in direction d, with step t of sequence b: it is then
  // given an initial state. In the second direction that is the last step before a reset.
  bool begins(int64_t d, int64_t t, int64_t b) const {
    if (d == 1 && ++t >= steps_.length(b)) return false;
    return p_.reset.data && static_cast<const uint8_t*>(p_.reset.data)[p_.reset.at(steps_, t, b)];
  }

  bool has_c() const { return info_.states > 1; }

  // The panel that is fetched while that of `unit` is multiplied, of those with so many gates: that
  // of the units `next`, or none.
  template <class W>
  const W* fetched(const W* packed, int gates, int64_t K, int64_t unit, int64_t next) const {
    if (!plan_.fetch_weights || next == unit) return nullptr;
    return packed + next * gates * packed_rows<W>(K);
  }

  // Calls body(first gate, count) for those that are normalised together.
  template <class Body>
  void each_norm(Body body) const {
    const int first = info_.norm_gates, others = info_.gates - first;
    body(0, first);
    if (others) body(first, others);
  }

  // Of a member's units those that it holds of h: with a projection, all that h has.
  Range units_of_h(Range units) const { return p_.projected() ? Range{0, Rp_} : units; }

  const CellInfo& info_;
  const Problem& p_;
  const Plan plan_;
  const Steps& steps_;
  const int64_t Hp_;
  const int64_t Rp_;
  int64_t units_ = Hp_;      // of a member that has all of them
  const int64_t slots_;      // of saved
  const int64_t widest_;     // features that a layer takes
  const int64_t part_rows_;  // sequences of a member, at most

 private:
  Barrier everyone_;
  Barrier barriers_[2];
  Member* members_[2];  // of each team, block by block
  Counter* progress_;   // [layers]: chunks done
};

template <class S>
FUSED_RNN_INLINE S* row_of(const Sequence& sequence, const Steps& steps, int64_t t, int64_t b) {
  return static_cast<S*>(sequence.data) + sequence.at(steps, t, b);
}

// dst[0, n) = src[0, n), zeros up to padded.
template <class S>
void copy_row(const S* src, int64_t n, int64_t padded, Accumulate<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < padded; i += L)
    store(dst + i, src ? load_partial(src + i, n - i) : Vector<A>{});
}

// dst[begin, end) = src[begin, end), where only the first n elements of dst exist.
template <class S, class X>
void store_row(const X* src, int64_t begin, int64_t end, int64_t n, S* dst) {
  constexpr int L = kLanes<Accumulate<S>>;
  for (int64_t i = begin; i < end && i < n; i += L) store_partial(dst + i, load(src + i), n - i);
}

// Runs scan.run(begin, end) over the ids of a plan, with the scan's memory.
template <class Scan>
void run_scan(Scan& scan, int threads, const Runtime& runtime) {
  Arena measure(nullptr);
  scan.lay_out(measure);
  Arena arena(runtime.allocate(runtime.host, measure.used()));
  scan.lay_out(arena);
  if (threads == 1) {
    const ZeroDenormals zero;
    return scan.run(0, 1);
  }
  runtime.parallel(
      threads,
      [](int begin, int end, void* s) {
        const ZeroDenormals zero;
        begin_together();
        static_cast<Scan*>(s)->run(begin, end);
      },
      &scan);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
