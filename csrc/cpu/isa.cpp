#include "isa.h"

#include <strings.h>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace fused_rnn::cpu {

// FUSED_RNN_ISA_...: those that setup.py builds.
namespace avx512_bf16 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
namespace avx2 {
extern const Isa kIsa;
}
namespace baseline {
extern const Isa kIsa;
}

namespace {

const Isa* const kCompiled[] = {
#if defined(FUSED_RNN_ISA_AVX512_BF16)
    &avx512_bf16::kIsa,
#endif
#if defined(FUSED_RNN_ISA_AVX512)
    &avx512::kIsa,
#endif
#if defined(FUSED_RNN_ISA_AVX2)
    &avx2::kIsa,
#endif
    &baseline::kIsa,
};
constexpr int kCount = int(sizeof(kCompiled) / sizeof(kCompiled[0]));

bool runs_here(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!std::strcmp(name, "avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx512")) return avx512;
  if (!std::strcmp(name, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return !std::strcmp(name, "baseline");
}

const Isa& choose() {
  // torch's own switch; like torch, an unknown value changes nothing.
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && !strcasecmp(wanted, "default")) wanted = "baseline";
  int widest = 0;
  for (int i = 0; wanted && i < kCount; ++i)
    if (!strcasecmp(wanted, kCompiled[i]->name)) widest = i;
  while (widest + 1 < kCount && !runs_here(kCompiled[widest]->name)) ++widest;
  return *kCompiled[widest];
}

// With what it has from its base.
Isa complete(const Isa& own) {
  if (!own.base) return own;
  static std::vector<CellKernels> cells(own.base->cells, own.base->cells + own.base->cell_count);
  Isa isa = *own.base;
  isa.name = own.name;
  isa.cells = cells.data();
  for (int type = 0; type < 4; ++type) {
    if (own.packing[type].pack) isa.packing[type] = own.packing[type];
    for (int i = 0; i < own.cell_count; ++i) {
      const CellKernels& kernels = own.cells[i];
      if (kernels.forward[type]) cells[i].forward[type] = kernels.forward[type];
      if (kernels.backward[type]) cells[i].backward[type] = kernels.backward[type];
    }
  }
  return isa;
}

}  // namespace

const Isa* const* compiled_isas(int* count) {
  *count = kCount;
  return kCompiled;
}

const Isa& chosen_isa() {
  static const Isa isa = complete(choose());
  return isa;
}

PackedTag tag_for(const CellInfo& cell, DType dtype, const WeightSizes& sizes) {
  static constexpr const char* kDTypes[] = {"float32", "float64", "bfloat16", "float16"};
  PackedTag tag{};
  const auto set = [](auto& field, const char* word) {
    std::strncpy(field, word, sizeof(field) - 1);
  };
  set(tag.layout, "fused_rnn 2");
  set(tag.isa, chosen_isa().name);
  set(tag.cell, cell.name);
  set(tag.dtype, kDTypes[int(dtype)]);
  tag.I = sizes.I;
  tag.H = sizes.H;
  tag.R = sizes.R;
  tag.projected = sizes.projected;
  return tag;
}

const CellKernels* find_cell(const char* name) {
  const Isa& isa = chosen_isa();
  for (int i = 0; i < isa.cell_count; ++i)
    if (!std::strcmp(isa.cells[i].info.name, name)) return &isa.cells[i];
  return nullptr;
}

}  // namespace fused_rnn::cpu
