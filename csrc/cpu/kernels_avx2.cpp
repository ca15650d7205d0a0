#if defined(__x86_64__)
#define FUSED_RNN_ISA avx2
#define FUSED_RNN_ISA_NAME "avx2"
#include "kernels.h"
#endif
