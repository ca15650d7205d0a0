// The kernels of a cell whose gates are normalised: one block, one row, because a norm takes sums
// over its units. A thread has the same units from beginning to end, so that what it leaves in
// memory needs no barrier.
#pragma once

#include "../core/norm.h"
#include "cell_units.cuh"
#include "row_sums.cuh"

namespace fused_rnn::cuda {

// Where the gain of the operand stands among the weights of a unit; its shift is behind it.
template <class Cell>
constexpr int kGainOfOperand = Cell::kDiagonals + 2 * Cell::kGates;

// How many values norm n of a row takes together: those of a product, and behind them the
// operand's.
template <class Cell, class A>
FUSED_RNN_DEVICE A count_of(int n, int64_t H) {
  const int others = Cell::kGates - Cell::kNormGates;
  return A(n == kNorms<Cell> ? 1 : n == 0 ? Cell::kNormGates : others) * A(H);
}

// Of the norms from kFirst on: values(u, take) calls take(n, value) for all values of unit u, n
// counted from kFirst.
template <class Cell, int kFirst = 0, class A, int kCount, class Values>
FUSED_RNN_DEVICE void take_moments(int64_t H, RowSums<A>& sum, RowMoments<A> (&moments)[kCount],
                                   Values values) {
  A sums[kCount] = {}, squares[kCount] = {};
  for_each_unit(H, [&](int64_t u) { values(u, [&](int n, A value) { sums[n] += value; }); });
  sum(sums);
  for (int n = 0; n < kCount; ++n) moments[n].mean = sums[n] / count_of<Cell, A>(kFirst + n, H);
  for_each_unit(H, [&](int64_t u) {
    values(u, [&](int n, A value) {
      const A d = value - moments[n].mean;
      squares[n] += d * d;
    });
  });
  sum(squares);
  for (int n = 0; n < kCount; ++n)
    moments[n].rstd = rstd_of(squares[n] / count_of<Cell, A>(kFirst + n, H));
}

// A row of products: gate g of unit u after its norm.
template <class Cell, class A>
class NormedRow {
 public:
  FUSED_RNN_DEVICE NormedRow(const NormedRows<A>& s, int64_t b, RowSums<A>& sum)
      : s_(s),
        row_(s.products + b * Cell::kGates * s.H),
        raw_(s.raw ? s.raw + b * s.ld_saved : nullptr) {
    take_moments<Cell>(s.H, sum, moments_, [&](int64_t u, auto take) {
      for (int g = 0; g < Cell::kGates; ++g) take(norm_of<Cell>(g), row_[g * s.H + u]);
    });
  }
  // Keeps what it was.
  FUSED_RNN_DEVICE A operator()(int g, int64_t u) const {
    const int64_t at = g * s_.H + u;
    const A value = row_[at];
    if (raw_) raw_[g * s_.slot + u] = value;
    return moments_[norm_of<Cell>(g)].scaled(value, load<A>(s_.type, s_.gain, at),
                                             load_or_zero<A>(s_.type, s_.shift, at));
  }

 private:
  const NormedRows<A>& s_;
  const A* row_;
  A* raw_;
  RowMoments<A> moments_[kNorms<Cell>];
};

// Products of x become pre-activations.
template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kRowThreads, 1) void normalise_rows(NormedRows<A> s) {
  RowSums<A> sum;
  for_each_row(s.rows, [&](int64_t b) {
    const NormedRow<Cell, A> normed(s, b, sum);
    for_each_unit(s.H, [&](int64_t u) {
      for (int g = 0; g < Cell::kGates; ++g)
        s.products[(b * Cell::kGates + g) * s.H + u] = normed(g, u);
    });
  });
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kRowThreads,
                                         1) void normed_forward_step(ForwardStep<A> s) {
  RowSums<A> sum;
  for_each_row(s.rows, [&](int64_t b) {
    const NormedRow<Cell, A> h(s.normed_h, b, sum);
    if constexpr (Cell::kNormedOperand) {
      A* operand = s.normed + b * s.H;
      for_each_unit(s.H, [&](int64_t u) {
        operand[u] = operand_unit<Cell>(s, b, u, [&](int g) { return h(g, u); });
      });
      RowMoments<A> moments[1];
      take_moments<Cell, kNorms<Cell>>(s.H, sum, moments,
                                       [&](int64_t u, auto take) { take(0, operand[u]); });
      for_each_unit(s.H, [&](int64_t u) {
        const int64_t gain = kGainOfOperand<Cell> * s.H + u;
        const A as_it_was = operand[u];
        const A normed = moments[0].scaled(as_it_was, load<A>(s.type, s.diag, gain),
                                           load<A>(s.type, s.diag, gain + s.H));
        forward_unit<Cell>(s, b, u, [&](int i) { return i == Cell::kNormed ? normed : as_it_was; });
      });
    } else {
      for_each_unit(
          s.H, [&](int64_t u) { forward_unit<Cell>(s, b, u, [&](int g) { return h(g, u); }); });
    }
  });
}

template <class Cell, class A>
FUSED_RNN_DEVICE A raw_product(const NormedRowsBackward<A>& s, int64_t b, int g, int64_t u) {
  return s.raw[b * s.ld_saved + g * s.slot + u];
}

// From the gradients of a row's gates to those of its products and gains.
template <class Cell, class A>
FUSED_RNN_DEVICE void backward_row(const NormedRowsBackward<A>& s, int64_t b, RowSums<A>& sum,
                                   const RowMoments<A>* moments) {
  constexpr int G = Cell::kGates, N = kNorms<Cell>;
  const int64_t row = b * G * s.H;
  const auto each = [&](auto body) {
    for_each_unit(s.H, [&](int64_t u) {
      for (int g = 0; g < G; ++g) {
        const int64_t at = g * s.H + u;
        const A d = s.d_gates[row + at];
        const A xhat = moments[norm_of<Cell>(g)].normalised(raw_product<Cell>(s, b, g, u));
        body(norm_of<Cell>(g), at, d, d * load<A>(s.type, s.gain, at), xhat);
      }
    });
  };
  A sums[2 * N] = {};  // of d_xhat, and of d_xhat xhat
  each([&](int n, int64_t, A, A d_xhat, A xhat) {
    sums[n] += d_xhat;
    sums[N + n] += d_xhat * xhat;
  });
  sum(sums);
  for (int n = 0; n < N; ++n) {
    sums[n] /= count_of<Cell, A>(n, s.H);
    sums[N + n] /= count_of<Cell, A>(n, s.H);
  }
  each([&](int n, int64_t at, A d, A d_xhat, A xhat) {
    store(s.type, s.d_products, row + at, moments[n].backward(d_xhat, xhat, sums[n], sums[N + n]));
    if (s.d_gain) s.d_gain[b * kUnitWeights<Cell> * s.H + at] = d * xhat;
  });
}

// The same of the operand, and on to the gates that made it.
template <class Cell, class A>
FUSED_RNN_DEVICE void operand_backward_row(const BackwardStep<A>& s, int64_t b, RowSums<A>& sum,
                                           const RowMoments<A>& moments) {
  const A* normed = s.d_operand + 3 * b * s.H;
  const A *as_it_was = normed + s.H, *operand = as_it_was + s.H;
  const int64_t gain = kGainOfOperand<Cell> * s.H;
  const auto each = [&](auto body) {
    for_each_unit(s.H, [&](int64_t u) {
      body(u, normed[u] * load<A>(s.type, s.diag, gain + u), moments.normalised(operand[u]));
    });
  };
  A sums[2] = {};
  each([&](int64_t, A d_xhat, A xhat) {
    sums[0] += d_xhat;
    sums[1] += d_xhat * xhat;
  });
  sum(sums);
  each([&](int64_t u, A d_xhat, A xhat) {
    if (s.d_diag) {
      A* d_gain = s.d_diag + b * kUnitWeights<Cell> * s.H + gain + u;
      d_gain[0] = normed[u] * xhat;
      d_gain[s.H] = normed[u];  // the shift's
    }
    const A d = moments.backward(d_xhat, xhat, sums[0] / A(s.H), sums[1] / A(s.H));
    operand_backward_unit<Cell>(s, b, u, d + as_it_was[u]);
  });
}

template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kRowThreads,
                                         1) void normed_backward_step(BackwardStep<A> s) {
  constexpr int N = kNorms<Cell>;
  RowSums<A> sum;
  for_each_row(s.rows, [&](int64_t b) {
    for_each_unit(s.H, [&](int64_t u) { backward_unit<Cell>(s, b, u); });
    RowMoments<A> moments[N + Cell::kNormedOperand];
    take_moments<Cell>(s.H, sum, moments, [&](int64_t u, auto take) {
      for (int g = 0; g < Cell::kGates; ++g)
        take(norm_of<Cell>(g), raw_product<Cell>(s.normed_h, b, g, u));
      if constexpr (Cell::kNormedOperand) take(N, s.d_operand[(3 * b + 2) * s.H + u]);
    });
    if constexpr (Cell::kNormedOperand) operand_backward_row<Cell>(s, b, sum, moments[N]);
    backward_row<Cell>(s.normed_h, b, sum, moments);
  });
}

// The way back of normalise_rows.
template <class Cell, class A>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kRowThreads,
                                         1) void normalise_rows_backward(NormedRowsBackward<A> s) {
  RowSums<A> sum;
  for_each_row(s.rows, [&](int64_t b) {
    RowMoments<A> moments[kNorms<Cell>];
    take_moments<Cell>(s.H, sum, moments, [&](int64_t u, auto take) {
      for (int g = 0; g < Cell::kGates; ++g) take(norm_of<Cell>(g), raw_product<Cell>(s, b, g, u));
    });
    backward_row<Cell>(s, b, sum, moments);
  });
}

template <class Cell, class A>
void fill_normed_launches(CellLaunches<A>& cell) {
  cell.forward = [](const ForwardStep<A>& s, dev::Stream stream) {
    return dev::launch<normed_forward_step<Cell, A>>(over_rows<A>(s.rows, s.H), stream, s);
  };
  cell.backward = [](const BackwardStep<A>& s, dev::Stream stream) {
    return dev::launch<normed_backward_step<Cell, A>>(over_rows<A>(s.rows, s.H), stream, s);
  };
  cell.normalise = [](const NormedRows<A>& s, dev::Stream stream) {
    return dev::launch<normalise_rows<Cell, A>>(over_rows<A>(s.rows, s.H), stream, s);
  };
  cell.normalise_backward = [](const NormedRowsBackward<A>& s, dev::Stream stream) {
    return dev::launch<normalise_rows_backward<Cell, A>>(over_rows<A>(s.rows, s.H), stream, s);
  };
}

}  // namespace fused_rnn::cuda
