#include "memory.h"

#include <stdint.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fused_rnn {
namespace {

constexpr size_t kAlignment = 64;
constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

// Stands in front of the data, in a line of its own.
struct Header {
  size_t bytes;  // of data
  Use use;
};
static_assert(sizeof(Header) <= kAlignment);

Header& header_of(void* data) {
  return *reinterpret_cast<Header*>(static_cast<char*>(data) - kAlignment);
}

size_t bytes_of(void* data) {
  return header_of(data).bytes;
}

// Whether a kept block serves a request. A tensor's may be a quarter too large.
bool serves(void* data, size_t bytes, Use use) {
  const Header& header = header_of(data);
  if (header.use != use || header.bytes < bytes) return false;
  return use == Use::kWorkspace || header.bytes <= bytes + bytes / 4;
}

void* allocate(size_t bytes, Use use) {
  void* base = std::aligned_alloc(kAlignment,
                                  kAlignment + (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!base) throw std::bad_alloc();
  void* data = static_cast<char*>(base) + kAlignment;
  header_of(data) = {bytes, use};
#if defined(MADV_HUGEPAGE)
  if (bytes >= 2 * kHugePage) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
    // Advice: where it is refused, all goes on in small pages.
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return data;
}

void release(void* data) {
  std::free(static_cast<char*>(data) - kAlignment);
}

struct Cache {
  std::mutex mutex;
  std::vector<void*> blocks;  // oldest first
  size_t bytes = 0;

  void* remove(size_t i) {
    void* data = blocks[i];
    blocks.erase(blocks.begin() + std::ptrdiff_t(i));
    bytes -= bytes_of(data);
    return data;
  }
};

// Never destroyed: tensors may outlive static objects.
Cache& cache() {
  static Cache* const cache = new Cache;
  return *cache;
}

std::atomic<bool> poison{false};

}  // namespace

// The lock is only tried: in a process forked while another thread held it, it stays locked for
// ever, and blocks then simply come from the system.
void* take_block(size_t bytes, Use use) {
  Cache& kept = cache();
  void* data = nullptr;
  if (const std::unique_lock lock(kept.mutex, std::try_to_lock); lock) {
    size_t best = kept.blocks.size();
    for (size_t i = 0; i < kept.blocks.size(); ++i) {
      if (!serves(kept.blocks[i], bytes, use)) continue;
      if (best == kept.blocks.size() || bytes_of(kept.blocks[i]) < bytes_of(kept.blocks[best]))
        best = i;
    }
    if (best < kept.blocks.size()) {
      data = kept.remove(best);
    } else if (use == Use::kWorkspace) {
      // Forward and backward take turns: the larger of their workspaces serves both, and the
      // smaller one would only be kept beside it.
      for (size_t i = kept.blocks.size(); i-- > 0;)
        if (header_of(kept.blocks[i]).use == use) release(kept.remove(i));
    }
  }
  if (!data) data = allocate(bytes, use);
  new_memory(data, bytes);
  return data;
}

void give_block(void* data) {
#ifdef __SANITIZE_ADDRESS__
  return release(data);  // a reused block would hide where its user writes beyond it
#endif
  Cache& kept = cache();
  const std::unique_lock lock(kept.mutex, std::try_to_lock);
  if (!lock || bytes_of(data) > kCacheLimit) return release(data);
  kept.blocks.push_back(data);
  kept.bytes += bytes_of(data);
  while (kept.bytes > kCacheLimit) release(kept.remove(0));
}

size_t cached_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().bytes;
}

void empty_cache() {
  const std::lock_guard lock(cache().mutex);
  while (!cache().blocks.empty()) release(cache().remove(cache().blocks.size() - 1));
}

void poison_new_memory(bool on) {
  poison = on;
}

void new_memory(void* data, size_t bytes) {
  // All bits set are a NaN in every storage type.
  if (poison && bytes) memset(data, 0xff, bytes);
}

}  // namespace fused_rnn
