/* The thread team by itself, without kernels: see test_team.py. Prints nothing and returns 0, or says what went wrong.
 *
 *   team_trial many N F  random calls from N threads; F forks in between
 *   team_trial turns     a worker must not stay with one call while another has units
 *   team_trial modes     tiny numbers are numbers in every thread, whatever the caller's mode, which is left to it */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "team.h"

static _Atomic int faults;

static void check(int good, const char *what) {
    if (!good && !atomic_fetch_add(&faults, 1)) fprintf(stderr, "%s\n", what);
}

/* ---- many: phase by phase, every unit is done once, and sees what others did in the phase before ---- */

enum { UNITS = 3000, PHASES = 12, MOST_CALLERS = 40 };

typedef struct {
    long *even, *odd, units, phase;
} Step;

static void step(void *data, long begin, long end) {
    const Step *s = data;
    long *mine = s->phase % 2 ? s->odd : s->even, *others = s->phase % 2 ? s->even : s->odd;
    for (long i = begin; i < end; i++) {
        check(s->phase == 0 || others[s->units - 1 - i] == s->phase - 1, "a phase began before the one before had ended");
        check(mine[i] == s->phase - 2, "a unit was done twice, or not at all");
        mine[i] = s->phase;
    }
}

static unsigned draw(unsigned *seed, unsigned below) {
    *seed = *seed * 1664525u + 1013904223u;
    return (*seed >> 8) % below;
}

static void random_call(unsigned *seed) {
    long units = 1 + draw(seed, draw(seed, 4) ? 64 : UNITS), count = 1 + draw(seed, PHASES);
    long *cells = malloc(2 * UNITS * sizeof *cells);
    Step steps[PHASES];
    Phase phases[PHASES];
    for (long i = 0; i < UNITS; i++) cells[i] = -2, cells[UNITS + i] = -1;
    for (long i = 0; i < count; i++) {
        steps[i] = (Step){cells, cells + UNITS, units, i};
        phases[i] = (Phase){step, steps + i, units, draw(seed, 3) ? 1 : 1 + draw(seed, 16)};
    }
    team_run(phases, (int)count, 1 + (int)draw(seed, 9));
    for (long i = 0; i < units; i++)
        check(cells[(count - 1) % 2 * UNITS + i] == count - 1, "the call returned before all units were done");
    /* Whoever still reads this would fall over it. */
    memset(steps, 0xff, sizeof steps), memset(phases, 0xff, sizeof phases), memset(cells, 0xff, 2 * UNITS * sizeof *cells);
    free(cells);
}

static void *caller(void *number) {
    unsigned seed = (unsigned)(intptr_t)number;
    for (int i = 0; i < 200; i++) {
        random_call(&seed);
        if (draw(&seed, 8) == 0) usleep(draw(&seed, 600));
    }
    return NULL;
}

static void many(int count, int forks) {
    pthread_t callers[MOST_CALLERS];
    for (intptr_t i = 0; i < count; i++) pthread_create(callers + i, NULL, caller, (void *)i);
    for (int i = 0; i < forks; i++) {
        int status = -1;
        pid_t child = fork();
        if (!child) {
            unsigned seed = 1000 + (unsigned)i;
            for (int n = 0; n < 60; n++) random_call(&seed);
            _exit(atomic_load(&faults) != 0);
        }
        waitpid(child, &status, 0);
        check(status == 0, "a forked child failed");
    }
    for (int i = 0; i < count; i++) pthread_join(callers[i], NULL);
    check(atomic_load(&team.workers) == 8, "there are not as many workers as the most threads asked for, less the caller");
}

/* ---- turns: two callers whose own thread is held, and one worker ---- */

static _Atomic int opened, helped, pieces_between;
static pthread_t holders[2];

static void held(void *data, long begin, long end) {
    int which = *(int *)data;
    (void)begin, (void)end;
    if (pthread_equal(pthread_self(), holders[which])) {
        if (which) atomic_store(&opened, 1);
        while (!atomic_load(&helped)) usleep(100);
    } else if (which)
        atomic_store(&helped, 1);
    else {
        while (!atomic_load(&opened)) usleep(100);
        if (!atomic_load(&helped) && atomic_fetch_add(&pieces_between, 1) > 100) atomic_store(&helped, 1);
    }
}

static void *hold(void *which) {
    holders[*(int *)which] = pthread_self();
    team_run(&(Phase){held, which, 100000, 1}, 1, 2);
    return NULL;
}

static void turns(void) {
    int first = 0, second = 1;
    pthread_t callers[2];
    pthread_create(callers, NULL, hold, &first);
    /* The worker has to be in the first call before there is a second. */
    while (!(atomic_load(&team.slots[0].word) & UNITS_MASK) || atomic_load(&team.workers) == 0) usleep(100);
    usleep(20000);
    pthread_create(callers + 1, NULL, hold, &second);
    for (int i = 0; i < 2; i++) pthread_join(callers[i], NULL);
    check(atomic_load(&pieces_between) <= 3, "the worker stayed with the first call");
}

/* ---- modes: products of 2^-70 and 2^-75, which are 0 where denormal numbers are ---- */

static volatile float factor = 0x1p-70f;

static void multiply(void *data, long begin, long end) {
    volatile float *cells = data;
    for (long i = begin; i < end; i++) cells[i] = factor * 0x1p-75f;
}

static void set_mode(uint64_t mode) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)mode);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" ::"r"(mode));
#else
    (void)mode;
#endif
}

static void modes(void) {
#if defined(__x86_64__)
    const uint64_t mode[] = {0x1f80, 0x9fc0, 0x7f80}; /* usual; denormal numbers are zeros; rounded towards zero */
#else
    const uint64_t mode[] = {0, 1 << 24, 3 << 22};
#endif
    for (int i = 0; i < 3; i++)
        for (int threads = 1; threads <= 3; threads++) {
            volatile float cells[UNITS], own, third;
            set_mode(mode[i]);
            team_run(&(Phase){multiply, (void *)cells, UNITS, 1}, 1, threads);
            own = factor * 0x1p-75f, third = 1.0f / (factor * 0x1.8p71f);
            set_mode(mode[0]);
            for (int j = 0; j < UNITS; j++) check(cells[j] == 0x1p-145f, "a thread computes in the caller's mode");
#if defined(__x86_64__) || defined(__aarch64__)
            check((own == 0) == (i == 1) && (third == 0x1.555554p-2f) == (i == 2), "the caller has lost its mode");
#endif
        }
}

int main(int count, char **words) {
    alarm(100);
    if (count == 4 && !strcmp(words[1], "many")) many(atoi(words[2]), atoi(words[3]));
    else if (count == 2 && !strcmp(words[1], "turns")) turns();
    else if (count == 2 && !strcmp(words[1], "modes")) modes();
    else return 2;
    return atomic_load(&faults) != 0;
}
