// A workspace: one block, and what lies where in it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "platform.h"

namespace fused_rnn {

// Hands out pieces of one block, null for nothing. Laid out once without memory to learn the size,
// then for real.
class Arena {
 public:
  FUSED_RNN_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FUSED_RNN_INLINE T* take(int64_t count) {
    T* p = base_ && count ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  FUSED_RNN_INLINE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fused_rnn
