// Every csrc/ops/cpu/*.cpp is compiled once per instruction set, each time in its own namespace TL_ISA; the C entry point
// picks one at run time. A kernel file therefore reads
//
//   namespace TL_ISA { int tl_x_cpu(int64_t n, ...) { ... } }          // plain loops that the compiler vectorises
//   TL_CPU_ENTRY(tl_x_cpu, (int64_t n, ...), (n, ...))                 // the dispatcher, compiled once
//
// Kernels that multiply matrices in bfloat16 or int8, or round whole tensors to bfloat16 (csrc/ops/cpu/matrix/), are
// compiled for two more sets, `vnni` (AVX-512 with VNNI and BF16) and `amx` (that with tile registers), and end with
// TL_MATRIX_ENTRY instead.
//
// Headers used by kernels define only `static inline` functions: a linker may merge any other inline function across
// instruction sets, and AVX-512 code would then run on a machine without it.
#pragma once

#ifndef TL_ISA
#error "compile CPU kernels with -DTL_ISA=base, v3, v4, vnni or amx"
#endif

// Level chosen for this machine: 6 (AMX), 5 (AVX-512 with VNNI and BF16), 4 (AVX-512), 3 (AVX2 and FMA) or 0.
// TLFAST_CPU_ISA=base|v3|v4|vnni|amx lowers it, for tests.
int tl_cpu_level(void);

#if defined(TL_ISA_ENTRY) && defined(TL_ISA_X86)
#define TL_CPU_ENTRY(name, parameters, arguments) \
  namespace v3 {                                  \
  int name parameters;                            \
  }                                               \
  namespace v4 {                                  \
  int name parameters;                            \
  }                                               \
  extern "C" int name parameters {                \
    const int level = tl_cpu_level();             \
    if (level >= 4) return v4::name arguments;    \
    if (level == 3) return v3::name arguments;    \
    return base::name arguments;                  \
  }
#define TL_MATRIX_ENTRY(name, parameters, arguments) \
  namespace v3 {                                     \
  int name parameters;                               \
  }                                                  \
  namespace v4 {                                     \
  int name parameters;                               \
  }                                                  \
  namespace vnni {                                   \
  int name parameters;                               \
  }                                                  \
  namespace amx {                                    \
  int name parameters;                               \
  }                                                  \
  extern "C" int name parameters {                   \
    const int level = tl_cpu_level();                \
    if (level == 6) return amx::name arguments;      \
    if (level == 5) return vnni::name arguments;     \
    if (level == 4) return v4::name arguments;       \
    if (level == 3) return v3::name arguments;       \
    return base::name arguments;                     \
  }
#elif defined(TL_ISA_ENTRY)
#define TL_CPU_ENTRY(name, parameters, arguments) \
  extern "C" int name parameters { return base::name arguments; }
#define TL_MATRIX_ENTRY(name, parameters, arguments) TL_CPU_ENTRY(name, parameters, arguments)
#else
#define TL_CPU_ENTRY(name, parameters, arguments)
#define TL_MATRIX_ENTRY(name, parameters, arguments)
#endif
