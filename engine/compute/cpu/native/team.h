/* Share the work of a call among threads: one team for the whole process. Knows pieces of work; nothing of what they compute.
 *
 * A call (`team_run`) is a list of phases; a phase is a number of units, of which any thread may take a few at a time. The
 * next phase begins when all units of the one before are done. So there is no barrier at which threads wait for each other,
 * only for units: a thread that the system has put aside delays the pieces that it holds, and one that has not woken yet
 * delays nothing. The calling thread works, too, and can do everything alone. Small phases are done at once by the thread
 * that finished the one before.
 *
 * Workers are for all callers alike: with two engines computing at once, each has its own thread, and a worker takes a piece
 * of one call, then of the next (`help`). It helps a call only if its number is less than the threads that were asked for.
 *
 * Who waits spins for as long as spinning has lately paid (`Patience`), then sleeps until it is woken. It does not yield:
 * beside a process that computes, a thread that yields stands behind that one's whole time slice (three milliseconds), while
 * one that has slept goes first when it is woken.
 *
 * Ownership: a caller owns its slot from `take_slot` to `give_slot`. In between, `word` says how many units nobody has taken
 * yet, and `left` how many are not done; the thread that brings `left` to 0 is the only one that touches the slot's plain
 * fields (`advance`), until it publishes the next phase. What a thread wrote in a unit is seen by whoever works on later
 * phases and by the caller: `left` is a chain of acquire-release operations, `word` and `finished` are stored with release
 * and read with acquire. */
#pragma once
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

/* Units `begin` … `end - 1` are work(data, begin, end). Fewer than `least` are not worth taking by themselves. */
typedef struct {
    void (*work)(void *data, long begin, long end);
    void *data;
    long units, least;
} Phase;

enum {
    MOST_THREADS = 256,
    SLOTS = 32,           /* calls that are helped at once; more compute alone */
    UNIT_BITS = 24,       /* of a slot's word; the others count phases, so that no old word comes back */
    SPIN_LEAST = 5000,    /* ns */
    SPIN_MOST = 200000,   /* ns; between two calls some 50 µs of Python pass */
    WOKEN_AT_ONCE = 4,    /* each wakes more */
    STACK = 4 << 20       /* bytes; a unit of attention needs 0.4 MiB */
};
#define UNITS_MASK ((UINT64_C(1) << UNIT_BITS) - 1)

/* Where one thread sleeps. `asleep` goes from 0 to 1 by the thread itself, and back by whoever wakes it. */
typedef struct {
    _Atomic uint32_t asleep;
#if !defined(__linux__)
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
} Bed;

/* How long a thread spins before it sleeps, in ns. It follows what would have been enough. */
typedef struct {
    long limit;
} Patience;

typedef struct {
    _Alignas(64) _Atomic uint64_t word; /* phases begun so far << UNIT_BITS | units that nobody has taken */
    /* The phase: written while nothing is to be taken, read by who then takes something with `word` unchanged. */
    _Atomic(void (*)(void *, long, long)) work;
    _Atomic(void *) data;
    _Atomic long units, least;
    _Atomic int threads;
    _Alignas(64) _Atomic long left; /* units that are not done */
    _Atomic int finished;
    const Phase *phases; /* plain: see "Ownership" */
    int count, next;
    Bed bed; /* the caller's */
    Patience patience;
} Slot;

static struct {
    Slot slots[SLOTS];
    _Alignas(64) _Atomic uint32_t taken; /* slots that have an owner, a bit each */
    _Atomic int workers, sleeping;
    _Alignas(64) Bed beds[MOST_THREADS]; /* worker i's is the i-th; there is no worker 0 */
    pthread_mutex_t growing;
    _Atomic int most; /* workers that can be had: fewer after the system has refused one */
    int forks_noted;
} team = {.growing = PTHREAD_MUTEX_INITIALIZER, .most = MOST_THREADS - 1};

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* ---- sleeping ---- */

static void bed_make(Bed *b) {
    atomic_store(&b->asleep, 0);
#if !defined(__linux__)
    pthread_mutex_init(&b->mutex, NULL);
    pthread_cond_init(&b->changed, NULL);
#endif
}

/* Returns when somebody has set `asleep` to 0. */
static void bed_sleep(Bed *b) {
#if defined(__linux__)
    while (atomic_load_explicit(&b->asleep, memory_order_acquire))
        syscall(SYS_futex, &b->asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
#else
    pthread_mutex_lock(&b->mutex);
    while (atomic_load_explicit(&b->asleep, memory_order_acquire)) pthread_cond_wait(&b->changed, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
#endif
}

/* Whether it was this call that ended the sleep. */
static int bed_leave(Bed *b) {
    return atomic_load_explicit(&b->asleep, memory_order_relaxed) &&
           atomic_exchange_explicit(&b->asleep, 0, memory_order_acq_rel);
}

static void bed_call(Bed *b) {
#if defined(__linux__)
    syscall(SYS_futex, &b->asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
#else
    pthread_mutex_lock(&b->mutex);
    pthread_cond_signal(&b->changed);
    pthread_mutex_unlock(&b->mutex);
#endif
}

/* Spin until `ready(arg)`; 0 if that took too long. */
static int spin(int (*ready)(const void *), const void *arg, const Patience *p, long begun) {
    for (int i = 1;; i++) {
        if (ready(arg)) return 1;
        PAUSE();
        if (i % 16 == 0 && now() - begun > p->limit) return 0;
    }
}

/* A wait has ended: had one spun for twice as long, would that have been worth it? */
static void learn(Patience *p, long waited) {
    if (waited <= SPIN_MOST) {
        long enough = 2 * waited < SPIN_MOST ? 2 * waited : SPIN_MOST;
        if (enough > p->limit) p->limit = enough;
    } else {
        p->limit -= p->limit / 8;
        if (p->limit < SPIN_LEAST) p->limit = SPIN_LEAST;
    }
}

/* Wait until `ready(arg)`. `sleeping` counts the threads whose beds are looked at by `rouse`; NULL: nobody counts this one.
 *
 * No wake-up is lost: this thread stores `asleep`, then looks again; the other stores what makes it ready, then looks at
 * `asleep`; sequentially consistent fences lie between, so that at least one sees the other's store. */
static void await(int (*ready)(const void *), const void *arg, Bed *bed, Patience *patience, _Atomic int *sleeping) {
    long begun = now();
    if (!spin(ready, arg, patience, begun))
        while (!ready(arg)) {
            if (sleeping) atomic_fetch_add(sleeping, 1);
            atomic_store(&bed->asleep, 1);
            atomic_thread_fence(memory_order_seq_cst);
            if (!ready(arg)) bed_sleep(bed);
            else if (bed_leave(bed) && sleeping) atomic_fetch_sub(sleeping, 1);
        }
    learn(patience, now() - begun);
}

/* Wake up to `wanted` of the sleeping workers 1 … threads - 1. A fence has to stand before. */
static void rouse(long wanted, int threads) {
    int workers = atomic_load_explicit(&team.workers, memory_order_relaxed);
    if (wanted > WOKEN_AT_ONCE) wanted = WOKEN_AT_ONCE;
    for (int i = 1; i < threads && i <= workers && wanted > 0; i++) {
        if (atomic_load_explicit(&team.sleeping, memory_order_relaxed) == 0) return;
        if (bed_leave(team.beds + i)) {
            atomic_fetch_sub(&team.sleeping, 1);
            bed_call(team.beds + i);
            wanted--;
        }
    }
}

/* ---- phases ---- */

/* Begin the next phase, or finish. By the thread that did the last unit of the one before (the caller, for the first). */
static void advance(Slot *s) {
    int threads = atomic_load_explicit(&s->threads, memory_order_relaxed);
    while (s->next < s->count) {
        const Phase *p = s->phases + s->next++;
        if (p->units <= p->least || (uint64_t)p->units > UNITS_MASK) {
            if (p->units > 0) p->work(p->data, 0, p->units);
            continue;
        }
        long pieces = p->units / p->least;
        uint64_t begun = (atomic_load_explicit(&s->word, memory_order_relaxed) >> UNIT_BITS) + 1;
        uint64_t word = begun << UNIT_BITS | (uint64_t)p->units;
        /* With the fence in `take`: who reads one of these cannot have the old word afterwards. */
        atomic_thread_fence(memory_order_release);
        atomic_store_explicit(&s->work, p->work, memory_order_relaxed);
        atomic_store_explicit(&s->data, p->data, memory_order_relaxed);
        atomic_store_explicit(&s->units, p->units, memory_order_relaxed);
        atomic_store_explicit(&s->least, p->least, memory_order_relaxed);
        atomic_store_explicit(&s->left, p->units, memory_order_relaxed);
        atomic_store_explicit(&s->word, word, memory_order_release);
        /* From here on the plain fields are another thread's. */
        atomic_thread_fence(memory_order_seq_cst);
        if (bed_leave(&s->bed)) bed_call(&s->bed);
        if (atomic_load_explicit(&team.sleeping, memory_order_relaxed)) rouse(pieces - 1, threads);
        return;
    }
    /* The slot may have another owner at once; it bears being woken for nothing. */
    atomic_store_explicit(&s->finished, 1, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (bed_leave(&s->bed)) bed_call(&s->bed);
}

/* Large pieces first, so that few are taken; small ones last, so that all end together. Kernels like them in fours. */
static long piece(long rest, long least, int threads) {
    long n = rest / (2 * threads);
    if (n < least) n = least;
    else if (n >= 4) n &= ~3L;
    return n < rest ? n : rest;
}

/* Take a piece and do it. 0 if there was none for this thread. self: a worker's number, 0 for the caller. */
static int take(Slot *s, int self) {
    uint64_t word = atomic_load_explicit(&s->word, memory_order_acquire);
    for (;;) {
        long rest = (long)(word & UNITS_MASK);
        if (!rest) return 0;
        void (*work)(void *, long, long) = atomic_load_explicit(&s->work, memory_order_relaxed);
        void *data = atomic_load_explicit(&s->data, memory_order_relaxed);
        long units = atomic_load_explicit(&s->units, memory_order_relaxed);
        long least = atomic_load_explicit(&s->least, memory_order_relaxed);
        int threads = atomic_load_explicit(&s->threads, memory_order_relaxed);
        /* Here, not before: the slot may have had another owner since. */
        if (self >= threads) return 0;
        long n = piece(rest, least, threads);
        atomic_thread_fence(memory_order_acquire);
        if (!atomic_compare_exchange_weak_explicit(&s->word, &word, word - (uint64_t)n, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        /* The word was still that of the phase read above, and the phase cannot end before this piece is done. */
        work(data, units - rest, units - rest + n);
        if (atomic_fetch_sub_explicit(&s->left, n, memory_order_acq_rel) == n) advance(s);
        return 1;
    }
}

/* ---- workers ---- */

/* Numbers that a processor treats as the caller's do, whatever mode a library has left it in: all threads compute alike. */
#if defined(__x86_64__)
typedef unsigned Arithmetic;
static Arithmetic usual_arithmetic(void) {
    unsigned mode = _mm_getcsr();
    if ((mode & 0xffc0) != 0x1f80) _mm_setcsr(0x1f80);
    return mode;
}
static void restore_arithmetic(Arithmetic mode) {
    if ((mode & 0xffc0) != 0x1f80) _mm_setcsr(mode);
}
#elif defined(__aarch64__)
typedef uint64_t Arithmetic;
static Arithmetic usual_arithmetic(void) {
    Arithmetic mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    if (mode) __asm__ volatile("msr fpcr, xzr" ::: "memory");
    return mode;
}
static void restore_arithmetic(Arithmetic mode) {
    if (mode) __asm__ volatile("msr fpcr, %0" ::"r"(mode) : "memory");
}
#else
typedef int Arithmetic;
static Arithmetic usual_arithmetic(void) { return 0; }
static void restore_arithmetic(Arithmetic mode) { (void)mode; }
#endif

static int open_to(int worker, const Slot *s) {
    return (atomic_load_explicit(&s->word, memory_order_relaxed) & UNITS_MASK) != 0 &&
           worker < atomic_load_explicit(&s->threads, memory_order_relaxed);
}

/* Whether there is something to take for a worker. arg: its number, as a pointer. */
static int wanted(const void *arg) {
    uint32_t taken = atomic_load_explicit(&team.taken, memory_order_acquire);
    for (; taken; taken &= taken - 1)
        if (open_to((int)(intptr_t)arg, team.slots + __builtin_ctz(taken))) return 1;
    return 0;
}

/* Take a piece of one of the calls, another one each `turn`: a call that always has units must not have all workers. If it
 * is their `first` after a pause, others may still sleep. 0 if there was nothing to take. */
static int help(int self, unsigned turn, int first) {
    uint32_t taken = atomic_load_explicit(&team.taken, memory_order_acquire), rest = taken;
    int calls = __builtin_popcount(taken);
    for (unsigned skip = calls ? turn % (unsigned)calls : 0; skip; skip--) rest &= rest - 1;
    for (; calls; calls--, rest &= rest - 1) {
        if (!rest) rest = taken;
        Slot *s = team.slots + __builtin_ctz(rest);
        if (!open_to(self, s)) continue;
        int threads = atomic_load_explicit(&s->threads, memory_order_relaxed);
        if (first && atomic_load_explicit(&team.sleeping, memory_order_relaxed)) rouse(threads - 2, threads);
        if (take(s, self)) return 1;
    }
    return 0;
}

static void *work_for_ever(void *arg) {
    int self = (int)(intptr_t)arg;
    unsigned turn = (unsigned)self; /* two workers begin with different calls */
    Patience patience = {SPIN_MOST};
    usual_arithmetic();
    for (;;) {
        await(wanted, arg, team.beds + self, &patience, &team.sleeping);
        for (int first = 1; help(self, turn++, first); first = 0) {}
    }
    return NULL;
}

/* In a forked child no worker lives, and no call is under way but none of ours: this thread was not in one. */
static void before_fork(void) { pthread_mutex_lock(&team.growing); }
static void after_fork(void) { pthread_mutex_unlock(&team.growing); }
static void in_child(void) {
    atomic_store(&team.workers, 0);
    atomic_store(&team.sleeping, 0);
    atomic_store(&team.taken, 0);
    atomic_store(&team.most, MOST_THREADS - 1);
    for (int i = 0; i < SLOTS; i++) {
        Slot *s = team.slots + i;
        atomic_store(&s->word, atomic_load(&s->word) & ~UNITS_MASK);
        bed_make(&s->bed);
    }
    pthread_mutex_init(&team.growing, NULL);
}

static int start_worker(int number) {
#if defined(VERBATIM_REFUSE_THREADS) /* for a test */
    return EAGAIN;
#endif
    pthread_t thread;
    pthread_attr_t settings;
    sigset_t all, before;
    bed_make(team.beds + number);
    pthread_attr_init(&settings);
    pthread_attr_setdetachstate(&settings, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&settings, STACK);
    /* Signals are for the threads that expect them; all but those of a fault of this thread's own, for a crash reporter. */
    sigfillset(&all);
    sigdelset(&all, SIGSEGV), sigdelset(&all, SIGBUS), sigdelset(&all, SIGFPE), sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int fault = pthread_create(&thread, &settings, work_for_ever, (void *)(intptr_t)number);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&settings);
#if defined(__linux__)
    char name[16];
    snprintf(name, sizeof name, "kernels-%d", number % MOST_THREADS);
    if (!fault) pthread_setname_np(thread, name);
#endif
    return fault;
}

/* Have workers 1 … threads - 1, or as many as the system grants. They live as long as the process, and end with it. */
static void grow(int threads) {
    pthread_mutex_lock(&team.growing);
    if (!team.forks_noted) {
        team.forks_noted = 1; /* also in a child: its handlers are its parent's */
        for (int i = 0; i < SLOTS; i++) bed_make(&team.slots[i].bed);
        pthread_atfork(before_fork, after_fork, in_child);
    }
    for (int next; (next = atomic_load(&team.workers) + 1) < threads && next <= atomic_load(&team.most);) {
        if (start_worker(next)) atomic_store(&team.most, next - 1);
        else atomic_store(&team.workers, next);
    }
    pthread_mutex_unlock(&team.growing);
}

/* ---- calls ---- */

static Slot *take_slot(void) {
    uint32_t taken = atomic_load_explicit(&team.taken, memory_order_relaxed);
    while (~taken) {
        int free = __builtin_ctz(~taken);
        if (atomic_compare_exchange_weak_explicit(&team.taken, &taken, taken | UINT32_C(1) << free, memory_order_acquire,
                                                  memory_order_relaxed))
            return team.slots + free;
    }
    return NULL;
}

static void give_slot(Slot *s) {
    atomic_fetch_and_explicit(&team.taken, ~(UINT32_C(1) << (s - team.slots)), memory_order_release);
}

static int finished_or_open(const void *arg) {
    const Slot *s = arg;
    return atomic_load_explicit(&s->finished, memory_order_acquire) ||
           (atomic_load_explicit(&s->word, memory_order_relaxed) & UNITS_MASK) != 0;
}

/* Do all phases, one after the other, with up to `threads` threads; returns when all is done. From any thread. */
static void team_run(const Phase *phases, int count, int threads) {
    Arithmetic mode = usual_arithmetic();
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int workers = atomic_load_explicit(&team.workers, memory_order_relaxed);
    if (workers + 1 < threads && workers < atomic_load_explicit(&team.most, memory_order_acquire)) grow(threads);
    Slot *s = threads > 1 ? take_slot() : NULL;
    if (!s)
        for (int i = 0; i < count; i++) {
            if (phases[i].units > 0) phases[i].work(phases[i].data, 0, phases[i].units);
        }
    else {
        if (!s->patience.limit) s->patience.limit = SPIN_MOST;
        s->phases = phases, s->count = count, s->next = 0;
        atomic_store_explicit(&s->threads, threads, memory_order_relaxed);
        atomic_store_explicit(&s->finished, 0, memory_order_relaxed);
        advance(s);
        while (!atomic_load_explicit(&s->finished, memory_order_acquire))
            if (!take(s, 0)) await(finished_or_open, s, &s->bed, &s->patience, NULL);
        give_slot(s);
    }
    restore_arithmetic(mode);
}
