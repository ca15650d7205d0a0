// Layer normalisation of a row, over the units of some gates together.
#pragma once

#include "../core/norm.h"
#include "pack.h"
#include "strategy.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// A sum over a row is kept in so many parts: one alone would wait for each addition.
constexpr int kChains = 4;

// Where the gates of a row stand that are normalised together. each(body) calls
// body(at, valid, chain) for every vector, with how many of its lanes are units, a constant where
// it is all of them, and the part of a sum that it belongs to. each_of(units, body) calls
// body(at, valid) for those of some units, in one loop whatever units they are: the compiler may
// round another one differently. They begin with a panel, as a member's units do, since a panel of
// three gates or more has no more units than kUnitPad.
template <class A>
struct GatesInSlots {  // gates of Hp units one after another
  int begin, count;
  int64_t H, Hp;

  template <class Body>
  FUSED_RNN_INLINE void each(Body body) const {
    constexpr int L = kLanes<A>;
    for (int g = begin; g < begin + count; ++g) {
      int64_t u = 0;
      for (; u + kChains * L <= H; u += kChains * L)
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i)
          body(g * Hp + u + i * L, std::integral_constant<int, L>{}, i);
      for (; u < Hp; u += L) body(g * Hp + u, H - u, 0);
    }
  }
  template <class Body>
  FUSED_RNN_INLINE void each_of(Range units, Body body) const {
    for (int g = begin; g < begin + count; ++g)
      for (int64_t u = units.begin; u < units.end; u += kLanes<A>) body(g * Hp + u, H - u);
  }
};
template <class A, int kCount>
struct GatesInPanels {  // as the packed weights give them
  int begin;
  static constexpr int count = kCount;
  int64_t H, Hp;
  int gates;  // of all

  template <class Body>
  FUSED_RNN_INLINE void each(Body body) const {
    constexpr int L = kLanes<A>;
    constexpr int at_once = count < kChains ? kChains / count : 1;
    int64_t u = 0;
    for (; kMaxVectors / gates == 1 && u + at_once * L <= H; u += at_once * L)
#pragma GCC unroll 4
      for (int i = 0; i < at_once; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < count; ++g)
          body((u + i * L) * gates + (begin + g) * L, std::integral_constant<int, L>{},
               i * count + g);
    const int64_t width = panel_units<A>(gates);
    for (; u < Hp; u += L) {
      const int64_t unit = u / width * width, gate = Hp - unit < width ? Hp - unit : width;
#pragma GCC unroll 4
      for (int g = 0; g < count; ++g) body(unit * gates + (begin + g) * gate + u - unit, H - u, g);
    }
  }
  template <class Body>
  FUSED_RNN_INLINE void each_of(Range units, Body body) const {
    constexpr int L = kLanes<A>;
    if (kMaxVectors / gates == 1) {
      for (int64_t u = units.begin; u < units.end; u += L)
#pragma GCC unroll 4
        for (int g = 0; g < count; ++g) body(u * gates + (begin + g) * L, H - u);
      return;
    }
    for_panels<A>(gates, units.begin, units.end, [&](int64_t unit, int vectors) {
      for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 4
        for (int g = 0; g < count; ++g)
          body(unit * gates + ((begin + g) * vectors + v) * L, H - unit - v * L);
    });
  }
};

// Calls body(count) with the number of gates as a constant.
template <class Body>
FUSED_RNN_INLINE void with_count(int count, Body body) {
  if (count == 4) return body(std::integral_constant<int, 4>{});
  if (count == 3) return body(std::integral_constant<int, 3>{});
  if (count == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}

// v in the lanes of units that there are, zero in the padding.
template <class A>
FUSED_RNN_INLINE Vector<A> only_units(Vector<A> v, int64_t valid) {
  if (valid >= kLanes<A>) return v;
  A lanes[kLanes<A>];
  store(lanes, v);
  return load_partial(lanes, valid > 0 ? valid : 0);
}

template <class A, int span = kLanes<A> / 2>
FUSED_RNN_INLINE A sum_of_lanes(Vector<A> v) {
  if constexpr (span == 0) {
    return v[0];
  } else {
    Vector<A> other = v;
    swap_blocks<A, span>(v, other, std::make_integer_sequence<int, kLanes<A>>{});
    return sum_of_lanes<A, span / 2>(v + other);
  }
}

template <class A>
struct Sum {
  Vector<A> chains[kChains] = {};
  FUSED_RNN_INLINE Vector<A> over(A count) const {
    const Vector<A> sum = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    return sum_of_lanes<A>(sum) / count - Vector<A>{};
  }
};

template <class A, class Gates>
FUSED_RNN_INLINE RowMoments<Vector<A>> moments_of(const Gates& gates, const A* row) {
  const A count = A(gates.count) * A(gates.H);
  Sum<A> sum, squares;
  gates.each([&](int64_t at, auto, int chain)
                 __attribute__((always_inline)) { sum.chains[chain] += load(row + at); });
  const Vector<A> mean = sum.over(count);
  gates.each([&](int64_t at, auto valid, int chain) __attribute__((always_inline)) {
    const Vector<A> d = only_units<A>(load(row + at) - mean, valid);
    squares.chains[chain] += d * d;
  });
  return {mean, rstd_of(squares.over(count)[0]) - Vector<A>{}};
}

// Some units of a row that is there as a whole. y may be the row itself where they are all. Gain
// and shift stand like the row; the padding of all must be zero.
template <class A, class Gates>
void normalise(const Gates& gates, Range units, const A* row, const A* gain, const A* shift, A* y) {
  const RowMoments<Vector<A>> moments = moments_of<A>(gates, row);
  gates.each_of(units, [&](int64_t at, int64_t) __attribute__((always_inline)) {
    store(y + at, moments.scaled(load(row + at), load(gain + at), load(shift + at)));
  });
}

// From the gradient of y, which is there as a whole, to those of some units of the row, as
// store_row(at, gradient), and to that of the gain, which is added to.
template <class A, class Store>
FUSED_RNN_INLINE void normalise_backward(const GatesInSlots<A>& gates, Range units, const A* row,
                                         const A* gain, const A* dy, A* d_gain, Store store_row) {
  const RowMoments<Vector<A>> moments = moments_of<A>(gates, row);
  const A count = A(gates.count) * A(gates.H);
  Sum<A> sum, sum_with;
  gates.each([&](int64_t at, auto, int chain) __attribute__((always_inline)) {
    const Vector<A> weighed = load(dy + at) * load(gain + at);
    sum.chains[chain] += weighed;
    sum_with.chains[chain] += weighed * moments.normalised(load(row + at));
  });
  const Vector<A> mean = sum.over(count), mean_with = sum_with.over(count);
  gates.each_of(units, [&](int64_t at, int64_t valid) __attribute__((always_inline)) {
    const Vector<A> d = load(dy + at), xhat = moments.normalised(load(row + at));
    store(d_gain + at, load(d_gain + at) + d * xhat);
    store_row(at,
              only_units<A>(moments.backward(d * load(gain + at), xhat, mean, mean_with), valid));
  });
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
