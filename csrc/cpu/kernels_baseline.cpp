#define FUSED_RNN_ISA baseline
#define FUSED_RNN_ISA_NAME "baseline"
#include "kernels.h"
