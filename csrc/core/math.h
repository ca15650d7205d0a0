// The elementary functions of the cells, each written once for every arithmetic type V: float,
// double, or a vector of either declared with __attribute__((vector_size(n))).
//
// NaN propagates, infinities saturate, and no step makes or multiplies a denormal number, which
// many machines do slowly. Errors are below 2.5 units in the last place for sigmoid and 1.5 for
// tanh, with and without contraction to FMA (tests/csrc/test_math.cpp). That takes
// round-to-nearest and no -ffast-math, which would cancel the shift in exp.
#pragma once

#include <stdint.h>

#include "platform.h"

namespace fused_rnn::math {

// Element: what V consists of. Int: V's bits as signed integers, and for vectors also the type of
// a comparison.
template <class V>
struct Arithmetic {
  using Int = decltype(V{} < V{});
  using Element = __typeof__(V{}[0] + V{}[0]);
};
template <>
struct Arithmetic<float> {
  using Int = int32_t;
  using Element = float;
};
template <>
struct Arithmetic<double> {
  using Int = int64_t;
  using Element = double;
};

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
  return condition ? a : b;
}

template <class To, class From>
FUSED_RNN_HD To bits_as(From value) {
  return __builtin_bit_cast(To, value);
}

// c0 + c1 x + c2 x^2 + ...
template <class V>
FUSED_RNN_HD V polynomial(V, Element<V> c0) {
  return broadcast<V>(c0);
}
template <class V, class... Rest>
FUSED_RNN_HD V polynomial(V x, Element<V> c0, Rest... rest) {
  return polynomial(x, rest...) * x + c0;
}

// Numbers of an element type. Those with many digits come from tools/fit_polynomials.py.
template <class E>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693145752f;  // 16 bits, so that n * kLn2High is exact
  static constexpr float kLn2Low = 1.42860682e-6f;
  static constexpr int kSignificandBits = 23;
  static constexpr float kShift = 0x1.8p23f + 126;
  static constexpr float kExpZero = 87.0f;        // rounds to n = -126
  static constexpr float kTanhOne = 9.5f;         // tanh rounds to 1 from 9.02 on
  static constexpr float kTanhLinear = 0x1p-13f;  // tanh rounds to x up to here
  static constexpr Int<float> kSign = INT32_MIN;

  template <class V>
  FUSED_RNN_HD static V twice_exp(V r) {
    return polynomial(r, 2.0f, 2.0f, 1.0f, 0.333331541f, 0.0833331093f, 0.0167263461f,
                      0.00278523522f);
  }
  template <class V>
  FUSED_RNN_HD static V tanh_tail(V u) {
    return polynomial(u, -0.333333289f, 0.133327697f, -0.0538509096f, 0.0209971790f,
                      -0.00609671417f);
  }
};

template <>
struct Constants<double> {
  static constexpr double kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 0.69314718055989033;  // 42 bits
  static constexpr double kLn2Low = 5.4979230187083712e-14;
  static constexpr int kSignificandBits = 52;
  static constexpr double kShift = 0x1.8p52 + 1022;
  static constexpr double kExpZero = 708.5;  // rounds to n = -1022
  static constexpr double kTanhOne = 20.0;   // tanh rounds to 1 from 19.07 on
  static constexpr double kTanhLinear = 0x1p-27;
  static constexpr Int<double> kSign = INT64_MIN;

  template <class V>
  FUSED_RNN_HD static V twice_exp(V r) {
    return polynomial(r, 2.0, 2.0, 1.0000000000000002, 0.33333333333333335, 0.083333333333248324,
                      0.016666666666660129, 0.0027777777834393438, 0.00039682539726081091,
                      4.9603042644737387e-5, 5.5114536960620051e-6, 5.5240151759966733e-7,
                      5.0200751665122467e-8);
  }
  template <class V>
  FUSED_RNN_HD static V tanh_tail(V u) {
    return polynomial(u, -0.33333333333333323, 0.13333333333326658, -0.053968253961395571,
                      0.021869488260559115, -0.0088632298309257087, 0.0035920589774734553,
                      -0.0014553092975346420, 0.00058743728600943819, -0.00023077616269519858,
                      7.9599557352648080e-5, -1.7244874494844330e-5);
  }
};

template <class V>
FUSED_RNN_HD V magnitude(V x) {
  return bits_as<V>(bits_as<Int<V>>(x) & ~Constants<Element<V>>::kSign);
}

// Both keep NaN.
template <class V>
FUSED_RNN_HD V at_least(V x, Element<V> low) {
  return select(x < low, broadcast<V>(low), x);
}
template <class V>
FUSED_RNN_HD V at_most(V x, Element<V> high) {
  return select(x > high, broadcast<V>(high), x);
}

// e^x = 2^n e^r with n an integer and |r| <= ln2 / 2, for -kExpZero <= x <= kExpZero.
// Adding 1.5 * 2^(significand bits) rounds to an integer, which is left in the low bits. kShift
// adds the exponent's bias as well, less one: shifted up, these bits are 2^(n-1), or zero for the
// lowest n, so that results near the denormals are exactly zero and none is denormal.
template <class V>
FUSED_RNN_HD V exp(V x) {
  using K = Constants<Element<V>>;
  const V t = x * K::kLog2e + K::kShift;
  const V n = t - K::kShift;
  const V r = x - n * K::kLn2High - n * K::kLn2Low;
  const V half_scale = bits_as<V>(bits_as<Int<V>>(t) << K::kSignificandBits);
  return K::twice_exp(r) * half_scale;
}

// 1 / (1 + e^-x). Below -kExpZero it is exactly zero, so that a closed gate makes no denormals.
template <class V>
FUSED_RNN_HD V sigmoid(V x) {
  using K = Constants<Element<V>>;
  // Too small to change any result, large enough that a denormal x is not multiplied as one (only
  // the dozen numbers next to its negative are).
  constexpr Element<V> kNoEffect = 0x1.51p-100f;
  const V bounded = at_most(at_least(x + kNoEffect, -K::kExpZero), K::kExpZero);
  return select(x < -K::kExpZero, V{}, 1 / (1 + exp(-bounded)));
}

// 1 - 2 / (e^2|x| + 1) with the sign of x; where that would cancel, a polynomial; where the
// polynomial would multiply denormals, x.
template <class V>
FUSED_RNN_HD V tanh(V x) {
  using K = Constants<Element<V>>;
  constexpr Element<V> kCancels = 0.625;
  const V a = magnitude(x);
  const V b = at_most(at_least(a, K::kTanhLinear), K::kTanhOne);
  const V u = b * b;
  const V small = b + b * (u * K::tanh_tail(u));
  const V large = 1 - 2 / (exp(b + b) + 1);
  const V y = select(a < K::kTanhLinear, a, select(b < kCancels, small, large));
  return bits_as<V>(bits_as<Int<V>>(y) | (bits_as<Int<V>>(x) & K::kSign));
}

// max(x, 0)
template <class V>
FUSED_RNN_HD V relu(V x) {
  return at_least(x, 0);
}

}  // namespace fused_rnn::math
