// Weights for the tile: repacked where enough rows will use them, read as they are where not.
//
// A panel is up to kMaxVectors vectors, in strips (Right::kPanel). Panels follow one another, so
// the panel that starts at column c of a matrix with K rows stands at offset c * K. Columns beyond
// the matrix are zero.
#pragma once

#include "../core/problem.h"
#include "tile.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// Units in a panel of some gates: the gates of a unit stand side by side, so that the cell finds
// them together.
template <class A>
constexpr int64_t panel_units(int gates) {
  return kMaxVectors / gates * kLanes<A>;
}

// Calls body(first_unit, vectors) for the panels of units [begin, end).
template <class A, class Body>
FUSED_RNN_INLINE void for_panels(int gates, int64_t begin, int64_t end, Body body) {
  const int64_t width = panel_units<A>(gates);
  for (int64_t unit = begin; unit < end; unit += width)
    body(unit, int((end - unit < width ? end - unit : width) / kLanes<A>));
}

// Vector `v` of a packed panel: where its first row stands, and how far the next.
template <class A>
struct PanelVector {
  A* data;
  int64_t stride;
  PanelVector(A* panel, int64_t K, int vectors, int v) {
    const int strip = v / kStrip * kStrip;
    const int width = vectors - strip < kStrip ? vectors - strip : kStrip;
    data = panel + (strip * K + v - strip) * kLanes<A>;
    stride = width * kLanes<A>;
  }
};

// W[gates*H, K], to be used as x W^T: dst[k, g, v, lane] = W[g*H + unit + v*L + lane, k].
template <class S>
void pack_transposed(const S* w, int gates, int64_t H, int64_t K, int64_t unit, int vectors,
                     Accumulate<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  // Along K inside: the L rows are streams that the processor prefetches, and few enough not to
  // fight for cache sets where K is a power of two.
  for (int g = 0; g < gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const PanelVector<A> out(dst, K, gates * vectors, g * vectors + v);
      const int64_t first = unit + v * L;
      for (int64_t k = 0; k < K; k += L) {
        Vector<A> rows[L];
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane)
          rows[lane] = first + lane < H ? load_partial(w + (g * H + first + lane) * K + k, K - k)
                                        : Vector<A>{};
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (k + i < K) store(out.data + (k + i) * out.stride, rows[i]);
      }
    }
}

// W[G*H, N], to be used as d W: dst[g*Hp + j, v, lane] = W[g*H + j, column + v*L + lane]; rows H <=
// j < Hp are zero.
template <class S>
void pack_rows(const S* w, int64_t G, int64_t H, int64_t Hp, int64_t N, int64_t column, int vectors,
               Accumulate<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  for (int64_t g = 0; g < G; ++g)
    for (int64_t j = 0; j < Hp; ++j)
      for (int v = 0; v < vectors; ++v) {
        const int64_t n = column + v * L;
        const PanelVector<A> out(dst, G * Hp, vectors, v);
        store(out.data + (g * Hp + j) * out.stride,
              j < H ? load_partial(w + (g * H + j) * N + n, N - n) : Vector<A>{});
      }
}

// A vector of per-gate values [gates*H] in the order of the panels; null gives zeros.
template <class S>
void pack_bias(const S* bias, int gates, int64_t H, int64_t unit, int vectors, Accumulate<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  for (int g = 0; g < gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const int64_t u = unit + v * L;
      store(dst, bias ? load_partial(bias + g * H + u, H - u) : Vector<A>{});
      dst += L;
    }
}

// W's diagonals [P*H] in the padding of our buffers, [P, Hp], in units [begin, end).
template <class S>
void pack_diagonals(const S* diag, int diagonals, int64_t H, int64_t begin, int64_t end,
                    Accumulate<S>* to) {
  for (int p = 0; p < diagonals; ++p)
    for (int64_t u = begin; u < end; u += kLanes<Accumulate<S>>)
      store(to + p * pad_units(H) + u, load_partial(diag + p * H + u, H - u));
}

// out[m, g, v, lane] = a[m, :] . W[g*H + unit + v*L + lane, :] + add: x W^T from W as it is, for
// few rows. Rows of W are contiguous in K, so each element is a dot product.
template <class S>
void dot(int64_t M, int64_t K, const Accumulate<S>* a, int64_t lda, const S* w, int gates,
         int64_t H, int64_t unit, int vectors, const Accumulate<S>* add, Accumulate<S>* out,
         int64_t ldo) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  for (int g = 0; g < gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const int64_t first = unit + v * L;
      const int64_t valid = H - first < L ? H - first : L;
      const int column = (g * vectors + v) * L;
      const S* rows[L];
      for (int i = 0; i < L; ++i) rows[i] = w + (g * H + first + (i < valid ? i : 0)) * K;
      for (int64_t m = 0; m < M; ++m) {
        Vector<A> result{};
        if (valid > 0) {
          Vector<A> sum[L];
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) sum[i] = Vector<A>{};
          int64_t k = 0;
          for (; k + L <= K; k += L) {
            const Vector<A> x = load(a + m * lda + k);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) sum[i] += x * load(rows[i] + k);
          }
          if (k < K) {
            const Vector<A> x = load_partial(a + m * lda + k, K - k);
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) sum[i] += x * load_partial(rows[i] + k, K - k);
          }
          result = sum_lanes<A>(sum);
          if (valid < L) {
            A lanes[L];
            store(lanes, result);
            result = load_partial(lanes, valid);
          }
        }
        store(out + m * ldo + column, result + load(add + column));
      }
    }
}

// out[m, column + ...] = sum_g a[m, g, :] W[g, :, column + ...] + add, for W[G*H, N] as it is.
// Columns [column, column + vectors*L) may reach beyond N: those results are zero.
template <class A>
void times_rows(int64_t M, int64_t G, int64_t H, int64_t Hp, int64_t N, const A* a, int64_t lda,
                const A* w, int64_t column, int vectors, const A* add, int64_t ld_add, A* out,
                int64_t ldo) {
  constexpr int L = kLanes<A>;
  int whole = vectors;
  while (whole > 0 && column + whole * L > N) --whole;
  for (int64_t g = 0; g < G; ++g) {
    const A* rows = w + g * H * N + column;
    const A* left = a + g * Hp;
    const A* before = g ? out : add;
    const int64_t ld_before = g ? ldo : ld_add;
    if (whole > 0)
      for_row_tiles<A, Left::kRows, Right::kRows>(
          M, whole, [&](int64_t m, int64_t, TileFunction<A> tile) {
            tile(H, left + m * lda, lda, rows, N, before ? before + m * ld_before : nullptr,
                 ld_before, out + m * ldo, ldo);
          });
    for (int v = whole; v < vectors; ++v) {
      const int64_t valid = N - column - v * L;
      for (int64_t m = 0; m < M; ++m) {
        Vector<A> sum{};
        if (valid > 0)
          for (int64_t k = 0; k < H; ++k)
            sum += left[m * lda + k] * load_partial(rows + k * N + v * L, valid);
        if (before) sum += load(before + m * ld_before + v * L);
        store(out + m * ldo + v * L, sum);
      }
    }
  }
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
