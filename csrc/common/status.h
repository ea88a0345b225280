// Errors cross the C ABI as a status code; the text waits in a per-thread buffer that tl_last_error() returns.
#pragma once

#include "tlfast.h"

// Stores a printf-style message and returns `status`, so that callers write `return tl_fail(TL_BAD_ARGUMENT, ...)`.
int tl_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
