// Memory of our own: workspaces, and what forward saves for backward.
//
// A training step asks for the same large blocks again and again. Given back to the system each
// time, they come back as new pages, whose first touch costs more than what is computed there (14
// ms for 40 MB, against 60 ms of LSTM at H = 512). So a few blocks are kept. Only memory is kept,
// never what is in it.
#pragma once

#include <stddef.h>

namespace fused_rnn {

// At most this much is kept for later.
constexpr size_t kCacheLimit = size_t(256) << 20;

enum class Use {
  kWorkspace,  // dies with the call: any kept workspace that is large enough will do
  kTensor,     // outlives it: a block much too large would stay half empty
};

// An uninitialised block, aligned to 64 bytes.
void* take_block(size_t bytes, Use use);
void give_block(void* data);

size_t cached_bytes();
// Gives all that is kept back to the system.
void empty_cache();

// For tests: new blocks and new tensors are filled with NaN, so that a value used before it is
// written shows.
void poison_new_memory(bool on);
void new_memory(void* data, size_t bytes);

}  // namespace fused_rnn
