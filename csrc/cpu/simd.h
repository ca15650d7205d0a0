// The vector of the instruction set this translation unit is compiled for, and how elements of each
// storage type are loaded into it. Built from the compiler's vector extensions, so one source
// serves every set; only what they cannot say (half-precision conversion, partial access, a sum
// rounded once) names instructions.
#pragma once

#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <type_traits>  // types, nothing is compiled from them
#include <utility>

#include "../core/math.h"

// A translation unit defines FUSED_RNN_ISA (avx512, avx2, baseline) before including this.
// Everything compiled under its flags lives in a namespace of that name: two units never share a
// symbol.
#ifndef FUSED_RNN_ISA
#error "define FUSED_RNN_ISA"
#endif

namespace fused_rnn::cpu::FUSED_RNN_ISA {

#if defined(FUSED_RNN_VECTOR_BYTES)  // a test, of wider vectors than this machine has
constexpr int kVectorBytes = FUSED_RNN_VECTOR_BYTES;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which a storage type is computed.
template <class S>
struct AccumulateImpl {
  using type = float;
};
template <>
struct AccumulateImpl<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateImpl<S>::type;

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef uint64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;

template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <class A>
FUSED_RNN_INLINE Vector<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}
template <class A>
FUSED_RNN_INLINE void store(A* p, Vector<A> v) {
  *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = v;
}

typedef uint32_t U32Vector __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32Vector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t U16Vector __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t U16Unaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// 16-bit lanes to 32-bit ones. GCC 12 makes two halves of it by itself.
FUSED_RNN_INLINE U32Vector widen(U16Vector v) {
#if defined(__AVX512F__)
  return reinterpret_cast<U32Vector>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32Vector>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32Vector);
#endif
}

FUSED_RNN_INLINE Vector<float> load(const BFloat16* p) {
  const U16Vector half = *reinterpret_cast<const U16Unaligned*>(p);
  return reinterpret_cast<Vector<float>>(widen(half) << 16);
}

// Round to nearest even; a NaN stays a NaN (adding the rounding bias could carry it to infinity).
FUSED_RNN_INLINE void store(BFloat16* p, Vector<float> v) {
  const U32Vector bits = reinterpret_cast<U32Vector>(v);
  const U32Vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32Vector nan = (bits >> 16) | 0x40;
  const U32Vector is_nan = reinterpret_cast<U32Vector>(v != v);
  *reinterpret_cast<U16Unaligned*>(p) =
      __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), U16Vector);
}

#if defined(__AVX512F__)
FUSED_RNN_INLINE Vector<float> load(const Float16* p) {
  return reinterpret_cast<Vector<float>>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
FUSED_RNN_INLINE void store(Float16* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
}
#elif defined(__AVX2__)
FUSED_RNN_INLINE Vector<float> load(const Float16* p) {
  return reinterpret_cast<Vector<float>>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
FUSED_RNN_INLINE void store(Float16* p, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
}
#else
// binary16 by integer arithmetic, without a denormal float. What is subnormal is a multiple of
// 2^-24.
FUSED_RNN_INLINE Vector<float> load(const Float16* p) {
  const U32Vector bits =
      __builtin_convertvector(*reinterpret_cast<const U16Unaligned*>(p), U32Vector);
  const U32Vector magnitude = bits & 0x7fff;
  const U32Vector special = reinterpret_cast<U32Vector>(magnitude >= 0x7c00);
  const U32Vector subnormal = reinterpret_cast<U32Vector>(magnitude < 0x400);
  const U32Vector normal = ((magnitude << 13) + (112u << 23)) | (special & 0x7f800000);
  const Vector<float> small =
      __builtin_convertvector(reinterpret_cast<I32Vector>(magnitude), Vector<float>) * 0x1p-24f;
  return reinterpret_cast<Vector<float>>(((bits & 0x8000) << 16) | (normal & ~subnormal) |
                                         (reinterpret_cast<U32Vector>(small) & subnormal));
}
FUSED_RNN_INLINE void store(Float16* p, Vector<float> v) {
  const U32Vector bits = reinterpret_cast<U32Vector>(v);
  const U32Vector magnitude = bits & 0x7fffffff;
  // Adding 2^(e+13) (or 0.5 for results that are subnormal) rounds at the last kept bit, ties to
  // even.
  U32Vector anchor = (magnitude & 0x7f800000) + (13u << 23);
  const U32Vector lowest = U32Vector{} + (126u << 23);
  const U32Vector small = reinterpret_cast<U32Vector>(anchor < lowest);
  anchor = (anchor & ~small) | (lowest & small);
  const Vector<float> anchored =
      reinterpret_cast<Vector<float>>(magnitude) + reinterpret_cast<Vector<float>>(anchor);
  const Vector<float> rounded = anchored - reinterpret_cast<Vector<float>>(anchor);
  const I32Vector below = rounded < 0x1p-14f;
  const U32Vector subnormal = reinterpret_cast<U32Vector>(below);
  const Vector<float> bounded = below ? rounded : Vector<float>{};
  const U32Vector multiple =
      reinterpret_cast<U32Vector>(__builtin_convertvector(bounded * 0x1p24f, I32Vector));
  const U32Vector normal = (reinterpret_cast<U32Vector>(rounded) >> 13) - (112u << 10);
  const U32Vector half = (multiple & subnormal) | (normal & ~subnormal);
  const U32Vector overflow =
      reinterpret_cast<U32Vector>(reinterpret_cast<Vector<float>>(magnitude) >= 65520.0f);
  const U32Vector is_nan = reinterpret_cast<U32Vector>(v != v);
  U32Vector result = (half & ~overflow) | ((U32Vector{} + 0x7c00) & overflow);
  result = (result & ~is_nan) | ((U32Vector{} + 0x7e00) & is_nan);
  *reinterpret_cast<U16Unaligned*>(p) =
      __builtin_convertvector(result | ((bits >> 16) & 0x8000), U16Vector);
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// 32 bytes of lanes, of which the first n are set.
template <class Int>
struct LaneMasks {
  static constexpr int L = 32 / sizeof(Int);
  Int lanes[2 * L] = {};
  constexpr LaneMasks() {
    for (int i = 0; i < L; ++i) lanes[i] = -1;
  }
  FUSED_RNN_INLINE __m256i first(int64_t n) const {
    const int64_t valid = n > L ? L : n > 0 ? n : 0;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes + L - valid));
  }
};
template <class Int>
inline constexpr LaneMasks<Int> kLaneMasks{};
#endif

// buffer[0, n) = p[0, n) and zeros behind, for n < N. By instructions where there are some: what
// scalars have just written is not there yet for a vector to be loaded.
template <class S, int N>
FUSED_RNN_INLINE void copy_partial(const S* p, int64_t n, S (&buffer)[N]) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) {
    const uint32_t mask = n > 0 ? (uint32_t(1) << n) - 1 : 0;
    if constexpr (N == 32)
      _mm512_storeu_si512(buffer, _mm512_maskz_loadu_epi16(mask, p));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer),
                          _mm256_maskz_loadu_epi16(__mmask16(mask), p));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 2) {
    // Pairs, and what is left.
    __m256i lanes =
        _mm256_maskload_epi32(reinterpret_cast<const int*>(p), kLaneMasks<int32_t>.first(n / 2));
    if (n > 0 && n % 2) {
      const __m256i last = _mm256_set1_epi16(short(p[n - 1].bits));
      const __m256i there =
          _mm256_xor_si256(kLaneMasks<int16_t>.first(n), kLaneMasks<int16_t>.first(n - 1));
      lanes = _mm256_or_si256(lanes, _mm256_and_si256(last, there));
    }
    if constexpr (N == 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), lanes);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(buffer), _mm256_castsi256_si128(lanes));
    return;
  }
#endif
  for (int i = 0; i < N; ++i) buffer[i] = i < n ? p[i] : S{};
}

// The first n lanes (0 <= n <= lanes); the others are zero, and their memory is not touched.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> load_partial(const S* p, int64_t n) {
  constexpr int L = kLanes<Accumulate<S>>;
  if (n >= L) return load(p);
  S buffer[L];
  copy_partial(p, n, buffer);
  return load(buffer);
}
template <class S>
FUSED_RNN_INLINE void store_partial(S* p, Vector<Accumulate<S>> v, int64_t n) {
  constexpr int L = kLanes<Accumulate<S>>;
  if (n >= L) return store(p, v);
  S buffer[L];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
FUSED_RNN_INLINE Vector<float> load_partial(const float* p, int64_t n) {
  const __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
  return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(mask, p));
}
FUSED_RNN_INLINE Vector<double> load_partial(const double* p, int64_t n) {
  const __mmask8 mask = n >= 8 ? 0xff : n <= 0 ? 0 : (1u << n) - 1;
  return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(mask, p));
}
FUSED_RNN_INLINE void store_partial(float* p, Vector<float> v, int64_t n) {
  const __mmask16 mask = n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1;
  _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
}
#elif defined(__AVX2__) && !defined(FUSED_RNN_VECTOR_BYTES)
// Not so stores, for which the instruction is slow on AMD's processors.
FUSED_RNN_INLINE Vector<float> load_partial(const float* p, int64_t n) {
  if (n >= 8) return load(p);
  return reinterpret_cast<Vector<float>>(_mm256_maskload_ps(p, kLaneMasks<int32_t>.first(n)));
}
FUSED_RNN_INLINE Vector<double> load_partial(const double* p, int64_t n) {
  if (n >= 4) return load(p);
  return reinterpret_cast<Vector<double>>(_mm256_maskload_pd(p, kLaneMasks<int64_t>.first(n)));
}
#endif

// Two bfloat16 that stand side by side, the first in the lower half.
struct BFloat16Pair {
  uint32_t bits;
};

// Weights of a storage type as they stand in panels: bfloat16 in pairs of two rows of K, and half
// precision widened where the set has no instruction for it.
template <class S>
struct PackedImpl {
  using type = S;
};
template <>
struct PackedImpl<BFloat16> {
  using type = BFloat16Pair;
};
#if !defined(__AVX2__)
template <>
struct PackedImpl<Float16> {
  using type = float;
};
#endif
template <class S>
using Packed = typename PackedImpl<S>::type;

// Rows of K in a row of a panel.
template <class W>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<BFloat16Pair> = 2;

template <class W>
constexpr int64_t packed_rows(int64_t K) {
  return (K + kDepth<W> - 1) / kDepth<W>;
}

// What packed weights are multiplied by: numbers of the type they are summed in, and bfloat16 where
// an instruction multiplies pairs. The baseline does it in the same way without one, so that all of
// it is tested on machines that lack the instruction.
#if defined(__AVX512BF16__) || !defined(__AVX2__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif
template <class S>
struct OperandImpl {
  using type = Accumulate<S>;
};
template <>
struct OperandImpl<BFloat16> {
  using type = std::conditional_t<kMultipliesPairs, BFloat16, float>;
};
template <class S>
using Operand = typename OperandImpl<S>::type;

FUSED_RNN_INLINE Vector<float> first_of(U32Vector pairs) {
  return reinterpret_cast<Vector<float>>(pairs << 16);
}
FUSED_RNN_INLINE Vector<float> second_of(U32Vector pairs) {
  return reinterpret_cast<Vector<float>>(pairs & 0xffff0000);
}
FUSED_RNN_INLINE U32Vector load_pairs(const void* p) {
  typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  return *static_cast<const Unaligned*>(p);
}

// Of a row of W the elements that fill a vector of a panel, where n are left: numbers, or pairs.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> load_row(const S* p, int64_t n) {
  return load_partial(p, n);
}
FUSED_RNN_INLINE U32Vector load_row(const BFloat16* p, int64_t n) {
  constexpr int L = 2 * kLanes<float>;
  if (n >= L) return load_pairs(p);
  BFloat16 buffer[L];
  copy_partial(p, n, buffer);
  return load_pairs(buffer);
}

// A vector of a panel.
template <class W>
FUSED_RNN_INLINE auto load_packed(const W* p) {
  return load(p);
}
FUSED_RNN_INLINE U32Vector load_packed(const BFloat16Pair* p) {
  return load_pairs(p);
}
FUSED_RNN_INLINE void store(BFloat16Pair* p, Vector<float> pairs) {
  store(reinterpret_cast<float*>(p), pairs);
}
// Pairs of numbers that bfloat16 holds exactly.
FUSED_RNN_INLINE void store_pairs(BFloat16Pair* p, Vector<float> first, Vector<float> second) {
  store(p, reinterpret_cast<Vector<float>>((reinterpret_cast<U32Vector>(first) >> 16) |
                                           (reinterpret_cast<U32Vector>(second) & 0xffff0000)));
}

// Weights meet operands of type X part by part: pairs as a whole, or widened one after the other.
template <class X, int depth>
constexpr int kParts = std::is_same_v<X, BFloat16> ? 1 : depth;

#if defined(__AVX2__) && !defined(__AVX512F__)
// A part that is known at run time only, in lanes, by one instruction that reads what it needs from
// memory.
FUSED_RNN_INLINE Vector<float> part_at(U32Vector pairs, int64_t part) {
  alignas(32) static constexpr uint8_t kBytes[2][32] = {
      {255, 255, 0, 1, 255, 255, 4, 5, 255, 255, 8, 9, 255, 255, 12, 13,
       255, 255, 0, 1, 255, 255, 4, 5, 255, 255, 8, 9, 255, 255, 12, 13},
      {255, 255, 2, 3, 255, 255, 6, 7, 255, 255, 10, 11, 255, 255, 14, 15,
       255, 255, 2, 3, 255, 255, 6, 7, 255, 255, 10, 11, 255, 255, 14, 15}};
  const auto* bytes = reinterpret_cast<const __m256i*>(kBytes[0] + 4 * part);
  asm("" : "+r"(bytes));  // or they are kept in a register
  return reinterpret_cast<Vector<float>>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(pairs), *bytes));
}
#endif

template <class X, class V>
FUSED_RNN_INLINE auto weights_of_part(V weights, int part) {
  if constexpr (std::is_same_v<V, U32Vector> && !std::is_same_v<X, BFloat16>)
    return part == 0 ? first_of(weights) : second_of(weights);
  else
    return weights;
}

template <int part, int... lane>
FUSED_RNN_INLINE Vector<float> every_second(Vector<float> a, Vector<float> b,
                                            std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + part)...);
}

// Operands from p on, where n are left, as the parts of a row of W in memory meet them.
template <int depth, class A>
FUSED_RNN_INLINE void load_operands(const A* p, int64_t n, Vector<A> (&parts)[depth]) {
  constexpr int L = kLanes<A>;
  parts[0] = load_partial(p, n);
  if constexpr (depth == 2) {
    const Vector<A> a = parts[0], b = load_partial(p + L, n - L);
    parts[0] = every_second<0>(a, b, std::make_integer_sequence<int, L>{});
    parts[1] = every_second<1>(a, b, std::make_integer_sequence<int, L>{});
  }
}
template <int depth>
FUSED_RNN_INLINE void load_operands(const BFloat16* p, int64_t n, U32Vector (&parts)[1]) {
  parts[0] = load_row(p, n);
}

// The operand at p in every lane: a number, or a pair of which `depth` are there.
template <int depth, class A>
FUSED_RNN_INLINE Vector<A> broadcast(const A* p) {
  return *p - Vector<A>{};  // not 0 + *p, which is another number where *p is -0
}
template <int depth>
FUSED_RNN_INLINE U32Vector broadcast(const BFloat16* p) {
  uint32_t pair = p->bits;
  if constexpr (depth == 2) __builtin_memcpy(&pair, p, sizeof(pair));
  return U32Vector{} + pair;
}

// sum + a * b, of numbers or of pairs. By the instruction where there is one: from version 13 on
// g++ tears the contracted expression apart in a loop with a single sum ("avoid FMA chains"), and
// the tile of one vector would round otherwise than the others.
template <class V>
FUSED_RNN_INLINE V multiply_add(V sum, V a, V b) {
#if defined(__AVX512F__) && !defined(FUSED_RNN_VECTOR_BYTES)
  if constexpr (std::is_same_v<V, Vector<float>>) return _mm512_fmadd_ps(a, b, sum);
  if constexpr (std::is_same_v<V, Vector<double>>) return _mm512_fmadd_pd(a, b, sum);
#elif defined(__FMA__) && !defined(FUSED_RNN_VECTOR_BYTES)
  if constexpr (std::is_same_v<V, Vector<float>>) return _mm256_fmadd_ps(a, b, sum);
  if constexpr (std::is_same_v<V, Vector<double>>) return _mm256_fmadd_pd(a, b, sum);
#endif
  return sum + a * b;
}
FUSED_RNN_INLINE Vector<float> multiply_add(Vector<float> sum, U32Vector a, U32Vector b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vector<float>>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  return multiply_add(multiply_add(sum, first_of(a), first_of(b)), second_of(a), second_of(b));
#endif
}

// How many vectors of a cell stand in the registers beside the constants of its functions. Fewer
// under AddressSanitizer, for the sake of g++, which takes long over four.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kBundle = 2;
#else
constexpr int kBundle = kVectorRegisters >= 32 ? 4 : 2;
#endif

// Vectors side by side: while one waits for a result, the others have work. An arithmetic type of
// core/math.h.
template <class V, int n>
struct Bundle {
  using E = math::Element<V>;
  V v[n];

  Bundle() = default;
  FUSED_RNN_INLINE Bundle(E value) : Bundle(of([&](int) { return value - V{}; })) {}

  template <class Make>
  FUSED_RNN_INLINE static Bundle of(Make make) {
    Bundle all;
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) all.v[i] = make(i);
    return all;
  }

  friend FUSED_RNN_INLINE Bundle operator+(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] + y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator-(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] - y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator-(Bundle x) {
    return of([&](int i) { return -x.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator*(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] * y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator/(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] / y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator&(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] & y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator|(Bundle x, Bundle y) {
    return of([&](int i) { return x.v[i] | y.v[i]; });
  }
  friend FUSED_RNN_INLINE Bundle operator<<(Bundle x, int bits) {
    return of([&](int i) { return x.v[i] << bits; });
  }
  FUSED_RNN_INLINE Bundle& operator+=(Bundle y) { return *this = *this + y; }
};

// The vectors at p, p + next and so on, as many as P has.
template <class P, class S>
FUSED_RNN_INLINE P load_as(const S* p, int64_t next) {
  if constexpr (std::is_same_v<P, Vector<Accumulate<S>>>)
    return load(p);
  else
    return P::of([&](int i) { return load(p + i * next); });
}
template <class S, class V>
FUSED_RNN_INLINE void store_as(S* p, int64_t, V v) {
  store(p, v);
}
template <class S, class V, int n>
FUSED_RNN_INLINE void store_as(S* p, int64_t next, const Bundle<V, n>& all) {
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) store(p + i * next, all.v[i]);
}

// What a value becomes when it is written to memory as S and read back.
template <class S, class V>
FUSED_RNN_INLINE V round_to(V v) {
  if constexpr (sizeof(S) == sizeof(Accumulate<S>)) {
    return v;
  } else {
    S buffer[kLanes<Accumulate<S>>];
    store(buffer, v);
    return load(buffer);
  }
}
template <class S, class V, int n>
FUSED_RNN_INLINE Bundle<V, n> round_to(const Bundle<V, n>& all) {
  return Bundle<V, n>::of([&](int i) { return round_to<S>(all.v[i]); });
}

// Swaps the off-diagonal blocks of size `span` between rows a and b of a square of lanes.
template <class A, int span, int... lane>
FUSED_RNN_INLINE void swap_blocks(Vector<A>& a, Vector<A>& b, std::integer_sequence<int, lane...>) {
  constexpr int L = kLanes<A>;
  const Vector<A> upper =
      __builtin_shufflevector(a, b, ((lane & span) ? L + lane - span : lane)...);
  const Vector<A> lower =
      __builtin_shufflevector(a, b, ((lane & span) ? L + lane : lane + span)...);
  a = upper;
  b = lower;
}

template <class A, int span = 1>
FUSED_RNN_INLINE void transpose(Vector<A> (&rows)[kLanes<A>]) {
  if constexpr (span < kLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i)
      if (!(i & span))
        swap_blocks<A, span>(rows[i], rows[i + span], std::make_integer_sequence<int, kLanes<A>>{});
    transpose<A, span * 2>(rows);
  }
}

// Lane j of the result is the sum of the lanes of rows[j]. The order of the sum is fixed.
template <class A, int span = 1>
FUSED_RNN_INLINE Vector<A> sum_lanes(Vector<A> (&rows)[kLanes<A>]) {
  if constexpr (span < kLanes<A>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; i += 2 * span) {
      swap_blocks<A, span>(rows[i], rows[i + span], std::make_integer_sequence<int, kLanes<A>>{});
      rows[i] += rows[i + span];
    }
    return sum_lanes<A, span * 2>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA

namespace fused_rnn::math {

#if defined(__AVX2__) && !defined(FUSED_RNN_VECTOR_BYTES)
template <>
struct Extremes<cpu::FUSED_RNN_ISA::Vector<float>> {
  using V = cpu::FUSED_RNN_ISA::Vector<float>;
#if defined(__AVX512F__)
  FUSED_RNN_INLINE static V larger(V a, V b) { return _mm512_max_ps(a, b); }
  FUSED_RNN_INLINE static V smaller(V a, V b) { return _mm512_min_ps(a, b); }
#else
  FUSED_RNN_INLINE static V larger(V a, V b) { return _mm256_max_ps(a, b); }
  FUSED_RNN_INLINE static V smaller(V a, V b) { return _mm256_min_ps(a, b); }
#endif
};
#endif

template <class V, int n>
struct Arithmetic<cpu::FUSED_RNN_ISA::Bundle<V, n>> {
  using All = cpu::FUSED_RNN_ISA::Bundle<V, n>;
  using Int = cpu::FUSED_RNN_ISA::Bundle<math::Int<V>, n>;
  using Element = math::Element<V>;
  using One = Arithmetic<V>;
  FUSED_RNN_INLINE static Int bits(All x) {
    return Int::of([&](int i) { return One::bits(x.v[i]); });
  }
  FUSED_RNN_INLINE static All from_bits(Int x) {
    return All::of([&](int i) { return One::from_bits(x.v[i]); });
  }
  FUSED_RNN_INLINE static All larger(All x, All y) {
    return All::of([&](int i) { return One::larger(x.v[i], y.v[i]); });
  }
  FUSED_RNN_INLINE static All smaller(All x, All y) {
    return All::of([&](int i) { return One::smaller(x.v[i], y.v[i]); });
  }
};

}  // namespace fused_rnn::math
