/* What the C tests share: a check that names its line, and strings. */
#ifndef LOCUM_TEST_COMMON_H
#define LOCUM_TEST_COMMON_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "locum.h"

#define CHECK(condition)                                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);  \
      fflush(stdout);                                                   \
      _exit(1);                                                         \
    }                                                                   \
  } while (0)

#define STATUS(expected, call)                                                                       \
  do {                                                                                               \
    int32_t got_ = (call);                                                                           \
    if (got_ != (expected)) {                                                                        \
      printf("%s:%d: %s gave %s, not %s\n", __FILE__, __LINE__, #call, locum_status_name(got_),      \
             locum_status_name(expected));                                                           \
      fflush(stdout);                                                                                \
      _exit(1);                                                                                      \
    }                                                                                                \
  } while (0)

static locum_str str(const char *text) {
  locum_str s;
  s.ptr = text;
  s.len = strlen(text);
  return s;
}

#endif
