// Layer normalisation (Ba, Kiros and Hinton, 2016) of some values together, whoever takes the sums:
//
//   y = gain xhat + shift,  xhat = (a - mean(a)) rstd,  rstd = 1 / sqrt(var(a) + eps)
//
// eps is that of torch.nn.LayerNorm. A is float or double, V is A or a vector of it.
#pragma once

#include "platform.h"

namespace fused_rnn {

// From the mean of (a - mean(a))^2.
template <class A>
FUSED_RNN_HD A rstd_of(A variance) {
  const A with_eps = variance + A(1e-5);
  if constexpr (sizeof(A) == sizeof(float))
    return 1 / __builtin_sqrtf(with_eps);
  else
    return 1 / __builtin_sqrt(with_eps);
}

template <class A>
struct RowMoments {
  A mean, rstd;

  template <class V>
  FUSED_RNN_HD V normalised(V a) const {
    return (a - mean) * rstd;
  }
  template <class V>
  FUSED_RNN_HD V scaled(V a, V gain, V shift) const {
    return normalised(a) * gain + shift;
  }
  // The gradient of a from d, that of xhat, and from the means of d and of d xhat.
  template <class V>
  FUSED_RNN_HD V backward(V d, V xhat, A mean_d, A mean_with) const {
    return (d - mean_d - xhat * mean_with) * rstd;
  }
};

}  // namespace fused_rnn
