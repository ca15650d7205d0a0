// Notices when other programs keep the cores busy.
#pragma once

#include <stdint.h>

#include <atomic>

namespace fused_rnn::cpu {

// Threads that need each other at every step are as fast as the slowest of them; where one has lost
// its core to another program, the rest wait for a time slice, some milliseconds. A call that lost
// two thirds of its time so would have been faster on one thread; ordinary waiting, for a layer
// that has twice the work, is less. After such a call the next ones stay on one thread for a while,
// longer each time it happens again; then one tries anew. Times are in nanoseconds.
class Pressure {
 public:
  static bool most_is_lost(int64_t total, int64_t lost) {
    return lost >= kLeast && 3 * lost >= 2 * total;
  }
  // Whether a call that starts now should stay on one thread.
  bool high(int64_t now) const { return now < until_.load(std::memory_order_relaxed); }
  // Threads have worked together for `total`, and the one that reports has waited `lost` of it: it
  // is at the end of the call, or goes on alone. What began before the last loss was reported is
  // part of that.
  void report(int64_t now, int64_t total, int64_t lost) {
    if (now - total < reported_.load(std::memory_order_relaxed)) return;
    const int level = level_.load(std::memory_order_relaxed);
    if (!most_is_lost(total, lost)) {
      if (level > 0) level_.store(level - 1, std::memory_order_relaxed);
      return;
    }
    reported_.store(now, std::memory_order_relaxed);
    until_.store(now + (kFirst << level), std::memory_order_relaxed);
    if (level < kMostDoublings) level_.store(level + 1, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kLeast = 300'000;    // less is no lost time slice
  static constexpr int64_t kFirst = 4'000'000;  // a hiccup of a quiet machine costs no more
  static constexpr int kMostDoublings = 6;      // to a quarter of a second: a try in thirty calls
                                                // of 8 ms

  // Several threads may call at once; what one of them overwrites is found out again.
  std::atomic<int64_t> until_{0};
  std::atomic<int64_t> reported_{INT64_MIN};
  std::atomic<int> level_{0};
};

Pressure& pressure();

// Of a steady clock.
int64_t now_ns();

}  // namespace fused_rnn::cpu
