// Every cell of the registry over rows of units, on one instruction set in one type: setup.py
// compiles this file once for each pair, with the set's flags and name (avx2) in FUSED_RNN_ISA and
// the type (float) in FUSED_RNN_ACCUMULATE.
#include <array>

#include "../cells/registry.h"
#include "cell_rows.h"
#include "zoneout.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {
namespace {

using A = FUSED_RNN_ACCUMULATE;
using V = Vector<A>;
constexpr int L = kLanes<A>;

// Vectors of units that are equally far from one another.
struct Line {
  int64_t count;
  int64_t row, unit, x, h;  // of the first, in step.x and tile.h
  int64_t next_row, next_unit, next_x, next_h;

  void skip(int64_t vectors) {
    count -= vectors;
    row += vectors * next_row;
    unit += vectors * next_unit;
    x += vectors * next_x;
    h += vectors * next_h;
  }
};

// Calls body(line) for what makes up a tile: down the rows of a panel, or from panel to panel,
// which are panel_x and panel_h apart, where that is longer.
template <class Body>
FUSED_RNN_INLINE void for_lines(const Tile<A>& tile, int64_t ldx, int64_t panel_x, int64_t panel_h,
                                Body body) {
  const bool down = tile.rows > tile.panels;
  const int64_t width = tile.vectors * L;
  const int64_t across = down ? panel_x : ldx, across_h = down ? panel_h : tile.ldh;
  for (int64_t i = 0; i < (down ? tile.panels : tile.rows); ++i)
    for (int64_t u = 0; u < width; u += L) {
      const int64_t row = tile.row + (down ? 0 : i), unit = tile.unit + u + (down ? i * width : 0);
      const int64_t x = tile.row * ldx + tile.x_at + u + i * across, h = u + i * across_h;
      body(down ? Line{tile.rows, row, unit, x, h, 1, 0, ldx, tile.ldh}
                : Line{tile.panels, row, unit, x, h, 0, width, panel_x, panel_h});
    }
}

// The weights of a unit as the cell takes them. With kMasked the mask is behind the diagonals.
template <class Cell, bool kMasked, class V>
FUSED_RNN_INLINE auto weights_of(const V* w) {
  if constexpr (kMasked)
    return WithMask<V>{w, w[Cell::kDiagonals]};
  else
    return w;
}

// Calls body(masked), of a type whose value tells whether there is a mask of the candidate: code
// that has none to apply is compiled without.
template <class Cell, class Body>
FUSED_RNN_INLINE void with_mask(const void* candidate_mask, Body body) {
  if constexpr (Cell::kCandidate)
    if (candidate_mask) return body(std::true_type{});
  body(std::false_type{});
}

// The step over a line, keeping what backward reads if kSaves; with a mask of the candidate one
// vector at a time.
template <class Cell, bool kMasked, bool kSaves>
FUSED_RNN_INLINE void forward_line(const ForwardStep<A>& step, const Tile<A>& tile, Line line) {
  constexpr int G = Cell::kGates;
  constexpr bool kHasC = Cell::kStates > 1;
  const auto first = [&](auto* base, int64_t ld) {
    return base ? base + line.row * ld + line.unit : base;
  };
  const auto next = [&](int64_t ld) { return line.next_row * ld + line.next_unit; };
  // All of it in registers: the compiler takes what is written here for what `step` holds.
  const A* x_at = step.x + line.x;
  const A* h_at = tile.h + line.h;
  const A* before = first(step.before, step.ld);
  A* after = first(step.after, step.ld);
  A* also = first(step.also, step.ld_also);
  const A* c_before = first(step.c_before, step.ld);
  A* c_after = first(step.c_after, step.ld);
  const A* mask = first(step.candidate_mask, step.ld);
  A* slot = first(step.saved, step.ld_saved);
  const int64_t next_state = next(step.ld), next_also = next(step.ld_also),
                next_slot = next(step.ld_saved);
  const int64_t x_gate = tile.x_gate, h_gate = tile.h_gate, slot_size = step.slot;
  const int64_t own[] = {step.own[0] * slot_size, step.own[1] * slot_size};
  // The next vectors of the line.
  const auto advance = [&]<class P>(P) __attribute__((always_inline)) {
    constexpr int n = sizeof(P) / sizeof(V);
    P x[G], h[G], w[Cell::kDiagonals + 1], prev[Cell::kStates], state[Cell::kStates],
        saved[Cell::kSaved + 1];
    prev[0] = load_as<P>(before, next_state);
    if constexpr (kHasC) prev[1] = load_as<P>(c_before, next_state);
    for (int p = 0; p < Cell::kDiagonals; ++p)
      w[p] = load_as<P>(step.w + p * step.w_stride + line.unit, line.next_unit);
    if constexpr (kMasked) w[Cell::kDiagonals] = load_as<P>(mask, next_state);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      x[g] = load_as<P>(x_at + g * x_gate, line.next_x);
      if (g >= Cell::kFirstGates)
        h[g] = load_as<P>(h_at + (g - Cell::kFirstGates) * h_gate, line.next_h);
    }
    if constexpr (Cell::kNormedOperand)
      for (int i = 0; i < 2; ++i) h[i] = load_as<P>(h_at + i * h_gate, line.next_h);

    Cell::forward(x, h, weights_of<Cell, kMasked>(w), prev, state, saved);

    store_as(after, next_state, state[0]);
    if (also) {
      store_as(also, next_also, state[0]);
      also += n * next_also;
    }
    if constexpr (kHasC) store_as(c_after, next_state, state[1]);
    if constexpr (kSaves) {
#pragma GCC unroll 2
      for (int s = 0; s < Cell::kStates; ++s) store_as(slot + own[s], next_slot, state[s]);
#pragma GCC unroll 8
      for (int s = 0; s < Cell::kSaved; ++s)
        store_as(slot + (Cell::kStates + s) * slot_size, next_slot, saved[s]);
      slot += n * next_slot;
    }
    x_at += n * line.next_x;
    h_at += n * line.next_h;
    before += n * next_state;
    after += n * next_state;
    if constexpr (kHasC) {
      c_before += n * next_state;
      c_after += n * next_state;
    }
    if constexpr (kMasked) mask += n * next_state;
    if constexpr (Cell::kDiagonals) line.unit += n * line.next_unit;
  };
  int64_t left = line.count;
  if constexpr (!kMasked) {
    if constexpr (kBundle > 2)
      for (; left >= kBundle; left -= kBundle) advance(Bundle<V, kBundle>{});
    for (; left >= 2; left -= 2) advance(Bundle<V, 2>{});
  }
  for (; left > 0; --left) advance(V{});
}

template <class Cell, bool kMasked>
void forward_tile(const ForwardStep<A>& step, const Tile<A>& tile) {
  constexpr int kGatesOfH = Cell::kGates - Cell::kFirstGates;
  const int64_t panel_h = Cell::kNormedOperand ? tile.vectors * L  // one value
                                               : kGatesOfH * tile.h_gate;
  for_lines(tile, step.ldx, Cell::kGates * tile.x_gate, panel_h,
            [&](Line line) __attribute__((always_inline)) {
              step.saved ? forward_line<Cell, kMasked, true>(step, tile, line)
                         : forward_line<Cell, kMasked, false>(step, tile, line);
            });
}

template <class Cell>
void forward_rows(const ForwardStep<A>& step, const Tile<A>& tile) {
  with_mask<Cell>(step.candidate_mask,
                  [&](auto masked) { forward_tile<Cell, masked.value>(step, tile); });
}

template <class Cell, bool kMasked>
void operand_tile(const ForwardStep<A>& step, const Tile<A>& tile) {
  constexpr int F = Cell::kFirstGates;
  for_lines(tile, step.ldx, Cell::kGates * tile.x_gate, F * tile.h_gate, [&](Line line) {
    for (; line.count > 0; line.skip(1)) {
      const int64_t row = line.row, u = line.unit;
      A* gx = step.x + line.x;
      const A* gh = tile.h + line.h;
      V x[F], h[F], first[F];
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) {
        x[g] = load(gx + g * tile.x_gate);
        h[g] = load(gh + g * tile.h_gate);
      }
      V w[Cell::kDiagonals + 1], prev[Cell::kStates];
      const int64_t at = row * step.ld + u;
      prev[0] = load(step.before + at);
      if constexpr (Cell::kStates > 1) prev[1] = load(step.c_before + at);
      for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(step.w + p * step.w_stride + u);
      if constexpr (kMasked) w[Cell::kDiagonals] = load(step.candidate_mask + at);
      V operand = Cell::operand(x, h, weights_of<Cell, kMasked>(w), prev, first);
      if constexpr (Cell::kNormedOperand) {
        store(step.normed + row * step.ld_normed + step.slot + u, operand);
      } else {
        if (step.operand_mask) operand *= load(step.operand_mask + at);
        store(step.operand + at, operand);
      }
#pragma GCC unroll 8
      for (int g = 0; g < F; ++g) store(gx + g * tile.x_gate, first[g]);
    }
  });
}

template <class Cell>
void operand_rows(const ForwardStep<A>& step, const Tile<A>& tile) {
  with_mask<Cell>(step.candidate_mask,
                  [&](auto masked) { operand_tile<Cell, masked.value>(step, tile); });
}

template <class Cell, bool kMasked>
FUSED_RNN_INLINE void load_before(const BackwardRow<A>& at, int64_t u, V* saved, V* w, V* prev) {
#pragma GCC unroll 8
  for (int i = 0; i < Cell::kSaved; ++i) saved[i] = load(at.saved + i * at.slot + u);
  prev[0] = at.h_before ? load(at.h_before + u) : V{};
  if constexpr (Cell::kStates > 1) prev[1] = load(at.c_before + u);
  for (int p = 0; p < Cell::kDiagonals; ++p) w[p] = load(at.w + p * at.slot + u);
  if constexpr (kMasked) w[Cell::kDiagonals] = load(at.candidate_mask + u);
}

template <class Cell, bool kMasked>
void backward_units(const BackwardRow<A>& at) {
  constexpr int G = Cell::kGates;
  for (int64_t u = at.begin; u < at.end; u += L) {
    V saved[Cell::kSaved + 1], prev[Cell::kStates], state[Cell::kStates], d_state[Cell::kStates];
    V w[Cell::kDiagonals + 1], dw[Cell::kDiagonals + 1];
    // A gate that waits for the operand is written later.
    V dx[G] = {}, dh[G] = {}, d_prev[Cell::kStates];
    load_before<Cell, kMasked>(at, u, saved, w, prev);
#pragma GCC unroll 8
    for (int i = 0; i < Cell::kStates; ++i)
      state[i] = load((at.own ? at.own : at.states) + i * at.slot + u);
    d_state[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_state[1] = load(at.dc + u);
    V kept[Cell::kStates] = {};  // gradients of the states before by way of zoneout
    if (at.own) {
#pragma GCC unroll 2
      for (int s = 0; s < Cell::kStates; ++s) {
        if (s == 0 && !at.h_before) continue;
        kept[s] = d_state[s] * zoneout_share(at, s, u, at.valid_c - u);
        d_state[s] -= kept[s];
      }
    }
    Cell::backward(saved, weights_of<Cell, kMasked>(w), prev, state, d_state, dx, dh, d_prev, dw);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      store(at.gates_x + g * at.slot + u, dx[g]);
      if constexpr (!Cell::kSumsGates) store(at.gates_h + g * at.slot + u, dh[g]);
    }
    if constexpr (Cell::kNormedOperand)
      for (int i = 0; i < 2; ++i) store(at.d_operand + i * at.slot + u, dh[i]);
    for (int p = 0; p < Cell::kDiagonals; ++p) store(at.gates_x + (G + p) * at.slot + u, dw[p]);
    store(at.dh + u, at.own ? d_prev[0] + kept[0] : d_prev[0]);
    if constexpr (Cell::kStates > 1) store(at.dc + u, at.own ? d_prev[1] + kept[1] : d_prev[1]);
  }
}

template <class Cell>
void backward_row(const BackwardRow<A>& at) {
  with_mask<Cell>(at.candidate_mask, [&](auto masked) { backward_units<Cell, masked.value>(at); });
}

template <class Cell, bool kMasked>
void operand_backward_units(const BackwardRow<A>& at) {
  constexpr int G = Cell::kGates;
  static_assert(Cell::kSumsGates);
  for (int64_t u = at.begin; u < at.end; u += L) {
    V saved[Cell::kSaved + 1], w[Cell::kDiagonals + 1], prev[Cell::kStates];
    V dx[G], d_prev[Cell::kStates];
    load_before<Cell, kMasked>(at, u, saved, w, prev);
    d_prev[0] = load(at.dh + u);
    if constexpr (Cell::kStates > 1) d_prev[1] = load(at.dc + u);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) dx[g] = load(at.gates_x + g * at.slot + u);
    V d_operand = load(at.d_operand + u);
    if (kTwoProducts<Cell> && at.h_mask) d_operand *= load(at.h_mask + u);
    Cell::operand_backward(saved, weights_of<Cell, kMasked>(w), prev, d_operand, dx, dx, d_prev);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) store(at.gates_x + g * at.slot + u, dx[g]);
    store(at.dh + u, d_prev[0]);
    if constexpr (Cell::kStates > 1) store(at.dc + u, d_prev[1]);
  }
}

template <class Cell>
void operand_backward_row(const BackwardRow<A>& at) {
  with_mask<Cell>(at.candidate_mask,
                  [&](auto masked) { operand_backward_units<Cell, masked.value>(at); });
}

template <class Cell>
void saved_operand(const BackwardRow<A>& at, int64_t begin, int64_t end, A* operand) {
  with_mask<Cell>(at.candidate_mask, [&](auto masked) {
    for (int64_t u = begin; u < end; u += L) {
      V saved[Cell::kSaved + 1], w[Cell::kDiagonals + 1], prev[Cell::kStates];
      load_before<Cell, masked.value>(at, u, saved, w, prev);
      V value = Cell::saved_operand(saved, weights_of<Cell, masked.value>(w), prev);
      if (kTwoProducts<Cell> && at.h_mask) value *= load(at.h_mask + u);
      store(operand + u - begin, value);
    }
  });
}

FUSED_RNN_INLINE void load_all(V* to, int count, const A* from, int64_t n, int64_t i) {
  for (int k = 0; k < count; ++k) to[k] = load_partial(from + k * n + i, n - i);
}
FUSED_RNN_INLINE void store_all(A* to, int count, const V* from, int64_t n, int64_t i) {
  for (int k = 0; k < count; ++k) store_partial(to + k * n + i, from[k], n - i);
}

// What the functions for tests have in common: weights, with the mask behind them, and states.
template <class Cell>
FUSED_RNN_INLINE void load_unit(const A* w, const A* m, const A* prev, int64_t n, int64_t i, V* vw,
                                V* vprev) {
  load_all(vw, Cell::kDiagonals, w, n, i);
  load_all(vw + Cell::kDiagonals, int(Cell::kCandidate), m, n, i);
  load_all(vprev, Cell::kStates, prev, n, i);
}

template <class Cell>
void cell_forward(int64_t n, const A* x, const A* h, const A* w, const A* m, const A* prev,
                  A* state, A* saved) {
  for (int64_t i = 0; i < n; i += L) {
    V vx[Cell::kGates], vh[Cell::kGates], vw[Cell::kDiagonals + 1], vprev[Cell::kStates],
        vstate[Cell::kStates], vsaved[Cell::kSaved + 1];
    load_all(vx, Cell::kGates, x, n, i);
    load_all(vh, Cell::kGates, h, n, i);
    load_unit<Cell>(w, m, prev, n, i, vw, vprev);
    const auto weights = weights_of<Cell, Cell::kCandidate>(vw);
    if constexpr (Cell::kNormedOperand) {
      vh[0] = vh[1] = Cell::operand(vx, vh, weights, vprev, vx);
    } else if constexpr (kTwoProducts<Cell>) {
      const V operand = Cell::operand(vx, vh, weights, vprev, vx);
      for (int g = Cell::kFirstGates; g < Cell::kGates; ++g) vh[g] += operand;
    }
    Cell::forward(vx, vh, weights, vprev, vstate, vsaved);
    store_all(state, Cell::kStates, vstate, n, i);
    store_all(saved, Cell::kSaved, vsaved, n, i);
  }
}

template <class Cell>
void cell_backward(int64_t n, const A* saved, const A* w, const A* m, const A* prev, const A* state,
                   const A* d_state, A* dx, A* dh, A* d_prev, A* dw) {
  for (int64_t i = 0; i < n; i += L) {
    V vsaved[Cell::kSaved + 1], vw[Cell::kDiagonals + 1], vprev[Cell::kStates],
        vstate[Cell::kStates], vd[Cell::kStates];
    V vdx[Cell::kGates], vdh[Cell::kGates], vdprev[Cell::kStates], vdw[Cell::kDiagonals + 1];
    load_all(vsaved, Cell::kSaved, saved, n, i);
    load_unit<Cell>(w, m, prev, n, i, vw, vprev);
    load_all(vstate, Cell::kStates, state, n, i);
    load_all(vd, Cell::kStates, d_state, n, i);
    const auto weights = weights_of<Cell, Cell::kCandidate>(vw);
    Cell::backward(vsaved, weights, vprev, vstate, vd, vdx, vdh, vdprev, vdw);
    if constexpr (kHasOperand<Cell>) {
      V d_operand{};
      if constexpr (Cell::kNormedOperand) d_operand = vdh[0] + vdh[1];
      for (int g = Cell::kFirstGates; g < Cell::kGates; ++g)
        d_operand += Cell::kSumsGates ? vdx[g] : vdh[g];
      Cell::operand_backward(vsaved, weights, vprev, d_operand, vdx, vdh, vdprev);
    }
    store_all(dx, Cell::kGates, vdx, n, i);
    store_all(dh, Cell::kGates, Cell::kSumsGates ? vdx : vdh, n, i);
    store_all(d_prev, Cell::kStates, vdprev, n, i);
    store_all(dw, Cell::kDiagonals, vdw, n, i);
  }
}

template <class Cell>
constexpr CellRows<A> rows_of_cell() {
  CellRows<A> rows{{info_of<Cell>()},
                   forward_rows<Cell>,
                   nullptr,
                   backward_row<Cell>,
                   nullptr,
                   nullptr,
                   {cell_forward<Cell>, cell_backward<Cell>}};
  if constexpr (kHasOperand<Cell>) {
    rows.operand = operand_rows<Cell>;
    rows.operand_backward = operand_backward_row<Cell>;
    rows.saved_operand = saved_operand<Cell>;
  }
  return rows;
}

template <class Function>
void map(int64_t n, const A* x, A* y, Function function) {
  for (int64_t i = 0; i < n; i += L)
    store_partial(y + i, function(load_partial(x + i, n - i)), n - i);
}
void sigmoid(int64_t n, const A* x, A* y) {
  map(n, x, y, [](V v) { return math::sigmoid(v); });
}
void tanh(int64_t n, const A* x, A* y) {
  map(n, x, y, [](V v) { return math::tanh(v); });
}

template <class Cell>
constexpr CellRows<A> kRows = rows_of_cell<Cell>();

template <class... Cs>
constexpr auto all(TypeList<Cs...>) {
  return std::array<const AnyCell*, sizeof...(Cs)>{&kRows<Cs>...};
}
constexpr auto kAll = all(Cells{});

}  // namespace

#define FUSED_RNN_CONCAT(a, b) a##b
#define FUSED_RNN_TABLE(type) FUSED_RNN_CONCAT(k_, type)
extern const CellTableOf<A> FUSED_RNN_TABLE(FUSED_RNN_ACCUMULATE);
constexpr CellTableOf<A> FUSED_RNN_TABLE(FUSED_RNN_ACCUMULATE) = {
    {kAll.data(), int(kAll.size())}, sigmoid, tanh};

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
