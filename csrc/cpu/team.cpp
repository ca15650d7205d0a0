#include "team.h"

#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn::cpu {
namespace {

// Pauses before the core is offered to others. Short: where cores are shared, spinning longer costs
// a time slice (a millisecond per step was measured with 20,000), yielding costs a microsecond.
constexpr int kPauses = 64;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

template <class Condition>
void wait_until(Condition holds) {
  for (int i = 0; !holds(); ++i) {
    if (i < kPauses)
      pause();
    else
      sched_yield();
  }
}

}  // namespace

void Barrier::wait(int arrivals) {
  if (arrivals == members_) return;
  const unsigned phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, arrivals, __ATOMIC_ACQ_REL) == members_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  wait_until([&] { return __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) != phase; });
}

void Progress::wait_for(int steps) const {
  wait_until([&] { return __atomic_load_n(&steps_, __ATOMIC_ACQUIRE) >= steps; });
}

}  // namespace fused_rnn::cpu
