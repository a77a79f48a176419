/* A host on Windows whose process is ended while it records, and the next one, which must find all that was confirmed.
 *
 *     killed.exe STORE-DIRECTORY MODEL-DIRECTORY ROUND MILLISECONDS
 *
 * Starts itself again as the recording host, reads what that one says was confirmed, and ends it with TerminateProcess so many
 * milliseconds after its twentieth confirmation. Then it opens the store, lets the student answer while a wake callback counts, and has
 * a policy stopped that never ends. The store must have been through journey.c, so that there is a student. Prints `ended TASK STEPS` for every episode whose end was confirmed and `flushed TASK STEPS`
 * for steps that were, for the caller to compare with the store. Ends with 0 if everything was as expected.
 */
#include <windows.h>

#define _exit(status) ExitProcess(status)
#include "../abi/common.h"

enum { CONFIRMATIONS = 20, STEPS = 6 };

static const char *const META =
    "{\"domain\":\"corridor\",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"act\",\"description\":\"Do one thing.\","
    "\"parameters\":{\"type\":\"object\",\"properties\":{\"action\":{\"type\":\"string\",\"enum\":[\"left\",\"right\",\"take\"]}},"
    "\"required\":[\"action\"]}}}]}";

static locum open_store(const char *store, const char *model) {
  locum_options options = {.struct_size = sizeof options};
  locum_error *error = NULL;
  locum l;
  options.store_dir = str(store);
  options.base_model_dir = str(model);
  int32_t status = locum_open(&options, &l, &error);
  if (status != LOCUM_OK) printf("%s\n", locum_error_message(error));
  STATUS(LOCUM_OK, status);
  return l;
}

static void record(locum_episode e, int32_t role, int32_t actor, const char *content_json) {
  locum_step step = {.struct_size = sizeof step};
  step.role = role;
  step.actor = actor;
  step.content_json = str(content_json);
  STATUS(LOCUM_OK, locum_episode_step(e, &step, NULL));
}

static void begin(locum l, const char *task, locum_episode *e) {
  STATUS(LOCUM_OK, locum_episode_begin(l, task, strlen(task), META, strlen(META), e, NULL));
  record(*e, LOCUM_ROLE_SYSTEM, LOCUM_ACTOR_UNKNOWN, "{\"content\":\"You walk in a corridor.\"}");
  record(*e, LOCUM_ROLE_USER, LOCUM_ACTOR_UNKNOWN, "{\"content\":\"Goal: take the coin.\"}");
}

static void act(locum_episode e, int call) {
  char json[256];
  snprintf(json, sizeof json,
           "{\"content\":null,\"tool_calls\":[{\"id\":\"c%d\",\"type\":\"function\",\"function\":{\"name\":\"act\","
           "\"arguments\":\"{\\\"action\\\":\\\"right\\\"}\"}}]}",
           call);
  record(e, LOCUM_ROLE_ASSISTANT, LOCUM_ACTOR_TEACHER, json);
  snprintf(json, sizeof json, "{\"tool_call_id\":\"c%d\",\"content\":\"See: a coin to the right of you.\"}", call);
  record(e, LOCUM_ROLE_TOOL, LOCUM_ACTOR_UNKNOWN, json);
}

/* The host that is ended: it records until then. */
static int record_for_ever(const char *store, const char *model, const char *round) {
  locum l = open_store(store, model);
  STATUS(LOCUM_OK, locum_student_use(l, 1, NULL));
  for (int n = 0;; n++) {
    locum_outcome outcome = {.struct_size = sizeof outcome, .status = LOCUM_OUTCOME_SUCCESS};
    char task[64];
    locum_episode e;
    snprintf(task, sizeof task, "killed-%s-%d", round, n);
    begin(l, task, &e);
    for (int call = 1; call <= STEPS; call++) {
      act(e, call);
      if (call != STEPS / 2) continue;
      STATUS(LOCUM_OK, locum_flush(l, 0, NULL));
      printf("flushed %s %d\n", task, call);
      fflush(stdout);
    }
    STATUS(LOCUM_OK, locum_episode_end(e, &outcome, NULL));
    printf("ended %s %d\n", task, STEPS);
    fflush(stdout);
  }
}

/* Starts the recording host, passes on what it confirms, and ends it. */
static void kill_one(char **argv) {
  SECURITY_ATTRIBUTES inherited = {sizeof inherited, NULL, TRUE};
  STARTUPINFOA start = {.cb = sizeof start, .dwFlags = STARTF_USESTDHANDLES};
  PROCESS_INFORMATION child;
  HANDLE ours, theirs;
  char command[4096], line[256], byte;
  int confirmations = 0, over = 0;
  size_t length = 0;
  DWORD n, code;
  CHECK(CreatePipe(&ours, &theirs, &inherited, 0));
  CHECK(SetHandleInformation(ours, HANDLE_FLAG_INHERIT, 0));
  start.hStdOutput = theirs;
  start.hStdError = theirs;
  snprintf(command, sizeof command, "\"%s\" \"%s\" \"%s\" \"%s\"", argv[0], argv[1], argv[2], argv[3]);
  CHECK(CreateProcessA(NULL, command, NULL, NULL, TRUE, 0, NULL, NULL, &start, &child));
  CloseHandle(theirs);
  /* What was written before the end may still be in the pipe, and counts: it was confirmed. A line without its end does not. */
  while (ReadFile(ours, &byte, 1, &n, NULL) && n == 1) {
    if (byte != '\n') {
      CHECK(length + 1 < sizeof line);
      line[length++] = byte;
      continue;
    }
    line[length] = '\0';
    length = 0;
    printf("%s\n", line);
    if (++confirmations < CONFIRMATIONS || over) continue;
    Sleep((DWORD)atoi(argv[4]));
    CHECK(TerminateProcess(child.hProcess, 9));
    over = 1;
  }
  CHECK(WaitForSingleObject(child.hProcess, 60000) == WAIT_OBJECT_0);
  CHECK(GetExitCodeProcess(child.hProcess, &code));
  if (!over) printf("the recording host ended by itself with %lu\n", code);
  CHECK(over && code == 9);
  CloseHandle(child.hProcess);
  CloseHandle(child.hThread);
  CloseHandle(ours);
}

static void woken(void *user_data) { InterlockedIncrement((LONG *)user_data); }

/* The pin of the process that was ended holds: its student answers, and the wake callback tells of it. */
static void let_the_student_answer(locum l) {
  locum_request request = {.struct_size = sizeof request, .flags = LOCUM_REQUEST_GREEDY | LOCUM_REQUEST_CALL_REQUIRED};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_bytes answer = {0};
  locum_episode e;
  locum_call call;
  LONG wakes = 0;
  int32_t status;
  STATUS(LOCUM_OK, locum_set_wake(l, woken, &wakes, NULL));
  begin(l, "after the end", &e);
  STATUS(LOCUM_OK, locum_decide(e, &request, &decision, NULL));
  printf("decided: %s\n", decision.reason);
  CHECK(decision.who == LOCUM_WHO_STUDENT && decision.student_version == 1);
  request.max_tokens = 32;
  STATUS(LOCUM_OK, locum_generate(e, &request, &call, NULL));
  STATUS(LOCUM_OK, locum_call_wait(call, 60000));
  status = locum_call_result(call, &answer, NULL);
  printf("answered: %.*s\n", (int)answer.len, (const char *)answer.ptr);
  STATUS(LOCUM_OK, status);
  locum_bytes_free(&answer);
  locum_call_free(call);
  STATUS(LOCUM_OK, locum_episode_drop(e));
  for (int tries = 0; tries < 100 && InterlockedAdd(&wakes, 0) == 0; tries++) Sleep(20);
  STATUS(LOCUM_OK, locum_set_wake(l, NULL, NULL, NULL));
  CHECK(wakes > 0);
}

/* A policy that never comes to an end is stopped, and the teacher is asked. */
static void stop_a_late_policy(locum l) {
  static const char *const endless = "return { decide = function() while true do end end }";
  locum_request request = {.struct_size = sizeof request};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_episode e;
  ULONGLONG began;
  STATUS(LOCUM_OK, locum_policy_load(l, endless, strlen(endless), "endless.lua", 11, NULL));
  begin(l, "a policy without end", &e);
  began = GetTickCount64();
  STATUS(LOCUM_OK, locum_decide(e, &request, &decision, NULL));
  printf("an endless policy, after %d ms: %s\n", (int)(GetTickCount64() - began), decision.reason);
  CHECK(decision.who == LOCUM_WHO_TEACHER && GetTickCount64() - began < 2000);
  STATUS(LOCUM_OK, locum_episode_drop(e));
}

int main(int argc, char **argv) {
  if (argc == 4) return record_for_ever(argv[1], argv[2], argv[3]);
  if (argc != 5) {
    fprintf(stderr, "usage: %s STORE-DIRECTORY MODEL-DIRECTORY ROUND MILLISECONDS\n", argv[0]);
    return 2;
  }
  kill_one(argv);
  locum l = open_store(argv[1], argv[2]);
  let_the_student_answer(l);
  stop_a_late_policy(l);
  STATUS(LOCUM_OK, locum_close(l, 0, NULL));
  return 0;
}
