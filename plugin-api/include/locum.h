/* locum.h : the C interface of Locum, and its manual.                                        ABI 0.1
 *
 * Locum stands in for the large model behind an agent. A host records what its agent does, says how each episode
 * ended, and asks before every step who plays it: the teacher (the model the host already calls) or the student
 * (a small model that Locum trained from the episodes that went well and that runs inside this process).
 * Whatever goes wrong in here, the answer is "ask the teacher", with the reason.
 *
 * While the major number is 0 the interface may still change with the minor number: compare locum_abi_version().
 *
 * THE WHOLE LOOP
 *     locum_open
 *       locum_episode_begin                         one per task
 *         locum_episode_step                        system prompt, user turn, tool result: as they happen
 *         locum_decide                              who plays the next agent step?
 *           teacher -> the host asks its own model; locum_episode_step with actor LOCUM_ACTOR_TEACHER
 *           student -> locum_generate, locum_call_wait, locum_call_result, locum_call_free,
 *                      then locum_episode_step with actor LOCUM_ACTOR_STUDENT
 *       locum_episode_end                           how did it end? (or later: locum_outcome_later)
 *     locum_close
 *
 * TEXT is UTF-8, a pointer and a length, and not NUL-terminated unless a comment says so. A null pointer is allowed where
 *   the length is 0. Names and ids: valid UTF-8 without control characters, at most 256 bytes. JSON: at most 64 levels deep;
 *   bytes in it that are not UTF-8 are replaced by U+FFFD.
 *
 * OWNERSHIP. What you pass in is read during the call and copied if kept. A `locum_bytes` and a `locum_error *` that you
 *   receive are yours until you give them to locum_bytes_free and locum_error_free. Nothing else is ever to be freed by you.
 *
 * HANDLES are integers in a struct: C checks their types, a foreign-function interface passes them as uint64. 0 is "none".
 *   A handle that is stale, of another kind, or was freed already is answered LOCUM_E_MISUSE; freeing "none" does nothing.
 *
 * THREADS. [any-thread]             may be called from any thread, several at once.
 *          [one-thread-at-a-time]   any thread, but not two at once with the same handle: the second is answered
 *                                   LOCUM_E_MISUSE and changes nothing.
 *          [callback]               may also be called inside one of your callbacks; everything else is
 *                                   answered LOCUM_E_MISUSE there.
 *          [may-block]              can wait, and can read and write files. Functions without this mark do neither.
 *
 * STATUS. Every function that can fail returns one of the numbers below: 0 is done, a positive number is no error but wants
 *   a look, a negative number is an error. Any function may return LOCUM_E_MISUSE, LOCUM_E_FORKED and LOCUM_E_INTERNAL;
 *   other statuses are listed at the function.
 *
 * ERRORS. The last argument `locum_error **error` may be NULL. If given, it is set to NULL where the status is 0 or
 *   positive, and to an object of yours otherwise. Messages name ids, limits and causes, never prompts, tool outputs, file
 *   contents or environment variables.
 *
 * STRUCTS begin with their size: set `struct_size = sizeof(...)` and everything else to zero, then fill in what you know.
 *   Zero (and a null string) means "default". Structs grow only at the end; a shorter one is read as if the rest were zero,
 *   so a program built with an older header keeps working.
 *
 * FORK. A child of fork() may not use the parent's handles: every function answers LOCUM_E_FORKED, frees nothing and
 *   touches no file. The child may call locum_open for itself. (Windows has no fork.)
 *
 * PROCESS. The library starts no thread before the first locum_open or locum_set_log, installs no signal handler (its
 *   threads block all signals), writes nothing to stdout or stderr, changes no environment variable, directory or locale,
 *   and exports nothing but locum_*. It stays mapped after dlclose or FreeLibrary. It brings its own SQLite and its own Lua,
 *   invisible from outside: do not open files inside the store directory with another SQLite of this process, since two
 *   copies break each other's file locks. There is no security boundary between a library and its process.
 */
#ifndef LOCUM_H
#define LOCUM_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LOCUM_API __declspec(dllimport)
#elif defined(__GNUC__)
#define LOCUM_API __attribute__((visibility("default")))
#else
#define LOCUM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LOCUM_ABI_MAJOR 0
#define LOCUM_ABI_MINOR 1

typedef struct { uint64_t id; } locum;          /* an open store with its policy, engine and students */
typedef struct { uint64_t id; } locum_episode;  /* an episode being recorded                           */
typedef struct { uint64_t id; } locum_call;     /* a generation in flight, or its finished answer      */
typedef struct locum_error locum_error;         /* why something failed; yours when received           */

typedef struct { const char *ptr; size_t len; } locum_str;                   /* borrowed text            */
typedef struct { uint8_t *ptr; size_t len; uint64_t owner; } locum_bytes;    /* yours: locum_bytes_free  */

/* Statuses. Unknown values may come from newer libraries: treat negative ones as errors. */
enum {
  LOCUM_OK = 0,
  LOCUM_PENDING = 1,         /* not finished yet                                                */
  LOCUM_EMPTY = 2,           /* nothing (more) to give                                          */
  LOCUM_TEACHER = 3,         /* there is no answer of a student: ask the teacher                */
  LOCUM_E_MISUSE = -1,       /* the calling program broke a rule of this page                   */
  LOCUM_E_ARGUMENT = -2,     /* a value is malformed: JSON, a name, a number, a combination     */
  LOCUM_E_LIMIT = -3,        /* larger than a named limit                                       */
  LOCUM_E_BUSY = -4,         /* a queue is full or another is at work; later it may succeed     */
  LOCUM_E_TIMEOUT = -5,      /* not done in the time given; it may still be done later          */
  LOCUM_E_CANCELLED = -6,
  LOCUM_E_CLOSED = -7,       /* the store was closed or the episode has ended                   */
  LOCUM_E_FORKED = -8,       /* the handle belongs to the parent process                        */
  LOCUM_E_NOT_FOUND = -9,    /* no such episode, job, student or file                           */
  LOCUM_E_STORE = -10,       /* the disk: full, not writable, failing                           */
  LOCUM_E_CORRUPT = -11,     /* something on disk is not what its hash or format says           */
  LOCUM_E_MODEL = -12,       /* a model folder cannot be used                                   */
  LOCUM_E_POLICY = -13,      /* a policy does not compile or fails its check                    */
  LOCUM_E_DEVICE = -14,
  LOCUM_E_MEMORY = -15,
  LOCUM_E_UNSUPPORTED = -16, /* not by this build, this platform or this tool specification     */
  LOCUM_E_INTERNAL = -17     /* our fault. From then on this `locum` always chooses the teacher */
};

/* locum_options.flags */
enum {
  LOCUM_OPEN_READ_ONLY = 1,   /* look only: what would change the store is answered LOCUM_E_UNSUPPORTED, no model is
                                 loaded, and a store that is not there is not made                               */
  LOCUM_OPEN_NO_LEARNING = 2, /* record and serve, but start no distillation in this process                     */
  LOCUM_OPEN_NO_MODEL = 4,    /* record only: no model is loaded, the teacher plays everything                   */
  LOCUM_OPEN_NO_DEVICE = 8,   /* compute on the processor, whatever else is there                                */
  LOCUM_OPEN_DROP_OLDEST = 16 /* at max_disk_bytes the oldest episodes that have ended are dropped, and recording
                                 goes on; without it the disk counts as full there (LOCUM_E_STORE)               */
};

/* locum_options.weights */
enum {
  LOCUM_WEIGHTS_DEFAULT = 0,  /* bf16                                                                            */
  LOCUM_WEIGHTS_F32 = 1,
  LOCUM_WEIGHTS_BF16 = 2,     /* what a student's file holds: nothing is lost                                    */
  LOCUM_WEIGHTS_Q8 = 3,       /* 8 bits: half of the memory and faster, answers may differ a little              */
  LOCUM_WEIGHTS_Q4 = 4        /* 4 bits: for the smallest machines; `locum bench quality` says what it costs     */
};

typedef struct {
  uint32_t struct_size;
  uint32_t flags;              /* LOCUM_OPEN_*                                                              */
  locum_str store_dir;         /* required; created with mode 0700 if missing, on Windows with the access
                                  list that the folder above passes on                                      */
  locum_str policy_path;       /* a Luau policy file; empty = the built-in default policy                   */
  locum_str base_model_dir;    /* Hugging Face folder that students start from; empty = the one imported
                                  into the store, or none: then everything is recorded, nothing is learned  */
  uint32_t worker_threads;     /* threads that answer; 0 = as many as the machine has cores                 */
  uint32_t train_threads;      /* threads that train;  0 = likewise, at low priority                        */
  uint64_t max_disk_bytes;     /* of the database; its log adds an eighth; models not counted; 0 = no limit */
  uint64_t max_cache_bytes;    /* KV caches kept for prefix reuse; 0 = 256 MiB, or what two prompts as long as the
                                  policy's view makes them take, if that is more                            */
  int32_t weights;             /* LOCUM_WEIGHTS_*: numbers in which models in service keep their weights    */
  uint32_t reserved;           /* 0 */
  locum_str device_library;    /* liblocum_cuda.so, which `make cuda` builds; empty = the one in this library's own folder, if any.
                                  Loaded at the first use and not unloaded. If it, its driver or its card cannot be used, the
                                  processor computes, and `engine.device` in the stats says why                  */
  uint64_t max_device_bytes;   /* of the card's memory; 0 = three quarters of what is free at the first use      */
  locum_str detectors;         /* secrets that are replaced by a mark before anything recorded is written: empty or
                                  "all"; "none"; or kinds to leave out, "-email,-entropy" (key, private_key, jwt,
                                  bearer, password, card, email, entropy)                                   */
} locum_options;

/* locum_step.flags */
enum { LOCUM_STEP_IS_ERROR = 1 };  /* this tool result reports a failed call: the step before it is not trained on */

/* locum_step.role */
enum {
  LOCUM_ROLE_IN_MESSAGE = 0,  /* content_json holds "role"   */
  LOCUM_ROLE_SYSTEM = 1,
  LOCUM_ROLE_USER = 2,
  LOCUM_ROLE_ASSISTANT = 3,   /* the agent's own turn        */
  LOCUM_ROLE_TOOL = 4         /* what came back for a call   */
};

/* locum_step.actor: who produced an assistant turn */
enum {
  LOCUM_ACTOR_UNKNOWN = 0,    /* never trained on            */
  LOCUM_ACTOR_TEACHER = 1,    /* the host's model            */
  LOCUM_ACTOR_STUDENT = 2,    /* the answer of a locum_call  */
  LOCUM_ACTOR_HUMAN = 3,
  LOCUM_ACTOR_SCRIPT = 4      /* a fixed program             */
};

typedef struct {
  uint32_t struct_size;
  uint32_t flags;          /* LOCUM_STEP_*                                                                */
  int32_t role;            /* LOCUM_ROLE_*; must agree with "role" in content_json where both are given   */
  int32_t actor;           /* LOCUM_ACTOR_*                                                               */
  locum_str content_json;  /* one OpenAI chat message, e.g.
                              {"role":"user","content":"..."}
                              {"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function",
                                 "function":{"name":"act","arguments":"{\"action\":\"left\"}"}}]}
                              {"role":"tool","tool_call_id":"c1","content":"..."}            at most 1 MiB */
  locum_str model;         /* name of the model that spoke, for statistics                                */
  uint64_t unix_ms;        /* when; 0 = now                                                               */
  double cost_usd;         /* what the turn cost; 0 = not known                                           */
  uint32_t latency_ms;     /* how long the turn took; 0 = not known                                       */
  uint32_t reserved;       /* 0 */
} locum_step;

/* locum_outcome.status */
enum {
  LOCUM_OUTCOME_UNKNOWN = 0,  /* nobody knows: such an episode is kept and never trained on */
  LOCUM_OUTCOME_SUCCESS = 1,
  LOCUM_OUTCOME_FAILURE = 2,
  LOCUM_OUTCOME_PARTIAL = 3,
  LOCUM_OUTCOME_ABORTED = 4
};
/* locum_outcome.flags */
enum { LOCUM_OUTCOME_HAS_SCORE = 1 };  /* `score` is meant, also where it is 0 */

typedef struct {
  uint32_t struct_size;
  uint32_t flags;          /* LOCUM_OUTCOME_HAS_SCORE                                                      */
  int32_t status;          /* LOCUM_OUTCOME_*                                                              */
  uint32_t reserved;       /* 0                                                                            */
  double score;            /* finite; any scale                                                            */
  locum_str reason;        /* why it ended, for people; at most 4096 bytes                                 */
  locum_str details_json;  /* object, all fields optional; unknown ones are kept:
                              {"criteria":[{"id","weight","passed","evidence"}],
                               "integrity":{"ok":true,"flags":["..."]},     was the success honest?
                               "judge":{"kind":"host|program|checklist|model|human|policy","name","version","privileged"},
                               "tags":["..."]}                                               at most 1 MiB */
} locum_outcome;

/* locum_request.flags */
enum {
  LOCUM_REQUEST_GREEDY = 1,         /* always the most likely token, whatever `temperature` says                  */
  LOCUM_REQUEST_CALL_REQUIRED = 2   /* the answer must be a tool call (tool_choice "required"); without it plain
                                       text is allowed too (tool_choice "auto")                                  */
};

typedef struct {
  uint32_t struct_size;
  uint32_t flags;           /* LOCUM_REQUEST_*                                                              */
  locum_str messages_json;  /* array of OpenAI chat messages, the whole history; at most 16 MiB. Empty = the
                               steps recorded so far                                                        */
  locum_str tools_json;     /* array of OpenAI tools, at most 256; empty = those of locum_episode_begin     */
  uint32_t max_tokens;      /* of the reply; 0 = 256                                                        */
  uint32_t deadline_ms;     /* an answer later than this is "ask the teacher"; 0 = 30000                    */
  float temperature;        /* 0 = what the policy sets, or else always the most likely token               */
  uint32_t reserved;        /* 0 */
  uint64_t seed;            /* of sampling; the same request with the same seed gives the same answer       */
} locum_request;

/* locum_decision.reason_code. Unknown values may come from newer libraries. */
enum {
  LOCUM_REASON_POLICY = 0,               /* the policy decided                                                      */
  LOCUM_REASON_NO_STUDENT = 1,           /* there is no student, or no model at all                                 */
  LOCUM_REASON_SHADOW = 2,               /* a candidate only watches so far                                         */
  LOCUM_REASON_CANARY_TEACHER = 3,       /* a candidate is on trial and this episode is the teacher's               */
  LOCUM_REASON_CANARY_STUDENT = 4,       /* ... and this one is the candidate's                                     */
  LOCUM_REASON_PROMOTED = 5,             /* the student has proved itself                                           */
  LOCUM_REASON_PINNED = 6,               /* locum_student_use said so                                               */
  LOCUM_REASON_BAD_REQUEST = 7,
  LOCUM_REASON_TOOLS_INEXPRESSIBLE = 8,  /* a tool specification that no grammar can be made of                     */
  LOCUM_REASON_PROMPT_TOO_LONG = 9,
  LOCUM_REASON_VIEW_MISMATCH = 10,       /* the student learned under another view than the policy declares         */
  LOCUM_REASON_LATE = 11,
  LOCUM_REASON_REFUSED = 12,             /* the policy refused the student's answer                                 */
  LOCUM_REASON_FAULT = 13,               /* something in here failed                                                */
  LOCUM_REASON_CLOSED = 14,
  LOCUM_REASON_DRIFTED = 15              /* what the student learned while it read went too far and was undone      */
};

/* locum_decision.who: zero is the teacher, so that a zeroed struct is the safe answer */
enum { LOCUM_WHO_TEACHER = 0, LOCUM_WHO_STUDENT = 1 };

typedef struct {
  uint32_t struct_size;     /* in: your sizeof; no more than that is written                                */
  int32_t who;              /* LOCUM_WHO_*                                                                  */
  float confidence;         /* 0..1: what the student's record so far says; 0 where there is none           */
  uint32_t decided_ns;      /* how long the decision took                                                   */
  uint64_t student_version; /* the student meant; 0 = none                                                  */
  int32_t reason_code;      /* stable number for programs: LOCUM_REASON_*                                   */
  char reason[100];         /* the same for people, NUL-terminated, cut at a character; nothing to free     */
} locum_decision;

/* locum_event.kind, with what `subject` names */
enum {
  LOCUM_EVENT_CALL_DONE = 1,        /* the id of a locum_call that has finished; 0 if it was freed meanwhile      */
  LOCUM_EVENT_JOB_PROGRESS = 2,     /* a job                                                                      */
  LOCUM_EVENT_JOB_STATE = 3,        /* a job that is in another state now                                         */
  LOCUM_EVENT_STUDENT_SWAPPED = 4,  /* the version of the student that plays from now on; 0 = the teacher         */
  LOCUM_EVENT_ROLLED_BACK = 5,      /* the version of the student that was taken back                             */
  LOCUM_EVENT_STORE_TROUBLE = 6,    /* the disk refuses; episodes are marked incomplete                           */
  LOCUM_EVENT_POLICY_LOADED = 7,
  LOCUM_EVENT_FAULT = 8,            /* something in here failed; the teacher plays from now on                    */
  LOCUM_EVENT_FAST_WEIGHTS = 9,     /* the version of a student whose learning in an episode was undone; detail:
                                     * {"episode","layer","drift"} (drift null: no number)                        */
  LOCUM_EVENT_FORGOTTEN = 10,       /* 0; number: episodes erased; detail: {"students"} that had learned from them  */
  LOCUM_EVENT_HOOK_OFF = 11         /* 0; detail: {"hook","policy"}: it failed too often and is off till a reload  */
};

typedef struct {
  uint32_t struct_size;     /* in: your sizeof; no more than that is written                                */
  int32_t kind;             /* LOCUM_EVENT_*; unknown kinds may come from newer libraries                   */
  uint64_t subject;         /* what it is about: a locum_call's id, a job, a student version                */
  int64_t number;           /* see the kind                                                                 */
  locum_bytes detail;       /* JSON object with "name" and more; yours: locum_bytes_free                    */
} locum_event;

/* Callbacks come from any thread, one at a time for each registration. They must return soon, must not throw, and may
 * call only functions marked [callback]. What they are given is valid until they return.                          */
typedef void (*locum_log_fn)(void *user_data, int32_t level, const char *target, const char *text, size_t text_len);
                                            /* level 1 error, 2 warning, 3 info, 4 debug, 5 trace; `target` is
                                               NUL-terminated; `text` is one line without control characters    */
typedef void (*locum_wake_fn)(void *user_data);
typedef void (*locum_done_fn)(void *user_data);  /* finaliser: exactly once, after the last call, on any thread  */

/* ------------------------------------------------------------------------------------------- 1. Library */

/* (major << 16) | minor of the library. Equal majors fit; while the major is 0, the minor must be equal too.
 *                                                                                   [any-thread] [callback] */
LOCUM_API uint32_t locum_abi_version(void);

/* One line for people: version and target of this build. Static and NUL-terminated.      [any-thread] [callback] */
LOCUM_API const char *locum_build_info(void);

/* Stable short name of a status, such as "LOCUM_E_BUSY"; "LOCUM_E_UNKNOWN" for a number this library does not know.
 * Static and NUL-terminated.                                                           [any-thread] [callback] */
LOCUM_API const char *locum_status_name(int32_t status);

/* A group of functions that is not part of this page yet, as a struct of function pointers that begins with its
 * struct_size; NULL if this library does not have it. `id` is NUL-terminated. The struct is static. See the end of this
 * page for the extensions there are.                                                    [any-thread] [callback] */
LOCUM_API const void *locum_extension(const char *id);

/* Sends the library's log lines of `max_level` (1..5) and more urgent ones to `log`; `log` NULL or `max_level` 0 switches
 * logging off. For the whole process. At most 200 lines a second are delivered; a line says how many were left out.
 * When this returns, the function set before is not running any more, and its `done` (may be NULL) has been called.
 * If the status is an error, nothing changed and the new `done` is not called.           [any-thread] [may-block]
 * LOCUM_E_ARGUMENT: max_level out of range.                                                                    */
LOCUM_API int32_t locum_set_log(locum_log_fn log, void *user_data, locum_done_fn done, int32_t max_level);

/* ------------------------------------------------------------------------------------ 2. Errors and bytes */

/* The status that came with the error. LOCUM_E_MISUSE for NULL or an error already freed. [any-thread] [callback] */
LOCUM_API int32_t locum_error_status(const locum_error *error);

/* A sentence for people. NUL-terminated, lives until locum_error_free; "" for NULL.       [any-thread] [callback] */
LOCUM_API const char *locum_error_message(const locum_error *error);

/* The operating system's number (errno) where it was the cause, else 0.                   [any-thread] [callback] */
LOCUM_API int32_t locum_error_os_code(const locum_error *error);

/* Frees an error. NULL does nothing; an address that is no error of ours is ignored.       [any-thread] [callback] */
LOCUM_API void locum_error_free(locum_error *error);

/* Frees bytes of ours and sets the struct to zero. NULL, a zeroed struct and a copy of a struct that was freed do
 * nothing.                                                                               [any-thread] [callback] */
LOCUM_API void locum_bytes_free(locum_bytes *bytes);

/* ------------------------------------------------------------------------------------------------ 3. Life */

/* Opens a store, creating it if missing, with its policy, its base model and its students.  [any-thread] [may-block]
 * LOCUM_OK: `*out` is yours until locum_close. On an error `*out` is none.
 * Several `locum` may be open on one directory, in one process or in several; one of them learns, all record and serve.
 * A base model that is missing or cannot be used is no error: then locum_decide says teacher and why.
 * LOCUM_E_ARGUMENT, LOCUM_E_LIMIT; LOCUM_E_NOT_FOUND: the policy file, or the store where opened read-only;
 * LOCUM_E_POLICY: the policy does not compile; LOCUM_E_STORE, LOCUM_E_CORRUPT: the store cannot be opened.         */
LOCUM_API int32_t locum_open(const locum_options *options, locum *out, locum_error **error);

/* Ends it: cancels calls in flight, pauses a running distillation at its last checkpoint, and writes what is queued for at
 * most `drain_ms` (0 = 5000). All episodes and calls of this `locum` become stale, the event handle is closed, the wake
 * callback is finalised. An episode that was not ended stays in the store as open and never trains.
 *                                                                                     [any-thread] [may-block]
 * The handle is gone whatever the status.   LOCUM_E_TIMEOUT, LOCUM_E_STORE: not everything queued was written.       */
LOCUM_API int32_t locum_close(locum handle, uint32_t drain_ms, locum_error **error);

/* ------------------------------------------------------------------------------------------- 4. Recording
 * Recording copies and returns; a writer thread of ours makes it durable, every episode at once with its end.        */

/* Begins an episode. `task` identifies the task (level and seed, ticket number) and may be empty.      [any-thread]
 * `meta_json` is empty or an object, all fields optional:
 *     {"domain":"babyai",               family of tasks, for slices in reports
 *      "group_key":"...",               episodes of one group are never split between training and test
 *      "instruction":"...",             the goal, where the first user message is not it
 *      "session_id":"...", "agent":{"name","version"},
 *      "scope":"...",                   whom it belongs to: students learn from one scope and answer in it only
 *      "tools":[OpenAI tools],          what the agent may call; used by later requests that name none
 *      "extra":{...}}                   kept as it is
 * LOCUM_OK: `*out` lives until locum_episode_end, locum_episode_drop or locum_close succeed.
 * LOCUM_E_ARGUMENT; LOCUM_E_LIMIT; LOCUM_E_BUSY: the queue is full; LOCUM_E_UNSUPPORTED: read-only.                  */
LOCUM_API int32_t locum_episode_begin(locum handle, const char *task, size_t task_len, const char *meta_json,
                                      size_t meta_json_len, locum_episode *out, locum_error **error);

/* Records one message. An assistant turn with actor LOCUM_ACTOR_STUDENT is joined with the exact tokens of the latest
 * finished locum_call of this episode.                                                     [one-thread-at-a-time]
 * LOCUM_E_ARGUMENT: not a chat message, or roles disagree; LOCUM_E_LIMIT: over 1 MiB, or the episode over 16 MiB;
 * LOCUM_E_BUSY: the queue is full. The step is lost then, and the episode is marked incomplete and never trains.      */
LOCUM_API int32_t locum_episode_step(locum_episode episode, const locum_step *step, locum_error **error);

/* Ends the episode; NULL is an unknown outcome. It is durable when this returns LOCUM_OK, and the handle is gone. On an
 * error the handle stays and the call may be repeated.                         [one-thread-at-a-time] [may-block]
 * LOCUM_E_ARGUMENT; LOCUM_E_LIMIT; LOCUM_E_BUSY; LOCUM_E_STORE.                                                       */
LOCUM_API int32_t locum_episode_end(locum_episode episode, const locum_outcome *outcome, locum_error **error);

/* Forgets the episode, also on disk; the handle is gone. "None" does nothing.                [one-thread-at-a-time]
 * LOCUM_E_BUSY: the queue is full and the handle stays.                                                               */
LOCUM_API int32_t locum_episode_drop(locum_episode episode);

/* Writes the 16 bytes that name this episode for ever; needed for locum_outcome_later. Ask before the end.
 *                                                                                            [any-thread] [callback] */
LOCUM_API int32_t locum_episode_id(locum_episode episode, uint8_t out_id[16]);

/* Says how an episode ended after its end, in this process or a later one; the newest word counts.
 *                                                                                      [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: no such episode; LOCUM_E_ARGUMENT; LOCUM_E_LIMIT; LOCUM_E_BUSY; LOCUM_E_STORE.                   */
LOCUM_API int32_t locum_outcome_later(locum handle, const uint8_t id[16], const locum_outcome *outcome,
                                      locum_error **error);

/* Waits until everything recorded before is durable, for at most `timeout_ms` (0 = 5000).    [any-thread] [may-block]
 * LOCUM_E_TIMEOUT; LOCUM_E_STORE.                                                                                     */
LOCUM_API int32_t locum_flush(locum handle, uint32_t timeout_ms, locum_error **error);

/* --------------------------------------------------------------------------- 5. Deciding and generating */

/* Who plays the next agent step?                                                           [one-thread-at-a-time]
 * LOCUM_OK: `*out` says who and why. On any error `*out` says teacher: a host may ignore the status and follow `out`.
 * That there is no student, no model, or no trust yet is no error but a reason.
 * LOCUM_E_ARGUMENT: the request is malformed; LOCUM_E_LIMIT.                                                          */
LOCUM_API int32_t locum_decide(locum_episode episode, const locum_request *request, locum_decision *out,
                               locum_error **error);

/* Lets the student answer. Returns at once; the answer is made on threads of ours. The call keeps the student it began
 * with until it ends, whatever is promoted or rolled back meanwhile.                        [one-thread-at-a-time]
 * LOCUM_OK: `*out` is yours until locum_call_free.
 * LOCUM_TEACHER: there is no student that could answer, or the tools cannot be turned into a grammar; `*out` is none.
 * locum_decide says which, with tool and field.
 * LOCUM_E_ARGUMENT; LOCUM_E_LIMIT; LOCUM_E_BUSY: too many at once; LOCUM_E_MODEL.                                     */
LOCUM_API int32_t locum_generate(locum_episode episode, const locum_request *request, locum_call *out,
                                 locum_error **error);

/* Gives the text made since the last poll (UTF-8, never cut inside a character; a preview: the answer itself is
 * locum_call_result). `new_text` may be NULL; otherwise it is yours and may be empty.                 [any-thread]
 * LOCUM_OK: finished, and this was the last piece. LOCUM_PENDING: more will come.                                     */
LOCUM_API int32_t locum_call_poll(locum_call call, locum_bytes *new_text);

/* Waits for the end for at most `timeout_ms`; 0 only looks.                             [any-thread] [may-block]
 * LOCUM_OK: finished, well or not: see locum_call_result. LOCUM_PENDING: not yet.                                     */
LOCUM_API int32_t locum_call_wait(locum_call call, uint32_t timeout_ms);

/* The finished answer, as often as asked. `*result_json` is yours.                                    [any-thread]
 * LOCUM_OK: {"message":{"role":"assistant","content":..,"tool_calls":[..]},        an OpenAI message, ready to send on
 *            "finish_reason":"tool_calls|stop|length",
 *            "usage":{"prompt_tokens","completion_tokens","cached_tokens"},
 *            "locum":{"student","version","confidence","mean_logprob","prefill_ms","decode_ms","queue_ms"}}
 * LOCUM_TEACHER: {"locum":{"who":"teacher","reason":"..","reason_code":N}}: it was late, the policy refused it, or it
 *            failed.
 * LOCUM_PENDING: not finished; `*result_json` is empty.   LOCUM_E_CANCELLED: it was cancelled.                        */
LOCUM_API int32_t locum_call_result(locum_call call, locum_bytes *result_json, locum_error **error);

/* Stops it soon. A finished call is not changed.                                                      [any-thread] */
LOCUM_API int32_t locum_call_cancel(locum_call call);

/* Gives the call back, cancelling it if it still runs. "None" does nothing.                           [any-thread] */
LOCUM_API int32_t locum_call_free(locum_call call);

/* ------------------------------------------------------------------------------ 6. Waiting without blocking */

/* What is signalled while events wait. On Linux a descriptor that is readable: an eventfd, for poll, epoll, or an event
 * loop. On Windows a HANDLE: an event object, for WaitForSingleObject and its like. Never read, reset or close it:
 * locum_next_event resets it when none is left. It stays ours and is closed by locum_close. -1 if there is none.
 *                                                                                           [any-thread] [callback] */
LOCUM_API int64_t locum_event_handle(locum handle);

/* Takes the oldest event; `out` must not be NULL.                                                     [any-thread]
 * LOCUM_OK: `*out` is filled; free `out->detail`. LOCUM_EMPTY: none waits. The oldest are dropped when nobody asks for
 * long; the next one given then has "dropped" in its detail.                                                          */
LOCUM_API int32_t locum_next_event(locum handle, locum_event *out);

/* For hosts that cannot watch one: `wake` is called from a thread of ours when events wait. Calls coalesce, so
 * always take events until LOCUM_EMPTY; and it may only post to your loop. `wake` NULL takes it away. When this returns, the
 * function set before is not running any more, and its `done` (may be NULL) has been called. Do not hold a lock that `wake`
 * needs. If the status is an error, nothing changed and the new `done` is not called.   [any-thread] [may-block]
 * LOCUM_E_UNSUPPORTED: there is no event handle on this platform.                                                     */
LOCUM_API int32_t locum_set_wake(locum handle, locum_wake_fn wake, void *user_data, locum_done_fn done);

/* ---------------------------------------------------------------------------------------------- 7. Policy */

/* Compiles a Luau policy, runs its self-test, and puts it in place of the present one; on an error nothing changes.
 * `name` appears in messages, decisions and the store (a file name, say); empty = "policy".  [any-thread] [may-block]
 * Decisions under way finish under the policy they began with. A policy with another view than the present student
 * learned under keeps that student from being served; locum_decide then says so.
 * LOCUM_E_POLICY: the message has file and line. LOCUM_E_LIMIT: over 256 KiB. LOCUM_E_ARGUMENT.                       */
LOCUM_API int32_t locum_policy_load(locum handle, const char *source, size_t source_len, const char *name,
                                    size_t name_len, locum_error **error);

/* -------------------------------------------------------------------------------------------- 8. Students */

/* Students are numbered 1, 2, ... in the order of their making. */
#define LOCUM_STUDENT_AUTOMATIC ((uint64_t)0)                /* policy and gate decide                    */
#define LOCUM_STUDENT_TEACHER   UINT64_MAX                   /* always the teacher: no student plays      */
#define LOCUM_STUDENT_BASE      (UINT64_MAX - (uint64_t)1)   /* the base model, untrained, for comparison */

/* Starts a distillation in the background: curate, train, evaluate, then shadow and canary under the gate. It survives
 * the process: the next locum_open resumes it, and the same order given there is that job.  [any-thread] [may-block]
 * `options_json` is empty or an object, all fields optional:
 *     {"method":"upper|lora|full", "tokens":N, "max_seconds":S, "epochs":E, "lr":.., "rank":.., "alpha":..,
 *      "upper_layers":.., "batch_tokens":.., "warmup_steps":.., "weight_decay":.., "patience":.., "seed":..,
 *      "compute":"bf16|f32",          numbers of the products; bf16 by itself where the processor is faster at it
 *      "memory_mib":6144,             memory the training may take; with less, more is computed twice
 *      "ttt":"published|next_token|off",  layers that learn while the student reads, and how they begin
 *      "ttt_every":6, "ttt_chunk":256, "ttt_lr":0.3,  every which layer, tokens of a chunk, step size
 *      "ttt_rate":..,                 learning rate of their filters and projections
 *      "ttt_from":0,                  share of the training before they begin to learn
 *      "ttt_decay":.., "ttt_delta":.., one of two ways to forget (docs/ttt.md); neither: all is kept
 *      "unfiltered":false,            true trains on everything, for comparison
 *      "continue_student":false,      true starts from the promoted student instead of the base
 *      "promote":"auto|never"}        never: the student is stored, and no gate and no trial follows
 * LOCUM_OK: `*job` is its number.
 * LOCUM_E_BUSY: one is running here or in another process; LOCUM_E_MODEL: there is no base model;
 * LOCUM_E_ARGUMENT; LOCUM_E_UNSUPPORTED: opened read-only or without learning; LOCUM_E_STORE.                         */
LOCUM_API int32_t locum_distil_start(locum handle, const char *options_json, size_t options_json_len, uint64_t *job,
                                     locum_error **error);

/* How a job stands; `job` 0 = the newest. `*status_json` is yours:                        [any-thread] [may-block]
 *     {"job":1, "state":"queued|curating|training|saving|evaluating|   at work
 *                        shadow|canary|                                 on trial in live episodes
 *                        promoted|held|stored|cancelled|failed",        ended
 *      "progress":0.42, "tokens_done":.., "tokens_total":.., "loss":.., "held_out_loss":.., "seconds_left":..,
 *      "held_seconds":..,    of waiting while steps were decided, or paused; not in "seconds"
 *      "tokens_shared":..,   of those done, what was computed once for several samples of a step that begin alike
 *      "student":"..", "version":.., "message":".."}                                    and more; null where nothing is known
 * LOCUM_E_NOT_FOUND: there is no such job.                                                                            */
LOCUM_API int32_t locum_distil_status(locum handle, uint64_t job, locum_bytes *status_json, locum_error **error);

/* Stops a job soon; what it has not finished is thrown away. `job` 0 = the newest. A finished job is not changed.
 * LOCUM_E_NOT_FOUND: there is no such job.                                                [any-thread] [may-block] */
LOCUM_API int32_t locum_distil_cancel(locum handle, uint64_t job, locum_error **error);

/* Keeps a job that runs in this process from computing, within milliseconds, until it is resumed, cancelled or the
 * handle is closed. It keeps its memory. While a step is being decided a job pauses by itself. `job` 0 = the newest.
 * LOCUM_E_NOT_FOUND: it does not run here.                                                [any-thread]             */
LOCUM_API int32_t locum_distil_pause(locum handle, uint64_t job, locum_error **error);

/* Lets a paused job go on. LOCUM_E_NOT_FOUND: it does not run here.                       [any-thread]             */
LOCUM_API int32_t locum_distil_resume(locum handle, uint64_t job, locum_error **error);

/* All students as a JSON array, oldest first: version, id, state, and what the gate measured. `*json` is yours.
 * LOCUM_E_STORE, LOCUM_E_CORRUPT.                                                         [any-thread] [may-block] */
LOCUM_API int32_t locum_student_list(locum handle, locum_bytes *json, locum_error **error);

/* Pins a student by its version, or one of LOCUM_STUDENT_*. It takes effect in memory: answers under way finish with the
 * student they began with. The pin is kept in the store, and other processes that have it open follow within about a
 * second.                                                                                  [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: no such version; LOCUM_E_MODEL: it cannot be loaded, or there is no base; LOCUM_E_STORE.         */
LOCUM_API int32_t locum_student_use(locum handle, uint64_t version, locum_error **error);

/* Takes the promoted student back: the one before it plays again, or the teacher where there was none.
 * LOCUM_E_NOT_FOUND: none is promoted; LOCUM_E_STORE.                                     [any-thread] [may-block] */
LOCUM_API int32_t locum_student_rollback(locum handle, locum_error **error);

/* What the student has learned in an episode while it read, for students with layers that do (else "on" is false):
 *     {"on","position","chunk","bytes","drift","layers":[{"layer","drift","waiting"}],"snapshot","snapshots":[N]}
 * `drift` is the change of a weight relative to its size. `*json` is yours.               [any-thread] [may-block]
 * LOCUM_E_MODEL: there is no model.                                                                                   */
LOCUM_API int32_t locum_fast_weights(locum_episode episode, locum_bytes *json, locum_error **error);

/* Switches that learning off (`on` 0) or on for the rest of the episode, from its next step on. Off, its students play as
 * they were trained, to the bit.                                                                      [any-thread] */
LOCUM_API int32_t locum_fast_weights_switch(locum_episode episode, int32_t on, locum_error **error);

/* Undoes what was learned in the episode so far and goes on learning.                     [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: nothing was read yet; LOCUM_E_BUSY: no answer within ten seconds; LOCUM_E_MODEL.                 */
LOCUM_API int32_t locum_fast_weights_reset(locum_episode episode, locum_error **error);

/* Keeps a copy of the episode's state in memory: what was learned, and keys and values. `*snapshot` is its number. It is
 * forgotten with the episode and when another student comes into service.                 [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: nothing was read yet; LOCUM_E_LIMIT: 16 of an episode, or no room; LOCUM_E_BUSY; LOCUM_E_MODEL.  */
LOCUM_API int32_t locum_fast_weights_snapshot(locum_episode episode, uint64_t *snapshot, locum_error **error);

/* Puts a copy back, as often as asked: the next step goes on from there as far as its messages begin alike.
 * LOCUM_E_NOT_FOUND: not this episode's; LOCUM_E_BUSY: an answer is being made; LOCUM_E_MODEL. [any-thread] [may-block] */
LOCUM_API int32_t locum_fast_weights_restore(locum_episode episode, uint64_t snapshot, locum_error **error);

/* Forgets a copy, or with `snapshot` 0 all of the episode's.                              [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: not this episode's; LOCUM_E_BUSY; LOCUM_E_MODEL.                                                 */
LOCUM_API int32_t locum_fast_weights_forget(locum_episode episode, uint64_t snapshot, locum_error **error);

/* Erases an episode for good: when this returns, no file of the store holds a byte of its contents. A job that learns from
 * it is cancelled first; students that learned from it are marked and go on playing until they are taken back. `retrain`
 * not 0 starts a job that makes the newest of them again without it. Takes as long, and as much room on the disk, as a copy
 * of the database. `*json` is yours:                                                       [any-thread] [may-block]
 *     {"episodes":["id",..], "students":[version,..], "serving":bool, "cancelled_job":N, "retraining":N}     or null
 * LOCUM_E_NOT_FOUND: neither the store nor a student knows it; LOCUM_E_BUSY: a job does not let go of it;
 * LOCUM_E_STORE: the files could not be written, and the call may be repeated; LOCUM_E_UNSUPPORTED: read-only.        */
LOCUM_API int32_t locum_forget_episode(locum handle, const uint8_t id[16], int32_t retrain, locum_bytes *json,
                                       locum_error **error);

/* The same for all episodes of a scope. An empty scope is refused (LOCUM_E_ARGUMENT).      [any-thread] [may-block] */
LOCUM_API int32_t locum_forget_scope(locum handle, const char *scope, size_t scope_len, int32_t retrain, locum_bytes *json,
                                     locum_error **error);

/* Which episodes made a student, also by way of those it was trained on from. `*json` is yours:
 *     {"version","id","scope","base","job","dataset_hash","ancestors":[{"version","id"}],
 *      "episodes":[{"id","version","erased"}]}                                             [any-thread] [may-block]
 * LOCUM_E_NOT_FOUND: no such version; LOCUM_E_CORRUPT.                                                                */
LOCUM_API int32_t locum_student_lineage(locum handle, uint64_t version, locum_bytes *json, locum_error **error);

/* Which students learned from an episode, also one that was erased since: [{"version","id","directly","current"}], empty
 * if none did. `*json` is yours.   LOCUM_E_CORRUPT.                                        [any-thread] [may-block] */
LOCUM_API int32_t locum_episode_students(locum handle, const uint8_t id[16], locum_bytes *json, locum_error **error);

/* Counters as a JSON object: episodes, steps, who answered, latencies, queues, hooks, the student in place.
 * `*json` is yours.                                                                       [any-thread] [may-block] */
LOCUM_API int32_t locum_stats(locum handle, locum_bytes *json, locum_error **error);

/* -------------------------------------------------------------------------------------------- Extensions
 * Drafts: an id ends in a number, and a later library may have dropped it. Stable ones become functions above.       */

/* The report as one HTML page that opens without a server. */
#define LOCUM_EXT_REPORT "locum.report/1"
typedef struct {
  uint32_t struct_size;
  /* `*html` is yours.   LOCUM_E_STORE.                                                    [any-thread] [may-block] */
  int32_t (*html)(locum handle, locum_bytes *html, locum_error **error);
} locum_ext_report;

#ifdef __cplusplus
}
#endif
#endif
