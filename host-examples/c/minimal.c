/* The smallest host: open, record, decide, end, close.
 *
 *     cc -std=c99 -I plugin-api/include host-examples/c/minimal.c -L target/release -llocum -o minimal
 *     LD_LIBRARY_PATH=target/release ./minimal STORE-DIRECTORY
 */
#include <stdio.h>
#include <string.h>

#include "locum.h"

static locum_str str(const char *text) {
  locum_str s;
  s.ptr = text;
  s.len = strlen(text);
  return s;
}

static void say(locum_episode episode, int32_t actor, const char *message) {
  locum_step step = {.struct_size = sizeof step};
  step.actor = actor;
  step.content_json = str(message);
  locum_episode_step(episode, &step, NULL);
}

int main(int argc, char **argv) {
  locum_options options = {.struct_size = sizeof options};
  locum_request request = {.struct_size = sizeof request};
  locum_decision who = {.struct_size = sizeof who};
  locum_outcome outcome = {.struct_size = sizeof outcome};
  locum_error *error = NULL;
  locum_episode episode;
  locum l;

  if (argc != 2) return fprintf(stderr, "usage: %s STORE-DIRECTORY\n", argv[0]), 2;
  options.store_dir = str(argv[1]);
  if (locum_open(&options, &l, &error) != LOCUM_OK) {
    fprintf(stderr, "%s\n", locum_error_message(error));
    locum_error_free(error);
    return 1;
  }

  locum_episode_begin(l, "door-1", 6, NULL, 0, &episode, NULL);
  say(episode, LOCUM_ACTOR_UNKNOWN, "{\"role\":\"user\",\"content\":\"Open the door.\"}");
  locum_decide(episode, &request, &who, NULL); /* on any failure it says teacher */
  printf("%s plays: %s\n", who.who == LOCUM_WHO_STUDENT ? "the student" : "the teacher", who.reason);
  say(episode, LOCUM_ACTOR_TEACHER, "{\"role\":\"assistant\",\"content\":\"It is open.\"}"); /* your model's answer */
  outcome.status = LOCUM_OUTCOME_SUCCESS;
  locum_episode_end(episode, &outcome, NULL);

  return locum_close(l, 0, NULL) == LOCUM_OK ? 0 : 1;
}
