// sigmoid, tanh and relu of core/math.h against libm in a wider type, over every exponent, as
// scalars and as vectors of 16, 32 and 64 bytes. Prints the largest errors in units in the last
// place. With the argument "all" it tries every float there is.
#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/math.h"

namespace {

using namespace fused_rnn;
using check::Vector;

struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr double kMaxUlp = 2.5;
  template <class V>
  static V ours(V x) {
    return math::sigmoid(x);
  }
  template <class Wide>
  static Wide exact(Wide x) {
    return 1 / (1 + std::exp(-x));
  }
};

struct Tanh {
  static constexpr const char* kName = "tanh";
  static constexpr double kMaxUlp = 2.6;
  template <class V>
  static V ours(V x) {
    return math::tanh(x);
  }
  template <class Wide>
  static Wide exact(Wide x) {
    return std::tanh(x);
  }
};

template <class E>
struct Format;
template <>
struct Format<float> {
  static constexpr const char* kName = "float";
  using Wide = double;
  using Bits = uint32_t;
};
template <>
struct Format<double> {
  static constexpr const char* kName = "double";
  using Wide = long double;
  using Bits = uint64_t;
};

// Finite values of both signs: `per_exponent` significands at random for every exponent, denormals
// among them, and every exponent's first and last.
template <class E>
std::vector<E> every_exponent(int per_exponent) {
  using Bits = typename Format<E>::Bits;
  constexpr int kSignificandBits = std::numeric_limits<E>::digits - 1;
  constexpr Bits kLast = (Bits{1} << kSignificandBits) - 1;
  constexpr Bits kExponents = Bits{2} * std::numeric_limits<E>::max_exponent - 1;
  std::mt19937_64 random(1);
  std::vector<E> values;
  const auto add = [&](Bits exponent, Bits significand) {
    const E x = __builtin_bit_cast(E, (exponent << kSignificandBits) | significand);
    values.push_back(x);
    values.push_back(-x);
  };
  for (Bits exponent = 0; exponent < kExponents; ++exponent) {
    add(exponent, 0);
    add(exponent, kLast);
    for (int i = 0; i < per_exponent; ++i) add(exponent, static_cast<Bits>(random()) & kLast);
  }
  return values;
}

// Where rounding and saturation happen: uniform on [-limit, limit].
template <class E>
std::vector<E> uniform(E limit, int count) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<E> draw(-limit, limit);
  std::vector<E> values;
  for (int i = 0; i < count; ++i) values.push_back(draw(random));
  return values;
}

// Out of line, so that nothing moves across the floating-point exception flags.
template <class Function, class V, class E>
[[gnu::noinline]] std::vector<E> evaluate(const std::vector<E>& x) {
  constexpr size_t kLanes = sizeof(V) / sizeof(E);
  std::vector<E> y(x.size());
  for (size_t i = 0; i < x.size(); i += kLanes) {
    const size_t bytes = std::min(kLanes, x.size() - i) * sizeof(E);
    V v{};
    std::memcpy(&v, &x[i], bytes);
    v = Function::ours(v);
    std::memcpy(&y[i], &v, bytes);
  }
  return y;
}

template <class E>
double ulps(E y, typename Format<E>::Wide exact) {
  if (exact == 0) return y == 0 ? 0 : std::numeric_limits<double>::infinity();
  int exponent;
  std::frexp(exact, &exponent);
  exponent = std::max(exponent, std::numeric_limits<E>::min_exponent);
  return static_cast<double>(
      std::abs(std::ldexp(y - exact, std::numeric_limits<E>::digits - exponent)));
}

struct Worst {
  double ulp = 0;
  double at = 0;
};

template <class Function, class E>
void compare(const std::vector<E>& x, Worst& worst) {
  using Wide = typename Format<E>::Wide;
  constexpr E kAlmostZero = 2 * std::numeric_limits<E>::min();
  // Of tiny numbers denormal ones may come: of their squares, and of a product with log2 e.
  std::vector<E> ordinary(x);
  for (E& value : ordinary) {
    const Wide exact = Function::exact(static_cast<Wide>(value));
    if (std::abs(value) < E(0x1p-60) || std::abs(exact) < kAlmostZero) value = 0;
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  evaluate<Function, E>(ordinary);
  check::that(!std::fetestexcept(FE_UNDERFLOW), "%s %s makes denormal numbers", Format<E>::kName,
              Function::kName);
  const std::vector<E> y = evaluate<Function, E>(x);
  for (size_t i = 0; i < x.size(); ++i) {
    const Wide exact = Function::exact(static_cast<Wide>(x[i]));
    if constexpr (std::is_same_v<Function, Sigmoid>) {
      // Zero before the exact one would round to it.
      if (y[i] == 0 && exact < kAlmostZero) continue;
    }
    const double error = ulps(y[i], exact);
    check::that(error <= Function::kMaxUlp, "%s %s(%a) = %a is off by %.3g ulp", Format<E>::kName,
                Function::kName, double(x[i]), double(y[i]), error);
    if (error > worst.ulp) worst = {error, static_cast<double>(x[i])};
  }
}

template <class Function, class V, class E>
void vector_equals_scalar(const std::vector<E>& x) {
  const std::vector<E> scalar = evaluate<Function, E>(x);
  const std::vector<E> vector = evaluate<Function, V>(x);
  for (size_t i = 0; i < x.size(); ++i) {
    check::that(check::same_bits(scalar[i], vector[i]), "%s %s(%a): scalar %a, %zu bytes %a",
                Format<E>::kName, Function::kName, double(x[i]), double(scalar[i]), sizeof(V),
                double(vector[i]));
  }
}

template <class Function, class E>
void sweep(int per_exponent) {
  Worst worst;
  for (const std::vector<E>& x :
       {every_exponent<E>(per_exponent), uniform<E>(2, 500'000), uniform<E>(100, 500'000)}) {
    compare<Function>(x, worst);
    vector_equals_scalar<Function, Vector<E, 16>>(x);
    vector_equals_scalar<Function, Vector<E, 32>>(x);
    vector_equals_scalar<Function, Vector<E, 64>>(x);
  }
  std::printf("%-7s%-8s max %.3f ulp at %.9g\n", Format<E>::kName, Function::kName, worst.ulp,
              worst.at);
}

template <class Function>
void every_float() {
  Worst worst;
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; ++bits) {
    const float value = __builtin_bit_cast(float, static_cast<uint32_t>(bits));
    if (std::isfinite(value)) x.push_back(value);
    if (x.size() == 1 << 20) {
      compare<Function>(x, worst);
      x.clear();
    }
  }
  compare<Function>(x, worst);
  std::printf("every float %-8s max %.3f ulp at %.9g\n", Function::kName, worst.ulp, worst.at);
}

template <class V, class E, class Function>
void special_values(const char* name, Function function, std::initializer_list<E> x,
                    std::initializer_list<E> y) {
  const auto evaluate = [function](E value) {
    const V result = function(V{} + value);
    E first;
    std::memcpy(&first, &result, sizeof(E));
    return first;
  };
  for (size_t i = 0; i < x.size(); ++i) {
    const E given = x.begin()[i], expected = y.begin()[i], got = evaluate(given);
    check::that(got == expected, "%s %s(%a) = %a, not %a", Format<E>::kName, name, double(given),
                double(got), double(expected));
  }
  constexpr E kNan = std::numeric_limits<E>::quiet_NaN();
  check::that(std::isnan(evaluate(kNan)) && std::isnan(evaluate(-kNan)), "%s %s(nan) is a number",
              Format<E>::kName, name);
}

template <class V, class E>
void special_values() {
  constexpr E kInf = std::numeric_limits<E>::infinity();
  constexpr E kMax = std::numeric_limits<E>::max();
  constexpr E kTiny = std::numeric_limits<E>::denorm_min();
  const std::initializer_list<E> x{0, kTiny, -kTiny, kMax, -kMax, kInf, -kInf};
  special_values<V, E>("sigmoid", [](V v) { return math::sigmoid(v); }, x,
                       {E(0.5), E(0.5), E(0.5), 1, 0, 1, 0});
  special_values<V, E>("tanh", [](V v) { return math::tanh(v); }, x,
                       {0, kTiny, -kTiny, 1, -1, 1, -1});
  special_values<V, E>("relu", [](V v) { return math::relu(v); }, x,
                       {0, kTiny, 0, kMax, 0, kInf, 0});
}

template <class E>
void test(int per_exponent) {
  special_values<E, E>();
  special_values<Vector<E, 16>, E>();
  special_values<Vector<E, 32>, E>();
  special_values<Vector<E, 64>, E>();
  sweep<Sigmoid, E>(per_exponent);
  sweep<Tanh, E>(per_exponent);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "all")) {
    every_float<Sigmoid>();
    every_float<Tanh>();
  }
  test<float>(4000);
  test<double>(500);
  return check::finish();
}
