// The little that the programs in this folder share: vector types, chance, and a count of failures.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

namespace check {

template <class E, int kBytes>
struct VectorOf {
  typedef E Type __attribute__((vector_size(kBytes)));
};
template <class E, int kBytes>
using Vector = typename VectorOf<E, kBytes>::Type;

inline int failures = 0;

// Counts a failure and prints the first twenty. A comparison with NaN is false and so fails.
template <class... Args>
void that(bool holds, const char* format, Args... args) {
  if (holds || ++failures > 20) return;
  std::printf("FAILED: ");
  if constexpr (sizeof...(args) == 0) {
    std::fputs(format, stdout);
  } else {
    std::printf(format, args...);
  }
  std::printf("\n");
}

inline int finish() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

template <class E>
bool same_bits(E a, E b) {
  return std::memcmp(&a, &b, sizeof(E)) == 0;
}

}  // namespace check
