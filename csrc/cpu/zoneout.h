// Which share of a state zoneout keeps.
#pragma once

#include "cell_rows.h"
#include "simd.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// Units [u, u + lanes) of a mask.
template <class A>
FUSED_RNN_INLINE Vector<A> load_mask(const uint8_t* mask, int64_t n) {
  A lanes[kLanes<A>];
  for (int lane = 0; lane < kLanes<A>; ++lane) lanes[lane] = lane < n && mask[lane] ? A(1) : A(0);
  return load(lanes);
}

// The share of state `s` that zoneout keeps, of the units from u on; n are valid.
template <class A>
FUSED_RNN_INLINE Vector<A> zoneout_share(const BackwardRow<A>& at, int s, int64_t u, int64_t n) {
  if (!at.zoneout_mask) return Vector<A>{} + at.zoneout[s];
  return load_mask<A>(at.zoneout_mask + s * at.zoneout_state + u, n);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
