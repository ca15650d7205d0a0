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

}  // namespace fused_rnn::cpu
