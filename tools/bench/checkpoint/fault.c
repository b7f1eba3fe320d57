// A preload library that makes one chosen file operation fail, or the process die at it.
//
// Every operation of the C library on a path below `root` is counted from the moment of `fault_arm(root, point, kind)`.
// At operation number `point` the fault happens; point 0 only counts. `fault_trace()` tells what was counted, one
// "operation path" a line.
//
// Kinds: kill   the process dies before the operation (SIGKILL)
//        torn   a write puts half of its bytes on the disk, then the process dies
//        power  the machine loses power before the operation: of files written and not yet fsynced half is lost, and
//        names that were
//               created or renamed in a folder not fsynced since are as they were before; then the process dies
//        enospc, eio   the operation fails with that error and has no effect; an fsync that fails has lost its pages
//        short  a write takes only half of its bytes and says so
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FDS 4096
#define MAX_PENDING 4096
#define TRACE_BYTES (1 << 20)

enum Kind { NONE, KILL, TORN, POWER, ENOSPC_, EIO_, SHORT };

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char root[PATH_MAX];
static int armed, point, kind, count;
static char trace[TRACE_BYTES];
static size_t trace_length;

static struct {
  char path[PATH_MAX];
  int known;
} files[MAX_FDS];

// Files written to and not fsynced since.
static char dirty[MAX_PENDING][PATH_MAX];
static int num_dirty;

// A name that came to be in a folder which was not fsynced since. A rename has `from`; a new file or folder has none.
static struct {
  char path[PATH_MAX], from[PATH_MAX];
} pending[MAX_PENDING];
static int num_pending;

#define REAL(name) ((__typeof__(name)*)real(#name))
static void* real(const char* name) { return dlsym(RTLD_NEXT, name); }

void fault_arm(const char* new_root, int new_point, const char* new_kind) {
  static const char* names[] = {"none", "kill", "torn", "power", "enospc", "eio", "short"};
  pthread_mutex_lock(&lock);
  snprintf(root, sizeof root, "%s", new_root);
  kind = NONE;
  for (int i = 0; i < 7; i++)
    if (!strcmp(new_kind, names[i])) kind = i;
  point = new_point;
  count = 0;
  trace_length = 0;
  num_pending = num_dirty = 0;
  memset(files, 0, sizeof files);
  armed = 1;
  pthread_mutex_unlock(&lock);
}

void fault_disarm(void) { armed = 0; }
int fault_count(void) { return count; }
const char* fault_trace(void) {
  trace[trace_length] = 0;
  return trace;
}

static int below_root(const char* path) {
  size_t n = strlen(root);
  return armed && path && !strncmp(path, root, n) && (path[n] == '/' || path[n] == 0);
}

// The path that (folder descriptor, path) means; 0 when it is none of ours.
static int resolve(int folder, const char* path, char* out) {
  if (!armed || !path) return 0;
  if (path[0] == '/' || folder == AT_FDCWD)
    snprintf(out, PATH_MAX, "%s", path);
  else if (folder >= 0 && folder < MAX_FDS && files[folder].known)
    snprintf(out, PATH_MAX, "%s/%s", files[folder].path, path);
  else
    return 0;
  return below_root(out);
}

static int parent_is(const char* path, const char* folder) {
  size_t n = strlen(folder);
  return !strncmp(path, folder, n) && path[n] == '/' && !strchr(path + n + 1, '/');
}

static void lose_power(void) {
  for (int i = num_pending - 1; i >= 0; i--) {
    if (pending[i].from[0])
      REAL(rename)(pending[i].path, pending[i].from);
    else if (REAL(unlink)(pending[i].path))
      REAL(rmdir)(pending[i].path);
  }
  for (int i = 0; i < num_dirty; i++) {
    struct stat info;
    if (!REAL(stat)(dirty[i], &info)) truncate(dirty[i], info.st_size / 2);
  }
}

static void mark_clean(const char* path) {
  int kept = 0;
  for (int i = 0; i < num_dirty; i++)
    if (strcmp(dirty[i], path)) memmove(dirty[kept++], dirty[i], PATH_MAX);
  num_dirty = kept;
}

static void mark_dirty(const char* path) {
  mark_clean(path);
  if (num_dirty == MAX_PENDING) abort();
  snprintf(dirty[num_dirty++], PATH_MAX, "%s", path);
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// Counts an operation. Returns the fault that it has to suffer; does not return where the process has to die before it.
static int step(const char* operation, const char* path) {
  count++;
  int n = snprintf(trace + trace_length, TRACE_BYTES - trace_length, "%s %s\n", operation, path);
  if (n > 0 && trace_length + n < TRACE_BYTES - 1) trace_length += n;
  if (count != point) return NONE;
  if (kind == POWER) lose_power();
  if (kind == KILL || kind == POWER) die();
  if (kind == ENOSPC_) errno = ENOSPC;
  if (kind == EIO_) errno = EIO;
  return kind;
}

static int fails(int fault) { return fault == ENOSPC_ || fault == EIO_; }

static void remember(const char* path, const char* from) {
  if (num_pending == MAX_PENDING) abort();
  snprintf(pending[num_pending].path, PATH_MAX, "%s", path);
  snprintf(pending[num_pending].from, PATH_MAX, "%s", from);
  num_pending++;
}

static void forget_below(const char* folder) {
  int kept = 0;
  for (int i = 0; i < num_pending; i++)
    if (!parent_is(pending[i].path, folder)) pending[kept++] = pending[i];
  num_pending = kept;
}

#define LOCKED(body)             \
  pthread_mutex_lock(&lock);     \
  body;                          \
  {                              \
    int saved_errno = errno;     \
    pthread_mutex_unlock(&lock); \
    errno = saved_errno;         \
  }

static int opened(int folder, const char* path, int flags, mode_t mode) {
  char full[PATH_MAX];
  int fd = -1;
  LOCKED({
    int ours = resolve(folder, path, full);
    int fault = ours ? step(flags & O_CREAT ? "create" : flags & O_DIRECTORY ? "open-folder" : "open", full) : NONE;
    if (!fails(fault)) {
      fd = REAL(openat)(folder, path, flags, mode);
      if (fd >= 0 && fd < MAX_FDS) {
        files[fd].known = ours;
        if (ours) snprintf(files[fd].path, PATH_MAX, "%s", full);
      }
      if (ours && fd >= 0 && flags & O_CREAT) remember(full, "");
    }
  })
  return fd;
}

#define MODE_ARGUMENT                                                          \
  va_list arguments;                                                           \
  va_start(arguments, flags);                                                  \
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0; \
  va_end(arguments);

int open(const char* path, int flags, ...) {
  MODE_ARGUMENT
  return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE_ARGUMENT
  return opened(AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char* path, int flags, ...) {
  MODE_ARGUMENT
  return opened(folder, path, flags, mode);
}
int openat64(int folder, const char* path, int flags, ...) {
  MODE_ARGUMENT
  return opened(folder, path, flags, mode);
}

static int is_ours(int fd) { return armed && fd >= 0 && fd < MAX_FDS && files[fd].known; }

ssize_t write(int fd, const void* data, size_t size) {
  if (!is_ours(fd)) return REAL(write)(fd, data, size);
  ssize_t done = -1;
  LOCKED({
    int fault = step("write", files[fd].path);
    mark_dirty(files[fd].path);
    if (fault == TORN) {
      REAL(write)(fd, data, size / 2);
      REAL(fsync)(fd);
      die();
    }
    if (!fails(fault)) done = REAL(write)(fd, data, fault == SHORT && size > 1 ? size / 2 : size);
  })
  return done;
}

static int synced(int fd, int data_only) {
  if (!is_ours(fd)) return data_only ? REAL(fdatasync)(fd) : REAL(fsync)(fd);
  int result = -1;
  LOCKED({
    struct stat info;
    int folder = !REAL(fstat)(fd, &info) && S_ISDIR(info.st_mode);
    int fault = step(folder ? "fsync-folder" : "fsync", files[fd].path);
    if (fails(fault)) {
      // What the kernel could not write is gone, and a second fsync would say that all is well.
      int why = errno;
      if (!folder) ftruncate(fd, info.st_size / 2);
      errno = why;
    } else {
      result = data_only ? REAL(fdatasync)(fd) : REAL(fsync)(fd);
      mark_clean(files[fd].path);
      if (folder) forget_below(files[fd].path);
    }
  })
  return result;
}
int fsync(int fd) { return synced(fd, 0); }
int fdatasync(int fd) { return synced(fd, 1); }

int close(int fd) {
  if (!is_ours(fd)) return REAL(close)(fd);
  int result;
  LOCKED({
    int fault = step("close", files[fd].path);
    int why = errno;
    files[fd].known = 0;
    result = REAL(close)(fd);
    if (fails(fault)) {
      errno = why;
      result = -1;
    }
  })
  return result;
}

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  char source[PATH_MAX], target[PATH_MAX];
  int result = -1;
  LOCKED({
    int ours = resolve(from_folder, from, source) && resolve(to_folder, to, target);
    if (!ours || !fails(step("rename", target))) {
      result = REAL(renameat2)(from_folder, from, to_folder, to, flags);
      if (ours && !result) remember(target, source);
    }
  })
  return result;
}
int rename(const char* from, const char* to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char* from, int b, const char* to) { return renameat2(a, from, b, to, 0); }

int mkdirat(int folder, const char* path, mode_t mode) {
  char full[PATH_MAX];
  int result = -1;
  LOCKED({
    int ours = resolve(folder, path, full);
    if (!ours || !fails(step("mkdir", full))) {
      result = REAL(mkdirat)(folder, path, mode);
      if (ours && !result) remember(full, "");
    }
  })
  return result;
}
int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

// Operations that change nothing which must survive, or only read: counted, and they can fail or be the place of death.
#define PASS(type, failure, operation, folder, path, call)                            \
  char full[PATH_MAX];                                                                \
  type result = failure;                                                              \
  LOCKED({                                                                            \
    if (!resolve(folder, path, full) || !fails(step(operation, full))) result = call; \
  })                                                                                  \
  return result;

int unlinkat(int folder, const char* path, int flags) {
  PASS(int, -1, flags& AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, REAL(unlinkat)(folder, path, flags))
}
int unlink(const char* path) { PASS(int, -1, "unlink", AT_FDCWD, path, REAL(unlink)(path)) }
int rmdir(const char* path){PASS(int, -1, "rmdir", AT_FDCWD, path, REAL(rmdir)(path))} DIR* opendir(const char* path) {
  PASS(DIR*, NULL, "list", AT_FDCWD, path, REAL(opendir)(path))
}
int stat(const char* restrict path, struct stat* restrict info) {
  PASS(int, -1, "stat", AT_FDCWD, path, REAL(stat)(path, info))
}
int lstat(const char* restrict path, struct stat* restrict info) {
  PASS(int, -1, "stat", AT_FDCWD, path, REAL(lstat)(path, info))
}
int stat64(const char* restrict path, struct stat64* restrict info) {
  PASS(int, -1, "stat", AT_FDCWD, path, REAL(stat64)(path, info))
}
int lstat64(const char* restrict path,
            struct stat64* restrict info){PASS(int, -1, "stat", AT_FDCWD, path, REAL(lstat64)(path, info))}

ssize_t read(int fd, void* data, size_t size) {
  if (!is_ours(fd)) return REAL(read)(fd, data, size);
  ssize_t done = -1;
  LOCKED({
    if (!fails(step("read", files[fd].path))) done = REAL(read)(fd, data, size);
  })
  return done;
}
