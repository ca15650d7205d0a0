// csrc/cpu/isa.cpp with sets that compute nothing: the chosen one has its own kernels where it has
// any, and those of its base elsewhere. The program is run with ATEN_CPU_CAPABILITY=avx2.
#include "cpu/isa.h"

#include "check.h"

namespace fused_rnn::cpu {
namespace {

template <int kIsa>
void forward(const ForwardProblem&, const Plan&, const Runtime&) {}
template <int kIsa>
void backward(const BackwardProblem&, const Plan&, const Runtime&) {}
template <int kIsa>
int64_t panel_step(const CellInfo&) {
  return kIsa;
}
template <int kIsa>
void pack(const CellInfo&, const WeightSizes&, const Weights&, void*) {}
void multiply(int64_t, int64_t, int64_t, int64_t, const float*, const float*, float*) {}

template <int kIsa>
constexpr Packing kPacking = {panel_step<kIsa>, nullptr, pack<kIsa>};

constexpr int kOwnType = int(DType::kBFloat16);

constexpr CellInfo named(const char* name) {
  CellInfo info{};
  info.name = name;
  return info;
}
constexpr CellKernels in_all_types(const char* name) {
  return {named(name),
          {forward<0>, forward<0>, forward<0>, forward<0>},
          {backward<0>, backward<0>, backward<0>, backward<0>},
          {},
          {}};
}
constexpr CellKernels in_one_type(const char* name) {
  return {named(name),
          {nullptr, nullptr, forward<1>, nullptr},
          {nullptr, nullptr, backward<1>, nullptr},
          {},
          {}};
}
constexpr CellKernels kBase[] = {in_all_types("first"), in_all_types("second")};
constexpr CellKernels kOwn[] = {in_one_type("first"), in_one_type("second")};

}  // namespace

namespace baseline {
extern const Isa kIsa;
const Isa kIsa{
    "baseline", nullptr, kBase, 2, nullptr, 0, {kPacking<0>, kPacking<0>, kPacking<0>, kPacking<0>},
    multiply};
}  // namespace baseline
namespace avx2 {
extern const Isa kIsa;
const Isa kIsa{"avx2", &baseline::kIsa, kOwn, 2, nullptr, 0, {{}, {}, kPacking<1>, {}}, nullptr};
}  // namespace avx2

}  // namespace fused_rnn::cpu

int main() {
  using namespace fused_rnn::cpu;
  const Isa& isa = chosen_isa();
  check::that(!std::strcmp(isa.name, "avx2"), "%s is chosen", isa.name);
  check::that(isa.cell_count == 2 && isa.multiply == multiply, "the base's rest is missing");
  for (int type = 0; type < 4; ++type) {
    const bool own = type == kOwnType;
    check::that(isa.packing[type].panel_step({}) == own, "packing of type %d", type);
    for (const char* name : {"first", "second"}) {
      const CellKernels* cell = find_cell(name);
      check::that(cell && cell->forward[type] == (own ? forward<1> : forward<0>),
                  "forward of %s, type %d", name, type);
      check::that(cell && cell->backward[type] == (own ? backward<1> : backward<0>),
                  "backward of %s, type %d", name, type);
    }
  }
  return check::finish();
}
