/* Makes the n-th call that changes a file below one folder fail, in a process that knows nothing of it (LD_PRELOAD).
 *
 * LOCUM_SHIM_DIR    calls on files below this folder count; all others pass
 * LOCUM_SHIM_NTH    which of them fails, 1 is the first; 0 or absent: none
 * LOCUM_SHIM_DO     an errno: the call fails with it once; "full": it and every later one fail with ENOSPC; "short": a write writes half
 *                   of its bytes and says so, other calls pass; "kill": the process is gone before the call
 * LOCUM_SHIM_COUNT  file that is given the number of calls when the process ends
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { ERRNO, FULL, SHORT, KILL };

static const char *folder, *report;
static size_t folder_len;
static long nth;
static int what, number;
static atomic_long calls;
static atomic_int hit;

__attribute__((constructor)) static void begin(void) {
    const char *act = getenv("LOCUM_SHIM_DO"), *n = getenv("LOCUM_SHIM_NTH");
    folder = getenv("LOCUM_SHIM_DIR");
    report = getenv("LOCUM_SHIM_COUNT");
    folder_len = folder ? strlen(folder) : 0;
    nth = n ? atol(n) : 0;
    if (!act) return;
    what = !strcmp(act, "full") ? FULL : !strcmp(act, "short") ? SHORT : !strcmp(act, "kill") ? KILL : ERRNO;
    number = what == FULL ? ENOSPC : atoi(act);
}

__attribute__((destructor)) static void end(void) {
    FILE *file = report ? fopen(report, "w") : NULL;
    if (!file) return;
    fprintf(file, "%ld\n", (long)calls);
    fclose(file);
}

static int below(const char *path) {
    return folder && path && !strncmp(path, folder, folder_len) && path[folder_len] == '/';
}

static int below_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    /* The folder itself counts: it is forced to the disk, too. */
    return below(path) || (folder && !strcmp(path, folder));
}

/* Counts a call. 1: it is to fail, with errno set. 2: it is to be done by halves. */
static int strikes(int counts) {
    if (!counts) return 0;
    long n = ++calls;
    int now = nth && n == nth;
    if (now) hit = 1;
    if (now && what == KILL) kill(getpid(), SIGKILL);
    if (what == SHORT) return now ? 2 : 0;
    if (now || (hit && what == FULL)) {
        errno = number;
        return 1;
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        /* Looking at a file changes nothing. */ \
        if (strikes((flags & (O_CREAT | O_WRONLY | O_RDWR)) && below(path)) == 1) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *bytes, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int how = strikes(below_fd(fd));
    return how == 1 ? -1 : real(fd, bytes, how ? (n + 1) / 2 : n);
}

#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *bytes, size_t n, offset at) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset); \
        int how = strikes(below_fd(fd)); \
        return how == 1 ? -1 : real(fd, bytes, how ? (n + 1) / 2 : n, at); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define SYNC(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        return strikes(below_fd(fd)) == 1 ? -1 : real(fd); \
    }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name, length) \
    int name(int fd, length to) { \
        REAL(int, #name, int, length); \
        return strikes(below_fd(fd)) == 1 ? -1 : real(fd, to); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return strikes(below(to)) == 1 ? -1 : real(from, to);
}

#define ON_PATH(name) \
    int name(const char *path) { \
        REAL(int, #name, const char *); \
        return strikes(below(path)) == 1 ? -1 : real(path); \
    }
ON_PATH(unlink)
ON_PATH(rmdir)

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return strikes(below(path)) == 1 ? -1 : real(path, mode);
}
