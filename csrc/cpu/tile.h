// The register tile: M rows x NV vectors of a matrix product held in registers over the whole of K.
// All products with packed weights run through it, so the order of each sum is the order of K,
// whatever the tile and the split among threads: results do not depend on the number of threads.
#pragma once

#include "simd.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 12;

// Rows that fit the registers beside NV vectors of weights and one broadcast.
constexpr int max_rows(int vectors) {
  const int fit = (kVectorRegisters - vectors - 1) / vectors;
  return fit < kMaxRows ? fit : kMaxRows;
}

// Where A[m, k] of the left operand stands.
enum class Left {
  kRows,     // a[m * lda + k]: activations, one row per sequence
  kColumns,  // a[m + k * lda]: gate gradients, transposed for weight gradients
};

// c[m, v] = sum_k a[m, k] * w[k, v] + add[m, v], with v over NV vectors. `add` may be null (zero),
// have ld_add = 0 (a bias for every row), or be c itself (accumulate). It is added last: a long
// accumulation in pieces then loses less than one that starts from a large sum.
template <class A, Left kLeft, int M, int NV>
void tile(int64_t K, const A* a, int64_t lda, const A* w, int64_t ldw, const A* add, int64_t ld_add,
          A* c, int64_t ldc) {
  constexpr int L = kLanes<A>;
  Vector<A> sum[M][NV];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[m][v] = Vector<A>{};
  for (int64_t k = 0; k < K; ++k) {
    Vector<A> weight[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weight[v] = load(w + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const A x = kLeft == Left::kRows ? a[m * lda] : a[m];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] += x * weight[v];
    }
    w += ldw;
    a += kLeft == Left::kRows ? 1 : lda;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      store(c + m * ldc + v * L, add ? sum[m][v] + load(add + m * ld_add + v * L) : sum[m][v]);
}

template <class A>
using TileFunction = void (*)(int64_t, const A*, int64_t, const A*, int64_t, const A*, int64_t, A*,
                              int64_t);

template <class A, Left kLeft>
struct TileTable {
  TileFunction<A> at[kMaxVectors][kMaxRows];  // [NV - 1][M - 1]

  template <int NV, int... m>
  constexpr void fill(std::integer_sequence<int, m...>) {
    ((at[NV - 1][m] = tile<A, kLeft, m + 1, NV>), ...);
  }
  constexpr TileTable() : at{} {
    fill<1>(std::make_integer_sequence<int, max_rows(1)>{});
    fill<2>(std::make_integer_sequence<int, max_rows(2)>{});
    fill<3>(std::make_integer_sequence<int, max_rows(3)>{});
    fill<4>(std::make_integer_sequence<int, max_rows(4)>{});
  }
};
template <class A, Left kLeft>
inline constexpr TileTable<A, kLeft> kTiles{};

// Calls body(first_row, rows, tile) for tiles of nearly equal height over `rows` rows: 8 rows are 4
// + 4, not 6 + 2, because a low tile is bound by loading weights.
template <class A, Left kLeft, class Body>
FUSED_RNN_INLINE void for_row_tiles(int64_t rows, int vectors, Body body) {
  const int64_t highest = max_rows(vectors);
  const int64_t tiles = (rows + highest - 1) / highest;
  int64_t row = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t height = (rows - row) / (tiles - i);
    body(row, height, kTiles<A, kLeft>.at[vectors - 1][height - 1]);
    row += height;
  }
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
