// What the forward and the backward scan share: memory, members of a team, rows of sequences.
#pragma once

#include "pack.h"
#include "strategy.h"
#include "team.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// Values kept per unit and row: the states, what the cell saves, and with a projection the cell's
// own output (the state h is then what it was projected to).
template <class Cell>
int64_t saved_slots(const Stack& stack) {
  return Cell::kStates + Cell::kSaved + (stack.projected() ? 1 : 0);
}

// Hands out pieces of one block, null for nothing. Laid out once without memory to learn the size,
// then for real.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ && count ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// One thread's share of a direction.
struct Member {
  int index;    // in its team
  int size;     // of the team
  Range rows;   // sequences
  Range units;  // in padded units
};

inline Member member_of(const Stack& s, const Plan& plan, Range team, int id) {
  Member member{int(id - team.begin), int(team.size()), {0, s.steps.B}, {0, pad_units(s.H)}};
  if (plan.split == Split::kRows) member.rows = rows_of(s.steps, member.index, member.size);
  if (plan.split == Split::kUnits)
    member.units = part_of(pad_units(s.H), kUnitPad, member.index, member.size);
  return member;
}

template <class S>
FUSED_RNN_INLINE S* row_of(const Sequence& sequence, const Steps& steps, int64_t t, int64_t b) {
  S* data = static_cast<S*>(sequence.data);
  return steps.offsets ? data + (steps.offsets[t] + b) * sequence.stride_b
                       : data + t * sequence.stride_t + b * sequence.stride_b;
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
template <class S>
void store_row(const Accumulate<S>* src, int64_t begin, int64_t end, int64_t n, S* dst) {
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
  if (threads == 1) return scan.run(0, 1);
  runtime.parallel(
      threads, [](int begin, int end, void* s) { static_cast<Scan*>(s)->run(begin, end); }, &scan);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
