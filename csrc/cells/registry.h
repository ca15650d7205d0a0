// The cells there are. A cell added to `Cells` is compiled for every schedule and walked by the
// tests.
#pragma once

#include "../core/problem.h"
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fused_rnn {

template <Cell... Cs>
struct TypeList {};

using Cells = TypeList<LSTM, PeepholeLSTM, CoupledLSTM, LayerNormLSTM, GRU, GRUResetBefore,
                       LayerNormGRU, RNNTanh, RNNRelu, IndRNNTanh, IndRNNRelu>;

template <Cell C>
FUSED_RNN_INLINE constexpr CellInfo info_of() {
  return {C::kName,      C::kGates,         C::kStates,    C::kSaved,
          C::kDiagonals, C::kFirstGates,    C::kRecurrent, C::kSumsGates,
          C::kNormGates, C::kNormedOperand, C::kCandidate};
}

template <Cell C>
constexpr int kUnitWeights = info_of<C>().unit_weights();

FUSED_RNN_INLINE constexpr bool same_name(const char* a, const char* b) {
  while (*a != '\0' && *a == *b) {
    ++a;
    ++b;
  }
  return *a == *b;
}

// Calls visitor.operator()<C>() for each cell in turn.
template <class... Cs, class Visitor>
FUSED_RNN_INLINE constexpr void for_each_cell(TypeList<Cs...>, Visitor&& visitor) {
  (visitor.template operator()<Cs>(), ...);
}

// Calls visitor.operator()<C>() for the cell of that name, or returns false where there is none.
template <class... Cs, class Visitor>
FUSED_RNN_INLINE constexpr bool visit_cell(TypeList<Cs...>, const char* name, Visitor&& visitor) {
  return ((same_name(name, Cs::kName) && (visitor.template operator()<Cs>(), true)) || ...);
}

}  // namespace fused_rnn
