// The register tile: M rows x NV vectors of a matrix product held in registers over all of K, or a
// piece of it. All products with packed weights run through it in the same pieces, so the order of
// each sum is that of K, whatever the tile and the split among threads: results do not depend on
// the number of threads.
#pragma once

#include <algorithm>
#include <array>

#include "simd.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// a / b of sizes far below 2^32, none negative: before Ice Lake, Intel's processors take up to 90
// cycles to divide 64 bits, and 26 for 32.
constexpr int64_t quotient(int64_t a, int64_t b) {
  return uint32_t(a) / uint32_t(b);
}

// A pointer of which the compiler does not know where it comes from.
template <class T>
FUSED_RNN_INLINE T* opaque(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

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

// The least rows of a tile that fetches other weights meanwhile.
constexpr int kFetchingRows = 4;
constexpr int64_t kLine = 64;  // bytes, of the caches

// A product over many K is the sum of those over pieces of it, of so many bytes of a vector of
// weights, and is made of so many rows at once: they find a piece in L2 beside what is fetched
// meanwhile, and a sum of sums has less error than one of as many terms.
constexpr int64_t kPieceBytes = 1 << 15;
constexpr int64_t kRowsOfPiece = 4 * kMaxRows;
template <class W>
constexpr int64_t kPiece =
    kPieceBytes / (kLanes<Accumulate<W>> * int64_t(sizeof(W))) * kDepth<W>;  // of K

// Terms that a tile adds up before it adds their sum to that of the terms before: where they are
// alike in size, the error of a sum grows with their number.
constexpr int64_t kTerms = 256;

// The rows of K that a tile goes through, of those that a panel has.
struct Depth {
  int64_t count;
  int64_t first = 0;
  int64_t all;
  Depth(int64_t K) : count(K), all(K) {}
  Depth(int64_t first, int64_t count, int64_t K) : count(count), first(first), all(K) {}
};

// Calls body(piece) for the pieces of K in which a product with W is made, in order.
template <class W, class Body>
FUSED_RNN_INLINE void for_pieces(int64_t K, Body body) {
  for (int64_t k = 0; k < K; k += kPiece<W>)
    body(Depth(k, K - k < kPiece<W> ? K - k : kPiece<W>, K));
}

// Where A[m, k] of the left operand stands.
enum class Left {
  kRows,     // a[m * lda + k]: activations, one row per sequence
  kColumns,  // a[m + k * lda]: gate gradients, transposed for weight gradients
};

// Where w[k, v] of the right operand stands.
enum class Right {
  kPanel,   // packed: strips of kStrip vectors one after another, each [K, width]; ldw is how many
            // bytes behind its own first row the lines stand that a tile fetches, 0: none
  kAcross,  // the same of panels of one strip, and vectors of more than one panel; what is fetched
            // is what the next tile over these panels takes
  kRows,    // w[k * ldw + v * L]: a matrix as it is
};

// What a tile multiplies. Where `depth` is a piece of K, `a` begins with that, and w with the
// panel.
//
// X is what `a` holds and W what w does: numbers of one type, or weights in their storage type,
// which are then widened (or multiplied in pairs) where they are loaded.
template <class X, class W>
struct Term {
  Depth depth;
  const X* a;
  int64_t lda;
  const W* w;
  int64_t ldw;
  int column = 0;  // with kAcross: the first vector, counted from w on
};

// c[m, v] = sum_k a[m, k] * w[k, v] + add[m, v], with v over NV vectors and m over `count` tiles of
// M rows each, one after the other. `add` may be null (zero), have ld_add = 0 (a bias for every
// row), or be c itself (accumulate). It is added last: a long accumulation in pieces then loses
// less than one that starts from a large sum.
//
// A high tile has time to fetch a line for each row of a panel, and fetches what other tiles will
// read: of a far cache the processor looks ahead too little by itself, and waits at every page.
template <class X, class W, Left kLeft, Right kRight, int M, int NV, int kPanels = 1>
void tile(const Term<X, W>& term, const Accumulate<X>* add, int64_t ld_add, Accumulate<X>* c,
          int64_t ldc, int64_t count) {
  using A = Accumulate<X>;
  constexpr int L = kLanes<A>;
  static_assert(kDepth<W> == 1 || (kLeft == Left::kRows && kRight != Right::kRows));
  static_assert(kTerms % kDepth<W> == 0);
  constexpr bool kAcross = kRight == Right::kAcross;
  constexpr int kStrips = kRight == Right::kPanel ? (NV + kStrip - 1) / kStrip : 1;  // of a panel
  constexpr int kStarts = kAcross ? NV : kPanels * kStrips;                          // in w
  constexpr int kVectors = kPanels * NV;
  if constexpr (M > max_rows_at_once(NV)) {
    static_assert(NV == 2 * kStrip && kPanels == 1);
    constexpr int64_t width = kStrip * L;
    tile<X, W, kLeft, kRight, M, kStrip>(term, add, ld_add, c, ldc, count);
    Term<X, W> second = term;
    second.w += kRight == Right::kPanel ? packed_rows<W>(term.depth.all) * width : width;
    tile<X, W, kLeft, kRight, M, kStrip>(second, add ? add + width : nullptr, ld_add, c + width,
                                         ldc, count);
    return;
  } else {
    const auto width = [](int s) { return NV - s * kStrip < kStrip ? NV - s * kStrip : kStrip; };
    // Of every sixth or fourth row, the next element: for all rows there would be too few
    // registers.
    constexpr int kApart = M <= 6 ? 6 : 4,
                  kFirst = kLeft == Left::kRows ? (M + kApart - 1) / kApart : 1;
    const X* a[kFirst];
    const W* w = term.w;
    const int64_t K = term.depth.count, lda = term.lda, ldw = term.ldw;
    const int64_t rows = packed_rows<W>(term.depth.all), above = term.depth.first / kDepth<W>;
    const auto across = [&](int column) __attribute__((always_inline)) {
      return w + ((column / kStrip * rows + above) * kStrip + column % kStrip) * L;
    };
    // Where strip i begins.
    const auto start = [&](int i) __attribute__((always_inline)) {
      const int p = i / kStrips, s = i % kStrips;
      return kAcross ? across(term.column + i)
                     : term.w + ((p * NV + s * kStrip) * rows + width(s) * above) * L;
    };
    const W* starts[kStarts];
    Vector<A> sum[M][kVectors];
    // Vector v of w, in a row of panels or of w itself that starts `row` vectors behind.
    const auto weight = [&](int v, int64_t row) __attribute__((always_inline)) {
      if constexpr (kAcross) return load_packed(starts[v]);
      const int s = v % NV / kStrip;
      return load_packed(kRight == Right::kPanel
                             ? starts[v / NV * kStrips + s] + row * width(s) + v % NV % kStrip * L
                             : w + v * L);
    };
    const auto operand = [&](int m) __attribute__((always_inline)) {
      return kLeft == Left::kRows ? a[m / kApart] + m % kApart * lda : a[0] + m;
    };
    const auto next = [&](int64_t n) __attribute__((always_inline)) {
      for (const X*& row : a) row += n;
    };
    const auto address = [](const W* w) { return reinterpret_cast<const char*>(w); };
    const char* coming = address(start(0)) + ldw;
    int64_t ahead[kStarts] = {};  // bytes from each start to what is fetched with it
    for (int i = 0; kAcross && ldw && i < kStarts; ++i) {
      const int next = term.column + NV + i, all = kStrip * NV;
      ahead[i] = address(across(next % all)) - address(start(i)) + (next < all ? 0 : ldw);
    }
    int64_t row = 0;  // of w where parts are known at run time only, times L
    constexpr bool kFetches = kAcross || (kRight == Right::kPanel && M >= kFetchingRows);
    constexpr bool kRowIsLine = kStarts == 1 && NV * L * int64_t(sizeof(W)) == kLine;
    const auto fetch = [&]() __attribute__((always_inline)) {
      if constexpr (kAcross) {
#pragma GCC unroll 4
        for (int i = 0; i < kStarts; ++i) __builtin_prefetch(address(starts[i]) + ahead[i], 0, 2);
      } else if constexpr (kRowIsLine) {
        __builtin_prefetch(address(starts[0] + row * width(0)) + ldw, 0, 2);
      } else {
        __builtin_prefetch(coming, 0, 2);
        coming += kLine;
      }
    };
    // Multiplies what weights(v) and operands(m) give. What is fewer stands in registers.
    const auto multiply = [&](auto weights, auto operands) __attribute__((always_inline)) {
      if constexpr (M < kVectors) {
        decltype(operands(0)) x[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) x[m] = operands(m);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const auto y = weights(v);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) sum[m][v] = multiply_add(sum[m][v], x[m], y);
        }
      } else {
        decltype(weights(0)) y[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) y[v] = weights(v);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const auto x = operands(m);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[m][v] = multiply_add(sum[m][v], x, y[v]);
        }
      }
    };
    constexpr int kHeld = kVectors * M + (M < kVectors ? M : kVectors) + 1;
    // Adds products of n of K. With few instructions for each: they are what it costs where another
    // thread has its share of the core.
    const auto add_up = [&](int64_t n, auto fetches) __attribute__((always_inline)) {
      if constexpr (kVectorRegisters == 16 && kParts<X, kDepth<W>> > 1 && kHeld >= 15) {
        // No register is left for a mask, and GCC would spill sums: one part at a time.
        int64_t part = 0;  // times L
        for (int64_t k = 0; k < n; ++k) {
          if (fetches && !part) fetch();
          multiply([&](int v)
                       __attribute__((always_inline)) { return part_at(weight(v, row), part); },
                   [&](int m) __attribute__((always_inline)) { return broadcast<1>(operand(m)); });
          row += part;
          part ^= L;
          next(1);
        }
      } else {
        // The next row of w, of which the first n rows of K are multiplied.
        const auto next_row = [&](auto n) __attribute__((always_inline)) {
          if (fetches) fetch();
#pragma GCC unroll 2
          for (int part = 0; part < kParts<X, n()>; ++part)
            multiply(
                [&](int v) __attribute__((always_inline)) {
                  return weights_of_part<X>(weight(v, 0), part);
                },
                [&](int m)
                    __attribute__((always_inline)) { return broadcast<n()>(operand(m) + part); });
#pragma GCC unroll 8
          for (int i = 0; i < kStarts; ++i)
            starts[i] += (kAcross ? kStrip : width(i % kStrips)) * L;
          if constexpr (kRight == Right::kRows) w += ldw;
          next(kLeft == Left::kRows ? n() : lda);
        };
        const X* const end = a[0] + n / kDepth<W> * (kLeft == Left::kRows ? kDepth<W> : lda);
        while (a[0] != end) next_row(std::integral_constant<int, kDepth<W>>{});
        if (kDepth<W> > 1 && n % kDepth<W>) next_row(std::integral_constant<int, 1>{});
      }
    };
    for (const X* rows_of_a = term.a; count > 0;
         --count, rows_of_a += kLeft == Left::kRows ? M * lda : M) {
      a[0] = rows_of_a;
      for (int i = 1; i < kFirst; ++i) a[i] = opaque(a[i - 1] + kApart * lda);
      w = term.w;
#pragma GCC unroll 8
      for (int i = 0; i < kStarts; ++i) starts[i] = start(i);
      row = 0;
      alignas(64) A buffer[M * kVectors * L];
      A* const before = opaque(buffer);  // the sums of the terms before
      int64_t left = K, n;
      do {
        n = left < kTerms ? left : kTerms;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[m][v] = Vector<A>{};
        if (kFetches && ldw)
          add_up(n, std::true_type{});
        else
          add_up(n, std::false_type{});
        const auto each_sum = [&](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) body(sum[m][v], before + (m * kVectors + v) * L);
        };
        if (left < K) each_sum([](Vector<A>& one, const A* to) { one += load(to); });
        if (left > n) each_sum([](const Vector<A>& one, A* to) { store(to, one); });
        left -= n;
      } while (left > 0);
      // From row to row: g++ would make all addresses beforehand, and keep them in memory.
      const auto write = [&](auto added) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            store(c + v * L, added ? sum[m][v] + load(add + v * L) : sum[m][v]);
          c = opaque(c + ldc);
          if (added) add = opaque(add + ld_add);
        }
      };
      add ? write(std::true_type{}) : write(std::false_type{});
    }
  }
}

template <class X, class W = X>
using TileFunction = void (*)(const Term<X, W>&, const Accumulate<X>*, int64_t, Accumulate<X>*,
                              int64_t, int64_t);

template <class X, class W, Left kLeft, Right kRight>
struct TileTable {
  TileFunction<X, W> at[kMaxVectors][kMaxRows];  // [NV - 1][M - 1]

  template <int NV, int... m>
  constexpr void fill(std::integer_sequence<int, m...>) {
    ((at[NV - 1][m] = tile<X, W, kLeft, kRight, m + 1, NV>), ...);
  }
  constexpr TileTable() : at{} {
    fill<1>(std::make_integer_sequence<int, max_rows(1)>{});
    fill<2>(std::make_integer_sequence<int, max_rows(2)>{});
    fill<3>(std::make_integer_sequence<int, max_rows(3)>{});
    fill<4>(std::make_integer_sequence<int, max_rows(4)>{});
  }
};
// One row over one panel has too few sums in flight for the latency of an addition: it takes two
// panels at once, where there are two of equal width.
template <class X, class W, int NV>
constexpr TileFunction<X, W> kTwoPanels = tile<X, W, Left::kRows, Right::kPanel, 1, NV, 2>;

template <class X, class W, Left kLeft, Right kRight>
inline constexpr TileTable<X, W, kLeft, kRight> kTiles{};

// Calls body(first_row, rows, count) for tiles over so many rows: first `count` of them of one
// height, then those of another. They are nearly equal, 4 + 4 rather than 6 + 2, because a low tile
// is bound by loading weights.
template <class Body>
FUSED_RNN_INLINE void for_equal_heights(int64_t rows, int64_t highest, Body body) {
  if (rows <= highest) {
    if (rows > 0) body(0, rows, 1);
    return;
  }
  const int64_t tiles = quotient(rows + highest - 1, highest), low = quotient(rows, tiles);
  const int64_t higher = rows - low * tiles;  // tiles of one row more
  if (higher) body(0, low + 1, higher);
  body(higher * (low + 1), low, tiles - higher);
}
// Calls body(first_row, rows) for each of them.
template <class Body>
FUSED_RNN_INLINE void for_heights(int64_t rows, int64_t highest, Body body) {
  for_equal_heights(rows, highest, [&](int64_t row, int64_t height, int64_t count) {
    for (; count > 0; --count, row += height) body(row, height);
  });
}

// Calls body(first_row, rows, count, tile) for the tiles over so many rows of a panel.
template <class X, class W, Left kLeft, Right kRight, class Body>
FUSED_RNN_INLINE void for_row_tiles(int64_t rows, int vectors, Body body) {
  for_equal_heights(rows, max_rows(vectors), [&](int64_t row, int64_t height, int64_t count) {
    body(row, height, count, kTiles<X, W, kLeft, kRight>.at[vectors - 1][height - 1]);
  });
}

// Tiles over three vectors have up to nine rows, and four of them go through three panels: that is
// for rows of which more tiles over a panel would be needed, each of which reads it again, where L1
// does not hold it.
constexpr int kAcrossVectors = 3, kAcrossPanels = 3;
constexpr int kAcrossRows = fitting_rows(kAcrossVectors);
constexpr int kLeastAcross = 5;  // 13 rows are 8 and 5
constexpr int kMostAcross = 2 * kAcrossRows;
constexpr int64_t kPanelOfL1 = 24576;  // bytes
template <class W>
constexpr bool goes_across(int64_t rows, int64_t K, int vectors) {
  constexpr int high = max_rows(kMaxVectors);
  const bool fewer =
      (rows > high && rows <= kAcrossRows) || (rows > 2 * high && rows <= kMostAcross);
  return kStrip == kMaxVectors && vectors == kMaxVectors && fewer &&
         packed_rows<W>(K) * vectors * kLanes<Accumulate<W>> * int64_t(sizeof(W)) >= kPanelOfL1;
}
template <class X, class W, int... m>
constexpr auto across_tiles(std::integer_sequence<int, m...>) {
  return std::array{tile<X, W, Left::kRows, Right::kAcross, kLeastAcross + m, kAcrossVectors>...};
}

// How many panels a product of so many rows takes at once, where so many of full width are left.
template <class W>
constexpr int panels_at_once(int64_t rows, int64_t K, int vectors) {
  return rows == 1 ? 2 : goes_across<W>(rows, K, vectors) ? kAcrossPanels : 1;
}

// Calls body(first_row, rows, count, column, tile) for the tiles over so many rows of `panels`
// packed ones, where these are as many as panels_at_once() or one; `column` is the first of their
// vectors in the tile.
template <class X, class W, class Body>
FUSED_RNN_INLINE void for_row_tiles(int64_t rows, int panels, int vectors, Body body) {
  static constexpr TileFunction<X, W> kTwo[] = {kTwoPanels<X, W, 1>, kTwoPanels<X, W, 2>,
                                                kTwoPanels<X, W, 3>, kTwoPanels<X, W, 4>};
  if (panels == 2) return body(0, 1, 1, 0, kTwo[vectors - 1]);
  if constexpr (kStrip == kMaxVectors) {
    static constexpr auto kTall =
        across_tiles<X, W>(std::make_integer_sequence<int, kAcrossRows - kLeastAcross + 1>{});
    if (panels == kAcrossPanels)
      return for_heights(rows, kAcrossRows, [&](int64_t m, int64_t height) {
        for (int column = 0; column < panels * vectors; column += kAcrossVectors)
          body(m, height, 1, column, kTall[size_t(height - kLeastAcross)]);
      });
  }
  for_row_tiles<X, W, Left::kRows, Right::kPanel>(
      rows, vectors, [&](int64_t m, int64_t height, int64_t count, TileFunction<X, W> tile) {
        body(m, height, count, 0, tile);
      });
}

// What the tile over the rows from m on fetches of that which stands `next` bytes behind its own
// weights, and is as large: its share. 0 where that is 0, or other tiles have fetched all of it.
template <class W>
int64_t share_of(int64_t next, int64_t K, int vectors, int64_t m) {
  if (!next) return 0;
  const int64_t rows = packed_rows<W>(K);
  const int64_t bytes = rows * vectors * kLanes<Accumulate<W>> * int64_t(sizeof(W));
  // A tall tile goes through two strips, and fetches with each.
  const int64_t strips = max_rows(vectors) > max_rows_at_once(vectors) ? 2 : 1;
  const int64_t tiles = quotient(m + max_rows(vectors) - 1, max_rows(vectors));
  const int64_t before = tiles * rows * strips * kLine;
  return before < bytes ? next + before : 0;
}

// Calls body(row, count, fetched) for `count` tiles of one height: one by one where they have
// something to fetch.
template <class Share, class Body>
FUSED_RNN_INLINE void for_fetching(int64_t height, int64_t count, Share share, Body body) {
  for (int64_t row = 0, n; count > 0; count -= n, row += n * height) {
    const int64_t fetched = share(row);
    n = fetched ? 1 : count;
    body(row, n, fetched);
  }
}

// c[m, :] = a[m, :] w + add, for so many rows and panels, one or panels_at_once(). They are the
// rows from `first` on of those that meet the panels, before the panels `next` (null: nothing is
// fetched).
template <class X, class W>
void packed_product(int64_t first, int64_t rows, int64_t K, const X* a, int64_t lda, const W* w,
                    const W* next, int vectors, int panels, const Accumulate<X>* add,
                    int64_t ld_add, Accumulate<X>* c, int64_t ldc) {
  using A = Accumulate<X>;
  constexpr int64_t L = kLanes<A>;
  const int64_t away = next ? (next - w) * int64_t(sizeof(W)) : 0;
  // What the tile over the rows from m on fetches of what stands so far behind.
  const auto share = [&](int64_t behind, int64_t count, int64_t m) {
    if (panels == kAcrossPanels) return m ? 0 : behind;
    return share_of<W>(behind, count, vectors, m);
  };
  if (K <= kPiece<W>)
    return for_row_tiles<X, W>(
        rows, panels, vectors,
        [&](int64_t m, int64_t height, int64_t count, int column, TileFunction<X, W> tile) {
          const int64_t at = column * L;
          for_fetching(
              height, count, [&](int64_t i) { return share(away, K, first + m + i); },
              [&](int64_t i, int64_t n, int64_t fetched) {
                const int64_t row = m + i;
                tile({K, a + row * lda, lda, w, fetched, column},
                     add ? add + row * ld_add + at : nullptr, ld_add, c + row * ldc + at, ldc, n);
              });
        });
  constexpr int64_t kSums = std::max(kRowsOfPiece, int64_t(kMostAcross) * kAcrossPanels);
  alignas(64) A sums[kSums * kMaxVectors * L];  // not in c, which may be `add`
  const int64_t width = panels * vectors * L, most = panels > 1 ? kMostAcross : kRowsOfPiece;
  const bool one_tile = rows <= max_rows(vectors);
  for (int64_t begin = 0; begin < rows; begin += most) {
    const int64_t count = rows - begin < most ? rows - begin : most;
    for_pieces<W>(K, [&](Depth piece) {
      const int64_t k = piece.first;
      // Many rows wait for the next piece, which stands behind this one. One tile is followed by
      // others over the same pieces, and then by the next panel.
      constexpr int64_t kRow = kStrip * L * int64_t(sizeof(W));
      const int64_t behind = k + piece.count < K ? packed_rows<W>(piece.count) * kRow
                             : away              ? away - packed_rows<W>(k) * kRow
                                                 : 0;
      const int64_t coming = one_tile ? away : behind;
      for_row_tiles<X, W>(
          count, panels, vectors,
          [&](int64_t m, int64_t height, int64_t tiles, int column, TileFunction<X, W> tile) {
            for_fetching(
                height, tiles,
                [&](int64_t i) { return share(coming, piece.count, one_tile ? first : m + i); },
                [&](int64_t i, int64_t n, int64_t fetched) {
                  A* const to = sums + (m + i) * width + column * L;
                  tile({piece, a + (begin + m + i) * lda + k, lda, w, fetched, column},
                       k ? to : nullptr, width, to, width, n);
                });
          });
    });
    for (int64_t m = 0; m < count; ++m)
      for (int64_t i = 0; i < width; i += L) {
        const Vector<A> sum = load(sums + m * width + i);
        const int64_t row = begin + m;
        store(c + row * ldc + i, add ? sum + load(add + row * ld_add + i) : sum);
      }
  }
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
