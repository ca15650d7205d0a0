// The CUDA backend as the ops see it: where the library was built without it, everything is refused
// before it comes here.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../core/problem.h"

namespace fused_rnn {

#ifdef FUSED_RNN_CUDA
constexpr bool kHasCuda = true;
#else
constexpr bool kHasCuda = false;
#endif

// Whether the kernels of csrc/cuda are executed on the host, with tensors there (tests/emu).
#ifdef FUSED_RNN_EMULATE
constexpr bool kEmulates = true;
#else
constexpr bool kEmulates = false;
#endif

#ifdef FUSED_RNN_CUDA
// On the current stream of the device, without waiting for it.
void run_on_cuda(const char* cell, DType type, const ForwardProblem& problem, int32_t device);
void run_on_cuda(const char* cell, DType type, const BackwardProblem& problem, int32_t device);
// Copies, or clears where `from` is null.
void copy_on_cuda(const void* from, void* to, size_t bytes, int32_t device);
#else
template <class Problem>
void run_on_cuda(const char*, DType, const Problem&, int32_t) {}
inline void copy_on_cuda(const void*, void*, size_t, int32_t) {}
#endif

}  // namespace fused_rnn
