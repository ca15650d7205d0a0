// What differs between the compilers that read the cells.
#pragma once

// A function that is always inlined. Always, because the same templates are compiled once per
// instruction set: a copy left out of line could be merged by the linker with the copy of another
// set, and run on a machine that lacks it.
#define FUSED_RNN_INLINE inline __attribute__((always_inline))

// The same, for host and device.
#ifdef __CUDACC__
#define FUSED_RNN_HD __host__ __device__ FUSED_RNN_INLINE
#else
#define FUSED_RNN_HD FUSED_RNN_INLINE
#endif
