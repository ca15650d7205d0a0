// What a scan is asked to do: raw pointers, sizes and strides. Knows neither torch nor a cell.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "platform.h"

namespace fused_rnn {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The units of a layer are padded to this many in every buffer of our own, whatever the vector
// length, so that no loop over units has a tail and `saved` has one shape on every machine.
constexpr int64_t kUnitPad = 16;

inline constexpr int64_t pad_units(int64_t units) {
  return (units + kUnitPad - 1) / kUnitPad * kUnitPad;
}

// A cell as numbers: the constants of its struct in csrc/cells/.
struct CellInfo {
  const char* name;
  int gates;
  int states;
  int saved;
  int diagonals;
  int first_gates;
  bool recurrent;
  bool sums_gates;
  int norm_gates;
  bool normed_operand;
  bool candidate;

  constexpr bool two_products() const { return first_gates > 0 && !normed_operand; }
  // What a step is made of, each a whole of all units before the next begins: the products and the
  // cell, an operand between, norms between.
  constexpr int stages() const { return 1 + (first_gates > 0) + (norm_gates > 0); }
  // Gains of the gates from x and of those from h, then gain and shift of the operand.
  constexpr int gains() const { return norm_gates ? 2 * gates + 2 * normed_operand : 0; }
  // Parameters of a unit besides its rows of the matrices and the biases.
  constexpr int unit_weights() const { return diagonals + gains(); }
};

// The rows (t, b) of a batch of sequences, numbered in time-major order. Ragged batches are sorted
// by length, longest first, as in PackedSequence: step t has the rows b < rows(t).
struct Steps {
  int64_t T = 0;
  int64_t B = 0;
  int64_t N = 0;                         // rows in all: T*B, or the sum of batch_sizes
  const int64_t* batch_sizes = nullptr;  // [T], null for a dense batch
  const int64_t* offsets = nullptr;      // [T]: rows before step t, null for a dense batch
  const int64_t* lengths = nullptr;      // [B]: steps of sequence b, null for a dense batch
  // [B]: where sequence b stands in the tensors that are not packed, null where it is row b.
  const int64_t* order = nullptr;

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
  int64_t place(int64_t b) const { return order ? order[b] : b; }
};

// A [T, B, features] tensor of any strides (in elements) with contiguous features, or the rows of
// all steps one after another.
struct Sequence {
  void* data = nullptr;
  int64_t stride_t = 0;  // unused when packed
  int64_t stride_b = 0;
  bool packed = false;

  // Elements before step t of sequence b.
  FUSED_RNN_INLINE int64_t at(const Steps& steps, int64_t t, int64_t b) const {
    return packed ? (steps.offset(t) + b) * stride_b : t * stride_t + steps.place(b) * stride_b;
  }
};

// Parameters of one layer and direction, row-major as in torch.nn. Null where absent.
struct Weights {
  const void* ih = nullptr;       // [G*H, I]
  const void* hh = nullptr;       // [G*H, R]
  const void* bias_ih = nullptr;  // [G*H]
  const void* bias_hh = nullptr;  // [G*H]
  const void* hr = nullptr;       // [R, H], the projection
  const void* diag = nullptr;     // [P*H], recurrent weights of units to themselves, and gains
  // All of them in one block, packed beforehand (cpu/packed.h). The others are then not read; that
  // hr is there still tells of a projection.
  const void* packed = nullptr;
};

// What the parameters of one layer and direction are measured by.
struct WeightSizes {
  int64_t I = 0;
  int64_t H = 0;
  int64_t R = 0;
  bool projected = false;
};

struct WeightGrads {
  void* ih = nullptr;
  void* hh = nullptr;
  void* bias_ih = nullptr;
  void* bias_hh = nullptr;
  void* hr = nullptr;
  void* diag = nullptr;
};

// What forward and backward have in common.
struct Stack {
  Steps steps;
  int64_t I = 0;  // features of the input
  int64_t H = 0;  // units
  int64_t R = 0;  // features of h: proj_size, or H
  int64_t layers = 1;
  int64_t dirs = 1;
  Sequence input;                    // [T, B, I]
  const void* h0 = nullptr;          // [L*D, B, R] contiguous, null for zeros
  const void* c0 = nullptr;          // [L*D, B, H]
  const Weights* weights = nullptr;  // [L*D]
  int64_t weight_bytes = 4;          // of an element, in memory and packed
  // uint8 [T, B]: a new sequence begins at this step. Data null for none.
  Sequence reset;
  bool reset_to_initial = false;  // it begins with h0 and c0 instead of zeros
  // Zoneout: the share of h and c that stays what it was, or where there is a mask, the units of
  // which all does. uint8 [T, B, R + H], or [T, B, H] without c, in each of L*D planes.
  double zoneout[2] = {0.0, 0.0};
  Sequence zoneout_mask;
  int64_t zoneout_plane = 0;             // elements of a plane
  const void* h_mask = nullptr;          // [L*D, B, R]: multiplies h wherever W_hh does
  const void* candidate_mask = nullptr;  // [L*D, B, H]: multiplies the cell's candidate
  bool zoned() const { return zoneout_mask.data || zoneout[0] != 0.0 || zoneout[1] != 0.0; }
  bool projected() const { return weights[0].hr != nullptr; }
  bool frozen() const { return weights[0].packed != nullptr; }
  WeightSizes weight_sizes(int64_t layer) const { return {input_size(layer), H, R, projected()}; }
  int64_t input_size(int64_t layer) const { return layer == 0 ? I : dirs * R; }
};

// Values kept for backward per unit and row: the states, what the cell saves, and where they are
// not the states the cell's own results: h before a projection, h and c before zoneout (with both
// h before both). Where gates are normalised, at last the products from x and those from h, before
// that.
FUSED_RNN_INLINE int64_t saved_slots(const Stack& stack, const CellInfo& cell) {
  const int own = stack.zoned() ? cell.states : stack.projected() ? 1 : 0;
  return cell.states + cell.saved + own + (cell.norm_gates ? 2 * cell.gates : 0);
}

struct ForwardProblem : Stack {
  Sequence output;        // [T, B, D*R]
  void* h_n = nullptr;    // [L*D, B, R], null when not wanted
  void* c_n = nullptr;    // [L*D, B, H], null for a cell without c
  void* saved = nullptr;  // [L*D, N, slots*Hp] in the accumulation type, null in inference
  Sequence all_c;         // [T, B, D*H], of a single layer; data null when not wanted
};

struct BackwardProblem : Stack {
  const void* saved = nullptr;
  Sequence d_output;                       // [T, B, D*R]; data null when undefined
  Sequence d_all_c;                        // [T, B, D*H], of a single layer; data null for none
  const void* d_h_n = nullptr;             // [L*D, B, R], null when undefined
  const void* d_c_n = nullptr;             // [L*D, B, H]
  Sequence d_input;                        // data null when not needed
  void* d_h0 = nullptr;                    // [L*D, B, R], null when not needed
  void* d_c0 = nullptr;                    // [L*D, B, H]
  const WeightGrads* d_weights = nullptr;  // [L*D], null when not needed
};

// What kernels borrow from their host: threads and memory.
struct Runtime {
  int threads = 1;
  // Calls body(begin, end, argument) on some threads so that every id of [0, count) is in one
  // range.
  void (*parallel)(int count, void (*body)(int begin, int end, void* argument),
                   void* argument) = nullptr;
  // Uninitialised memory that lives until the call returns.
  void* (*allocate)(void* host, size_t bytes) = nullptr;
  void* host = nullptr;
};

}  // namespace fused_rnn
