/* Calls functions of a shared library in an emulated processor: see emulated_library.py. Usage: arm_host LIBRARY
 *
 * A call on standard input, all numbers little-endian:
 *   char name[64]; int64 counts[5]: integers, floats, buffers, pointers, kind of result (0 none, 1 integer, 2 text)
 *   int64 integers[]; float floats[]; for each buffer: int64 size, bytes
 *   int64 pointers[][4]: where one is (a buffer, or -1 for the integers; an offset), and what it points to (buffer, offset)
 * The answer: int64 result, or the length of a text and the text; then the contents of all buffers without pointers in them.
 * An unknown name is answered by the single int64 INT64_MIN. Every buffer ends where no memory is, so that whoever reads or
 * writes beyond it faults. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 40, MOST_BUFFERS = 256 };

/* AAPCS64 counts integers and floats apart, each first in registers and then on the stack in eight bytes, so that functions
 * with few floats can be called as if the integers stood first. */
typedef int64_t Function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float,
                         float, float, float, float, float, float, float);
#define FOUR(a, i) a[i], a[i + 1], a[i + 2], a[i + 3]
#define SIXTEEN(a, i) FOUR(a, i), FOUR(a, i + 4), FOUR(a, i + 8), FOUR(a, i + 12)

static void get(void *to, size_t size) {
    if (size && fread(to, 1, size, stdin) != size) exit(feof(stdin) ? 0 : 1);
}

static void put(const void *from, size_t size) {
    if (size && fwrite(from, 1, size, stdout) != size) exit(1);
}

/* Memory for a buffer, aligned to 16 bytes, with a page behind it that nobody may touch. */
typedef struct {
    char *pages, *start;
    size_t size, mapped;
    int record; /* has pointers in it */
} Buffer;

static Buffer make(int64_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), rounded = ((size_t)size + 15) / 16 * 16;
    size_t whole = (rounded + page - 1) / page * page;
    char *pages = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + whole, page, PROT_NONE)) exit(1);
    return (Buffer){pages, pages + whole - rounded, (size_t)size, whole + page, 0};
}

static void answer(void *library) {
    char name[64];
    int64_t counts[5], integers[MOST] = {0};
    float floats[MOST] = {0};
    static Buffer buffers[MOST_BUFFERS];
    get(name, sizeof name), get(counts, sizeof counts);
    if (counts[0] > 32 || counts[1] > 8 || counts[2] > MOST_BUFFERS) exit(1);
    get(integers, (size_t)counts[0] * 8), get(floats, (size_t)counts[1] * 4);
    for (int i = 0; i < counts[2]; i++) {
        int64_t size;
        get(&size, 8);
        buffers[i] = make(size);
        get(buffers[i].start, (size_t)size);
    }
    for (int i = 0; i < counts[3]; i++) {
        int64_t p[4];
        get(p, sizeof p);
        char *to = buffers[p[2]].start + p[3];
        memcpy(p[0] < 0 ? (char *)integers + p[1] : buffers[p[0]].start + p[1], &to, 8);
        if (p[0] >= 0) buffers[p[0]].record = 1;
    }
    Function *function = (Function *)dlsym(library, name);
    int64_t result = INT64_MIN;
    if (function) {
        result = function(SIXTEEN(integers, 0), SIXTEEN(integers, 16), FOUR(floats, 0), FOUR(floats, 4));
        if (counts[4] == 2) {
            const char *text = (const char *)result;
            result = (int64_t)strlen(text);
            put(&result, 8), put(text, (size_t)result);
        } else {
            result = counts[4] == 1 ? result : 0;
            put(&result, 8);
        }
        for (int i = 0; i < counts[2]; i++)
            if (!buffers[i].record) put(buffers[i].start, buffers[i].size);
    } else
        put(&result, 8);
    fflush(stdout);
    for (int i = 0; i < counts[2]; i++) munmap(buffers[i].pages, buffers[i].mapped);
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) {
        fprintf(stderr, "%s\n", count == 2 ? dlerror() : "one argument: a library");
        return 1;
    }
    for (;;) answer(library);
}
