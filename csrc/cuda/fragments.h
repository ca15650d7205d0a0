// Where the elements of matrix fragments stand: register `r` of lane `lane` of a warp. From the PTX
// manual, "Matrix fragments for mma". A is [M, K], B is [K, N], C and D are [M, N].
#pragma once

#include "../core/platform.h"

namespace fused_rnn::dev {

struct Element {
  int row;
  int col;
};

// mma_m16n8k16: a[4] and b[2] hold two 16-bit elements each, the lower half of a register first:
// r counts elements, so r / 2 is the register.
struct M16N8K16 {
  static constexpr int M = 16, N = 8, K = 16;
  FUSED_RNN_HD static constexpr Element a(int lane, int r) {  // r < 8
    return {lane / 4 + r / 2 % 2 * 8, lane % 4 * 2 + r % 2 + r / 4 * 8};
  }
  FUSED_RNN_HD static constexpr Element b(int lane, int r) {  // r < 4
    return {lane % 4 * 2 + r % 2 + r / 2 * 8, lane / 4};
  }
  FUSED_RNN_HD static constexpr Element c(int lane, int r) {  // r < 4
    return {lane / 4 + r / 2 * 8, lane % 4 * 2 + r % 2};
  }
};

// mma_m16n8k8: tf32, one element per register.
struct M16N8K8 {
  static constexpr int M = 16, N = 8, K = 8;
  FUSED_RNN_HD static constexpr Element a(int lane, int r) {  // r < 4
    return {lane / 4 + r % 2 * 8, lane % 4 + r / 2 * 4};
  }
  FUSED_RNN_HD static constexpr Element b(int lane, int r) {  // r < 2
    return {lane % 4 + r * 4, lane / 4};
  }
  FUSED_RNN_HD static constexpr Element c(int lane, int r) { return M16N8K16::c(lane, r); }
};

// mma_m8n8k4: double, one element of A and B per lane.
struct M8N8K4 {
  static constexpr int M = 8, N = 8, K = 4;
  FUSED_RNN_HD static constexpr Element a(int lane, int) { return {lane / 4, lane % 4}; }
  FUSED_RNN_HD static constexpr Element b(int lane, int) { return {lane % 4, lane / 4}; }
  FUSED_RNN_HD static constexpr Element c(int lane, int r) {  // r < 2
    return {lane / 4, lane % 4 * 2 + r};
  }
};

}  // namespace fused_rnn::dev
