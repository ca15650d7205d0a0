#if defined(__x86_64__)
#define FUSED_RNN_ISA avx512_bf16
#define FUSED_RNN_ISA_NAME "avx512_bf16"
#include "kernels.h"
#endif
