// Every cell of the registry: its backward against finite differences of its forward, its vector
// form against its scalar form, and its manners.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cells/registry.h"
#include "check.h"

namespace {

using namespace fused_rnn;
using check::Vector;

// A cell with a mask of its candidate, which stands behind the diagonals.
template <class C>
struct Masked : C {
  template <class V>
  static WithMask<V> with_mask(const V* w) {
    return {w, w[C::kDiagonals]};
  }
  template <class V>
  static void forward(const V* x, const V* h, const V* w, const V* prev, V* state, V* saved) {
    C::forward(x, h, with_mask(w), prev, state, saved);
  }
  template <class V>
  static void backward(const V* saved, const V* w, const V* prev, const V* state, const V* d_state,
                       V* dx, V* dh, V* d_prev, V* dw) {
    C::backward(saved, with_mask(w), prev, state, d_state, dx, dh, d_prev, dw);
  }
  template <class V>
  static V operand(const V* x, const V* h, const V* w, const V* prev, V* first) {
    return C::operand(x, h, with_mask(w), prev, first);
  }
  template <class V>
  static void operand_backward(const V* saved, const V* w, const V* prev, V d_operand, V* dx, V* dh,
                               V* d_prev) {
    C::operand_backward(saved, with_mask(w), prev, d_operand, dx, dh, d_prev);
  }
};

// The arguments and results of one unit, as the contract names them.
template <class C, class V>
struct Unit {
  // kSaved may be 0, an array may not.
  static constexpr int kSavedRoom = C::kSaved + 1;
  static constexpr int kDiagonalRoom = C::kDiagonals + 1;
  V x[C::kGates], h[C::kGates], w[kDiagonalRoom], prev[C::kStates], d_state[C::kStates];
  V state[C::kStates], saved[kSavedRoom];
  V dx[C::kGates], dh[C::kGates], d_prev[C::kStates], dw[kDiagonalRoom];

  // The matrix of a second product is taken for one: h is what is added to the operand. A norm
  // changes nothing.
  void forward() { forward(prev, state); }
  void forward(const V* before, V* after) {
    V gates_x[C::kGates], gates_h[C::kGates];
    for (int g = 0; g < C::kGates; ++g) {
      gates_x[g] = x[g];
      gates_h[g] = h[g];
    }
    if constexpr (C::kNormedOperand) {
      gates_h[0] = gates_h[1] = C::operand(x, h, w, before, gates_x);
    } else if constexpr (kTwoProducts<C>) {
      const V operand = C::operand(x, h, w, before, gates_x);
      for (int g = C::kFirstGates; g < C::kGates; ++g) gates_h[g] += operand;
    }
    C::forward(gates_x, gates_h, w, before, after, saved);
  }
  void backward() { backward(d_state, d_prev); }
  void backward(const V* d_after, V* d_before) {
    V d_normed[C::kGates];
    C::backward(saved, w, prev, state, d_after, dx, C::kNormedOperand ? d_normed : dh, d_before,
                dw);
    if constexpr (kHasOperand<C>) {
      V d_operand{};
      if constexpr (C::kNormedOperand) d_operand = d_normed[0] + d_normed[1];
      for (int g = C::kFirstGates; g < C::kGates; ++g) d_operand += C::kSumsGates ? dx[g] : dh[g];
      C::operand_backward(saved, w, prev, d_operand, dx, dh, d_before);
    }
  }
};

// Every value of a Unit seen as an array of E, lane by lane within each V.
template <class E, class U>
E* elements(U& unit) {
  return reinterpret_cast<E*>(&unit);
}

template <class C, class V, class E>
Unit<C, V> draw(std::mt19937_64& random, E scale) {
  std::normal_distribution<E> normal(0, scale);
  Unit<C, V> unit;
  constexpr size_t kCount = sizeof(unit) / sizeof(E);
  constexpr size_t kInputs =
      (2 * C::kGates + 2 * C::kStates + C::kDiagonals + 1) * sizeof(V) / sizeof(E);
  E* values = elements<E>(unit);
  for (size_t i = 0; i < kCount; ++i) {
    values[i] = i < kInputs ? normal(random) : std::numeric_limits<E>::quiet_NaN();
  }
  return unit;
}

template <class C>
double loss(Unit<C, double> unit) {
  unit.forward();
  double sum = 0;
  for (int s = 0; s < C::kStates; ++s) sum += unit.d_state[s] * unit.state[s];
  return sum;
}

// d loss / d argument, for the argument that is `offset` doubles into the Unit.
template <class C>
double finite_difference(const Unit<C, double>& unit, size_t offset) {
  constexpr double kStep = 1e-5;
  Unit<C, double> above = unit, below = unit;
  elements<double>(above)[offset] += kStep;
  elements<double>(below)[offset] -= kStep;
  return (loss(above) - loss(below)) / (2 * kStep);
}

// The seed is fixed, and no draw comes within the step of relu's kink.
template <class C>
void backward_is_the_derivative() {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 1000; ++trial) {
    Unit<C, double> unit = draw<C, double, double>(random, 1.5);
    unit.forward();
    unit.backward();
    const auto agree = [&](const char* what, int index, double ours, const double& argument) {
      const size_t offset = &argument - elements<double>(unit);
      const double expected = finite_difference<C>(unit, offset);
      check::that(std::abs(ours - expected) <= 1e-8, "%s %s[%d] = %.12g, not %.12g", C::kName, what,
                  index, ours, expected);
    };
    for (int g = 0; g < C::kGates; ++g) {
      agree("dx", g, unit.dx[g], unit.x[g]);
      agree("dh", g, C::kSumsGates ? unit.dx[g] : unit.dh[g], unit.h[g]);
      check::that(C::kSumsGates == std::isnan(unit.dh[g]), "%s writes dh[%d]", C::kName, g);
    }
    for (int s = 0; s < C::kStates; ++s) agree("d_prev", s, unit.d_prev[s], unit.prev[s]);
    for (int p = 0; p < C::kDiagonals; ++p) agree("dw", p, unit.dw[p], unit.w[p]);
    check::that(std::isnan(unit.dw[C::kDiagonals]), "%s writes behind dw", C::kName);
    check::that(std::isnan(unit.saved[C::kSaved]), "%s writes behind saved", C::kName);
  }
}

// Up to the product that the compiler chooses to fuse in f c + i g.
template <class C, class V, class E>
void vector_equals_scalar() {
  constexpr size_t kLanes = sizeof(V) / sizeof(E);
  constexpr size_t kCount = sizeof(Unit<C, E>) / sizeof(E);
  constexpr E kTolerance = 8 * std::numeric_limits<E>::epsilon();
  std::mt19937_64 random(4);
  for (int trial = 0; trial < 1000; ++trial) {
    Unit<C, V> vector = draw<C, V, E>(random, E(3));
    Unit<C, E> scalar[kLanes];
    for (size_t lane = 0; lane < kLanes; ++lane) {
      for (size_t i = 0; i < kCount; ++i) {
        elements<E>(scalar[lane])[i] = elements<E>(vector)[i * kLanes + lane];
      }
      scalar[lane].forward();
      scalar[lane].backward();
    }
    vector.forward();
    vector.backward();
    for (size_t i = 0; i < kCount * kLanes; ++i) {
      const E a = elements<E>(vector)[i], b = elements<E>(scalar[i % kLanes])[i / kLanes];
      const bool equal =
          std::isnan(a) ? std::isnan(b) : std::abs(a - b) <= kTolerance * (1 + std::abs(b));
      check::that(equal, "%s value %zu, lane %zu of %zu: %a, scalar %a", C::kName, i / kLanes,
                  i % kLanes, kLanes, double(a), double(b));
    }
  }
}

// A scan may keep the states of a unit in one place, and their gradients.
template <class C>
void results_may_overwrite_arguments() {
  std::mt19937_64 random(5);
  Unit<C, double> apart = draw<C, double, double>(random, 1.5);
  Unit<C, double> shared = apart;
  apart.forward();
  apart.backward();
  shared.forward(shared.prev, shared.prev);
  for (int s = 0; s < C::kStates; ++s) {
    check::that(check::same_bits(shared.prev[s], apart.state[s]), "%s state[%d]", C::kName, s);
  }
  for (int s = 0; s < C::kStates; ++s) {
    shared.prev[s] = apart.prev[s];
    shared.state[s] = apart.state[s];
  }
  shared.backward(shared.d_state, shared.d_state);
  for (int s = 0; s < C::kStates; ++s) {
    check::that(check::same_bits(shared.d_state[s], apart.d_prev[s]), "%s d_prev[%d]", C::kName, s);
  }
  for (int g = 0; g < C::kGates; ++g) {
    check::that(check::same_bits(shared.dx[g], apart.dx[g]), "%s dx[%d]", C::kName, g);
  }
}

template <class C, class E>
void nan_reaches_h() {
  std::mt19937_64 random(6);
  for (int argument = 0; argument < 2 * C::kGates; ++argument) {
    Unit<C, E> unit = draw<C, E, E>(random, 1);
    elements<E>(unit)[argument] = std::numeric_limits<E>::quiet_NaN();
    unit.forward();
    check::that(std::isnan(unit.state[0]), "%s loses a NaN of pre-activation %d", C::kName,
                argument);
  }
}

// Infinite pre-activations from the input, of every combination of signs, give numbers.
template <class C, class E>
void infinities_saturate() {
  std::mt19937_64 random(7);
  for (int signs = 0; signs < 1 << C::kGates; ++signs) {
    Unit<C, E> unit = draw<C, E, E>(random, 1);
    for (int g = 0; g < C::kGates; ++g) {
      unit.x[g] = std::numeric_limits<E>::infinity();
      if (signs >> g & 1) unit.x[g] = -unit.x[g];
    }
    unit.forward();
    unit.backward();
    for (int s = 0; s < C::kStates; ++s) {
      check::that(!std::isnan(unit.state[s]), "%s state[%d], signs %d", C::kName, s, signs);
      check::that(!std::isnan(unit.d_prev[s]), "%s d_prev[%d], signs %d", C::kName, s, signs);
    }
    for (int g = 0; g < C::kGates; ++g) {
      check::that(!std::isnan(unit.dx[g]), "%s dx[%d], signs %d", C::kName, g, signs);
    }
  }
}

template <class C>
void a_mask_of_one_changes_no_bit() {
  std::mt19937_64 random(8);
  for (int trial = 0; trial < 100; ++trial) {
    Unit<Masked<C>, double> masked = draw<Masked<C>, double, double>(random, 1.5);
    Unit<C, double> plain;
    masked.w[C::kDiagonals] = 1;
    for (size_t i = 0; i < sizeof(plain) / sizeof(double); ++i)
      elements<double>(plain)[i] = elements<double>(masked)[i];
    masked.forward();
    plain.forward();
    for (int s = 0; s < C::kStates; ++s)
      check::that(check::same_bits(masked.state[s], plain.state[s]), "%s state[%d]", C::kName, s);
  }
}

template <class C, class E>
void test() {
  vector_equals_scalar<C, Vector<E, 16>, E>();
  vector_equals_scalar<C, Vector<E, 32>, E>();
  vector_equals_scalar<C, Vector<E, 64>, E>();
  nan_reaches_h<C, E>();
  infinities_saturate<C, E>();
}

}  // namespace

int main() {
  int cells = 0;
  for_each_cell(Cells{}, [&]<class C>() {
    backward_is_the_derivative<C>();
    results_may_overwrite_arguments<C>();
    test<C, float>();
    test<C, double>();
    if constexpr (C::kCandidate) {
      a_mask_of_one_changes_no_bit<C>();
      backward_is_the_derivative<Masked<C>>();
      results_may_overwrite_arguments<Masked<C>>();
      vector_equals_scalar<Masked<C>, Vector<float, 32>, float>();
      vector_equals_scalar<Masked<C>, Vector<double, 32>, double>();
    }
    bool found = false;
    const bool visited =
        visit_cell(Cells{}, C::kName, [&]<class D>() { found = C::kName == D::kName; });
    check::that(visited && found, "%s is not found by its name", C::kName);
    ++cells;
  });
  check::that(cells > 0, "there are no cells");
  for (const char* name : {"", "lst", "lstm_", "LSTM"}) {
    check::that(!visit_cell(Cells{}, name, []<class>() {}), "there is a cell called '%s'", name);
  }
  return check::finish();
}
