/* Breaks every rule of locum.h it can, and expects a status each time. argv[1] is an empty directory. */
#define _GNU_SOURCE

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"

/* Memory that ends where a page without rights begins: one byte read or written too many ends the program. */
static void *at_the_edge(size_t size) {
  static char *pages;
  long page = sysconf(_SC_PAGESIZE);
  if (!pages) {
    pages = mmap(NULL, (size_t)page * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED);
    CHECK(mprotect(pages + page, (size_t)page, PROT_NONE) == 0);
  }
  memset(pages, 0, (size_t)page);
  return pages + page - size;
}

/* Copies as much of a struct as a host with an older header has, with its size. */
static void *shorter(const void *whole, size_t size) {
  uint32_t told = (uint32_t)size;
  void *edge = at_the_edge(size);
  memcpy(edge, whole, size);
  memcpy(edge, &told, sizeof told);
  return edge;
}

static const uint64_t BAD[] = {0, 1, 42, UINT64_MAX, UINT64_MAX >> 1, (uint64_t)1 << 60, (uint64_t)2 << 60, (uint64_t)3 << 60,
                               ((uint64_t)1 << 60) | ((uint64_t)1 << 24), ((uint64_t)7 << 60) | ((uint64_t)1 << 24)};

/* Every function with a handle that it must refuse. `none_is_fine` for the functions that free. */
static void refuse_locum(locum l) {
  locum_error *error = NULL;
  locum_bytes bytes = {0};
  locum_episode episode;
  locum_event event = {.struct_size = sizeof event};
  uint64_t job;
  uint8_t id[16] = {0};
  STATUS(LOCUM_E_MISUSE, locum_episode_begin(l, "t", 1, NULL, 0, &episode, &error));
  CHECK(error != NULL && locum_error_status(error) == LOCUM_E_MISUSE && strlen(locum_error_message(error)) > 10);
  CHECK(episode.id == 0);
  locum_error_free(error);
  STATUS(LOCUM_E_MISUSE, locum_outcome_later(l, id, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_flush(l, 1, NULL));
  STATUS(LOCUM_E_MISUSE, locum_next_event(l, &event));
  STATUS(LOCUM_E_MISUSE, locum_set_wake(l, NULL, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_policy_load(l, "return {}", 9, NULL, 0, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_start(l, NULL, 0, &job, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_status(l, 0, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_cancel(l, 0, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_pause(l, 0, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_resume(l, 0, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_list(l, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_use(l, 0, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_rollback(l, NULL));
  STATUS(LOCUM_E_MISUSE, locum_stats(l, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_forget_episode(l, id, 0, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_forget_scope(l, "s", 1, 0, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_lineage(l, 1, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_episode_students(l, id, &bytes, NULL));
  CHECK(locum_event_handle(l) == -1);
  if (l.id != 0) STATUS(LOCUM_E_MISUSE, locum_close(l, 0, NULL));
  CHECK(bytes.ptr == NULL && bytes.owner == 0);
}

static void refuse_episode(locum_episode e) {
  locum_step step = {.struct_size = sizeof step};
  locum_request request = {.struct_size = sizeof request};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_call call = {77};
  uint8_t id[16];
  step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
  decision.who = LOCUM_WHO_STUDENT;
  STATUS(LOCUM_E_MISUSE, locum_episode_step(e, &step, NULL));
  STATUS(LOCUM_E_MISUSE, locum_episode_end(e, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_episode_id(e, id));
  STATUS(LOCUM_E_MISUSE, locum_decide(e, &request, &decision, NULL));
  CHECK(decision.who == LOCUM_WHO_TEACHER && decision.reason[0] != '\0');
  STATUS(LOCUM_E_MISUSE, locum_generate(e, &request, &call, NULL));
  CHECK(call.id == 0);
  uint64_t snapshot = 77;
  locum_bytes report = {0};
  STATUS(LOCUM_E_MISUSE, locum_fast_weights(e, &report, NULL));
  CHECK(report.ptr == NULL && report.owner == 0);
  STATUS(LOCUM_E_MISUSE, locum_fast_weights_switch(e, 1, NULL));
  STATUS(LOCUM_E_MISUSE, locum_fast_weights_reset(e, NULL));
  STATUS(LOCUM_E_MISUSE, locum_fast_weights_snapshot(e, &snapshot, NULL));
  CHECK(snapshot == 0);
  STATUS(LOCUM_E_MISUSE, locum_fast_weights_restore(e, 1, NULL));
  STATUS(LOCUM_E_MISUSE, locum_fast_weights_forget(e, 0, NULL));
  if (e.id != 0) STATUS(LOCUM_E_MISUSE, locum_episode_drop(e));
}

static void refuse_call(locum_call c) {
  locum_bytes bytes = {0};
  STATUS(LOCUM_E_MISUSE, locum_call_poll(c, &bytes));
  STATUS(LOCUM_E_MISUSE, locum_call_poll(c, NULL));
  STATUS(LOCUM_E_MISUSE, locum_call_wait(c, 0));
  STATUS(LOCUM_E_MISUSE, locum_call_result(c, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_call_cancel(c));
  if (c.id != 0) STATUS(LOCUM_E_MISUSE, locum_call_free(c));
}

static void bad_handles(locum l, locum_episode e) {
  size_t i;
  for (i = 0; i < sizeof BAD / sizeof *BAD; i++) {
    locum bad_locum = {BAD[i]};
    locum_episode bad_episode = {BAD[i]};
    locum_call bad_call = {BAD[i]};
    if (BAD[i] != l.id) refuse_locum(bad_locum);
    if (BAD[i] != e.id) refuse_episode(bad_episode);
    refuse_call(bad_call);
  }
  { /* Of the wrong kind. */
    locum as_locum = {e.id};
    locum_episode as_episode = {l.id};
    locum_call as_call = {e.id};
    refuse_locum(as_locum);
    refuse_episode(as_episode);
    refuse_call(as_call);
  }
  { /* None may be given back as often as one likes. */
    locum no_locum = {0};
    locum_episode no_episode = {0};
    locum_call no_call = {0};
    STATUS(LOCUM_OK, locum_close(no_locum, 0, NULL));
    STATUS(LOCUM_OK, locum_episode_drop(no_episode));
    STATUS(LOCUM_OK, locum_call_free(no_call));
  }
}

static void null_arguments(locum l, locum_episode e) {
  locum_bytes bytes = {0};
  uint8_t id[16] = {0};
  locum_options options = {.struct_size = sizeof options};
  locum_request request = {.struct_size = sizeof request};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_step step = {.struct_size = sizeof step};
  locum other;
  locum_call call;
  STATUS(LOCUM_E_MISUSE, locum_open(NULL, &other, NULL));
  CHECK(other.id == 0);
  STATUS(LOCUM_E_MISUSE, locum_open(&options, NULL, NULL));
  STATUS(LOCUM_E_ARGUMENT, locum_open(&options, &other, NULL)); /* no directory */
  STATUS(LOCUM_E_MISUSE, locum_episode_begin(l, NULL, 0, NULL, 0, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_episode_step(e, NULL, NULL));
  STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL)); /* no content */
  STATUS(LOCUM_E_MISUSE, locum_episode_id(e, NULL));
  STATUS(LOCUM_E_MISUSE, locum_outcome_later(l, NULL, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_decide(e, NULL, &decision, NULL));
  CHECK(decision.who == LOCUM_WHO_TEACHER && decision.reason[0] != '\0');
  STATUS(LOCUM_E_MISUSE, locum_decide(e, &request, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_generate(e, NULL, &call, NULL));
  STATUS(LOCUM_E_MISUSE, locum_generate(e, &request, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_next_event(l, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_start(l, NULL, 0, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_distil_status(l, 0, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_list(l, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_stats(l, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_forget_episode(l, NULL, 0, &bytes, NULL));
  STATUS(LOCUM_E_MISUSE, locum_forget_episode(l, id, 0, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_forget_scope(l, "s", 1, 0, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_student_lineage(l, 1, NULL, NULL));
  STATUS(LOCUM_E_MISUSE, locum_episode_students(l, NULL, &bytes, NULL));
  CHECK(locum_extension(NULL) == NULL && locum_extension("locum.nonsense/1") == NULL);
  CHECK(locum_error_status(NULL) == LOCUM_E_MISUSE);
  CHECK(strcmp(locum_error_message(NULL), "") == 0 && locum_error_os_code(NULL) == 0);
  CHECK(strcmp(locum_status_name(-999), "LOCUM_E_UNKNOWN") == 0);
  locum_error_free(NULL);
  locum_bytes_free(NULL);
}

/* Lengths that no memory stands behind. */
static void huge_lengths(locum l, locum_episode e) {
  static const size_t huge[] = {1, 257, (size_t)1 << 30, SIZE_MAX / 2 + 1, SIZE_MAX};
  size_t i;
  for (i = 0; i < sizeof huge / sizeof *huge; i++) {
    locum_str bad;
    locum_step step = {.struct_size = sizeof step};
    locum_outcome outcome = {.struct_size = sizeof outcome};
    locum_request request = {.struct_size = sizeof request};
    locum_decision decision = {.struct_size = sizeof decision};
    locum_options options = {.struct_size = sizeof options};
    locum_episode other;
    locum_call call;
    locum opened;
    uint64_t job;
    bad.ptr = NULL;
    bad.len = huge[i];
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, NULL, huge[i], NULL, 0, &other, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, NULL, 0, NULL, huge[i], &other, NULL));
    step.content_json = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
    step.model = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    outcome.reason = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_end(e, &outcome, NULL));
    outcome.reason = str("");
    outcome.details_json = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_end(e, &outcome, NULL));
    request.messages_json = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_decide(e, &request, &decision, NULL));
    CHECK(decision.who == LOCUM_WHO_TEACHER);
    STATUS(LOCUM_E_ARGUMENT, locum_generate(e, &request, &call, NULL));
    request.messages_json = str("");
    request.tools_json = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_decide(e, &request, &decision, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_policy_load(l, NULL, huge[i], NULL, 0, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_policy_load(l, "return {}", 9, NULL, huge[i], NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_distil_start(l, NULL, huge[i], &job, NULL));
    options.store_dir = bad;
    STATUS(LOCUM_E_ARGUMENT, locum_open(&options, &opened, NULL));
  }
  { /* A pointer to little, a length of much: refused by the limit before it is read. */
    locum_step step = {.struct_size = sizeof step};
    locum_episode other;
    step.content_json.ptr = "{}";
    step.content_json.len = SIZE_MAX;
    STATUS(LOCUM_E_LIMIT, locum_episode_step(e, &step, NULL));
    STATUS(LOCUM_E_LIMIT, locum_episode_begin(l, "x", 257, NULL, 0, &other, NULL));
    STATUS(LOCUM_E_LIMIT, locum_policy_load(l, "x", SIZE_MAX, NULL, 0, NULL));
  }
}

/* Values that mean nothing. */
static void bad_values(locum l, locum_episode e) {
  static const char *const not_messages[] = {"", "{", "[]", "1", "null", "{\"role\":7}", "{\"role\":\"nobody\",\"content\":\"x\"}",
                                             "{\"role\":\"user\",\"content\":{\"a\":1}}"};
  locum_error *error = NULL;
  size_t i;
  for (i = 0; i < sizeof not_messages / sizeof *not_messages; i++) {
    locum_step step = {.struct_size = sizeof step};
    step.content_json = str(not_messages[i]);
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, &error));
    CHECK(error != NULL && strlen(locum_error_message(error)) > 10);
    locum_error_free(error);
    locum_error_free(error); /* twice is harmless */
  }
  {
    locum_step step = {.struct_size = sizeof step};
    step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
    step.role = LOCUM_ROLE_TOOL; /* the message says user */
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.role = 99;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.role = 0;
    step.actor = -1;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.actor = 0;
    step.flags = 0x80000000u;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.flags = 0;
    step.cost_usd = -1.0;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
    step.cost_usd = 0.0;
    step.model = str("a\nb");
    STATUS(LOCUM_E_ARGUMENT, locum_episode_step(e, &step, NULL));
  }
  {
    locum_outcome outcome = {.struct_size = sizeof outcome};
    outcome.status = 5;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_end(e, &outcome, NULL));
    outcome.status = LOCUM_OUTCOME_SUCCESS;
    outcome.details_json = str("[1]");
    STATUS(LOCUM_E_ARGUMENT, locum_episode_end(e, &outcome, NULL));
    outcome.details_json = str("{\"criteria\":7}");
    STATUS(LOCUM_E_ARGUMENT, locum_episode_end(e, &outcome, NULL));
  }
  {
    locum_episode other;
    uint64_t job;
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, "a\x01", 2, NULL, 0, &other, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, "\xff", 1, NULL, 0, &other, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, "a", 1, "{\"unheard_of\":1}", 16, &other, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_episode_begin(l, "a", 1, "{\"tools\":7}", 11, &other, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_distil_start(l, "{\"method\":7}", 12, &job, NULL));
    STATUS(LOCUM_E_POLICY, locum_policy_load(l, "return 5 +", 10, NULL, 0, NULL));
    STATUS(LOCUM_E_NOT_FOUND, locum_student_use(l, 12345, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_set_log(NULL, NULL, NULL, 6));
  }
  {
    uint8_t nobody[16] = {1, 2, 3};
    locum_bytes bytes = {0};
    STATUS(LOCUM_E_NOT_FOUND, locum_outcome_later(l, nobody, NULL, NULL));
    STATUS(LOCUM_E_NOT_FOUND, locum_forget_episode(l, nobody, 0, &bytes, NULL));
    STATUS(LOCUM_E_NOT_FOUND, locum_forget_scope(l, "nobody's", 8, 0, &bytes, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_forget_scope(l, NULL, 0, 0, &bytes, NULL));
    STATUS(LOCUM_E_ARGUMENT, locum_forget_scope(l, "\xff", 1, 0, &bytes, NULL));
    STATUS(LOCUM_E_NOT_FOUND, locum_student_lineage(l, 12345, &bytes, NULL));
    CHECK(bytes.ptr == NULL && bytes.owner == 0);
    STATUS(LOCUM_OK, locum_episode_students(l, nobody, &bytes, NULL));
    CHECK(bytes.len == 2 && memcmp(bytes.ptr, "[]", 2) == 0);
    locum_bytes_free(&bytes);
  }
  {
    char *deep = malloc(300);
    locum_step step = {.struct_size = sizeof step};
    CHECK(deep != NULL);
    memset(deep, '[', 150);
    memset(deep + 150, ']', 150);
    step.content_json.ptr = deep;
    step.content_json.len = 300;
    STATUS(LOCUM_E_LIMIT, locum_episode_step(e, &step, NULL));
    free(deep);
  }
}

/* A host with an older header has shorter structs: nothing behind their end is read or written. */
static void shorter_structs(locum l, const char *dir) {
  locum_episode e;
  size_t size;
  STATUS(LOCUM_OK, locum_episode_begin(l, "short", 5, NULL, 0, &e, NULL));
  for (size = 0; size <= sizeof(locum_step); size++) {
    locum_step whole = {.struct_size = sizeof whole};
    int32_t status;
    if (size < 4 && size > 0) continue;
    whole.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
    whole.model = str("m");
    if (size == 0) { /* a size that was forgotten */
      whole.struct_size = 0;
      STATUS(LOCUM_E_MISUSE, locum_episode_step(e, &whole, NULL));
      continue;
    }
    status = locum_episode_step(e, shorter(&whole, size), NULL);
    CHECK(status == LOCUM_OK || status == LOCUM_E_ARGUMENT);
    if (size == sizeof whole) CHECK(status == LOCUM_OK);
  }
  for (size = 4; size <= sizeof(locum_decision); size++) {
    locum_request request = {.struct_size = sizeof request};
    locum_decision whole = {.struct_size = sizeof whole};
    locum_decision *edge = shorter(&whole, size);
    uint32_t told;
    STATUS(LOCUM_OK, locum_decide(e, &request, edge, NULL));
    memcpy(&told, edge, sizeof told);
    CHECK(told == size);
  }
  for (size = 4; size <= sizeof(locum_request); size++) {
    locum_request whole = {.struct_size = sizeof whole};
    locum_decision decision = {.struct_size = sizeof decision};
    int32_t status;
    whole.messages_json = str("[{\"role\":\"user\",\"content\":\"x\"}]");
    whole.max_tokens = 8;
    whole.seed = 1;
    status = locum_decide(e, shorter(&whole, size), &decision, NULL);
    CHECK(status == LOCUM_OK || status == LOCUM_E_ARGUMENT);
    CHECK(decision.who == LOCUM_WHO_TEACHER);
  }
  for (size = 4; size <= sizeof(locum_event); size++) {
    locum_event whole = {.struct_size = sizeof whole};
    int32_t status = locum_next_event(l, shorter(&whole, size));
    CHECK(status == LOCUM_OK || status == LOCUM_EMPTY);
  }
  STATUS(LOCUM_OK, locum_episode_drop(e));
  for (size = 4; size <= sizeof(locum_outcome); size++) {
    locum_outcome whole = {.struct_size = sizeof whole};
    whole.reason = str("because");
    whole.details_json = str("{\"tags\":[]}");
    STATUS(LOCUM_OK, locum_episode_begin(l, "short", 5, NULL, 0, &e, NULL));
    STATUS(LOCUM_OK, locum_episode_end(e, shorter(&whole, size), NULL));
  }
  for (size = 4; size <= sizeof(locum_options); size++) {
    locum_options whole = {.struct_size = sizeof whole};
    locum other;
    int32_t status;
    whole.store_dir = str(dir);
    whole.max_cache_bytes = 1 << 20;
    status = locum_open(shorter(&whole, size), &other, NULL);
    CHECK(status == LOCUM_OK || (size < 24 && status == LOCUM_E_ARGUMENT));
    if (status == LOCUM_OK) STATUS(LOCUM_OK, locum_close(other, 0, NULL));
  }
  { /* A newer host has longer ones. */
    struct { locum_decision known; char unknown[64]; } newer;
    locum_request request = {.struct_size = sizeof request};
    memset(&newer, 0x55, sizeof newer);
    newer.known.struct_size = sizeof newer;
    STATUS(LOCUM_OK, locum_episode_begin(l, "long", 4, NULL, 0, &e, NULL));
    STATUS(LOCUM_OK, locum_decide(e, &request, &newer.known, NULL));
    CHECK(newer.unknown[0] == 0x55 && newer.unknown[63] == 0x55);
    STATUS(LOCUM_OK, locum_episode_drop(e));
  }
}

static void freed_twice(locum l) {
  locum_bytes bytes, copy;
  locum_episode e;
  STATUS(LOCUM_OK, locum_stats(l, &bytes, NULL));
  CHECK(bytes.len > 0);
  copy = bytes;
  locum_bytes_free(&bytes);
  CHECK(bytes.ptr == NULL && bytes.len == 0 && bytes.owner == 0);
  locum_bytes_free(&bytes);
  locum_bytes_free(&copy);
  STATUS(LOCUM_OK, locum_episode_begin(l, "twice", 5, NULL, 0, &e, NULL));
  STATUS(LOCUM_OK, locum_episode_end(e, NULL, NULL));
  refuse_episode(e);
  STATUS(LOCUM_OK, locum_episode_begin(l, "twice", 5, NULL, 0, &e, NULL));
  STATUS(LOCUM_OK, locum_episode_drop(e));
  refuse_episode(e);
}

static locum_episode shared;
static int refused;

static void *hammer(void *unused) {
  int i, mine = 0;
  for (i = 0; i < 2000; i++) {
    locum_step step = {.struct_size = sizeof step};
    int32_t status;
    step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
    status = locum_episode_step(shared, &step, NULL);
    CHECK(status == LOCUM_OK || status == LOCUM_E_MISUSE || status == LOCUM_E_BUSY);
    mine += status == LOCUM_E_MISUSE;
  }
  __atomic_fetch_add(&refused, mine, __ATOMIC_SEQ_CST);
  return unused;
}

static void two_threads_on_one_episode(locum l) {
  pthread_t threads[4];
  size_t i;
  STATUS(LOCUM_OK, locum_episode_begin(l, "shared", 6, NULL, 0, &shared, NULL));
  for (i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, hammer, NULL) == 0);
  for (i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
  STATUS(LOCUM_OK, locum_flush(l, 30000, NULL));
  STATUS(LOCUM_OK, locum_episode_drop(shared));
}

int main(int argc, char **argv) {
  locum_options options = {.struct_size = sizeof options};
  locum l;
  locum_episode e;
  CHECK(argc == 2);
  options.store_dir = str(argv[1]);
  options.flags = 0x40000000u;
  STATUS(LOCUM_E_ARGUMENT, locum_open(&options, &l, NULL));
  options.flags = 0;
  options.policy_path = str("/nonexistent/policy.lua");
  STATUS(LOCUM_E_NOT_FOUND, locum_open(&options, &l, NULL));
  options.policy_path = str("");
  STATUS(LOCUM_OK, locum_open(&options, &l, NULL));
  STATUS(LOCUM_OK, locum_episode_begin(l, "misuse", 6, NULL, 0, &e, NULL));
  bad_handles(l, e);
  null_arguments(l, e);
  huge_lengths(l, e);
  bad_values(l, e);
  shorter_structs(l, argv[1]);
  freed_twice(l);
  two_threads_on_one_episode(l);
  { /* After all that the episode still works. */
    locum_step step = {.struct_size = sizeof step};
    step.content_json = str("{\"role\":\"user\",\"content\":\"still here\"}");
    STATUS(LOCUM_OK, locum_episode_step(e, &step, NULL));
    STATUS(LOCUM_OK, locum_episode_end(e, NULL, NULL));
  }
  STATUS(LOCUM_OK, locum_episode_begin(l, "left open", 9, NULL, 0, &e, NULL));
  STATUS(LOCUM_OK, locum_close(l, 0, NULL));
  refuse_locum(l);
  refuse_episode(e);
  printf("done\n");
  return 0;
}
