// The weights of one layer and direction as the forward scan reads them. A call packs them into its
// workspace; frozen weights were packed before, into a block with a tag at its head.
#pragma once

#include "isa.h"
#include "scan.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

template <class S>
struct PackedWeights {
  using A = Accumulate<S>;
  using W = Packed<S>;
  // The part of W_hh that is multiplied at once: some gates of it.
  struct Recurrent {
    int first;  // gate
    int gates;
    W* packed;  // panels of [R, gates*Hp], null where W_hh is read as it is
    A* bias;    // [gates*Hp] in panel order
  };

  W* ih;       // panels of [I, G*Hp], null where W_ih is read as it is
  W* hr;       // panels of [H, Rp]
  A* bias_ih;  // [G*Hp] in panel order
  A* gain_ih;  // the same, null where nothing is normalised
  A* gain_hh;
  Recurrent recurrent[2];  // the second has no gates but where a cell has two products
  A* diag;                 // [P, Hp], gains included

  void lay_out(Arena& arena, const CellInfo& cell, const WeightSizes& sizes, bool pack_ih,
               bool pack_hh) {
    const int64_t Hp = pad_units(sizes.H);
    ih = arena.take<W>(pack_ih ? cell.gates * Hp * packed_rows<W>(sizes.I) : 0);
    const int first = cell.two_products() ? cell.first_gates : cell.gates;
    recurrent[0] = {0, first, nullptr, nullptr};
    recurrent[1] = {first, cell.gates - first, nullptr, nullptr};
    for (Recurrent& product : recurrent) {
      const bool pack = pack_hh && cell.recurrent;
      product.packed = arena.take<W>(pack ? product.gates * Hp * packed_rows<W>(sizes.R) : 0);
      product.bias = arena.take<A>(product.gates * Hp);
    }
    hr = arena.take<W>(pack_hh && sizes.projected ? pad_units(sizes.R) * packed_rows<W>(sizes.H)
                                                  : 0);
    bias_ih = arena.take<A>(cell.gates * Hp);
    gain_ih = arena.take<A>(cell.norm_gates ? cell.gates * Hp : 0);
    gain_hh = arena.take<A>(cell.norm_gates ? cell.gates * Hp : 0);
    diag = arena.take<A>(cell.unit_weights() * Hp);
  }

  // Packs those panels of some units for which mine() is true; it is asked once for each, in one
  // order.
  template <class Mine>
  void pack(const CellInfo& cell, const WeightSizes& sizes, const Weights& w, Range units,
            Mine mine) const {
    const auto gates_of = [&](const void* weight, const void* bias, int first, int gates, int64_t K,
                              W* packed, A* packed_bias) {
      if (gates == 0) return;
      for_panels<A>(gates, units.begin, units.end, [&](int64_t unit, int vectors) {
        if (!mine()) return;
        const auto from = [&](const void* rows, int64_t columns) {
          return rows ? static_cast<const S*>(rows) + first * sizes.H * columns : nullptr;
        };
        pack_bias<S>(from(bias, 1), gates, sizes.H, unit, vectors, packed_bias + unit * gates);
        if (packed)
          pack_transposed<S>(from(weight, K), K, gates, sizes.H, K, unit, vectors,
                             packed + unit * gates * packed_rows<W>(K));
      });
    };
    gates_of(w.ih, w.bias_ih, 0, cell.gates, sizes.I, ih, bias_ih);
    for (const Recurrent& r : recurrent)
      gates_of(w.hh, w.bias_hh, r.first, r.gates, sizes.R, r.packed, r.bias);
    if (hr)
      for_panels<A>(1, 0, pad_units(sizes.R), [&](int64_t unit, int vectors) {
        if (mine())
          pack_transposed<S>(static_cast<const S*>(w.hr), sizes.H, 1, sizes.R, sizes.H, unit,
                             vectors, hr + unit * packed_rows<W>(sizes.H));
      });
    if (cell.norm_gates)
      for_panels<A>(cell.gates, units.begin, units.end, [&](int64_t unit, int vectors) {
        if (!mine()) return;
        const S* gains = static_cast<const S*>(w.diag) + cell.diagonals * sizes.H;
        const int64_t at = unit * cell.gates;
        pack_bias<S>(gains, cell.gates, sizes.H, unit, vectors, gain_ih + at);
        pack_bias<S>(gains + cell.gates * sizes.H, cell.gates, sizes.H, unit, vectors,
                     gain_hh + at);
      });
    if (cell.unit_weights() && mine())
      pack_diagonals(static_cast<const S*>(w.diag), cell.unit_weights(), sizes.H, units.begin,
                     units.end, diag);
  }
};

// The weights in a block of frozen ones, and how long it is. Their panels are those of all units:
// whoever works on some units must work on whole panels (panel_step).
template <class S>
PackedWeights<S> weights_in(void* block, const CellInfo& cell, const WeightSizes& sizes,
                            size_t* bytes = nullptr) {
  Arena arena(block);
  arena.take<PackedTag>(1);
  PackedWeights<S> weights;
  weights.lay_out(arena, cell, sizes, true, true);
  if (bytes) *bytes = arena.used();
  return weights;
}

// Units after which a panel begins in every product of a cell: all of them are powers of two.
template <class A>
int64_t widest_panel(const CellInfo& cell) {
  int64_t units = 1;
  const int parts[] = {cell.gates, cell.first_gates, cell.gates - cell.first_gates};
  for (const int gates : parts)
    if (gates && panel_units<A>(gates) > units) units = panel_units<A>(gates);
  return units;
}
template <class S>
int64_t panel_step(const CellInfo& cell) {
  const int64_t units = widest_panel<Accumulate<S>>(cell);
  return units > kUnitPad ? units : kUnitPad;
}

template <class S>
size_t packed_bytes(const CellInfo& cell, const WeightSizes& sizes) {
  size_t bytes = 0;
  weights_in<S>(nullptr, cell, sizes, &bytes);
  return bytes;
}

template <class S>
void pack_weights(const CellInfo& cell, const WeightSizes& sizes, const Weights& weights,
                  void* block) {
  weights_in<S>(block, cell, sizes).pack(cell, sizes, weights, {0, pad_units(sizes.H)}, [] {
    return true;
  });
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
