/* A host whose calls are made from bytes: any function of locum.h in any order, with handles that are real, stale, made up or
 * of another kind, structs of every size, and texts of any length. A call may refuse; it must not crash, read or write what is
 * not the host's, give a status that is none, leave an error behind a success, or fail inside (LOCUM_E_INTERNAL).
 *
 * Every struct and text lies in a block of its own that is exactly as large as is said, so that AddressSanitizer sees a byte
 * too many. `tests/abi/replay.c` is a program around it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "locum.h"

#define LENGTH(list) (sizeof(list) / sizeof *(list))
#define MUST(condition)                                                        \
  do {                                                                         \
    if (!(condition)) {                                                        \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                 \
    }                                                                          \
  } while (0)

enum { SLOTS = 6, BLOCKS = 256, CALLS = 64, LARGEST_STRUCT = 4096 };

/* What the bytes of this run have made so far. */
static struct {
  const uint8_t *at;
  size_t left;
  locum_episode episodes[SLOTS];
  locum_call calls[SLOTS];
  uint64_t stale[SLOTS];
  uint64_t snapshot;
  uint8_t id[16];
  void *blocks[BLOCKS];
  size_t n_blocks;
  int policy_changed;
} run;

static locum store;
static char other_store[4096];
static unsigned jobs;

/* ------------------------------------------------------------------------------------------ what bytes mean */

static uint8_t u8(void) {
  if (run.left == 0) return 0;
  run.left--;
  return *run.at++;
}

static uint32_t u32(void) {
  uint32_t value = u8();
  if (value < 250) return value;
  value = (uint32_t)u8() << 24;
  value |= (uint32_t)u8() << 16;
  return value | (uint32_t)u8() << 8 | u8();
}

static uint64_t u64(void) {
  uint64_t value = u32();
  return value < 250 ? value : value << 32 | u32();
}

static void *block(size_t size) {
  void *new = malloc(size);
  MUST(new != NULL || size == 0);
  MUST(run.n_blocks < BLOCKS);
  return run.blocks[run.n_blocks++] = new;
}

static const char *const TEXTS[] = {
    "",
    "{}",
    "[]",
    "{\"role\":\"user\",\"content\":\"go\"}",
    "{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"id\":\"c\",\"type\":\"function\",\"function\":{\"name\":\"act\","
    "\"arguments\":\"{\\\"action\\\":\\\"left\\\"}\"}}]}",
    "{\"role\":\"tool\",\"tool_call_id\":\"c\",\"content\":\"done\"}",
    "[{\"role\":\"user\",\"content\":\"go\"}]",
    "[{\"type\":\"function\",\"function\":{\"name\":\"act\",\"parameters\":{\"type\":\"object\",\"properties\":{\"action\":{\"enum\":"
    "[\"left\",\"right\"]}},\"required\":[\"action\"]}}}]",
    "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"act\",\"parameters\":{\"type\":\"object\",\"properties\":{\"action\":"
    "{\"enum\":[\"left\",\"right\"]}}}}}],\"scope\":\"s\",\"domain\":\"d\"}",
    "{\"criteria\":[{\"id\":\"a\",\"weight\":1,\"passed\":true}],\"integrity\":{\"ok\":true}}",
    "return {}",
    "return { decide = function(s) return 'student', s.stage end, redact = function(r) return r.content end }",
    "return { decide = function() while true do end end }",
    "{\"tokens\":300,\"max_seconds\":1,\"method\":\"lora\",\"promote\":\"never\"}",
    "{\"tokens\":300,\"max_seconds\":1,\"ttt\":\"published\",\"ttt_chunk\":16}",
    "-email,-entropy",
    "s",
};

/* A text in a block of its own: one of the above, bytes of the input, NULL, or something long. */
static locum_str text(void) {
  locum_str made = {NULL, 0};
  const uint8_t kind = u8();
  const char *from = NULL;
  char *copy;
  if (kind < 150) {
    from = TEXTS[kind % LENGTH(TEXTS)];
    made.len = strlen(from);
  } else if (kind < 200) {
    made.len = u8();
    if (made.len > run.left) made.len = run.left;
    from = (const char *)run.at;
    run.at += made.len;
    run.left -= made.len;
  } else if (kind == 200) {
    made.len = u32(); /* NULL with a length: misuse, unless that is zero */
    return made;
  } else if (kind == 201) {
    made.len = (size_t)1 << 20;
  }
  copy = block(made.len);
  if (from != NULL && made.len > 0) memcpy(copy, from, made.len);
  if (from == NULL) memset(copy, '[', made.len);
  made.ptr = copy;
  return made;
}

static uint64_t made_up(void) {
  static const uint64_t ODD[] = {0, 1, UINT64_MAX, UINT64_MAX >> 1, (uint64_t)1 << 60, (uint64_t)2 << 60, (uint64_t)3 << 60,
                                 (uint64_t)1 << 60 | (uint64_t)1 << 24, (uint64_t)7 << 60 | (uint64_t)1 << 24};
  const uint8_t kind = u8();
  if (kind < LENGTH(ODD)) return ODD[kind];
  if (kind < 100) return run.stale[kind % SLOTS];
  if (kind < 130) return run.episodes[kind % SLOTS].id;
  if (kind < 160) return run.calls[kind % SLOTS].id;
  if (kind < 200) return store.id ^ (uint64_t)1 << kind % 64;
  return u64() ^ run.episodes[kind % SLOTS].id;
}

static locum which_store(void) {
  locum handle = store;
  if (u8() >= 240) handle.id = made_up();
  /* The real one stays open for the next run. */
  return handle;
}

static size_t slot;

static locum_episode which_episode(void) {
  locum_episode handle;
  const uint8_t kind = u8();
  slot = kind % SLOTS;
  handle = run.episodes[slot];
  if (kind >= 230) handle.id = made_up();
  return handle;
}

static locum_call which_call(void) {
  locum_call handle;
  const uint8_t kind = u8();
  slot = kind % SLOTS;
  handle = run.calls[slot];
  if (kind >= 230) handle.id = made_up();
  return handle;
}

/* As much of a struct as a host says that it has: all of it, less, or more than this header knows. */
static void *sized(const void *whole, size_t size) {
  uint32_t told = (uint32_t)size;
  uint8_t *edge;
  switch (u8() % 8) {
    case 0: told = u32() % (uint32_t)(size + 1); break;
    case 1: told = (uint32_t)size + u32() % (LARGEST_STRUCT - (uint32_t)size); break;
    case 2: return NULL;
    default: break;
  }
  /* Four bytes are there in any case: they say how many there are. */
  edge = block(told < sizeof told ? sizeof told : told);
  memset(edge, u8(), told < sizeof told ? sizeof told : told);
  memcpy(edge, whole, told < size ? told : size);
  memcpy(edge, &told, sizeof told);
  return edge;
}

static const locum_step *step(void) {
  locum_step made;
  memset(&made, 0, sizeof made);
  made.flags = u8() < 200 ? 0 : u32();
  made.role = u8() < 200 ? 0 : (int32_t)u32();
  made.actor = (int32_t)(u8() % 6);
  made.content_json = text();
  made.model = text();
  made.unix_ms = u64();
  made.cost_usd = u8() < 200 ? 0.5 : -1.0 / (double)u8();
  made.latency_ms = u32();
  made.reserved = u8() < 250 ? 0 : 1;
  return sized(&made, sizeof made);
}

static const locum_outcome *outcome(void) {
  locum_outcome made;
  memset(&made, 0, sizeof made);
  made.flags = u8() < 200 ? 0 : u32();
  made.status = u8() < 250 ? (int32_t)(u8() % 5) : (int32_t)u32();
  made.score = u8() < 200 ? 1.0 : 1.0 / (double)u8();
  made.reason = text();
  made.details_json = text();
  return sized(&made, sizeof made);
}

static const locum_request *request(void) {
  locum_request made;
  memset(&made, 0, sizeof made);
  made.flags = u8() < 200 ? u8() % 4 : u32();
  made.messages_json = text();
  made.tools_json = text();
  made.max_tokens = u32();
  made.deadline_ms = u32();
  made.temperature = u8() < 200 ? 0.0F : 1.0F / (float)u8();
  made.seed = u64();
  return sized(&made, sizeof made);
}

/* ------------------------------------------------------------------------------------- what must hold of a call */

static locum_error *error;

static locum_error **why(void) { return u8() < 200 ? &error : NULL; }

/* Looks at a status and at the error that came with it. */
static int32_t told(int32_t status) {
  MUST(status >= LOCUM_E_INTERNAL && status <= LOCUM_TEACHER);
  if (status == LOCUM_E_INTERNAL) {
    fprintf(stderr, "inside: %s\n", error ? locum_error_message(error) : "?");
    abort();
  }
  MUST(strlen(locum_status_name(status)) > 1);
  if (error != NULL) {
    MUST(status < 0 && locum_error_status(error) == status);
    MUST(strlen(locum_error_message(error)) > 5);
    locum_error_free(error);
    error = NULL;
  }
  return status;
}

/* Bytes are the host's after a success and nothing after a failure. */
static void given(int32_t status, locum_bytes *bytes) {
  size_t i;
  unsigned sum = 0;
  if (status < 0) MUST(bytes->ptr == NULL && bytes->len == 0);
  for (i = 0; i < bytes->len; i++) sum += bytes->ptr[i];
  MUST(sum < UINT32_MAX);
  locum_bytes_free(bytes);
  MUST(bytes->ptr == NULL && bytes->len == 0 && bytes->owner == 0);
}

/* ------------------------------------------------------------------------------------------------ the calls */

static void begin_episode(void) {
  locum_episode made = {77};
  const locum_str task = text(), meta = text();
  const size_t where = u8() % SLOTS;
  if (told(locum_episode_begin(which_store(), task.ptr, task.len, meta.ptr, meta.len, &made, why())) != LOCUM_OK) {
    MUST(made.id == 0);
    return;
  }
  MUST(made.id != 0);
  (void)locum_episode_drop(run.episodes[where]);
  run.stale[where] = run.episodes[where].id;
  run.episodes[where] = made;
}

static void end_episode(void) {
  const locum_episode handle = which_episode();
  const locum_outcome *how = u8() < 40 ? NULL : outcome();
  (void)locum_episode_id(handle, run.id);
  if (told(locum_episode_end(handle, how, why())) == LOCUM_OK) run.stale[slot] = handle.id;
}

static void decide(void) {
  const locum_request *asked = request();
  locum_decision out;
  memset(&out, 0xff, sizeof out);
  out.struct_size = u8() < 200 ? (uint32_t)sizeof out : u32() % (sizeof out + 1);
  if (told(locum_decide(which_episode(), asked, &out, why())) < 0 && out.struct_size >= 8) MUST(out.who == LOCUM_WHO_TEACHER);
  if (out.struct_size == sizeof out) MUST(memchr(out.reason, 0, sizeof out.reason) != NULL);
}

static void generate(void) {
  locum_call made = {77};
  const locum_request *asked = request();
  const size_t where = u8() % SLOTS;
  if (told(locum_generate(which_episode(), asked, &made, why())) != LOCUM_OK) {
    MUST(made.id == 0);
    return;
  }
  (void)locum_call_free(run.calls[where]);
  run.stale[where] = run.calls[where].id;
  run.calls[where] = made;
}

static void event(void) {
  locum_event out;
  memset(&out, 0, sizeof out);
  out.struct_size = (uint32_t)sizeof out;
  if (told(locum_next_event(which_store(), &out)) == LOCUM_OK) given(LOCUM_OK, &out.detail);
}

static void open_another(void) {
  locum_options options;
  locum made = {77};
  memset(&options, 0, sizeof options);
  options.flags = u32() | LOCUM_OPEN_NO_DEVICE;
  options.store_dir = text();
  if (u8() < 230) {
    options.store_dir.ptr = other_store;
    options.store_dir.len = strlen(other_store);
  } else if (options.store_dir.len > 0 && options.store_dir.ptr != NULL && options.store_dir.ptr[0] != '\0') {
    ((char *)(size_t)options.store_dir.ptr)[0] = '\0'; /* never a folder of somebody's */
  }
  options.policy_path = text();
  options.base_model_dir = text();
  options.worker_threads = u32();
  options.train_threads = u32();
  options.max_disk_bytes = u64();
  options.max_cache_bytes = u64();
  options.weights = (int32_t)u32();
  options.reserved = u8() < 250 ? 0 : 1;
  options.max_device_bytes = u64();
  options.detectors = text();
  if (told(locum_open(sized(&options, sizeof options), &made, why())) == LOCUM_OK) {
    MUST(made.id != 0);
    (void)told(locum_close(made, u8(), &error));
    MUST(locum_close(made, 0, NULL) == LOCUM_E_MISUSE);
  } else {
    MUST(made.id == 0);
  }
}

static void job(void) {
  const locum_str options = text();
  uint64_t number = 77;
  if (++jobs % 64 != 1) return; /* they are slow */
  if (told(locum_distil_start(which_store(), options.ptr, options.len, &number, why())) != LOCUM_OK) MUST(number == 0);
}

static void wake(void *data) { (void)data; }

/* One call, as the next byte says. */
static void call(void) {
  locum_bytes bytes = {NULL, 0, 0};
  locum_str said;
  locum handle;
  int32_t status;
  switch (u8() % 42) {
    case 0: case 1: begin_episode(); break;
    case 2: case 3: case 4: case 5: {
      const locum_step *made = step();
      (void)told(locum_episode_step(which_episode(), made, why()));
      break;
    }
    case 6: end_episode(); break;
    case 7: (void)told(locum_episode_drop(which_episode())); break;
    case 8: (void)told(locum_episode_id(which_episode(), u8() < 250 ? run.id : NULL)); break;
    case 9: {
      const locum_outcome *made = outcome();
      (void)told(locum_outcome_later(which_store(), u8() < 250 ? run.id : NULL, made, why()));
      break;
    }
    case 10: (void)told(locum_flush(which_store(), 1 + u8() % 4, why())); break;
    case 11: case 12: decide(); break;
    case 13: case 14: generate(); break;
    case 15: status = told(locum_call_poll(which_call(), &bytes)); given(status, &bytes); break;
    case 16: (void)told(locum_call_poll(which_call(), NULL)); break;
    case 17: (void)told(locum_call_wait(which_call(), u8() % 8)); break;
    case 18: status = told(locum_call_result(which_call(), &bytes, why())); given(status, &bytes); break;
    case 19: (void)told(locum_call_cancel(which_call())); break;
    case 20: {
      const locum_call made = which_call();
      if (told(locum_call_free(made)) == LOCUM_OK) run.stale[slot] = made.id;
      break;
    }
    case 21: (void)locum_event_handle(which_store()); break;
    case 22: event(); break;
    case 23: (void)told(locum_next_event(which_store(), NULL)); break;
    case 24: (void)told(locum_set_wake(which_store(), u8() % 2 ? wake : NULL, NULL, NULL)); break;
    case 25: {
      const locum_str name = text();
      said = text();
      handle = which_store();
      if (told(locum_policy_load(handle, said.ptr, said.len, name.ptr, name.len, why())) == LOCUM_OK) run.policy_changed = 1;
      break;
    }
    case 26: job(); break;
    case 27: status = told(locum_distil_status(which_store(), u64(), &bytes, why())); given(status, &bytes); break;
    case 28: (void)told(locum_distil_cancel(which_store(), u64(), why())); break;
    case 29: (void)told(locum_distil_pause(which_store(), u64(), why())); break;
    case 30: (void)told(locum_distil_resume(which_store(), u64(), why())); break;
    case 31: status = told(locum_student_list(which_store(), &bytes, why())); given(status, &bytes); break;
    case 32: (void)told(locum_student_use(which_store(), u8() < 100 ? LOCUM_STUDENT_BASE : u64(), why())); break;
    case 33: (void)told(locum_student_rollback(which_store(), why())); break;
    case 34: status = told(locum_fast_weights(which_episode(), &bytes, why())); given(status, &bytes); break;
    case 35: (void)told(locum_fast_weights_switch(which_episode(), (int32_t)u32(), why())); break;
    case 36: (void)told(locum_fast_weights_reset(which_episode(), why())); break;
    case 37: (void)told(locum_fast_weights_snapshot(which_episode(), u8() < 250 ? &run.snapshot : NULL, why())); break;
    case 38: {
      const uint64_t number = u8() < 200 ? run.snapshot : u64();
      const int forget = u8() % 2;
      const locum_episode of = which_episode();
      (void)told(forget ? locum_fast_weights_forget(of, number, why()) : locum_fast_weights_restore(of, number, why()));
      break;
    }
    case 39:
      /* Rewrites the database, so not often. */
      if (u8() < 16) {
        said = text();
        status = told(locum_forget_scope(which_store(), said.ptr, said.len, 0, &bytes, why()));
      } else if (u8() < 16) {
        status = told(locum_forget_episode(which_store(), u8() < 250 ? run.id : NULL, 0, &bytes, why()));
      } else {
        status = told(locum_student_lineage(which_store(), u64(), &bytes, why()));
      }
      given(status, &bytes);
      break;
    case 40:
      status = told(u8() < 128 ? locum_stats(which_store(), &bytes, why())
                               : locum_episode_students(which_store(), run.id, &bytes, why()));
      given(status, &bytes);
      break;
    default:
      if (u8() < 16) {
        open_another();
      } else {
        /* What was never given out. */
        locum_bytes wrong = {run.id, sizeof run.id, made_up()};
        locum_bytes_free(&wrong);
        (void)locum_status_name((int32_t)u32());
        (void)locum_extension(TEXTS[u8() % LENGTH(TEXTS)]);
        handle.id = made_up();
        if (handle.id != store.id) (void)told(locum_close(handle, 1, &error));
      }
  }
}

/* Opens the store of all runs, in a folder that is not there yet, with the model of another one. */
void locum_fuzz_begin(const char *directory, const char *model);
void locum_fuzz_begin(const char *directory, const char *model) {
  locum_options options;
  memset(&options, 0, sizeof options);
  options.struct_size = (uint32_t)sizeof options;
  options.flags = LOCUM_OPEN_NO_DEVICE;
  options.store_dir.ptr = directory;
  options.store_dir.len = strlen(directory);
  options.base_model_dir.ptr = model;
  options.base_model_dir.len = strlen(model);
  options.worker_threads = 1;
  options.train_threads = 1;
  (void)snprintf(other_store, sizeof other_store, "%s-other", directory);
  MUST(told(locum_open(&options, &store, &error)) == LOCUM_OK);
  MUST(told(locum_student_use(store, LOCUM_STUDENT_BASE, &error)) == LOCUM_OK);
}

/* One run: the calls that these bytes mean. */
void locum_fuzz_abi(const uint8_t *data, size_t size);
void locum_fuzz_abi(const uint8_t *data, size_t size) {
  size_t i, n;
  memset(&run, 0, sizeof run);
  run.at = data;
  run.left = size;
  /* A call makes three blocks at most. */
  for (n = 0; run.left > 0 && n < CALLS; n++) call();
  for (i = 0; i < SLOTS; i++) {
    (void)locum_call_free(run.calls[i]);
    (void)locum_episode_drop(run.episodes[i]);
  }
  if (jobs % 64 == 1) (void)locum_distil_cancel(store, 0, NULL);
  if (run.policy_changed) MUST(told(locum_policy_load(store, "return {}", 9, NULL, 0, &error)) == LOCUM_OK);
  for (i = 0; i < run.n_blocks; i++) free(run.blocks[i]);
}
