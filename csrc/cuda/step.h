// What the kernels of one step are told: pointers at the first row of the step, sizes, and who
// begins or ends there. Passed by value, so that a launch carries all it needs.
#pragma once

#include "../core/problem.h"
#include "host.h"
#include "persistent.h"

namespace fused_rnn::cuda {

// The rows of one step in a tensor of the caller: row b stands at order[b], where there is an
// order, and rows are `stride` elements apart.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  const int64_t* order = nullptr;

  FUSED_RNN_HD int64_t at(int64_t b) const { return (order ? order[b] : b) * stride; }
};

// Who of the rows [0, rows) begins a new sequence, by the reset mask of one step.
struct Begins {
  Rows reset;  // uint8; data null for none
  int64_t rows = 0;

  FUSED_RNN_HD bool operator()(int64_t b) const {
    return reset.data && b < rows && static_cast<const uint8_t*>(reset.data)[reset.at(b)];
  }
};

// The states that sequences begin with, in the order of the caller; data null for zeros.
struct Initial {
  Rows h;  // [B, R]
  Rows c;  // [B, H]
};

struct Zoneout {
  bool any = false;
  double share[2] = {0.0, 0.0};  // of h and c that stays
  Rows mask;                     // uint8 [rows, R + H], or which units of them; data null for none
};

// Rows of products, of W_ih or W_hh, and their norm. S is the storage type, A the type that is
// accumulated in.
template <class A>
struct NormedRows {
  DType type;
  int64_t rows, H;
  A* products;        // [rows, G*H]; for those of x also where the pre-activations go
  const void* gain;   // S [G*H]
  const void* shift;  // S [G*H]: the bias, null for none
  A* raw;             // [rows, G slots of saved]: where they are kept; null in inference
  int64_t ld_saved, slot;
};

// The way back.
template <class A>
struct NormedRowsBackward {
  DType type;
  int64_t rows, H;
  const A* raw;  // [rows, G slots of saved]
  int64_t ld_saved, slot;
  const void* gain;  // S [G*H]
  const A* d_gates;  // [rows, G*H]
  void* d_products;  // S [rows, G*H]
  A* d_gain;         // [rows, unit weights * H], from the first of these gains on; or null
};

// One step forward.
template <class A>
struct ForwardStep {
  DType type;
  int64_t rows, H, R;
  A* gates_x;           // [rows, G*H], without bias; `operand` changes its first gates
  const A* gates_h;     // [rows, gates of the product * H], without bias; null for no product
  const void* bias_ih;  // S [G*H], null for none
  const void* bias_hh;  // S [G*H]
  const void* diag;     // S [P*H], and behind it the gains
  const void* h;        // S [B, R]: before the step
  void* h_after;        // S [B, R]: after it, what the next one begins with
  void* masked_after;   // S [B, R]: the same times h_mask, for the product; null for no mask
  Rows h_mask;          // S [B, R]
  Rows candidate_mask;  // S [B, H], data null for none
  A* c;                 // [B, H]: before, and after; null for a cell without
  void* own;            // S [B, H]: the cell's own h where a projection follows, else null
  void* operand;        // S [B, H]: of the second product, where there is one
  Rows y;               // S [rows, R]: the output
  Rows all_c;           // S [rows, H], data null when not wanted
  Zoneout zoneout;
  A* saved;  // [rows, slots * Hp]; null in inference
  int64_t ld_saved, slot;
  int own_slot;     // the first of what is not a state, but the cell's own result
  int64_t ends;     // rows from here on have their last step: these are their final states
  Rows h_n, c_n;    // S [B, R], [B, H]; data null when not wanted
  Begins next;      // who begins anew with the next step
  Initial initial;  // and with what
  // Of a product in the kernel itself, for few rows: gates_h is not read.
  const void* weight_hh;  // S [G*H, R]
  const void* h_operand;  // S [B, R]: h, or h times its mask
  // Where gates are normalised.
  NormedRows<A> normed_h;
  A* normed;  // [rows, H]: the operand of a norm
};

// Steps of one dense batch, one after another in a single launch: the first of them, and how far it
// is from each to the next. Its sequences have no more than h, c and an output.
template <class A>
struct ForwardSteps {
  ForwardStep<A> first;  // its h_after is that of the last
  int64_t count;
  bool ends;                  // the sequences, with the last of these steps
  int64_t gates_x, y, saved;  // elements
  void* exchange;             // S [count - 1, rows, H], full of kNothing: h between two steps
  PersistentShares shares;
};

// What backward knows of the gradients of the states after a step: they come from the outputs of
// that step, and from the step walked before.
template <class A>
struct Incoming {
  DType type;
  int64_t first;  // rows from here on are walked for the first time: they begin with d_h_n, d_c_n
  Begins ended;   // whose gradient ended there: it is lost, or that of h0 and c0
  Rows d_h_n;     // S [B, R], data null for zeros
  Rows d_c_n;     // S [B, H]
  Rows d_output;  // [rows, R]: S, or A between layers
  DType d_output_type;
  Rows d_all_c;      // S
  A* direct;         // [B, R]: gradient of h before the step, without the part through W_hh; null
                     // where there is no other
  const A* product;  // [B, R]: that part, before h_mask; null where there is no such product
  Rows h_mask;       // S [B, R]
  A* dc;             // [B, H]
  A* d_h0;           // [B, R]: what ended so far, null where it is lost
  A* d_c0;           // [B, H]
};

// One step backward.
template <class A>
struct BackwardStep {
  DType type;
  int64_t rows, H, R;
  const A* saved;  // [rows, slots * Hp] of this step
  int64_t ld_saved, slot;
  int own_slot;     // the cell's own states where zoneout made others of them; 0 for none
  const A* before;  // the same of the step before, for the rows b < before_rows
  int64_t before_rows;
  Begins begins;  // who began with this step, and had initial states or zeros before it
  bool begins_initial;
  Initial initial;
  const void* diag;  // S [P*H], and behind it the gains
  Zoneout zoneout;
  Rows candidate_mask;  // S [B, H], data null for none
  Incoming<A> incoming;
  const A* d_own;    // [rows, H]: gradient of the cell's own h where a projection follows
  DType gates_type;  // S; A where they are normalised, and these are not yet those of the products
  void* d_gates_x;   // [rows, G*H]
  void* d_gates_h;   // [rows, G*H], the same pointer where x and h are summed
  A* d_operand;      // [rows, H]; of a norm [rows, 3, H]: normalised, as it was, and its value
  A* d_diag;         // [rows, unit weights * H], null when not wanted
  void* h_before;    // S [rows, R]: right operand of the gradient of W_hh, null when not wanted
  void* operand;     // S [rows, H], likewise
  // Of a product in the kernel itself, for few rows: incoming.product is null.
  const void* weight_hh;           // S [G*H, R]
  const void* d_walked;            // S [rows, G*H]: d_gates_h of the step walked before
  NormedRowsBackward<A> normed_h;  // where gates are normalised
};

// As ForwardSteps. d_gates_h of all of them is full of kNothing.
template <class A>
struct BackwardSteps {
  BackwardStep<A> first;
  int64_t count;
  bool ends;                       // at the first steps of the sequences
  int64_t saved, gates, h_before;  // elements
  int64_t d_output;                // bytes
  PersistentShares shares;
};

// One step backward through a projection: the gradient of h is left as the operand of a product.
template <class A>
struct UnprojectStep {
  Incoming<A> incoming;
  Zoneout zoneout;
  int64_t rows, H, R;
  void* d_h;       // S [rows, R]
  const A* saved;  // the slot of the cell's own h in [rows, slots * Hp]
  int64_t ld_saved;
  void* own;  // S [rows, H]: that h, right operand of the gradient of W_hr; null when not wanted
};

// Rows whose sums a thread holds where the kernel of a step has the product in it.
constexpr int kFusedRows = 8;

// The kernels of a cell, as functions that launch them.
template <class A>
struct CellLaunches {
  CellInfo info;
  dev::Status (*forward)(const ForwardStep<A>&, dev::Stream);
  // For at most kFusedRows rows, with the product; null for a cell that has not just that one.
  dev::Status (*fused_forward)(const ForwardStep<A>&, dev::Stream);
  dev::Status (*fused_backward)(const BackwardStep<A>&, dev::Stream);
  // All steps in one launch; null where there is no such kernel, and see plan_persistent.
  dev::Status (*persistent_forward)(const ForwardSteps<A>&, dev::Stream);
  dev::Status (*persistent_backward)(const BackwardSteps<A>&, dev::Stream);
  dev::Status (*operand)(const ForwardStep<A>&, dev::Stream);  // null for a cell with one product
  dev::Status (*backward)(const BackwardStep<A>&, dev::Stream);
  dev::Status (*operand_backward)(const BackwardStep<A>&, dev::Stream);
  // The products of x, before the steps of a chunk and after them; null for a cell without norms.
  dev::Status (*normalise)(const NormedRows<A>&, dev::Stream);
  dev::Status (*normalise_backward)(const NormedRowsBackward<A>&, dev::Stream);
};

// Those of the cell of that name, or null. In cells_float.cu and cells_double.cu.
template <class A>
const CellLaunches<A>* find_launches(const char* cell);
template <>
const CellLaunches<float>* find_launches(const char* cell);
template <>
const CellLaunches<double>* find_launches(const char* cell);

}  // namespace fused_rnn::cuda
