// The schedule that walks all steps of a layer and direction in one launch, for what fits: whether
// it does, how blocks share the work, and why not. Pure functions of sizes and a device.
#pragma once

#include <algorithm>
#include <atomic>
#include <string_view>

#include "../core/problem.h"
#include "host.h"

namespace fused_rnn::cuda {

enum class Schedule { kStepwise, kPersistent };
constexpr int kSchedules = 2;
constexpr const char* kScheduleNames[kSchedules] = {"stepwise", "persistent"};

// What every call takes, or -1. A call that cannot is an error.
inline std::atomic<int> forced_schedule{-1};

// The cells that have the kernels. Another one that is recurrent, with one product and no norms,
// needs no more than its name here, and a minute of nvcc.
constexpr bool has_persistent(std::string_view cell) {
  return cell == "lstm" || cell == "gru";
}

// A block has some units of some sequences, and their weights in shared memory: forward the rows of
// W_hh of all their gates, backward their columns. So many sequences are taken at a time; each warp
// multiplies parts of k, and each thread has one unit of one of them.
constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = kPersistentWarps * 32;
constexpr int kRowsAtOnce = 16;
constexpr int kUnitsTogether = 4;  // a block has a multiple of it
constexpr int kMostUnits = kPersistentThreads / kRowsAtOnce;
// A warp multiplies so many rows of weights at once; a block has at most those of 4 gates.
constexpr int kSumTile = 16;
constexpr int kMostWeightRows = 4 * kMostUnits;
constexpr int kPart = 32;  // of k, of a warp at once, with 16-bit operands
constexpr int kPartOfFloats = 4;
constexpr int kStage = 512;  // of k, that a block has in shared memory at once, with float32

// How blocks share a launch.
struct PersistentShares {
  int units = 0;   // of a block
  int blocks = 0;  // that have all units of a sequence
  int groups = 0;  // of such blocks, each with sequences of its own
  int rows = 0;    // sequences of a group
  int sums = 0;    // rows of weights of a block: of gates, or backward of units; padded
  size_t shared_bytes = 0;
};

struct PersistentPlan : PersistentShares {
  double microseconds = 0;        // of a step, as far as one can tell
  bool faster = false;            // than a step of its own
  const char* against = nullptr;  // why it cannot run; null where it can

  bool chosen() const { return !against && faster; }
};

// Sums of a row and the next one's begin in different banks, of any 4 rows.
FUSED_RNN_HD constexpr int partial_stride(int sums) {
  return sums + 8;
}
// Of float32: rows of weights and of operands in shared memory begin in different banks.
FUSED_RNN_HD constexpr int64_t shared_row(int64_t K) {
  return K + 4;
}
// Of weights in shared memory, of elements of S.
FUSED_RNN_HD constexpr int64_t weight_count(int sums, int64_t K, int64_t size) {
  return size == 2 ? sums * ((K + kPart - 1) / kPart * kPart) : sums * shared_row(K);
}

// The shares with so many units of a block, for sums over K. `width` is how many sums a unit has.
inline PersistentShares shares_with(int units, int width, int64_t H, int64_t K, int64_t size,
                                    int64_t B, int sms) {
  PersistentShares s;
  const auto rounded = [](int64_t n, int64_t to) { return int((n + to - 1) / to * to); };
  s.units = units;
  s.blocks = int((H + units - 1) / units);
  // Backward a float has use for half a tile; mma has none.
  s.sums = rounded(width * units, size == 2 || width > 1 ? kSumTile : kSumTile / 2);
  if (s.blocks > sms || s.sums > kMostWeightRows) return s;
  // Half the rows that are multiplied at once are no slower than fewer.
  s.rows = rounded((B + sms / s.blocks - 1) / (sms / s.blocks), kRowsAtOnce / 2);
  s.groups = int((B + s.rows - 1) / s.rows);
  const int64_t staged = size == 2 ? 0 : kRowsAtOnce * shared_row(std::min(K, int64_t(kStage)));
  s.shared_bytes =
      size_t((weight_count(s.sums, K, size) + staged) * size) +
      2 * sizeof(float) * kPersistentWarps * kRowsAtOnce * size_t(partial_stride(s.sums));
  return s;
}

// What a step takes, as it was measured on an H100: what 16 sequences wait for each other and for
// memory, operands that come from L2, the weights from shared memory or with float32 the
// arithmetic, and all blocks that ask L2 at once.
inline double step_microseconds(const PersistentShares& s, int64_t K, int64_t size) {
  const double tiles = (s.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const double of_sum = size == 2 ? 9.4e-6 : 1.4e-4;
  return 0.2 + 0.01 * s.blocks * s.groups +
         tiles * (2.2 + double(K) * (3.5e-4 * double(size) + of_sum * s.sums));
}

// Steps that are estimated to take less are made in one launch: one of its own waits for the host,
// which makes its launches one after another. Timed by hand on an H100, outside of graphs, where
// steps of their own take less.
constexpr double kStepwiseForward = 16.0;
constexpr double kStepwiseBackward = 25.0;

// Problem is ForwardProblem or BackwardProblem.
template <class Problem>
PersistentPlan plan_persistent(const CellInfo& cell, DType type, const Problem& problem,
                               const dev::DeviceInfo& device) {
  constexpr bool kForward = requires { problem.h_n; };
  const int64_t H = problem.H, size = type == DType::kFloat32 ? 4 : 2;
  const int64_t K = kForward ? H : cell.gates * H;
  const int width = kForward ? cell.gates : 1;
  PersistentPlan plan;
  for (int units = kUnitsTogether; units <= kMostUnits; units += kUnitsTogether) {
    const PersistentShares s = shares_with(units, width, H, K, size, problem.steps.B, device.sms);
    if (s.groups == 0 || s.shared_bytes > device.shared_per_block) continue;
    const double microseconds = step_microseconds(s, K, size);
    if (plan.groups > 0 && microseconds >= plan.microseconds) continue;
    static_cast<PersistentShares&>(plan) = s;
    plan.microseconds = microseconds;
  }
  plan.faster = plan.microseconds < (kForward ? kStepwiseForward : kStepwiseBackward);
  bool controlled =
      problem.reset.data || problem.zoned() || problem.h_mask || problem.candidate_mask;
  if constexpr (kForward)
    controlled |= problem.all_c.data != nullptr;
  else
    controlled |= problem.d_all_c.data != nullptr;
  const auto against = [&]() -> const char* {
    if (!has_persistent(cell.name)) return "there is no kernel for this cell";
    if (type == DType::kFloat64) return "there is no kernel for float64";
    if (problem.projected()) return "h is projected";
    if (problem.steps.batch_sizes || problem.steps.order)
      return "the sequences have lengths of their own";
    if (controlled) return "resets, regularisers and all cell states need a kernel per step";
    if (H % 8) return "the number of units is no multiple of 8";
    if (!device.cooperative) return "the GPU cannot launch blocks that wait for each other";
    if (plan.groups == 0) return "the weights do not fit into the shared memory of all SMs";
    return nullptr;
  };
  plan.against = against();
  return plan;
}

}  // namespace fused_rnn::cuda
