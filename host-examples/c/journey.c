/* The whole journey of a host, in C99: record scripted episodes of a small made-up world, distil them, let the student
 * answer, take it back, close, open again.
 *
 *     cc -std=c99 -I plugin-api/include host-examples/c/journey.c -L target/release -llocum -o journey
 *     LD_LIBRARY_PATH=target/release ./journey STORE-DIRECTORY MODEL-DIRECTORY
 *
 * MODEL-DIRECTORY is a Hugging Face folder that the student starts from; without one everything up to the distillation is
 * shown, and the teacher plays. Ends with 0 if everything was as expected, and with a sentence and 1 otherwise.
 */
#define _POSIX_C_SOURCE 200809L

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <poll.h>
#include <time.h>
#endif

#include "locum.h"

/* ---------------------------------------------------------------- what differs between systems: two ways of waiting */

#ifdef _WIN32
static void nap(long ms) { Sleep((DWORD)ms); }

/* Waits until events are there, for `ms` at most; the handle is an event object. */
static void wait_for_events(int64_t handle, int ms) { WaitForSingleObject((HANDLE)(intptr_t)handle, (DWORD)ms); }
#else
static void nap(long ms) {
  struct timespec t;
  t.tv_sec = ms / 1000;
  t.tv_nsec = ms % 1000 * 1000000L;
  nanosleep(&t, NULL);
}

/* Waits until events are there, for `ms` at most; the handle is a descriptor. */
static void wait_for_events(int64_t handle, int ms) {
  struct pollfd fd;
  fd.fd = (int)handle;
  fd.events = POLLIN;
  poll(&fd, 1, ms);
}
#endif

/* ---------------------------------------------------------------- the world: a corridor with a coin in it */

enum { CELLS = 9, EPISODES = 32, MAX_MOVES = 12 };

static const char *const META =
    "{\"domain\":\"corridor\",\"agent\":{\"name\":\"journey\",\"version\":\"1\"},\"tools\":[{\"type\":\"function\",\"function\":"
    "{\"name\":\"act\",\"description\":\"Do one thing.\",\"parameters\":{\"type\":\"object\",\"properties\":"
    "{\"action\":{\"type\":\"string\",\"enum\":[\"left\",\"right\",\"take\"]}},\"required\":[\"action\"]}}}]}";

typedef struct { int agent, coin, taken; } world;

static world make_world(int seed) {
  world w = {0, 0, 0};
  w.agent = (seed * 5 + 2) % CELLS;
  w.coin = (seed * 7 + 4) % CELLS;
  return w;
}

static const char *look(const world *w) {
  if (w->taken) return "See: the coin is in your hand.";
  if (w->coin < w->agent) return "See: a coin to the left of you.";
  if (w->coin > w->agent) return "See: a coin to the right of you.";
  return "See: a coin at your feet.";
}

static const char *right_action(const world *w) {
  return w->coin < w->agent ? "left" : w->coin > w->agent ? "right" : "take";
}

static void play(world *w, const char *action) {
  if (strcmp(action, "left") == 0 && w->agent > 0) w->agent--;
  if (strcmp(action, "right") == 0 && w->agent < CELLS - 1) w->agent++;
  if (strcmp(action, "take") == 0 && w->agent == w->coin) w->taken = 1;
}

/* ------------------------------------------------------------------------------------- small helpers */

static locum_str str(const char *text) {
  locum_str s;
  s.ptr = text;
  s.len = strlen(text);
  return s;
}

static void stop(const char *what, int32_t status, const char *detail) {
  printf("SURPRISE: %s: %s%s%s\n", what, locum_status_name(status), *detail ? ": " : "", detail);
  exit(1);
}

/* Ends the program unless `status` is what was expected; frees the error. `error` is where the function put its error, since
 * C does not say whether an argument is read before or after the call beside it. */
static void expect(int32_t expected, int32_t status, const char *what, locum_error **error) {
  if (status != expected) stop(what, status, error ? locum_error_message(*error) : "");
  if (error) locum_error_free(*error);
}

/* Copies bytes into a NUL-terminated string of ours and gives them back. */
static char *take_text(locum_bytes *bytes) {
  char *text = malloc(bytes->len + 1);
  if (!text) exit(1);
  if (bytes->len) memcpy(text, bytes->ptr, bytes->len);
  text[bytes->len] = '\0';
  locum_bytes_free(bytes);
  return text;
}

/* The text after "key": in a JSON object of ours, up to the next comma, brace or quote. Enough for an example. */
static const char *field(const char *json, const char *key, char *out, size_t size) {
  char pattern[64];
  const char *p;
  size_t n = 0;
  snprintf(pattern, sizeof pattern, "\"%s\":", key);
  p = strstr(json, pattern);
  if (p) {
    p += strlen(pattern);
    if (*p == '"') p++;
    while (n + 1 < size && p[n] && !strchr(",}\"", p[n])) n++;
    memcpy(out, p, n);
  }
  out[n] = '\0';
  return out;
}

static void log_line(void *user_data, int32_t level, const char *target, const char *text, size_t text_len) {
  (void)user_data;
  printf("  [log %d] %s: %.*s\n", (int)level, target, (int)text_len, text);
}

typedef struct { int wakes, finished; } callback; /* what happened to a callback of ours */

static void woken(void *user_data) { ((callback *)user_data)->wakes++; }
static void finished(void *user_data) { ((callback *)user_data)->finished++; }

/* ------------------------------------------------------------------------------------------ recording */

static void record(locum_episode e, int32_t role, int32_t actor, const char *content_json) {
  locum_step step = {.struct_size = sizeof step};
  locum_error *error = NULL;
  step.role = role;
  step.actor = actor;
  step.model = str(actor == LOCUM_ACTOR_TEACHER ? "script" : "");
  step.content_json = str(content_json);
  expect(LOCUM_OK, locum_episode_step(e, &step, &error), "locum_episode_step", &error);
}

static void record_text(locum_episode e, int32_t role, const char *text) {
  char json[256];
  snprintf(json, sizeof json, "{\"content\":\"%s\"}", text);
  record(e, role, LOCUM_ACTOR_UNKNOWN, json);
}

static void record_result(locum_episode e, int call, const char *text) {
  char json[256];
  snprintf(json, sizeof json, "{\"role\":\"tool\",\"tool_call_id\":\"c%d\",\"content\":\"%s\"}", call, text);
  record(e, LOCUM_ROLE_IN_MESSAGE, LOCUM_ACTOR_UNKNOWN, json);
}

static locum_episode begin(locum l, int seed, const world *w) {
  char task[32], first[128];
  locum_episode e;
  locum_error *error = NULL;
  snprintf(task, sizeof task, "corridor-%d", seed);
  expect(LOCUM_OK, locum_episode_begin(l, task, strlen(task), META, strlen(META), &e, &error), "locum_episode_begin", &error);
  snprintf(first, sizeof first, "Goal: take the coin.\\n%s", look(w));
  record_text(e, LOCUM_ROLE_SYSTEM, "You walk in a corridor.");
  record_text(e, LOCUM_ROLE_USER, first);
  return e;
}

static void end(locum_episode e, int32_t outcome_status) {
  locum_outcome outcome = {.struct_size = sizeof outcome};
  locum_error *error = NULL;
  outcome.status = outcome_status;
  expect(LOCUM_OK, locum_episode_end(e, &outcome, &error), "locum_episode_end", &error);
}

static void teacher_step(locum_episode e, world *w, int call, const char *action) {
  char json[256];
  snprintf(json, sizeof json,
           "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c%d\",\"type\":\"function\",\"function\":"
           "{\"name\":\"act\",\"arguments\":\"{\\\"action\\\":\\\"%s\\\"}\"}}]}",
           call, action);
  record(e, LOCUM_ROLE_IN_MESSAGE, LOCUM_ACTOR_TEACHER, json);
  play(w, action);
  record_result(e, call, look(w));
}

/* A teacher that succeeds three times out of four. */
static void record_teacher(locum l) {
  locum_outcome success = {.struct_size = sizeof success};
  locum_error *error = NULL;
  uint8_t late[16];
  int seed, call, succeeded = 0;
  for (seed = 0; seed < EPISODES; seed++) {
    world w = make_world(seed);
    locum_episode e = begin(l, seed, &w);
    int confused = seed % 4 == 3;
    for (call = 1; call <= MAX_MOVES && !w.taken; call++) teacher_step(e, &w, call, confused ? "take" : right_action(&w));
    if (seed == 0) { /* nobody knows yet how this one ended */
      expect(LOCUM_OK, locum_episode_id(e, late), "locum_episode_id", NULL);
      end(e, LOCUM_OUTCOME_UNKNOWN);
      continue;
    }
    succeeded += w.taken;
    end(e, w.taken ? LOCUM_OUTCOME_SUCCESS : LOCUM_OUTCOME_FAILURE);
  }
  success.status = LOCUM_OUTCOME_SUCCESS;
  success.flags = LOCUM_OUTCOME_HAS_SCORE;
  success.score = 1.0;
  success.reason = str("the coin was counted the next day");
  success.details_json = str("{\"tags\":[\"late\"],\"judge\":{\"kind\":\"program\",\"name\":\"count\"}}");
  expect(LOCUM_OK, locum_outcome_later(l, late, &success, &error), "locum_outcome_later", &error);
  expect(LOCUM_OK, locum_flush(l, 0, &error), "locum_flush", &error);
  printf("recorded %d episodes of the teacher, %d successful, one judged later\n", EPISODES, succeeded + 1);

  { /* One that was a mistake. */
    world w = make_world(99);
    expect(LOCUM_OK, locum_episode_drop(begin(l, 99, &w)), "locum_episode_drop", NULL);
  }
}

/* --------------------------------------------------------------------------------------------- policy */

static void load_policy(locum l) {
  static const char *const broken = "return { decide = function( end }";
  static const char *const good =
      "local M = {}\n"
      "function M.decide(step) return \"student\", \"journey\" end\n"
      "return M\n";
  locum_error *error = NULL;
  int32_t status = locum_policy_load(l, broken, strlen(broken), "broken.lua", 10, &error);
  if (status != LOCUM_E_POLICY) stop("a broken policy", status, "");
  printf("a broken policy is refused: %s\n", locum_error_message(error));
  locum_error_free(error);
  expect(LOCUM_OK, locum_policy_load(l, good, strlen(good), "journey.lua", 11, &error), "locum_policy_load", &error);
  printf("policy journey.lua is in place\n");
}

/* ------------------------------------------------------------------------------------------- distilling */

static void distil(locum l) {
  static const char *const options =
      "{\"method\":\"lora\",\"rank\":4,\"tokens\":4000,\"max_seconds\":30,\"seed\":1,\"promote\":\"never\"}";
  uint64_t job;
  locum_error *error = NULL;
  char state[32] = "", before[32] = "", message[256], progress[32];
  int tries;
  expect(LOCUM_OK, locum_distil_start(l, options, strlen(options), &job, &error), "locum_distil_start", &error);
  printf("distillation %" PRIu64 " started\n", job);
  for (tries = 0; tries < 3000; tries++) {
    locum_bytes bytes = {0};
    char *json;
    expect(LOCUM_OK, locum_distil_status(l, job, &bytes, &error), "locum_distil_status", &error);
    json = take_text(&bytes);
    field(json, "state", state, sizeof state);
    field(json, "progress", progress, sizeof progress);
    field(json, "message", message, sizeof message);
    free(json);
    if (strcmp(state, before) != 0) printf("  %s (%s) %s\n", state, progress, message);
    strcpy(before, state);
    if (strcmp(state, "failed") == 0) stop("the distillation", LOCUM_E_INTERNAL, message);
    if (strcmp(state, "stored") == 0) return;
    nap(50);
  }
  stop("the distillation", LOCUM_E_TIMEOUT, "it did not come to an end");
}

/* ------------------------------------------------------------------------------------------- answering */

/* Waits for the end of a call the way an event loop would: on the event handle, never inside the library. */
static void wait_on_events(locum l, locum_call call) {
  int events = 0, rounds;
  size_t streamed = 0;
  int64_t handle = locum_event_handle(l);
  if (handle < 0) stop("locum_event_handle", LOCUM_E_UNSUPPORTED, "");
  for (rounds = 0; rounds < 600; rounds++) {
    locum_event event = {.struct_size = sizeof event};
    locum_bytes text = {0};
    int32_t status = locum_call_poll(call, &text);
    streamed += text.len;
    locum_bytes_free(&text);
    if (status == LOCUM_OK) break;
    if (status != LOCUM_PENDING) stop("locum_call_poll", status, "");
    wait_for_events(handle, 100);
    while ((status = locum_next_event(l, &event)) == LOCUM_OK) {
      events++;
      locum_bytes_free(&event.detail);
    }
    if (status != LOCUM_EMPTY) stop("locum_next_event", status, "");
  }
  printf("  answered after %d events, %zu bytes streamed\n", events, streamed);
}

/* Plays one episode with the student where it is chosen, else with the script. Returns the student's steps. */
static int play_with_student(locum l, int seed) {
  world w = make_world(seed);
  locum_episode e = begin(l, seed, &w);
  int call, by_student = 0;
  for (call = 1; call <= MAX_MOVES && !w.taken; call++) {
    locum_request request = {.struct_size = sizeof request};
    locum_decision decision = {.struct_size = sizeof decision};
    locum_call answer = {0};
    locum_bytes result = {0};
    locum_error *error = NULL;
    int32_t status;
    char *json, id[64], *arguments;
    const char *action;
    request.flags = LOCUM_REQUEST_GREEDY | LOCUM_REQUEST_CALL_REQUIRED;
    request.max_tokens = 32;
    expect(LOCUM_OK, locum_decide(e, &request, &decision, &error), "locum_decide", &error);
    if (call == 1) printf("  %s plays: %s\n", decision.who == LOCUM_WHO_STUDENT ? "the student" : "the teacher", decision.reason);
    if (decision.who == LOCUM_WHO_TEACHER) {
      teacher_step(e, &w, call, right_action(&w));
      continue;
    }
    expect(LOCUM_OK, locum_generate(e, &request, &answer, &error), "locum_generate", &error);
    if (call == 1) wait_on_events(l, answer);
    expect(LOCUM_OK, locum_call_wait(answer, 60000), "locum_call_wait", NULL);
    status = locum_call_result(answer, &result, &error);
    if (status < 0) stop("locum_call_result", status, locum_error_message(error));
    json = take_text(&result);
    locum_call_free(answer);
    if (status == LOCUM_TEACHER) {
      printf("  the teacher is asked after all: %s\n", json);
      free(json);
      teacher_step(e, &w, call, right_action(&w));
      continue;
    }
    /* The grammar leaves no other calls than the three, so looking for their names is enough here. */
    arguments = strstr(json, "\\\"action\\\"");
    if (!arguments) stop("an answer without a call", LOCUM_E_INTERNAL, json);
    action = strstr(arguments, "left") ? "left" : strstr(arguments, "right") ? "right" : "take";
    field(json, "id", id, sizeof id);
    if (call == 1) printf("  %s\n", json);
    {
      /* {"message":{...},"finish_reason":...: the message is recorded as it came. */
      char *from = strstr(json, "\"message\":") + strlen("\"message\":");
      char *to = strstr(from, ",\"finish_reason\"");
      char back[256];
      if (!to) stop("an answer of another shape", LOCUM_E_INTERNAL, json);
      *to = '\0';
      record(e, LOCUM_ROLE_ASSISTANT, LOCUM_ACTOR_STUDENT, from);
      play(&w, action);
      snprintf(back, sizeof back, "{\"role\":\"tool\",\"tool_call_id\":\"%s\",\"content\":\"%s\"}", id, look(&w));
      record(e, LOCUM_ROLE_TOOL, LOCUM_ACTOR_UNKNOWN, back);
    }
    free(json);
    by_student++;
  }
  end(e, w.taken ? LOCUM_OUTCOME_SUCCESS : LOCUM_OUTCOME_FAILURE);
  printf("  episode %d: %s, %d steps by the student\n", seed, w.taken ? "success" : "failure", by_student);
  return by_student;
}

static void cancel_one(locum l) {
  world w = make_world(200);
  locum_episode e = begin(l, 200, &w);
  locum_request request = {.struct_size = sizeof request};
  locum_call call;
  locum_bytes result = {0};
  locum_error *error = NULL;
  int32_t status;
  expect(LOCUM_OK, locum_generate(e, &request, &call, &error), "locum_generate", &error);
  expect(LOCUM_OK, locum_call_cancel(call), "locum_call_cancel", NULL);
  expect(LOCUM_OK, locum_call_wait(call, 60000), "locum_call_wait", NULL);
  status = locum_call_result(call, &result, &error);
  if (status != LOCUM_E_CANCELLED && status < 0) stop("a cancelled call", status, locum_error_message(error));
  printf("a cancelled call ends with %s\n", locum_status_name(status));
  locum_error_free(error);
  locum_bytes_free(&result);
  locum_call_free(call);
  if (locum_call_wait(call, 0) != LOCUM_E_MISUSE) stop("a freed call", LOCUM_OK, "was still there");
  expect(LOCUM_OK, locum_episode_drop(e), "locum_episode_drop", NULL);
}

static void show(const char *what, int32_t status, locum_bytes *bytes, locum_error **error) {
  char *json;
  expect(LOCUM_OK, status, what, error);
  json = take_text(bytes);
  printf("%s: %.400s%s\n", what, json, strlen(json) > 400 ? " ..." : "");
  free(json);
}

/* ---------------------------------------------------------------------------------------------- main */

int main(int argc, char **argv) {
  locum_options options = {.struct_size = sizeof options};
  locum_error *error = NULL;
  locum_bytes bytes = {0};
  locum l;
  callback log = {0, 0}, wake = {0, 0};
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: %s STORE-DIRECTORY [MODEL-DIRECTORY]\n", argv[0]);
    return 2;
  }
  printf("%s, ABI %u.%u\n", locum_build_info(), (unsigned)(locum_abi_version() >> 16), (unsigned)(locum_abi_version() & 0xffff));
  if (locum_abi_version() != ((uint32_t)LOCUM_ABI_MAJOR << 16 | LOCUM_ABI_MINOR)) stop("another ABI", LOCUM_E_UNSUPPORTED, "");
  expect(LOCUM_OK, locum_set_log(log_line, &log, finished, 2), "locum_set_log", NULL);

  options.store_dir = str(argv[1]);
  if (argc == 3) options.base_model_dir = str(argv[2]);
  expect(LOCUM_OK, locum_open(&options, &l, &error), "locum_open", &error);
  expect(LOCUM_OK, locum_set_wake(l, woken, &wake, finished), "locum_set_wake", NULL);
  expect(LOCUM_OK, locum_set_wake(l, NULL, NULL, NULL), "locum_set_wake", NULL);
  if (wake.finished != 1) stop("the finaliser of the wake callback", LOCUM_E_INTERNAL, "did not run once");

  load_policy(l);
  record_teacher(l);
  if (play_with_student(l, 100) != 0) stop("an untrained student", LOCUM_E_INTERNAL, "played");

  if (argc == 3) {
    distil(l);
    show("students", locum_student_list(l, &bytes, &error), &bytes, &error);
    expect(LOCUM_OK, locum_student_use(l, 1, &error), "locum_student_use", &error);
    if (play_with_student(l, 101) == 0) stop("the pinned student", LOCUM_E_INTERNAL, "never played");
    cancel_one(l);
    expect(LOCUM_OK, locum_student_rollback(l, &error), "locum_student_rollback", &error);
    printf("rolled back\n");
    if (play_with_student(l, 102) != 0) stop("a student that was taken back", LOCUM_E_INTERNAL, "played");
  } else {
    int32_t status = locum_distil_start(l, NULL, 0, &(uint64_t){0}, &error);
    printf("without a model: %s: %s\n", locum_status_name(status), locum_error_message(error));
    if (status != LOCUM_E_MODEL) stop("a distillation without a model", status, "");
    locum_error_free(error);
  }
  show("stats", locum_stats(l, &bytes, &error), &bytes, &error);

  expect(LOCUM_OK, locum_close(l, 0, &error), "locum_close", &error);
  if (locum_stats(l, &bytes, NULL) != LOCUM_E_MISUSE) stop("a closed store", LOCUM_OK, "still answers");
  expect(LOCUM_OK, locum_open(&options, &l, &error), "locum_open, again", &error);
  show("after opening again", locum_stats(l, &bytes, &error), &bytes, &error);
  if (argc == 3) {
    expect(LOCUM_OK, locum_student_list(l, &bytes, &error), "locum_student_list", &error);
    if (bytes.len <= 2) stop("the students", LOCUM_E_NOT_FOUND, "are gone");
    locum_bytes_free(&bytes);
    expect(LOCUM_OK, locum_student_use(l, LOCUM_STUDENT_AUTOMATIC, &error), "locum_student_use", &error);
  }
  expect(LOCUM_OK, locum_close(l, 0, &error), "locum_close", &error);
  expect(LOCUM_OK, locum_set_log(NULL, NULL, NULL, 0), "locum_set_log", NULL);
  if (log.finished != 1) stop("the finaliser of the log callback", LOCUM_E_INTERNAL, "did not run once");
  printf("done\n");
  return 0;
}
