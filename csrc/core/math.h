// The elementary functions of the cells, each written once for every arithmetic type V: float,
// double, a vector of either declared with __attribute__((vector_size(n))), or a struct that has
// their operators and a specialisation of Arithmetic.
//
// NaN propagates, infinities saturate, and numbers are denormal only where tiny ones make them so
// and where a sigmoid is almost zero: where machines are slow at them the kernels take them for
// zero. Cells wait for these functions, which are chains of operations: of two ways to the same
// digits the shorter is here. Errors are below 2.6 units in the last place, with and without
// contraction to FMA (tests/csrc/test_math.cpp). That takes round-to-nearest and no -ffast-math,
// which would cancel the shift in exp.
#pragma once

#include <stdint.h>

#include "platform.h"

namespace fused_rnn::math {

// b where one of them is NaN. Compilers do not find the instruction that does this to a vector: a
// specialisation may name it.
template <class V>
struct Extremes {
  FUSED_RNN_HD static V larger(V a, V b) { return a > b ? a : b; }
  FUSED_RNN_HD static V smaller(V a, V b) { return a < b ? a : b; }
};

// a / b, where b is not denormal. A GPU's own division asks for each b whether that or 1 / b is, so
// that one waits for the other; this is a correction of an approximate reciprocal. There b must be
// finite, and where 1 / b is denormal the result is zero.
template <class V>
FUSED_RNN_HD V quotient(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (__is_same(V, float)) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    const float q = a * r;
    return __fmaf_rn(__fmaf_rn(-q, b, a), r, q);
  }
#endif
  return a / b;
}

// Element: what V consists of. Int: V's bits as signed integers, and for vectors also the type of
// a comparison. Operations that are not operators.
template <class V, class I, class E>
struct Operations : Extremes<V> {
  using Int = I;
  using Element = E;
  FUSED_RNN_HD static I bits(V value) { return __builtin_bit_cast(I, value); }
  FUSED_RNN_HD static V from_bits(I bits) { return __builtin_bit_cast(V, bits); }
  // Lane by lane.
  template <class Condition>
  FUSED_RNN_HD static V select(Condition condition, V a, V b) {
    return condition ? a : b;
  }
};
template <class V>
struct Arithmetic : Operations<V, decltype(V{} < V{}), __typeof__(V{}[0] + V{}[0])> {};
template <>
struct Arithmetic<float> : Operations<float, int32_t, float> {};
template <>
struct Arithmetic<double> : Operations<double, int64_t, double> {};

template <class V>
using Int = typename Arithmetic<V>::Int;
template <class V>
using Element = typename Arithmetic<V>::Element;

template <class V>
FUSED_RNN_HD V broadcast(Element<V> value) {
  return value - V{};
}

// Lane by lane, condition ? a : b.
template <class Condition, class V>
FUSED_RNN_HD V select(Condition condition, V a, V b) {
  return Arithmetic<V>::select(condition, a, b);
}

template <class V>
FUSED_RNN_HD Int<V> bits(V value) {
  return Arithmetic<V>::bits(value);
}
template <class V>
FUSED_RNN_HD V from_bits(Int<V> bits) {
  return Arithmetic<V>::from_bits(bits);
}

// c0 + c1 s x + c2 (s x)^2 + ..., for s a power of two: it is in the coefficients then.
template <int s, class V>
FUSED_RNN_HD V polynomial(V, Element<V> c0) {
  return broadcast<V>(c0);
}
template <int s, class V, class... Rest>
FUSED_RNN_HD V polynomial(V x, Element<V> c0, Rest... rest) {
  return polynomial<s>(x, (s * rest)...) * x + c0;
}

// Numbers of an element type. Those with many digits come from tools/fit_polynomials.py.
template <class E>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2 = 0.693147181f;
  static constexpr float kLn2High = 0.693145752f;  // 16 bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = 1.42860682e-6f;
  static constexpr int kSignificandBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kExpZero = 87.0f;  // rounds to n = -126
#ifdef __CUDA_ARCH__
  static constexpr float kExpHuge = 88.0f;  // finite for quotient(), which gives zero
#else
  static constexpr float kExpHuge = 89.0f;  // its exponential is infinite
#endif
  static constexpr float kTanhOne = 9.5f;  // tanh rounds to 1 from 9.02 on
  static constexpr Int<float> kSign = INT32_MIN;

  template <int s, class V>
  FUSED_RNN_HD static V twice_exp_tail(V r) {
    return polynomial<s>(r, 1.0f, 0.333331541f, 0.0833331093f, 0.0167263461f, 0.00278523522f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2 = 0.69314718055994531;
  static constexpr double kLn2High = 0.69314718055989033;  // 42 bits
  static constexpr double kLn2Low = 5.4979230187083712e-14;
  static constexpr int kSignificandBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kExpZero = 708.5;  // rounds to n = -1022
  static constexpr double kExpHuge = 710.0;
  static constexpr double kTanhOne = 20.0;  // tanh rounds to 1 from 19.07 on
  static constexpr Int<double> kSign = INT64_MIN;

  template <int s, class V>
  FUSED_RNN_HD static V twice_exp_tail(V r) {
    return polynomial<s>(r, 1.0000000000000002, 0.33333333333333335, 0.083333333333248324,
                         0.016666666666660129, 0.0027777777834393438, 0.00039682539726081091,
                         4.9603042644737387e-5, 5.5114536960620051e-6, 5.5240151759966733e-7,
                         5.0200751665122467e-8);
  }
};

// a b + c d. Contracted, it is a b that is rounded once less: compilers take the product that comes
// first, and of two operands of an operator that is a function, either may. The bits of a cell must
// not depend on the arithmetic type.
template <class V>
FUSED_RNN_HD V sum_of_products(V a, V b, V c, V d) {
  const V first = a * b;
  const V second = c * d;
  return first + second;
}

template <class V>
FUSED_RNN_HD V magnitude(V x) {
  return from_bits<V>(bits(x) & ~Constants<Element<V>>::kSign);
}

// Both keep NaN.
template <class V>
FUSED_RNN_HD V at_least(V x, Element<V> low) {
  return Arithmetic<V>::larger(broadcast<V>(low), x);
}
template <class V>
FUSED_RNN_HD V at_most(V x, Element<V> high) {
  return Arithmetic<V>::smaller(broadcast<V>(high), x);
}

// Adding kRound rounds to an integer, which is left in the low bits. Where the exponent's bias was
// added as well, these bits shifted up are a power of two.
template <class V>
FUSED_RNN_HD V power_of_two(V rounded) {
  return from_bits<V>(bits(rounded) << Constants<Element<V>>::kSignificandBits);
}

// e^x = 2^n e^r with n an integer and |r| <= ln2 / 2, for -kExpZero <= x <= kExpHuge. The power is
// that of n - 1, which is zero for the lowest n: no result is denormal.
template <class V>
FUSED_RNN_HD V exp(V x) {
  using K = Constants<Element<V>>;
  constexpr Element<V> kShift = K::kRound + (K::kBias - 1);
  const V t = x * K::kLog2e + kShift;
  const V n = t - kShift;
  const V r = x - n * K::kLn2High - n * K::kLn2Low;
  const V tail = K::template twice_exp_tail<1>(r);
  return ((tail * r + 2) * r + 2) * power_of_two(t);
}

// 1 / (1 + e^-x). From -kExpHuge down it is exactly zero.
template <class V>
FUSED_RNN_HD V sigmoid(V x) {
  using K = Constants<Element<V>>;
  const V bounded = at_most(at_least(x, -K::kExpHuge), K::kExpZero);
  return quotient(broadcast<V>(1), 1 + exp(-bounded));
}

// m / (m + 1) with the sign of x, where m = (e^2|x| - 1) / 2. With |x| = n ln2 / 2 + r, that is
// 2^n (e^2r - 1) / 2 + (2^n - 1) / 2. Where |x| is small, n is 0 and what is added too; where n is
// large, what ln2 / 2 loses by rounding is lost in 2^n.
template <class V>
FUSED_RNN_HD V tanh(V x) {
  using K = Constants<Element<V>>;
  constexpr Element<V> kShift = K::kRound + K::kBias, kHalf = Element<V>(0.5);
  const V b = at_most(magnitude(x), K::kTanhOne);
  const V t = b * (2 * K::kLog2e) + kShift;
  const V n = t - kShift;
  const V r = b - n * (K::kLn2 / 2);
  const V tail = K::template twice_exp_tail<2>(r);
  const V power = power_of_two(t);
  const V m = (tail * r * r + r) * power + (power * kHalf - kHalf);
  return from_bits<V>(bits(quotient(m, m + 1)) | (bits(x) & K::kSign));
}

// max(x, 0)
template <class V>
FUSED_RNN_HD V relu(V x) {
  return at_least(x, 0);
}

}  // namespace fused_rnn::math
