/* A child of fork() may use nothing of its parent's, and may open a store of its own. argv[1] and argv[2] are directories. */
#define _GNU_SOURCE

#include <sys/wait.h>
#include <unistd.h>

#include "common.h"

static void record_one(locum l, const char *task) {
  locum_episode e;
  locum_step step = {.struct_size = sizeof step};
  locum_outcome outcome = {.struct_size = sizeof outcome};
  step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
  outcome.status = LOCUM_OUTCOME_SUCCESS;
  STATUS(LOCUM_OK, locum_episode_begin(l, task, strlen(task), NULL, 0, &e, NULL));
  STATUS(LOCUM_OK, locum_episode_step(e, &step, NULL));
  STATUS(LOCUM_OK, locum_episode_end(e, &outcome, NULL));
}

static void as_child(locum parent_locum, locum_episode parent_episode, locum_bytes parent_bytes, const char *dir) {
  locum_options options = {.struct_size = sizeof options};
  locum_step step = {.struct_size = sizeof step};
  locum_request request = {.struct_size = sizeof request};
  locum_decision decision = {.struct_size = sizeof decision};
  locum_error *error = NULL;
  locum_bytes bytes;
  uint8_t id[16];
  locum own;
  step.content_json = str("{\"role\":\"user\",\"content\":\"x\"}");
  STATUS(LOCUM_E_FORKED, locum_episode_step(parent_episode, &step, &error));
  CHECK(locum_error_status(error) == LOCUM_E_FORKED);
  locum_error_free(error);
  STATUS(LOCUM_E_FORKED, locum_episode_end(parent_episode, NULL, NULL));
  STATUS(LOCUM_E_FORKED, locum_episode_drop(parent_episode));
  STATUS(LOCUM_E_FORKED, locum_episode_id(parent_episode, id));
  STATUS(LOCUM_E_FORKED, locum_decide(parent_episode, &request, &decision, NULL));
  CHECK(decision.who == LOCUM_WHO_TEACHER);
  STATUS(LOCUM_E_FORKED, locum_stats(parent_locum, &bytes, NULL));
  STATUS(LOCUM_E_FORKED, locum_flush(parent_locum, 1, NULL));
  STATUS(LOCUM_E_FORKED, locum_close(parent_locum, 0, NULL));
  CHECK(locum_event_handle(parent_locum) == -1);
  locum_bytes_free(&parent_bytes);
  CHECK(parent_bytes.ptr == NULL);

  options.store_dir = str(dir);
  STATUS(LOCUM_OK, locum_open(&options, &own, NULL));
  CHECK(own.id != parent_locum.id);
  record_one(own, "of the child");
  STATUS(LOCUM_E_FORKED, locum_stats(parent_locum, &bytes, NULL));
  STATUS(LOCUM_OK, locum_close(own, 0, NULL));
}

static void wait_for(pid_t pid) {
  int status;
  CHECK(pid > 0);
  CHECK(waitpid(pid, &status, 0) == pid);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv) {
  locum_options options = {.struct_size = sizeof options};
  locum_bytes bytes;
  locum_episode e;
  locum l;
  pid_t pid;
  CHECK(argc == 3);

  pid = fork(); /* before anything was opened */
  if (pid == 0) {
    options.store_dir = str(argv[2]);
    STATUS(LOCUM_OK, locum_open(&options, &l, NULL));
    record_one(l, "before");
    STATUS(LOCUM_OK, locum_close(l, 0, NULL));
    _exit(0);
  }
  wait_for(pid);

  options.store_dir = str(argv[1]);
  STATUS(LOCUM_OK, locum_open(&options, &l, NULL));
  STATUS(LOCUM_OK, locum_episode_begin(l, "parent", 6, NULL, 0, &e, NULL));
  STATUS(LOCUM_OK, locum_stats(l, &bytes, NULL));
  pid = fork();
  if (pid == 0) {
    as_child(l, e, bytes, argv[2]);
    pid = fork(); /* and a child of the child, while the child holds nothing open */
    if (pid == 0) {
      as_child(l, e, bytes, argv[2]);
      _exit(0);
    }
    wait_for(pid);
    _exit(0);
  }
  wait_for(pid);

  /* The parent goes on as if nothing had happened. */
  locum_bytes_free(&bytes);
  STATUS(LOCUM_OK, locum_episode_end(e, NULL, NULL));
  record_one(l, "after");
  STATUS(LOCUM_OK, locum_close(l, 0, NULL));
  printf("done\n");
  return 0;
}
