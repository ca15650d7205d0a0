// Products with weights in panels and in place, in every storage type, against double: every height
// of the tile, odd K, columns beyond the matrix. What stands beyond a row is NaN, and must not be
// met. Numbers are small integers, so that no result is rounded.
#include <initializer_list>
#include <limits>
#include <vector>

#include "check.h"

#define FUSED_RNN_ISA tested
#include "cpu/pack.h"

namespace {

using namespace fused_rnn::cpu::tested;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class S>
double read(S x) {
  S buffer[kLanes<Accumulate<S>>] = {x};
  return double(load(buffer)[0]);
}
template <class S>
S make(double x) {
  S buffer[kLanes<Accumulate<S>>];
  store(buffer, Vector<Accumulate<S>>{} + Accumulate<S>(x));
  return buffer[0];
}

int number(int64_t i) {
  return int((i * 2654435761u >> 7) % 9) - 4;
}

// [rows, columns] at a distance of ld, with NaN between them and behind.
template <class S>
std::vector<S> matrix(int64_t rows, int64_t columns, int64_t ld) {
  std::vector<S> m(size_t(rows * ld + 4 * kLanes<float>), make<S>(kNaN));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) m[size_t(i * ld + j)] = make<S>(number(i * columns + j));
  return m;
}

template <class S>
struct Name;
template <>
struct Name<float> {
  static constexpr const char* k = "float";
};
template <>
struct Name<double> {
  static constexpr const char* k = "double";
};
template <>
struct Name<BFloat16> {
  static constexpr const char* k = "bfloat16";
};
template <>
struct Name<Float16> {
  static constexpr const char* k = "float16";
};

// x W^T with W[gates*H, K]: what the forward scan does.
template <class S>
void forward_products(int64_t rows, int64_t K, int64_t H, int gates) {
  using A = Accumulate<S>;
  using O = Operand<S>;
  using W = Packed<S>;
  constexpr int64_t L = kLanes<A>;
  const int64_t Hp = fused_rnn::pad_units(H), ldx = K + 3;
  const std::vector<S> w = matrix<S>(gates * H, K, K);
  const std::vector<O> x = matrix<O>(rows, K, ldx);
  std::vector<W> packed(size_t(gates * Hp * packed_rows<W>(K)), W{});
  std::vector<A> bias(size_t(gates * Hp)), out(size_t(rows * gates * Hp));
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = A(number(int64_t(i) + 5));
  const auto compare = [&](const char* how) {
    for_panels<A>(gates, 0, Hp, [&](int64_t unit, int vectors) {
      for (int64_t m = 0; m < rows; ++m)
        for (int g = 0; g < gates; ++g)
          for (int64_t u = 0; u < vectors * L; ++u) {
            const int64_t at = unit * gates + g * vectors * L + u;
            double sum = bias[size_t(at)];
            for (int64_t k = 0; k < K && unit + u < H; ++k)
              sum += read(x[size_t(m * ldx + k)]) * read(w[size_t((g * H + unit + u) * K + k)]);
            const double found = read(out[size_t(m * gates * Hp + at)]);
            check::that(found == sum, "%s, %s: [%ld, %d, %ld] of K = %ld is %g, not %g", Name<S>::k,
                        how, long(m), g, long(unit + u), long(K), found, sum);
          }
    });
  };
  for_panels<A>(gates, 0, Hp, [&](int64_t unit, int vectors) {
    pack_transposed(w.data(), K, gates, H, K, unit, vectors,
                    packed.data() + unit * gates * packed_rows<W>(K));
  });
  for_panels_at_once<W>(rows, K, gates, 0, Hp, [&](int64_t unit, int vectors, int panels, int64_t) {
    const W* panel = packed.data() + unit * gates * packed_rows<W>(K);
    packed_product<O, W>(0, rows, K, x.data(), ldx, panel, nullptr, gates * vectors, panels,
                         bias.data() + unit * gates, 0, out.data() + unit * gates, gates * Hp);
  });
  compare("packed");
  out.assign(out.size(), A(kNaN));
  for_panels<A>(gates, 0, Hp, [&](int64_t unit, int vectors) {
    dot<S>(rows, K, x.data(), ldx, w.data(), gates, H, unit, vectors, bias.data() + unit * gates,
           out.data() + unit * gates, gates * Hp);
  });
  compare("in place");
  if constexpr (std::is_same_v<S, A>) {
    out.assign(out.size(), A(kNaN));
    std::vector<A> left(size_t((rows + L) * K), A(kNaN));
    pack_left(rows, K, x.data(), ldx, left.data());
    dot_left(rows, K, left.data(), w.data(), gates, H, 0, Hp, bias.data(), out.data(), gates * Hp);
    compare("rows packed");
  }
}

// d W with W[gates*H, N]: what the backward scan does.
template <class S>
void backward_product(int64_t rows, int64_t N, int64_t H, int64_t gates) {
  using A = Accumulate<S>;
  using O = Operand<S>;
  using W = Packed<S>;
  const int64_t Hp = fused_rnn::pad_units(H), Np = fused_rnn::pad_units(N), K = gates * Hp;
  const std::vector<S> w = matrix<S>(gates * H, N, N);
  const std::vector<O> d = matrix<O>(rows, K, K);
  std::vector<W> packed(size_t(packed_rows<W>(K) * Np));
  std::vector<A> out(size_t(rows * Np), A(3));  // added to
  for_panels<A>(1, 0, Np, [&](int64_t column, int vectors) {
    for (int64_t row = 0; row < gates * Hp; row += kRowsAtOnce)
      pack_rows(w.data(), gates, H, Hp, N, row / Hp, row % Hp, column, vectors,
                packed.data() + column * packed_rows<W>(K));
  });
  for_panels_at_once<W>(
      rows, K, 1, 0, Np, turn(rows), [&](int64_t column, int vectors, int panels, int64_t next) {
        const W* const all = packed.data();
        const int64_t size = packed_rows<W>(K);
        packed_product<O, W>(0, rows, K, d.data(), K, all + column * size, all + next * size,
                             vectors, panels, out.data() + column, Np, out.data() + column, Np);
      });
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < Np; ++n) {
      double sum = 3;
      for (int64_t k = 0; k < K; ++k)
        if (n < N && k % Hp < H)
          sum += read(d[size_t(m * K + k)]) * read(w[size_t((k / Hp * H + k % Hp) * N + n)]);
      const double found = read(out[size_t(m * Np + n)]);
      check::that(found == sum, "%s, backward: [%ld, %ld] of %ld is %g, not %g", Name<S>::k,
                  long(m), long(n), long(N), found, sum);
    }
}

// Tiles enough over a panel fetch all lines of the next, and none of them much beyond it.
template <class S>
void fetched_lines(int vectors) {
  using W = Packed<S>;
  const int64_t K = 64, rows = 12 * max_rows(vectors), next = 1 << 20;
  const int64_t bytes = packed_rows<W>(K) * vectors * kLanes<Accumulate<S>> * int64_t(sizeof(W));
  std::vector<bool> fetched(size_t(bytes / kLine));
  const auto fetch = [&](int64_t from) {
    for (int64_t line = from / kLine; line < from / kLine + packed_rows<W>(K); ++line)
      if (line < int64_t(fetched.size())) fetched[size_t(line)] = true;
  };
  for_heights(rows, max_rows(vectors), [&](int64_t m, int64_t height) {
    const int64_t share = share_of<W>(next, K, vectors, m);
    check::that(share == 0 || (share >= next && share < next + bytes), "row %ld fetches at %ld",
                long(m), long(share - next));
    if (share && height >= kFetchingRows) fetch(share - next);
    if (share && height > max_rows_at_once(vectors)) fetch(share - next + bytes / 2);
  });
  for (size_t line = 0; line < fetched.size(); ++line)
    check::that(fetched[line], "%s, %d vectors: line %ld of %ld is not fetched", Name<S>::k,
                vectors, long(line), long(fetched.size()));
  check::that(share_of<W>(0, K, vectors, 0) == 0, "nothing follows, and is fetched");
}

// A number to which 1 cannot be added hides the ones that follow it among its own kTerms, no
// others.
void terms(int64_t rows) {
  constexpr int64_t K = 1000, H = kLanes<float>;
  constexpr float kLarge = 0x1p24f;
  const std::vector<float> x(size_t(rows * K), 1);
  std::vector<float> w(size_t(H * K), 1), packed(size_t(H * K)), out(size_t(rows * H));
  for (int64_t h = 0; h < H; ++h) w[size_t(h * K)] = kLarge;
  pack_transposed(w.data(), K, 1, H, K, 0, 1, packed.data());
  packed_product<float, float>(0, rows, K, x.data(), K, packed.data(), nullptr, 1, 1, nullptr, 0,
                               out.data(), H);
  for (const float sum : out)
    check::that(sum == kLarge + float(K - kTerms), "the terms amount to %a", double(sum));
}

template <class S>
void test() {
  for (int vectors = 1; vectors <= kMaxVectors; ++vectors) fetched_lines<S>(vectors);
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 9, 12, 14, 35})
    for (const int64_t K : {1, 2, 7, 33})
      for (const int gates : {1, 2, 3, 4}) forward_products<S>(rows, K, 71, gates);
  forward_products<S>(16, 7, 65, 1);  // a last block of padding alone
  for (const int64_t rows : {1, 16}) forward_products<S>(rows, 2100, 35, 3);  // in pieces of K
  for (const int64_t rows : {7, 8, 9, 13, 18}) {  // across panels, some of which are left
    forward_products<S>(rows, 201, 71, 4);
    forward_products<S>(rows, 201, 200, 1);
    backward_product<S>(rows, 200, 71, 4);
  }
  for (const int64_t rows : {8, 13, 18}) forward_products<S>(rows, 2100, 63, 4);  // in pieces of K
  for (const int64_t rows : {1, 2, 7})
    for (const int64_t N : {5, 151}) backward_product<S>(rows, N, 19, 3);
  backward_product<S>(59, 151, 1501, 3);  // in pieces of K
}

}  // namespace

int main() {
  test<BFloat16>();
  test<float>();
  for (const int64_t rows : {1, 6}) terms(rows);
#if !defined(FUSED_RNN_VECTOR_BYTES)  // the others add nothing to what is tested so
  test<double>();
  test<Float16>();
#endif
  return check::finish();
}
