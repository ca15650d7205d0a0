#if defined(__x86_64__)
#define FUSED_RNN_ISA avx512
#define FUSED_RNN_ISA_NAME "avx512"
#include "kernels.h"
#endif
