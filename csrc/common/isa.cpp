#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "tlfast.h"

#ifdef TL_ISA_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef TL_ISA_X86
bool bit(unsigned value, int position) { return (value >> position & 1u) != 0; }

bool has_vnni_and_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_supports("avx512vnni") || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return bit(a, 5);
}

// The tile registers also have to be switched on by the operating system and asked for by the process.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bit(d, 22) || !bit(d, 24) || !bit(d, 25)) return false;
#ifdef __linux__
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return bit(low, 17) && bit(low, 18) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

int machine_level() {
#ifdef TL_ISA_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (!avx2) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  if (!avx512) return 3;
  if (!has_vnni_and_bf16()) return 4;
  return has_amx() ? 6 : 5;
#else
  return 0;
#endif
}

int requested_level() {
  constexpr struct {
    const char *name;
    int level;
  } levels[] = {{"base", 0}, {"v3", 3}, {"v4", 4}, {"vnni", 5}};
  const char *name = std::getenv("TLFAST_CPU_ISA");
  for (const auto &entry : levels)
    if (name != nullptr && std::strcmp(name, entry.name) == 0) return entry.level;
  return 6;
}

}  // namespace

int tl_cpu_level(void) {
  static const int level = machine_level() < requested_level() ? machine_level() : requested_level();
  return level;
}

const char *tl_cpu_isa(void) {
#ifdef TL_ISA_X86
  const int level = tl_cpu_level();
  return level >= 4 ? "x86-64-v4" : level == 3 ? "x86-64-v3" : "x86-64";
#else
  return "generic";
#endif
}

const char *tl_matrix_isa(void) {
  switch (tl_cpu_level()) {
    case 6:
      return "AMX";
    case 5:
      return "AVX-512 VNNI and BF16";
    case 4:
      return "AVX-512";
    case 3:
      return "AVX2";
    default:
      return "none";
  }
}
