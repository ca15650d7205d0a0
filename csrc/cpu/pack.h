// Weights for the tile: repacked where enough rows will use them, read as they are where not.
//
// A panel is up to kMaxVectors vectors, in strips (Right::kPanel). Panels follow one another, so
// the panel that starts at column c of a matrix with K rows stands at offset c * packed_rows(K).
// Columns beyond the matrix are zero.
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

// The same, with body(first_unit, vectors, panels) for panels of equal width that follow one
// another.
template <class A, class Body>
FUSED_RNN_INLINE void for_equal_panels(int gates, int64_t begin, int64_t end, Body body) {
  const int64_t width = panel_units<A>(gates), full = quotient(end - begin, width);
  if (full) body(begin, int(width / kLanes<A>), int(full));
  begin += full * width;
  if (begin < end) body(begin, int((end - begin) / kLanes<A>), 1);
}

// Where gate g of a vector of units stands in a row of the panels of units [begin, end).
template <class A>
int64_t column_of(int gates, int64_t begin, int64_t end, int64_t unit, int g) {
  const int64_t width = panel_units<A>(gates);
  const int64_t panel = unit - (unit - begin) % width;
  const int64_t units = end - panel < width ? end - panel : width;
  return panel * gates + g * units + unit - panel;
}

// Which way a product goes through the panels. Steps that take turns find those in the caches that
// the step before has used last, where all of them do not fit.
enum class Way { kForth, kBack };
constexpr Way turn(int64_t step) {
  return step % 2 ? Way::kBack : Way::kForth;
}

// Calls body(index, next) for [0, count): in that order, or from the end. The last has itself for
// next.
template <class Body>
FUSED_RNN_INLINE void for_each_in(Way way, int64_t count, Body body) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t after = i + 1 < count ? i + 1 : i;
    way == Way::kForth ? body(i, after) : body(count - 1 - i, count - 1 - after);
  }
}

// Calls body(first_unit, vectors, panels, next_unit) for what a product of so many rows and K takes
// of them at once.
template <class W, class Body>
FUSED_RNN_INLINE void for_panels_at_once(int64_t rows, int64_t K, int gates, int64_t begin,
                                         int64_t end, Way way, Body body) {
  using A = Accumulate<W>;
  const int64_t one = panel_units<A>(gates);
  const int at_once = panels_at_once<W>(rows, K, int(one / kLanes<A>) * gates);
  const int64_t group = at_once * one, groups = at_once > 1 ? quotient(end - begin, group) : 0;
  const int64_t singles = begin + groups * group;
  const auto first_of = [&](int64_t i) {
    return i < groups ? begin + i * group : singles + (i - groups) * one;
  };
  for_each_in(way, groups + quotient(end - singles + one - 1, one), [&](int64_t i, int64_t next) {
    const int64_t unit = first_of(i), width = end - unit < one ? end - unit : one;
    body(unit, int(width / kLanes<A>), i < groups ? at_once : 1, first_of(next));
  });
}
template <class W, class Body>
FUSED_RNN_INLINE void for_panels_at_once(int64_t rows, int64_t K, int gates, int64_t begin,
                                         int64_t end, Body body) {
  for_panels_at_once<W>(rows, K, gates, begin, end, Way::kForth, body);
}

// Vector `v` of a packed panel: where its first row stands, and how far the next.
template <class W>
struct PanelVector {
  W* data;
  int64_t stride;
  PanelVector(W* panel, int64_t rows, int vectors, int v, int L) {
    const int strip = v / kStrip * kStrip;
    const int width = vectors - strip < kStrip ? vectors - strip : kStrip;
    data = panel + (strip * rows + v - strip) * L;
    stride = width * L;
  }
};

// Vectors that hold so many rows, of those that stand in one strip.
constexpr int vectors_of_rows(int64_t rows, int64_t L) {
  return rows > (kStrip - 1) * L ? kStrip : int((rows + L - 1) / L);
}

// W[gates*H, K] with rows ldw apart, to be used as x W^T:
// dst[k, g, v, lane] = W[g*H + unit + v*L + lane, k].
template <class S>
void pack_transposed(const S* w, int64_t ldw, int gates, int64_t H, int64_t K, int64_t unit,
                     int vectors, Packed<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  constexpr int depth = kDepth<Packed<S>>;
  const int64_t rows_of_panel = packed_rows<Packed<S>>(K);
  // Along K inside: the L rows are streams that the processor prefetches, and few enough not to
  // fight for cache sets where K is a power of two.
  for (int g = 0; g < gates; ++g)
    for (int v = 0; v < vectors; ++v) {
      const PanelVector out(dst, rows_of_panel, gates * vectors, g * vectors + v, L);
      const int64_t first = unit + v * L;
      for (int64_t row = 0; row < rows_of_panel; row += L) {
        const int64_t k = row * depth;
        Vector<A> rows[L];
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane)
          rows[lane] = first + lane < H ? reinterpret_cast<Vector<A>>(
                                              load_row(w + (g * H + first + lane) * ldw + k, K - k))
                                        : Vector<A>{};
        transpose<A>(rows);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (row + i < rows_of_panel) store(out.data + (row + i) * out.stride, rows[i]);
      }
    }
}

// W[G*H, N], to be used as d W: dst[g*Hp + j, v, lane] = W[g*H + j, column + v*L + lane] for
// kRowsAtOnce rows from j = first on; rows H <= j < Hp are zero. A panel's lines of all rows are in
// few sets of the caches where N is a power of two: who packs a few rows for all panels finds them
// again.
constexpr int64_t kRowsAtOnce = kUnitPad;
template <class S>
void pack_rows(const S* w, int64_t G, int64_t H, int64_t Hp, int64_t N, int64_t g, int64_t first,
               int64_t column, int vectors, Packed<S>* dst) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  constexpr int depth = kDepth<Packed<S>>;
  for (int64_t j = first; j < first + kRowsAtOnce; j += depth)
    for (int v = 0; v < vectors; ++v) {
      const int64_t n = column + v * L;
      const PanelVector out(dst, G * Hp / depth, vectors, v, L);
      const auto row = [&](int64_t i) {
        return i < H ? load_partial(w + (g * H + i) * N + n, N - n) : Vector<A>{};
      };
      Packed<S>* to = out.data + (g * Hp + j) / depth * out.stride;
      if constexpr (depth == 2)
        store_pairs(to, row(j), row(j + 1));
      else
        store(to, row(j));
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
void dot(int64_t M, int64_t K, const Operand<S>* a, int64_t lda, const S* w, int gates, int64_t H,
         int64_t unit, int vectors, const Accumulate<S>* add, Accumulate<S>* out, int64_t ldo) {
  using A = Accumulate<S>;
  constexpr int L = kLanes<A>;
  using O = Operand<S>;
  constexpr int depth = kDepth<Packed<S>>;
  constexpr int parts = kParts<O, depth>;
  constexpr int width = depth * L;  // elements of K at once
  // Rows of W at once: enough sums in flight, and few enough to be in one page, as the processor
  // looks ahead.
  constexpr int some = L < 4 ? L : 4;
  // sum[i] += some of a row of `a` times those of row i of W.
  const auto next = [](const O* x, const S* const* rows, int64_t k, int64_t n,
                       Vector<A>* sum) __attribute__((always_inline)) {
    decltype(weights_of_part<O>(load_row(rows[0], n), 0)) operands[parts];
    load_operands<depth>(x + k, n, operands);
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part)
#pragma GCC unroll 16
      for (int i = 0; i < some; ++i)
        sum[i] = multiply_add(sum[i], operands[part],
                              weights_of_part<O>(load_row(rows[i] + k, n), part));
  };
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
#pragma GCC unroll 16
          for (int i = 0; i < L; i += some) {
            int64_t k = 0;
            for (; k + width <= K; k += width) next(a + m * lda, rows + i, k, width, sum + i);
            if (k < K) next(a + m * lda, rows + i, k, K - k, sum + i);
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

// Rows of a left operand, a[M, K], packed as if they were weights: strips of kStrip vectors of
// rows.
template <class S>
void pack_left(int64_t M, int64_t K, const S* a, int64_t lda, S* dst) {
  constexpr int64_t L = kLanes<S>;
  for (int64_t m = 0; m < M; m += kStrip * L)
    pack_transposed<S>(a, lda, 1, M, K, m, vectors_of_rows(M - m, L), dst + m * K);
}

// The same as dot() for all panels of units [begin, end), with the rows of `a` packed by pack_left:
// the tile takes its rows from W as it is, and its vectors from them. Where rows fill the vectors
// that is nearly as fast as with W packed, and has the same bits. `add` may be null.
template <class A>
void dot_left(int64_t M, int64_t K, const A* a, const A* w, int gates, int64_t H, int64_t begin,
              int64_t end, const A* add, A* out, int64_t ldo) {
  constexpr int64_t L = kLanes<A>, kUnits = 3 * L;  // at once: full tiles
  // More rows of W than that fight for a set of L1, where K is a power of two.
  constexpr int64_t kHighest = 6;
  alignas(64) A sums[kUnits * kStrip * L];
  for (int64_t first = begin; first < end; first += kUnits)
    for (int g = 0; g < gates; ++g) {
      const int64_t units = end - first < kUnits ? end - first : kUnits;
      const int64_t valid = H <= first ? 0 : H - first < units ? H - first : units;
      const A* rows = w + (g * H + first) * K;
      for (int64_t m = 0; m < M; m += kStrip * L) {
        const int n = vectors_of_rows(M - m, L);
        for_heights(valid, kHighest, [&](int64_t row, int64_t height) {
          A* const to = sums + row * n * L;
          for_pieces<A>(K, [&](Depth piece) {
            kTiles<A, A, Left::kRows, Right::kPanel>.at[n - 1][height - 1](
                {piece, rows + row * K + piece.first, K, a + m * K, 0}, piece.first ? to : nullptr,
                n * L, to, n * L, 1);
          });
        });
        for (int64_t i = valid * n; i < units * n; ++i) store(sums + i * L, Vector<A>{});
        for (int64_t u = 0; u < units; u += L)
          for (int i = 0; i < n; ++i) {
            Vector<A> turned[L];
#pragma GCC unroll 16
            for (int64_t lane = 0; lane < L; ++lane)
              turned[lane] = load(sums + ((u + lane) * n + i) * L);
            transpose<A>(turned);
            const int64_t column = column_of<A>(gates, begin, end, first + u, g);
            const Vector<A> bias = add ? load(add + column) : Vector<A>{};
            const int64_t row = m + i * L, left = M - row < L ? M - row : L;
            for (int64_t lane = 0; lane < left; ++lane)
              store(out + (row + lane) * ldo + column, turned[lane] + bias);
          }
      }
    }
}

// out[m, column + ...] = sum_g a[m, g, :] W[g, :, column + ...] + add, for W[G*H, N] as it is.
// Columns [column, column + vectors*L) may reach beyond N: those results are zero.
template <class S, class A>
void times_rows(int64_t M, int64_t G, int64_t H, int64_t Hp, int64_t N, const A* a, int64_t lda,
                const S* w, int64_t column, int vectors, const A* add, int64_t ld_add, A* out,
                int64_t ldo) {
  constexpr int L = kLanes<A>;
  int whole = vectors;
  while (whole > 0 && column + whole * L > N) --whole;
  for (int64_t g = 0; g < G; ++g) {
    const S* rows = w + g * H * N + column;
    const A* left = a + g * Hp;
    const A* before = g ? out : add;
    const int64_t ld_before = g ? ldo : ld_add;
    if (whole > 0)
      for_row_tiles<A, S, Left::kRows, Right::kRows>(
          M, whole, [&](int64_t m, int64_t, int64_t count, TileFunction<A, S> tile) {
            tile({H, left + m * lda, lda, rows, N}, before ? before + m * ld_before : nullptr,
                 ld_before, out + m * ldo, ldo, count);
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
