#include "team.h"

#include "pressure.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn::cpu {
namespace {

// About 20 to 50 us. A step's work differs by less between threads, and a time slice, which is what
// a partner without a core waits for, is a hundred times as long. Yielding instead of sleeping gave
// the slice to whatever else was running: with another busy process a barrier took 4 ms.
constexpr int kPauses = 1000;

// Less is no lost time slice, but a hiccup: going on alone costs the rest of the call its threads.
constexpr int64_t kSlice = 2'000'000;

thread_local int64_t slept = 0;
// Since begin_together().
thread_local int64_t began = 0;
thread_local int64_t slept_before = 0;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

long futex(int* word, int operation, int value) {
  return syscall(SYS_futex, word, operation, value, nullptr, nullptr, 0);
}

}  // namespace

// The order matters: value_ before sleepers_ here, sleepers_ before value_ in wait_for. So either
// the one sees the sleeper, or the other sees the new value.
void Counter::increment() {
  __atomic_fetch_add(&value_, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0)
    futex(&value_, FUTEX_WAKE_PRIVATE, INT_MAX);
}

bool Counter::wait_for(int target) {
  const auto reached = [&](int value) { return int(unsigned(value) - unsigned(target)) >= 0; };
  for (int i = 0; i < kPauses; ++i) {
    if (reached(value())) return false;
    pause();
  }
  const int64_t start = now_ns();
  __atomic_fetch_add(&sleepers_, 1, __ATOMIC_SEQ_CST);
  for (int seen; !reached(seen = __atomic_load_n(&value_, __ATOMIC_SEQ_CST));)
    futex(&value_, FUTEX_WAIT_PRIVATE, seen);
  __atomic_fetch_sub(&sleepers_, 1, __ATOMIC_RELAXED);
  slept += now_ns() - start;
  return true;
}

int64_t slept_ns() {
  return slept;
}

void begin_together() {
  began = now_ns();
  slept_before = slept;
}

Pressure& pressure() {
  static Pressure pressure;
  return pressure;
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Whether the calling thread has slept.
bool Barrier::meet(int arrivals) {
  if (arrivals == members_) return false;
  const int phase = phase_.value();
  if (__atomic_add_fetch(&arrived_, arrivals, __ATOMIC_ACQ_REL) != members_)
    return phase_.wait_for(phase + 1);
  __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
  // All are here: none reads it before the phase has ended, and all have before the next.
  heir_ = __atomic_load_n(&wanted_, __ATOMIC_RELAXED);
  phase_.increment();
  return false;
}

Range Barrier::wait(Range mine) {
  if (mine.size() == 0 || mine.size() == members_) return mine;
  if (meet(int(mine.size()))) {
    const int64_t now = now_ns(), total = now - began, lost = slept - slept_before;
    int nobody = -1;
    if (lost >= kSlice && Pressure::most_is_lost(total, lost) &&
        __atomic_compare_exchange_n(&wanted_, &nobody, int(mine.begin), false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED))
      pressure().report(now, total, lost);
  }
  return left(mine);
}

}  // namespace fused_rnn::cpu
