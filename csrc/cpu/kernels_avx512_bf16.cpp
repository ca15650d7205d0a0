#if defined(__x86_64__)
#include "isa.h"
namespace fused_rnn::cpu::avx512 {
extern const Isa kIsa;
}
#define FUSED_RNN_ISA avx512_bf16
#define FUSED_RNN_ISA_NAME "avx512_bf16"
#define FUSED_RNN_BASE_ISA avx512
#include "kernels.h"
#endif
