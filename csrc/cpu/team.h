// Threads that walk through a sequence together.
#pragma once

#include <stdint.h>

#include "strategy.h"

namespace fused_rnn::cpu {

// A number that grows, and threads that wait for it. A waiting thread first spins, because on a
// quiet machine its partner is a fraction of a microsecond behind, then sleeps, because on a busy
// one the partner may have lost its core for milliseconds.
class Counter {
 public:
  int value() const { return __atomic_load_n(&value_, __ATOMIC_ACQUIRE); }
  void increment();
  // Returns once value() - target >= 0; the difference may wrap around. Whether it has slept.
  bool wait_for(int target);

 private:
  alignas(64) int value_ = 0;
  int sleepers_ = 0;
};

// Nanoseconds that the calling thread has slept in wait_for, ever.
int64_t slept_ns();
// The calling thread begins to work with others: what it loses to waiting counts from here.
void begin_together();

// A barrier for `members` ids. A thread may stand for several of them (a host can grant fewer
// threads than were asked for), and arrives once for all.
class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  void wait(int arrivals) { meet(arrivals); }
  // The same for a thread that stands for the ids `mine`; returns those it stands for from now on.
  // Where another program has its core, a partner is late by a time slice, and may be at every
  // barrier. So a thread that has lost most of its time asks to go on alone: at the next barrier,
  // where all have done their work so far, it gets all ids and the others none. Who has none does
  // not wait here any more.
  Range wait(Range mine);
  // What is left, after the barriers so far, of the ids that a thread began with.
  Range left(Range mine) const {
    return heir_ < 0 ? mine : heir_ == mine.begin ? Range{0, members_} : Range{0, 0};
  }

 private:
  bool meet(int arrivals);

  const int members_;
  alignas(64) int arrived_ = 0;
  int wanted_ = -1;  // the first id of the thread that asks
  int heir_ = -1;    // of the one that was granted it; changes while all are here
  Counter phase_;
};

}  // namespace fused_rnn::cpu
