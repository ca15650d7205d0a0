// Layer normalisation of a row, over the units of some gates together.
#pragma once

#include "../core/norm.h"
#include "pack.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// Where the gates [begin, end) of a row stand: each(body) calls body(at, gate, unit) for every
// vector.
template <class A>
struct GatesInSlots {  // gates of Hp units one after another
  int begin, end;
  int64_t Hp;
  template <class Body>
  FUSED_RNN_INLINE void each(Body body) const {
    for (int g = begin; g < end; ++g)
      for (int64_t u = 0; u < Hp; u += kLanes<A>) body(g * Hp + u, g, u);
  }
};
template <class A>
struct GatesInPanels {  // as the packed weights give them
  int begin, end, gates;
  int64_t Hp;
  template <class Body>
  FUSED_RNN_INLINE void each(Body body) const {
    for_panels<A>(gates, 0, Hp, [&](int64_t unit, int vectors) {
      for (int g = begin; g < end; ++g)
        for (int v = 0; v < vectors; ++v)
          body(unit * gates + (g * vectors + v) * kLanes<A>, g, unit + v * kLanes<A>);
    });
  }
};

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
struct Moments : RowMoments<A> {
  using RowMoments<A>::mean, RowMoments<A>::rstd;

  // Of H units of each gate.
  template <class Gates>
  Moments(const Gates& gates, int64_t H, const A* row) {
    const A count = A(gates.end - gates.begin) * A(H);
    Vector<A> sum{};
    gates.each([&](int64_t at, int, int64_t) { sum += load(row + at); });
    mean = sum_of_lanes<A>(sum) / count;
    Vector<A> squares{};
    gates.each([&](int64_t at, int, int64_t u) {
      const Vector<A> d = only_units<A>(load(row + at) - mean, H - u);
      squares += d * d;
    });
    rstd = rstd_of(sum_of_lanes<A>(squares) / count);
  }
};

// y may be the row itself. Gain and shift stand like the row; its padding must be zero.
template <class A, class Gates>
void normalise(const Gates& gates, int64_t H, const A* row, const A* gain, const A* shift, A* y) {
  const Moments<A> moments(gates, H, row);
  gates.each([&](int64_t at, int, int64_t) {
    store(y + at, moments.scaled(load(row + at), load(gain + at), load(shift + at)));
  });
}

// From the gradient of y to that of the row, which may be in the same place, and of the gain.
template <class A, class Gates>
void normalise_backward(const Gates& gates, int64_t H, const A* row, const A* gain, const A* dy,
                        A* d_row, A* d_gain) {
  const Moments<A> moments(gates, H, row);
  const A count = A(gates.end - gates.begin) * A(H);
  Vector<A> sum{}, sum_with{};
  gates.each([&](int64_t at, int, int64_t) {
    const Vector<A> xhat = moments.normalised(load(row + at)), d = load(dy + at);
    const Vector<A> weighed = d * load(gain + at);
    store(d_gain + at, d * xhat);
    sum += weighed;
    sum_with += weighed * xhat;
  });
  const A mean = sum_of_lanes<A>(sum) / count, mean_with = sum_of_lanes<A>(sum_with) / count;
  gates.each([&](int64_t at, int, int64_t u) {
    const Vector<A> xhat = moments.normalised(load(row + at));
    const Vector<A> d = moments.backward(load(dy + at) * load(gain + at), xhat, mean, mean_with);
    store(d_row + at, only_units<A>(d, H - u));
  });
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
