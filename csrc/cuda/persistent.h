// The schedule that walks all steps of a layer and direction in one launch, for what fits: whether
// it does, and why not. Pure functions of sizes and a device.
#pragma once

#include <atomic>
#include <string_view>

#include "../core/problem.h"
#include "host.h"

namespace fused_rnn::cuda {

enum class Schedule { kStepwise, kPersistent };
constexpr int kSchedules = 2;
constexpr const char* kScheduleNames[kSchedules] = {"stepwise", "persistent"};

// What every forward call takes, or -1. A call that cannot is an error.
inline std::atomic<int> forced_schedule{-1};

// The cells that have the kernel. Another one that is recurrent, with one product and no norms,
// needs no more than its name here, and a few seconds of nvcc.
constexpr bool has_persistent(std::string_view cell) {
  return cell == "lstm" || cell == "gru";
}

// A block has some units, and the rows of W_hh of all their gates in shared memory. Per step it
// takes so many sequences at a time, its warps parts of their sums.
constexpr int kPersistentWarps = 8;
constexpr int kPersistentThreads = kPersistentWarps * 32;
constexpr int kRowsAtOnce = 16;
constexpr int kGateTile = 16;      // rows of W_hh that a warp multiplies at once
constexpr int kUnitsTogether = 4;  // a block has a multiple of it
constexpr int kPartialStride = kRowsAtOnce + 1;

// Rows of W_hh and of h in shared memory begin in different banks.
FUSED_RNN_HD constexpr int64_t shared_row_bytes(int64_t H, int64_t element_size) {
  return H * element_size + 16;
}

struct PersistentPlan {
  int units = 0;  // of a block
  int blocks = 0;
  int gate_rows = 0;  // of a block, padded to kGateTile
  size_t shared_bytes = 0;
  const char* against = nullptr;  // why it cannot run; null where it can
};

inline PersistentPlan plan_persistent(const CellInfo& cell, DType type,
                                      const ForwardProblem& problem,
                                      const dev::DeviceInfo& device) {
  PersistentPlan plan;
  const int64_t H = problem.H, size = type == DType::kFloat32 ? 4 : 2;
  if (device.sms > 0) {
    const int64_t least = (H + device.sms - 1) / device.sms;
    plan.units = int((least + kUnitsTogether - 1) / kUnitsTogether * kUnitsTogether);
    plan.blocks = int((H + plan.units - 1) / plan.units);
    plan.gate_rows = (cell.gates * plan.units + kGateTile - 1) / kGateTile * kGateTile;
    plan.shared_bytes =
        size_t((plan.gate_rows + kRowsAtOnce) * shared_row_bytes(H, size)) +
        size_t(kPersistentWarps) * size_t(plan.gate_rows) * kPartialStride * sizeof(float);
  }
  const auto against = [&]() -> const char* {
    if (!has_persistent(cell.name)) return "there is no kernel for this cell";
    if (type == DType::kFloat64) return "there is no kernel for float64";
    if (problem.projected()) return "h is projected";
    if (problem.steps.batch_sizes || problem.steps.order)
      return "the sequences have lengths of their own";
    if (problem.reset.data || problem.zoned() || problem.h_mask || problem.candidate_mask ||
        problem.all_c.data)
      return "resets, regularisers and all cell states need a kernel per step";
    if (H % kGateTile) return "the number of units is no multiple of 16";
    if (!device.cooperative) return "the GPU cannot launch blocks that wait for each other";
    if (plan.shared_bytes > device.shared_per_block)
      return "the weights do not fit into the shared memory of all SMs";
    return nullptr;
  };
  plan.against = against();
  return plan;
}

}  // namespace fused_rnn::cuda
