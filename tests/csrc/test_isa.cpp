// csrc/cpu/isa.cpp with sets that compute nothing: the chosen one has its own kernels in the types
// that it has any for, and those of the next set elsewhere. The program is run with
// ATEN_CPU_CAPABILITY=avx2.
#include "cpu/isa.h"

#include "check.h"

namespace fused_rnn::cpu {
namespace {

constexpr AnyCell named(const char* name) {
  CellInfo info{};
  info.name = name;
  return {info};
}
template <int kIsa>
constexpr AnyCell kFirst = named("first");
template <int kIsa>
constexpr AnyCell kSecond = named("second");
template <int kIsa>
constexpr const AnyCell* kAll[] = {&kFirst<kIsa>, &kSecond<kIsa>};
template <int kIsa>
constexpr CellTable kTable{kAll<kIsa>, 2};
template <int kIsa>
constexpr Kernels kKernels{&kTable<kIsa>, nullptr, nullptr, {}, nullptr};

}  // namespace

namespace baseline {
extern const Kernels kFloat32, kFloat64, kBFloat16, kFloat16;
const Kernels kFloat32 = kKernels<0>, kFloat64 = kKernels<0>, kBFloat16 = kKernels<0>,
              kFloat16 = kKernels<0>;
}  // namespace baseline
namespace avx2 {
extern const Kernels kBFloat16;
const Kernels kBFloat16 = kKernels<1>;
}  // namespace avx2

}  // namespace fused_rnn::cpu

int main() {
  using namespace fused_rnn;
  using namespace fused_rnn::cpu;
  const std::vector<const char*> compiled = compiled_isas();
  check::that(compiled.size() == 2 && !std::strcmp(compiled[0], "avx2") &&
                  !std::strcmp(compiled[1], "baseline"),
              "%zu sets are compiled", compiled.size());
  check::that(!std::strcmp(chosen_isa().name, "avx2"), "%s is chosen", chosen_isa().name);
  for (const DType type : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    const Kernels* expected = type == DType::kBFloat16 ? &avx2::kBFloat16 : &baseline::kFloat32;
    check::that(chosen_isa()[type]->cells == expected->cells, "kernels of type %d", int(type));
    for (int i = 0; i < 2; ++i)
      check::that(find_cell(i ? "second" : "first", type) == expected->cells->all[i],
                  "cell %d, type %d", i, int(type));
    check::that(!find_cell("third", type), "there is a third, type %d", int(type));
  }
  return check::finish();
}
