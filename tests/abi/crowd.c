/* A crowded host: it has another Lua and another SQLite with all their names visible, signal handlers, and a library that it
 * loads late and unloads early. argv[1] is the library, argv[2] an empty directory. */
#define _GNU_SOURCE

#include <dirent.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <unistd.h>

#include "common.h"

extern char **environ;

/* dlsym gives an object pointer; C99 has no other way to a function. */
static void *must(void *library, const char *name) {
  void *symbol = dlsym(library, name);
  if (!symbol) {
    printf("no %s\n", name);
    _exit(1);
  }
  return symbol;
}
#define FIND(result, variable, arguments, library, name) \
  result(*variable) arguments;                           \
  *(void **)(&variable) = must(library, name)

/* ------------------------------------------------------------------------------------ the neighbours */

static void use_lua(const char *when) {
  void *library = dlopen("liblua5.4.so.0", RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    printf("skipped lua %s\n", when);
    return;
  }
  {
    FIND(void *, new_state, (void), library, "luaL_newstate");
    FIND(void, open_libs, (void *), library, "luaL_openlibs");
    FIND(int, load_string, (void *, const char *), library, "luaL_loadstring");
    FIND(int, pcall, (void *, int, int, int, intptr_t, void *), library, "lua_pcallk");
    FIND(double, to_number, (void *, int, int *), library, "lua_tonumberx");
    FIND(void, close_state, (void *), library, "lua_close");
    void *L = new_state();
    CHECK(L != NULL);
    open_libs(L);
    CHECK(load_string(L, "local t = {} for i = 1, 1000 do t[i] = i * 2 end return #t + t[21]") == 0);
    CHECK(pcall(L, 0, 1, 0, 0, NULL) == 0);
    CHECK(to_number(L, -1, NULL) == 1042.0);
    CHECK(load_string(L, "error('caught')") == 0);
    CHECK(pcall(L, 0, 0, 0, 0, NULL) != 0);
    close_state(L);
    printf("lua %s\n", when);
  }
}

static void use_sqlite(const char *when) {
  void *library = dlopen("libsqlite3.so.0", RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    printf("skipped sqlite %s\n", when);
    return;
  }
  {
    FIND(int, open_db, (const char *, void **), library, "sqlite3_open");
    FIND(int, exec, (void *, const char *, void *, void *, char **), library, "sqlite3_exec");
    FIND(long long, last_row, (void *), library, "sqlite3_last_insert_rowid");
    FIND(int, close_db, (void *), library, "sqlite3_close");
    void *db = NULL;
    CHECK(open_db(":memory:", &db) == 0);
    CHECK(exec(db, "create table t(x); insert into t values(1); insert into t values(2);", NULL, NULL, NULL) == 0);
    CHECK(last_row(db) == 2);
    CHECK(close_db(db) == 0);
    printf("sqlite %s\n", when);
  }
}

/* --------------------------------------------------------------------------------- what must not change */

static void handler(int signal_number) { (void)signal_number; }

static struct sigaction actions[NSIG];

static void note_signals(void) {
  int i;
  struct sigaction mine;
  memset(&mine, 0, sizeof mine);
  mine.sa_handler = handler;
  CHECK(sigaction(SIGUSR1, &mine, NULL) == 0);
  for (i = 1; i < NSIG; i++) sigaction(i, NULL, &actions[i]);
}

static void check_signals(void) {
  int i;
  sigset_t set;
  for (i = 1; i < NSIG; i++) {
    struct sigaction now;
    if (sigaction(i, NULL, &now) == 0) CHECK(now.sa_handler == actions[i].sa_handler && now.sa_flags == actions[i].sa_flags);
  }
  CHECK(sigprocmask(SIG_BLOCK, NULL, &set) == 0);
  for (i = 1; i < 32; i++) CHECK(!sigismember(&set, i));
}

static size_t environment(char *out, size_t size) {
  size_t n = 0;
  char **entry;
  for (entry = environ; *entry; entry++) n += (size_t)snprintf(out + n, n < size ? size - n : 0, "%s\n", *entry);
  return n;
}

/* Every thread but the first must block the signals of the host. Read here and by no child: while one is started, the
 * thread that starts it blocks every signal too. */
static int threads_that_take_signals(void) {
  char path[300], line[256];
  int loose = 0;
  struct dirent *entry;
  DIR *tasks = opendir("/proc/self/task");
  CHECK(tasks != NULL);
  while ((entry = readdir(tasks)) != NULL) {
    FILE *status;
    if (entry->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
    status = fopen(path, "r");
    if (!status) continue; /* it has ended */
    while (fgets(line, sizeof line, status))
      if (strncmp(line, "SigBlk:", 7) == 0) loose += strtoull(line + 7, NULL, 16) == 0;
    fclose(status);
  }
  closedir(tasks);
  return loose;
}

static int is_mapped(const char *name) {
  char line[1024];
  int found = 0;
  FILE *maps = fopen("/proc/self/maps", "r");
  CHECK(maps != NULL);
  while (fgets(line, sizeof line, maps)) found |= strstr(line, name) != NULL;
  fclose(maps);
  return found;
}

/* ------------------------------------------------------------------------------------------ the guest */

static void *use_locum(const char *path, const char *dir) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) printf("%s\n", dlerror());
  CHECK(library != NULL);
  {
    FIND(int32_t, open_locum, (const locum_options *, locum *, locum_error **), library, "locum_open");
    FIND(int32_t, close_locum, (locum, uint32_t, locum_error **), library, "locum_close");
    FIND(int32_t, load_policy, (locum, const char *, size_t, const char *, size_t, locum_error **), library, "locum_policy_load");
    FIND(int32_t, begin, (locum, const char *, size_t, const char *, size_t, locum_episode *, locum_error **), library, "locum_episode_begin");
    FIND(int32_t, decide, (locum_episode, const locum_request *, locum_decision *, locum_error **), library, "locum_decide");
    FIND(int32_t, end, (locum_episode, const locum_outcome *, locum_error **), library, "locum_episode_end");
    locum_options options = {.struct_size = sizeof options};
    locum_request request = {.struct_size = sizeof request};
    locum_decision decision = {.struct_size = sizeof decision};
    locum_episode e;
    locum l;
    int loose;
    options.store_dir = str(dir);
    CHECK(open_locum(&options, &l, NULL) == LOCUM_OK);
    loose = threads_that_take_signals();
    if (loose != 1) {
      printf("%d threads take the host's signals\n", loose);
      return NULL;
    }
    /* A Lua error travels as a C++ exception inside us: it must be our own runtime that catches it. */
    CHECK(load_policy(l, "error('no')", 11, NULL, 0, NULL) == LOCUM_E_POLICY);
    CHECK(begin(l, "crowd", 5, NULL, 0, &e, NULL) == LOCUM_OK);
    CHECK(decide(e, &request, &decision, NULL) == LOCUM_OK);
    CHECK(decision.who == LOCUM_WHO_TEACHER);
    CHECK(end(e, NULL, NULL) == LOCUM_OK);
    CHECK(close_locum(l, 0, NULL) == LOCUM_OK);
  }
  return library;
}

int main(int argc, char **argv) {
  static char before[1 << 16], after[1 << 16];
  static char cwd_before[4096], cwd_after[4096];
  void *library;
  CHECK(argc == 3);
  note_signals();
  CHECK(environment(before, sizeof before) < sizeof before);
  CHECK(getcwd(cwd_before, sizeof cwd_before) != NULL);
  use_lua("before");
  use_sqlite("before");
  library = use_locum(argv[1], argv[2]);
  use_lua("after");
  use_sqlite("after");
  CHECK(use_locum(argv[1], argv[2]) == library);
  check_signals();
  environment(after, sizeof after);
  CHECK(strcmp(before, after) == 0);
  CHECK(getcwd(cwd_after, sizeof cwd_after) != NULL && strcmp(cwd_before, cwd_after) == 0);
  {
    FIND(uint32_t, version, (void), library, "locum_abi_version");
    CHECK(dlclose(library) == 0);
    CHECK(dlclose(library) == 0);
    CHECK(is_mapped("liblocum"));
    CHECK(version() == ((uint32_t)LOCUM_ABI_MAJOR << 16 | LOCUM_ABI_MINOR));
  }
  printf("done\n");
  return 0;
}
