#include "memory.h"

#include <stdint.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>

namespace fused_rnn {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

std::atomic<bool> poison{false};

}  // namespace

void poison_new_memory(bool on) { poison = on; }

void new_memory(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= 2 * kHugePage) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
    // Advice: where it is refused, all goes on in small pages.
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  // All bits set are a NaN in every storage type.
  if (poison && bytes) memset(data, 0xff, bytes);
}

}  // namespace fused_rnn
