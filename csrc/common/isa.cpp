#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "tlfast.h"

namespace {

int machine_level() {
#ifdef TL_ISA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!avx2) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  return avx512 ? 4 : 3;
#else
  return 0;
#endif
}

int requested_level() {
  const char *name = std::getenv("TLFAST_CPU_ISA");
  if (name == nullptr) return 4;
  if (std::strcmp(name, "v3") == 0) return 3;
  return std::strcmp(name, "base") == 0 ? 0 : 4;
}

}  // namespace

int tl_cpu_level(void) {
  static const int level = machine_level() < requested_level() ? machine_level() : requested_level();
  return level;
}

const char *tl_cpu_isa(void) {
#ifdef TL_ISA_X86
  const int level = tl_cpu_level();
  return level == 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "x86-64";
#else
  return "generic";
#endif
}
