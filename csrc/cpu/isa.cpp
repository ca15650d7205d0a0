#include "isa.h"

#include <strings.h>
#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fused_rnn::cpu {

// Null where setup.py has not built them.
#define FUSED_RNN_DECLARE(isa)                                                \
  namespace isa {                                                             \
  [[gnu::weak]] extern const Kernels kFloat32, kFloat64, kBFloat16, kFloat16; \
  constexpr Isa kIsa{#isa, {&kFloat32, &kFloat64, &kBFloat16, &kFloat16}};    \
  }
FUSED_RNN_DECLARE(avx512_bf16)
FUSED_RNN_DECLARE(avx512)
FUSED_RNN_DECLARE(avx2)
FUSED_RNN_DECLARE(baseline)
#undef FUSED_RNN_DECLARE

namespace {

// Widest first.
constexpr Isa kSets[] = {avx512_bf16::kIsa, avx512::kIsa, avx2::kIsa, baseline::kIsa};
constexpr int kCount = int(sizeof(kSets) / sizeof(kSets[0]));

bool compiled(const Isa& isa) {
  return std::any_of(isa.types, isa.types + 4, [](const Kernels* kernels) { return kernels; });
}

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

Isa choose() {
  // torch's own switch; like torch, an unknown value changes nothing.
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && !strcasecmp(wanted, "default")) wanted = "baseline";
  int widest = 0;
  for (int i = 0; wanted && i < kCount; ++i)
    if (compiled(kSets[i]) && !strcasecmp(wanted, kSets[i].name)) widest = i;
  while (widest + 1 < kCount && !(compiled(kSets[widest]) && runs_here(kSets[widest].name)))
    ++widest;
  Isa isa = kSets[widest];
  for (int type = 0; type < 4; ++type)
    for (int i = widest + 1; i < kCount && !isa.types[type]; ++i)
      isa.types[type] = kSets[i].types[type];
  return isa;
}

}  // namespace

std::vector<const char*> compiled_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : kSets)
    if (compiled(isa)) names.push_back(isa.name);
  return names;
}

const Isa& chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* name_of(DType type) {
  static constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
  return kNames[int(type)];
}

PackedTag tag_for(const CellInfo& cell, DType dtype, const WeightSizes& sizes) {
  PackedTag tag{};
  const auto set = [](auto& field, const char* word) {
    std::strncpy(field, word, sizeof(field) - 1);
  };
  set(tag.layout, "fused_rnn 2");
  set(tag.isa, chosen_isa().name);
  set(tag.cell, cell.name);
  set(tag.dtype, name_of(dtype));
  tag.I = sizes.I;
  tag.H = sizes.H;
  tag.R = sizes.R;
  tag.projected = sizes.projected;
  return tag;
}

const AnyCell* find_cell(const char* name, DType type) {
  const Kernels* kernels = chosen_isa()[type];
  for (int i = 0; kernels && i < kernels->cells->count; ++i)
    if (!std::strcmp(kernels->cells->all[i]->info.name, name)) return kernels->cells->all[i];
  return nullptr;
}

}  // namespace fused_rnn::cpu
