// Numbers below the smallest normal are zero to the kernels. Intel's processors leave the fast path
// for every instruction that meets one, and they are common where gradients vanish.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// While it lives the calling thread reads and writes zeros in their place. Conversions to and from
// half precision are not concerned.
class ZeroDenormals {
 public:
  ZeroDenormals() : before_(mode()) { set(before_ | kZero); }
  ~ZeroDenormals() { set(before_); }
  ZeroDenormals(const ZeroDenormals&) = delete;
  ZeroDenormals& operator=(const ZeroDenormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint32_t kZero = 0x8040;  // results (FTZ) and operands (DAZ)
  static uint32_t mode() { return _mm_getcsr(); }
  static void set(uint32_t mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  static constexpr uint64_t kZero = 1 << 24;  // FZ: both
  static uint64_t mode() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr int kZero = 0;
  static int mode() { return 0; }
  static void set(int) {}
#endif

  const decltype(mode()) before_;
};

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
