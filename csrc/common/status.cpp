#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace {
thread_local char last_error[512] = "";
}

int tl_fail(int status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

const char *tl_last_error(void) { return last_error; }

const char *tl_cuda_architectures(void) {
#ifdef TLFAST_WITH_CUDA
  return TLFAST_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}
