// Threads that walk through a sequence together.
#pragma once

#include <stdint.h>

namespace fused_rnn::cpu {

// A number that grows, and threads that wait for it. A waiting thread first spins, because on a
// quiet machine its partner is a fraction of a microsecond behind, then sleeps, because on a busy
// one the partner may have lost its core for milliseconds.
class Counter {
 public:
  int value() const { return __atomic_load_n(&value_, __ATOMIC_ACQUIRE); }
  void increment();
  // Returns once value() - target >= 0; the difference may wrap around.
  void wait_for(int target);

 private:
  alignas(64) int value_ = 0;
  int sleepers_ = 0;
};

// Nanoseconds that the calling thread has slept in wait_for, ever.
int64_t slept_ns();

// A barrier for `members` ids. A thread may stand for several of them (a host can grant fewer
// threads than were asked for), and arrives once for all.
class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  void wait(int arrivals);

 private:
  const int members_;
  alignas(64) int arrived_ = 0;
  Counter phase_;
};

}  // namespace fused_rnn::cpu
