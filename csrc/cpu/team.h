// Threads that walk through a sequence together.
#pragma once

#include <stdint.h>

namespace fused_rnn::cpu {

// A barrier for `members` ids. A thread may stand for several of them (a host can grant fewer
// threads than were asked for), and arrives once for all.
class Barrier {
 public:
  explicit Barrier(int members = 1) : members_(members) {}
  void wait(int arrivals);

 private:
  const int members_;
  alignas(64) int arrived_ = 0;
  alignas(64) unsigned phase_ = 0;
};

// How far a thread has come, for those that follow it.
class Progress {
 public:
  void advance() { __atomic_fetch_add(&steps_, 1, __ATOMIC_RELEASE); }
  void wait_for(int steps) const;

 private:
  alignas(64) int steps_ = 0;
};

}  // namespace fused_rnn::cpu
