/* Preloaded, it lets the writes to files whose path contains BROKEN_NAME fail with EIO after BROKEN_BYTES bytes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long written;

static int breaks(int file, size_t bytes) {
    const char *name = getenv("BROKEN_NAME"), *limit = getenv("BROKEN_BYTES");
    char link[64], path[4096];
    if (!name || !limit) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, name)) return 0;
    written += bytes;
    if (written <= atol(limit)) return 0;
    errno = EIO;
    return 1;
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *from, size_t bytes) {
    return breaks(file, bytes) ? -1 : REAL(ssize_t, write, int, const void *, size_t)(file, from, bytes);
}

ssize_t pwrite64(int file, const void *from, size_t bytes, off64_t at) {
    return breaks(file, bytes) ? -1
                               : REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(file, from, bytes, at);
}

int fsync(int file) {
    return breaks(file, 0) ? -1 : REAL(int, fsync, int)(file);
}
