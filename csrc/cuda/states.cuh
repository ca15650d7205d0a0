// How states pass from step to step, forward, and their gradients backward.
#pragma once

#include "elements.cuh"

namespace fused_rnn::cuda {

// What zoneout keeps of state k of row b, whose unit stands at `place` in a row of the mask.
template <class A>
FUSED_RNN_DEVICE A zoneout_share(const Zoneout& zoneout, int k, int64_t b, int64_t place) {
  const auto* mask = static_cast<const uint8_t*>(zoneout.mask.data);
  if (!mask) return A(zoneout.share[k]);
  return A(mask[zoneout.mask.at(b) + place] ? 1 : 0);
}

// And what becomes of it. A mask chooses: the other one may be infinite.
template <class A>
FUSED_RNN_DEVICE A zone_out(const Zoneout& zoneout, int k, int64_t b, int64_t place, A before,
                            A after) {
  const A share = zoneout_share<A>(zoneout, k, b, place);
  if (zoneout.mask.data) return share != A(0) ? before : after;
  return after + share * (before - after);
}

// h of a row and unit goes to the output, and on to the next step: as the output holds it, or what
// a sequence that begins there begins with, and times its mask for the product.
template <class A>
FUSED_RNN_DEVICE A emit_h(const ForwardStep<A>& s, int64_t b, int64_t u, A h) {
  h = round_to(s.type, h);
  const A on = s.next(b) ? load_or_zero<A>(s.type, s.initial.h.data, s.initial.h.at(b) + u) : h;
  // First of all, since in a launch of many steps others wait for it.
  publish(s.type, s.h_after, b * s.R + u, on);
  store(s.type, s.y.data, s.y.at(b) + u, h);
  if (s.masked_after)
    store(s.type, s.masked_after, b * s.R + u,
          on * load<A>(s.type, s.h_mask.data, s.h_mask.at(b) + u));
  if (b >= s.ends && s.h_n.data) store(s.type, s.h_n.data, s.h_n.at(b) + u, h);
  return h;
}

// What h was multiplied by for the product.
template <class A>
FUSED_RNN_DEVICE A mask_of_h(const Incoming<A>& in, int64_t b, int64_t u) {
  return in.h_mask.data ? load<A>(in.type, in.h_mask.data, in.h_mask.at(b) + u) : A(1);
}

// The gradient of h after a step: what flows in from the step walked before, or d_h_n at the end of
// a sequence, and what the output of this step adds. All but what W_hh adds to what flows is loaded
// when it is made.
template <class A>
class IncomingH {
 public:
  IncomingH() = default;
  FUSED_RNN_DEVICE IncomingH(const Incoming<A>& in, int64_t b, int64_t u, int64_t R)
      : begins_(b >= in.first), ended_(in.ended(b)) {
    if (begins_) {
      at_end_ = load_or_zero<A>(in.type, in.d_h_n.data, in.d_h_n.at(b) + u);
    } else {
      mask_ = mask_of_h(in, b, u);
      if (in.direct) direct_ = in.direct[b * R + u];
      if (ended_ && in.d_h0) d_h0_ = in.d_h0 + b * R + u;
    }
    type_ = in.d_output_type;
    if (in.d_output.data) output_ = Late<A>(type_, in.d_output.data, in.d_output.at(b) + u);
  }
  // With what W_hh adds.
  FUSED_RNN_DEVICE A operator()(A product) const {
    A d = at_end_;
    if (!begins_) {
      const A flowing = product * mask_ + direct_;
      if (!ended_)
        d = flowing;
      else if (d_h0_)
        *d_h0_ += flowing;
    }
    return d + output_.value(type_);
  }

 private:
  bool begins_ = false, ended_ = false;
  A at_end_ = 0, direct_ = 0, mask_ = 1;
  DType type_ = DType::kFloat32;
  Late<A> output_;
  A* d_h0_ = nullptr;
};

template <class A>
FUSED_RNN_DEVICE A incoming_h(const Incoming<A>& in, int64_t b, int64_t u, int64_t R) {
  return IncomingH<A>(in, b, u, R)(in.product ? in.product[b * R + u] : A(0));
}

// The same of c.
template <class A>
FUSED_RNN_DEVICE A incoming_c(const Incoming<A>& in, int64_t b, int64_t u, int64_t H) {
  A d = 0;
  if (b >= in.first) {
    d = load_or_zero<A>(in.type, in.d_c_n.data, in.d_c_n.at(b) + u);
  } else if (!in.ended(b)) {
    d = in.dc[b * H + u];
  } else if (in.d_c0) {
    in.d_c0[b * H + u] += in.dc[b * H + u];
  }
  if (in.d_all_c.data) d += load<A>(in.type, in.d_all_c.data, in.d_all_c.at(b) + u);
  return d;
}

}  // namespace fused_rnn::cuda
