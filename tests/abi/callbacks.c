/* What happens inside callbacks, and what ends them. argv[1] is an empty directory. */
#define _GNU_SOURCE

#include <poll.h>
#include <unistd.h>

#include "common.h"

typedef struct {
  locum l;
  locum_episode e;
  int calls, finished, refused, allowed;
} seen;

/* Tries what is marked [callback] and what is not. */
static void try_both(seen *s) {
  locum_bytes bytes = {0};
  locum_error *error = NULL;
  uint8_t id[16];
  s->refused += locum_stats(s->l, &bytes, &error) == LOCUM_E_MISUSE && strstr(locum_error_message(error), "callback") != NULL;
  locum_error_free(error);
  locum_bytes_free(&bytes);
  s->allowed += locum_episode_id(s->e, id) == LOCUM_OK && locum_event_handle(s->l) >= 0 && locum_abi_version() != 0;
  __atomic_fetch_add(&s->calls, 1, __ATOMIC_SEQ_CST);
}

static void woken(void *user_data) { try_both(user_data); }

static void finished(void *user_data) {
  __atomic_fetch_add(&((seen *)user_data)->finished, 1, __ATOMIC_SEQ_CST);
}

static void line(void *user_data, int32_t level, const char *target, const char *text, size_t text_len) {
  size_t i;
  CHECK(level >= 1 && level <= 5 && strlen(target) > 0 && text_len > 0);
  for (i = 0; i < text_len; i++) CHECK((unsigned char)text[i] >= 32);
  __atomic_fetch_add(&((seen *)user_data)->calls, 1, __ATOMIC_SEQ_CST);
}

static int reaches(int *counter, int least) {
  int tries;
  for (tries = 0; tries < 500; tries++) {
    if (__atomic_load_n(counter, __ATOMIC_SEQ_CST) >= least) return 1;
    usleep(10000);
  }
  return 0;
}

int main(int argc, char **argv) {
  static const char *const policy = "return { decide = function(step) return 'teacher', 'always' end }";
  locum_options options = {.struct_size = sizeof options};
  locum_request request = {.struct_size = sizeof request};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_event event = {.struct_size = sizeof event};
  struct pollfd fd;
  seen log, first, second;
  int loaded = 0;
  CHECK(argc == 2);
  memset(&log, 0, sizeof log);
  STATUS(LOCUM_OK, locum_set_log(line, &log, finished, 5));
  options.store_dir = str(argv[1]);
  memset(&first, 0, sizeof first);
  STATUS(LOCUM_OK, locum_open(&options, &first.l, NULL));
  STATUS(LOCUM_OK, locum_episode_begin(first.l, "t", 1, NULL, 0, &first.e, NULL));
  second = first;

  /* An event wakes the host, on the descriptor and by the callback. */
  STATUS(LOCUM_OK, locum_set_wake(first.l, woken, &first, finished));
  STATUS(LOCUM_OK, locum_policy_load(first.l, policy, strlen(policy), "always.lua", 10, NULL));
  fd.fd = (int)locum_event_handle(first.l);
  fd.events = POLLIN;
  CHECK(poll(&fd, 1, 5000) == 1);
  CHECK(reaches(&first.calls, 1));
  while (locum_next_event(first.l, &event) == LOCUM_OK) {
    loaded += event.kind == LOCUM_EVENT_POLICY_LOADED;
    CHECK(event.detail.len > 0 && strstr((const char *)event.detail.ptr, "\"name\"") != NULL);
    locum_bytes_free(&event.detail);
  }
  CHECK(loaded == 1);
  STATUS(LOCUM_EMPTY, locum_next_event(first.l, &event));
  CHECK(poll(&fd, 1, 0) == 0); /* nothing waits any more */
  STATUS(LOCUM_OK, locum_decide(first.e, &request, &decision, NULL));
  CHECK(decision.who == LOCUM_WHO_TEACHER);

  /* Another registration ends the first; closing ends the second. */
  STATUS(LOCUM_OK, locum_set_wake(first.l, woken, &second, finished));
  CHECK(first.finished == 1 && first.refused == first.calls && first.allowed == first.calls);
  STATUS(LOCUM_OK, locum_episode_end(first.e, NULL, NULL));
  STATUS(LOCUM_OK, locum_close(first.l, 0, NULL));
  CHECK(second.finished == 1 && first.finished == 1);

  STATUS(LOCUM_OK, locum_set_log(NULL, NULL, NULL, 0));
  CHECK(log.finished == 1);
  printf("done\n");
  return 0;
}
