// What happens to memory between its allocation and its first use.
#pragma once

#include <stddef.h>

namespace fused_rnn {

// Asks for huge pages where they matter: a large block is new to the process at every call, and its first touch in
// pages of 4 KiB costs more than what is computed there (14 against 2.4 ms for 40 MB).
void new_memory(void* data, size_t bytes);

// For tests: fill new memory with NaN, so that a value used before it is written shows.
void poison_new_memory(bool on);

}  // namespace fused_rnn
