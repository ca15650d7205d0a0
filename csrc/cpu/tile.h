// The register tile: M rows x NV vectors of a matrix product held in registers over the whole of K.
// All products with packed weights run through it, so the order of each sum is the order of K,
// whatever the tile and the split among threads: results do not depend on the number of threads.
#pragma once

#include "simd.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 12;

// Vectors of a panel that stand side by side. With 16 registers a tall tile is 6 rows x 2 vectors
// (2 x 4 would load as much as it multiplies) and reads one strip after the other; a low one reads
// all strips at once, because it needs that many sums in flight.
constexpr int kStrip = kVectorRegisters >= 32 ? 4 : 2;

// Rows whose sums fit the registers beside one row of weights and one broadcast.
constexpr int fitting_rows(int vectors) {
  const int fit = (kVectorRegisters - vectors - 1) / vectors;
  return fit < kMaxRows ? fit : kMaxRows;
}
// Rows of the highest tile over a panel.
constexpr int max_rows(int vectors) {
  return fitting_rows(vectors < kStrip || vectors % kStrip ? vectors : kStrip);
}
// Rows up to which all strips are read at once. The 3 x 4 of 16 registers keeps the broadcasts in
// registers and the weights in memory.
constexpr int max_rows_at_once(int vectors) {
  return kStrip == 2 && vectors == 4 ? 3 : fitting_rows(vectors);
}

// Where A[m, k] of the left operand stands.
enum class Left {
  kRows,     // a[m * lda + k]: activations, one row per sequence
  kColumns,  // a[m + k * lda]: gate gradients, transposed for weight gradients
};

// Where w[k, v] of the right operand stands.
enum class Right {
  kPanel,  // packed: strips of kStrip vectors one after another, each [K, width]
  kRows,   // w[k * ldw + v * L]: a matrix as it is
};

// c[m, v] = sum_k a[m, k] * w[k, v] + add[m, v], with v over NV vectors. `add` may be null (zero),
// have ld_add = 0 (a bias for every row), or be c itself (accumulate). It is added last: a long
// accumulation in pieces then loses less than one that starts from a large sum.
template <class A, Left kLeft, Right kRight, int M, int NV>
void tile(int64_t K, const A* a, int64_t lda, const A* w, int64_t ldw, const A* add, int64_t ld_add,
          A* c, int64_t ldc) {
  constexpr int L = kLanes<A>;
  constexpr int kStrips = kRight == Right::kPanel ? (NV + kStrip - 1) / kStrip : 1;
  if constexpr (M > max_rows_at_once(NV)) {
    static_assert(NV == 2 * kStrip);
    constexpr int64_t width = kStrip * L;
    const int64_t second = kRight == Right::kPanel ? K * width : width;
    tile<A, kLeft, kRight, M, kStrip>(K, a, lda, w, ldw, add, ld_add, c, ldc);
    tile<A, kLeft, kRight, M, kStrip>(K, a, lda, w + second, ldw, add ? add + width : nullptr,
                                      ld_add, c + width, ldc);
    return;
  } else {
    Vector<A> sum[M][NV];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = Vector<A>{};
    const A* strips[kStrips];
#pragma GCC unroll 4
    for (int s = 0; s < kStrips; ++s) strips[s] = w + s * K * kStrip * L;
    for (int64_t k = 0; k < K; ++k) {
      Vector<A> weight[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        weight[v] = kRight == Right::kPanel ? load(strips[v / kStrip] + v % kStrip * L)
                                            : load(strips[0] + v * L);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const A x = kLeft == Left::kRows ? a[m * lda] : a[m];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[m][v] += x * weight[v];
      }
#pragma GCC unroll 4
      for (int s = 0; s < kStrips; ++s) {
        const int width = NV - s * kStrip < kStrip ? NV - s * kStrip : kStrip;
        strips[s] += kRight == Right::kPanel ? width * L : ldw;
      }
      a += kLeft == Left::kRows ? 1 : lda;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        store(c + m * ldc + v * L, add ? sum[m][v] + load(add + m * ld_add + v * L) : sum[m][v]);
  }
}

template <class A>
using TileFunction = void (*)(int64_t, const A*, int64_t, const A*, int64_t, const A*, int64_t, A*,
                              int64_t);

template <class A, Left kLeft, Right kRight>
struct TileTable {
  TileFunction<A> at[kMaxVectors][kMaxRows];  // [NV - 1][M - 1]

  template <int NV, int... m>
  constexpr void fill(std::integer_sequence<int, m...>) {
    ((at[NV - 1][m] = tile<A, kLeft, kRight, m + 1, NV>), ...);
  }
  constexpr TileTable() : at{} {
    fill<1>(std::make_integer_sequence<int, max_rows(1)>{});
    fill<2>(std::make_integer_sequence<int, max_rows(2)>{});
    fill<3>(std::make_integer_sequence<int, max_rows(3)>{});
    fill<4>(std::make_integer_sequence<int, max_rows(4)>{});
  }
};
template <class A, Left kLeft, Right kRight>
inline constexpr TileTable<A, kLeft, kRight> kTiles{};

// Calls body(first_row, rows, tile) for tiles of nearly equal height over `rows` rows: 8 rows are 4
// + 4, not 6 + 2, because a low tile is bound by loading weights.
template <class A, Left kLeft, Right kRight, class Body>
FUSED_RNN_INLINE void for_row_tiles(int64_t rows, int vectors, Body body) {
  const int64_t highest = max_rows(vectors);
  const int64_t tiles = (rows + highest - 1) / highest;
  int64_t row = 0;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t height = (rows - row) / (tiles - i);
    body(row, height, kTiles<A, kLeft, kRight>.at[vectors - 1][height - 1]);
    row += height;
  }
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
