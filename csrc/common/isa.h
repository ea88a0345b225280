// Every csrc/ops/cpu/*.cpp is compiled once per instruction set, each time in its own namespace TL_ISA; the C entry point
// picks one at run time. A kernel file therefore reads
//
//   namespace TL_ISA { int tl_x_cpu(int64_t n, ...) { ... } }          // plain loops that the compiler vectorises
//   TL_CPU_ENTRY(tl_x_cpu, (int64_t n, ...), (n, ...))                 // the dispatcher, compiled once
//
// Headers used by kernels define only `static inline` functions: a linker may merge any other inline function across
// instruction sets, and AVX-512 code would then run on a machine without it.
#pragma once

#ifndef TL_ISA
#error "compile CPU kernels with -DTL_ISA=base, v3 or v4"
#endif

// Level chosen for this machine: 4 (AVX-512), 3 (AVX2 and FMA) or 0. TLFAST_CPU_ISA=base|v3|v4 lowers it, for tests.
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
    switch (tl_cpu_level()) {                     \
      case 4:                                     \
        return v4::name arguments;                \
      case 3:                                     \
        return v3::name arguments;                \
      default:                                    \
        return base::name arguments;              \
    }                                             \
  }
#elif defined(TL_ISA_ENTRY)
#define TL_CPU_ENTRY(name, parameters, arguments) \
  extern "C" int name parameters { return base::name arguments; }
#else
#define TL_CPU_ENTRY(name, parameters, arguments)
#endif
