"""A pool of threads that costs a step next to nothing, and that a step never has to wait for.

Invariants:
(a) the caller works too and takes whatever nobody has claimed: it waits for claimed pieces only, never for a helper to
    wake or to arrive. A wake-up that gets lost therefore costs speed, nothing else;
(b) a helper touches the pool's static memory alone, and the caller's only through a piece it has claimed. So processes
    exit, and interpreters end, around helpers in any state;
(c) pieces are ranges of items that follow from ``items`` and ``grain`` alone;
(d) import starts nothing. It registers what resets the pool in a forked child, where no helper is left: under the GIL, so
    outside any fork of Python's, for a fork that has begun runs no handler that is registered later.

A job (one call of ``share``) has a ticket, and each helper a slot into which the caller writes the ticket it shall work
on. The helper joins by counting itself in (``active``), then looks whether the job is still open under that ticket; the
caller closes the job, then looks whether ``active`` is 0, and only then fills it for another ticket. All four accesses
are sequentially consistent, so at least one of the two sees the other (Dekker). Two jobs take turns, so that a helper
that lingers in one does not hinder the next; if it still lingers when the job's turn comes again, the caller works alone.

Each worker has a contiguous range of the pieces and begins there, so that a core meets the same memory at each step;
whoever has finished takes pieces from the others' ranges. A claim is one fetch-and-add, harmless beyond the end.
"""

from libc.signal cimport SIGBUS, SIGFPE, SIGILL, SIGSEGV
from libc.stdint cimport int64_t
from libc.string cimport memset
from posix.signal cimport sigdelset, sigfillset, sigset_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from cylora.kernels._fpenv cimport fp_enter

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    enum:
        PTHREAD_CREATE_DETACHED
    int pthread_attr_init(pthread_attr_t*)
    int pthread_attr_setdetachstate(pthread_attr_t*, int)
    int pthread_attr_setstacksize(pthread_attr_t*, size_t)
    int pthread_attr_destroy(pthread_attr_t*)
    int pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*) noexcept nogil, void*)
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil, void (*)() noexcept nogil)
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_trylock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    int pthread_cond_init(pthread_cond_t*, void*)
    int pthread_cond_wait(pthread_cond_t*, pthread_mutex_t*)
    int pthread_cond_signal(pthread_cond_t*)

cdef extern from "<signal.h>" nogil:
    enum:
        SIG_SETMASK
    int pthread_sigmask(int, const sigset_t*, sigset_t*)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from *:
    """
    #include <pthread.h>
    #include <sched.h>
    #include <stdint.h>
    #include <unistd.h>

    /* What different threads write lies 128 bytes apart: cores fetch lines of 64 bytes in pairs, Apple's are that long. */
    #define CYLORA_APART __attribute__((aligned(128)))

    typedef struct {
        CYLORA_APART int64_t next;      /* atomic: the first piece that nobody has claimed */
        int64_t end;
        int64_t done;                   /* atomic: pieces, of any range, that the owner of this one has finished */
        int64_t units;                  /* that it has reported; written before `done` */
    } cylora_range;

    typedef struct {
        CYLORA_APART int64_t ticket;    /* atomic: what the caller wants done */
        CYLORA_APART int64_t asleep;    /* atomic; set by the helper, cleared by whoever wakes it */
        int worker;                     /* whose slot this is; 0 is the caller */
        pthread_mutex_t mutex;
        pthread_cond_t wake;
    } cylora_slot;

    static __thread int64_t cylora_reported;

    static inline int64_t cylora_load(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static inline void cylora_store(int64_t *p, int64_t x) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }
    static inline int64_t cylora_add(int64_t *p, int64_t x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
    static inline int64_t cylora_swap(int64_t *p, int64_t x) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); }
    static inline void cylora_publish(int64_t *p, int64_t x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }

    static inline void cylora_relax(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #else
        __asm__ volatile ("yield");
    #endif
    }

    /* Where this thread runs, -1 if that cannot be told; how many processors it may run on; leave one to others. */
    #if defined(__linux__)
    static inline int cylora_processor(void) { return sched_getcpu(); }
    static int cylora_processors(void) {
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
        return (int) sysconf(_SC_NPROCESSORS_ONLN);                 /* more than 1,024 of them */
    }
    static int cylora_leave_processor(int processor) {
        cpu_set_t set;
        if (sched_getaffinity(getpid(), sizeof set, &set) != 0) return 0;
        CPU_CLR(processor, &set);
        return sched_setaffinity(0, sizeof set, &set) == 0;         /* refused if none is left */
    }
    #else
    static inline int cylora_processor(void) { return -1; }
    static int cylora_processors(void) { return (int) sysconf(_SC_NPROCESSORS_ONLN); }
    static int cylora_leave_processor(int processor) { (void) processor; return 0; }
    #endif
    """
    ctypedef struct Range "cylora_range":
        int64_t next
        int64_t end
        int64_t done
        int64_t units
    ctypedef struct Slot "cylora_slot":
        int64_t ticket
        int64_t asleep
        int worker
        pthread_mutex_t mutex
        pthread_cond_t wake
    int64_t reported "cylora_reported"
    int64_t load "cylora_load"(const int64_t*) noexcept nogil
    void store "cylora_store"(int64_t*, int64_t) noexcept nogil
    int64_t add "cylora_add"(int64_t*, int64_t) noexcept nogil
    int64_t swap "cylora_swap"(int64_t*, int64_t) noexcept nogil
    void publish "cylora_publish"(int64_t*, int64_t) noexcept nogil
    void relax "cylora_relax"() noexcept nogil
    int processor "cylora_processor"() noexcept nogil
    int processors "cylora_processors"() noexcept nogil
    bint leave_processor "cylora_leave_processor"(int processor) noexcept nogil

cdef enum:
    MAX_WORKERS = 64
    JOBS = 2
    STACK_BYTES = 262144

cdef enum:                  # rules
    MEASURED
    ALWAYS
    NEVER

cdef enum:
    AWAKE_US = 12           # alone below this: handing over to a helper that spins costs 1 to 2 us
    ASLEEP_US = 80          # alone below this if the helper sleeps: it needs 30 to 60 us to arrive
    STREAK = 3              # ... unless so many steps followed one another closely: then the next finds it awake
    YIELD_NS = 20_000       # the caller has waited so long for a claimed piece: the helper may need this processor
    CREDIT_NS = 4_000_000    # what sharing has gained counts up to this against what it loses
    DEBT_NS = 20_000        # a loss worth a rest
    REST = 32               # rest, in losses, so that at most 3 % of the time is lost; doubled while it does not help
    MAX_REST = 1024
    MAX_REST_NS = 1_000_000_000

cdef struct Job:
    int64_t active          # atomic: helpers between joining and leaving
    int64_t open            # atomic: the ticket under which helpers may join, 0 when closed
    Work work
    void* context
    Py_ssize_t items
    Py_ssize_t grain
    int workers
    Range ranges[64]        # of MAX_WORKERS

cdef struct Pool:
    int64_t taken           # atomic: a team is open. What follows is that team's.
    int64_t ticket
    int team                # threads, with the caller
    int started             # helpers that exist
    int processors
    int64_t processor       # atomic: the caller's, where a helper would only be in its way
    int64_t last_open       # ns, as all times and amounts below
    int streak
    int64_t work
    int64_t gained
    int64_t lost
    int64_t balance
    int64_t rest
    int64_t rest_until
    int64_t begun           # of what is handed out: when that began, and when all who help had been told
    int64_t ready
    bint is_shared          # it, with others
    Job* handed_out
    Job alone               # what it is, if it is not
    Slot slots[64]          # of MAX_WORKERS; the first is nobody's, because worker 0 is the caller
    Job jobs[2]             # of JOBS

cdef Pool pool
cdef int64_t rule = MEASURED     # atomic, as the next
cdef int64_t spin_ns = 50_000    # how long a helper looks for the next job before it sleeps


cdef int64_t now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t> time.tv_sec * 1_000_000_000 + time.tv_nsec


# ------------------------------------------------------------------ what all workers do

cdef inline bint claim(Range* victim, int64_t* piece) noexcept nogil:
    if load(&victim.next) >= victim.end:
        return False
    piece[0] = add(&victim.next, 1)
    return piece[0] < victim.end


cdef inline void do_piece(Work work, void* context, Py_ssize_t items, Py_ssize_t grain, int64_t piece) noexcept nogil:
    cdef Py_ssize_t first = piece * grain
    work(context, first, items if items - first < grain else first + grain)


cdef void report(int64_t units) noexcept nogil:
    global reported
    reported += units


cdef int64_t take_part(Job* job, int worker) noexcept nogil:
    """Do pieces until all are claimed; return how many."""
    global reported
    cdef int64_t piece, done = 0
    cdef int victim = worker
    reported = 0
    for _ in range(job.workers):
        while claim(&job.ranges[victim], &piece):
            do_piece(job.work, job.context, job.items, job.grain, piece)
            done += 1
            job.ranges[worker].units = reported
            publish(&job.ranges[worker].done, done)
        victim = victim + 1 if victim + 1 < job.workers else 0
    return done


# ------------------------------------------------------------------ helpers

cdef bint await_ticket(Slot* slot, int64_t seen) noexcept nogil:
    """Return when the slot has another ticket than ``seen``; say whether the helper slept meanwhile."""
    cdef int64_t deadline = now() + load(&spin_ns)
    cdef bint slept = False
    while True:
        for _ in range(32):
            if load(&slot.ticket) != seen:
                return slept
            relax()
        if now() < deadline and not in_the_way():
            continue
        pthread_mutex_lock(&slot.mutex)
        store(&slot.asleep, 1)
        if load(&slot.ticket) != seen:
            store(&slot.asleep, 0)
        while load(&slot.asleep):
            pthread_cond_wait(&slot.wake, &slot.mutex)
            slept = True
        pthread_mutex_unlock(&slot.mutex)


cdef inline bint in_the_way() noexcept nogil:
    """Whether this helper keeps the caller from its processor."""
    cdef int here = processor()
    return here >= 0 and here == load(&pool.processor) and load(&rule) == MEASURED


cdef void* help_out(void* slot_) noexcept nogil:
    cdef Slot* slot = <Slot*> slot_
    cdef int64_t seen = 0
    cdef Job* job
    fp_enter()
    while True:
        # After a pause Linux wakes a helper on its caller's processor, even if another is idle: 199 of 200 times after 3 ms.
        if await_ticket(slot, seen) and in_the_way() and not leave_processor(processor()):
            seen = load(&slot.ticket)
            continue
        seen = load(&slot.ticket)
        job = &pool.jobs[seen % JOBS]
        add(&job.active, 1)
        if load(&job.open) == seen:
            take_part(job, slot.worker)
        add(&job.active, -1)


cdef bint wake(Slot* slot) noexcept nogil:
    """Wake a helper that sleeps. If it holds the mutex it is just falling asleep, and will be woken another time."""
    if not load(&slot.asleep) or pthread_mutex_trylock(&slot.mutex) != 0:
        return False
    store(&slot.asleep, 0)
    pthread_mutex_unlock(&slot.mutex)
    pthread_cond_signal(&slot.wake)
    return True


cdef void forget_helpers() noexcept nogil:
    """In a forked child: whatever state the fork met the pool in, here no helper and no team exists."""
    memset(&pool, 0, sizeof(Pool))


if pthread_atfork(NULL, NULL, forget_helpers) != 0:
    raise MemoryError()


cdef void start_helpers(int wanted) noexcept nogil:
    """Start helpers until there are so many; fewer if the system refuses."""
    cdef pthread_t thread
    cdef pthread_attr_t attributes
    cdef sigset_t blocked, before
    cdef Slot* slot
    if pthread_attr_init(&attributes) != 0:
        return
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED)
    pthread_attr_setstacksize(&attributes, STACK_BYTES)  # where that is too little, the default stays
    # Signals are for the main thread, which Python makes look at them; but a crash must be reported where it happens.
    sigfillset(&blocked)
    sigdelset(&blocked, SIGSEGV)
    sigdelset(&blocked, SIGBUS)
    sigdelset(&blocked, SIGFPE)
    sigdelset(&blocked, SIGILL)
    pthread_sigmask(SIG_SETMASK, &blocked, &before)
    while pool.started < wanted:
        slot = &pool.slots[pool.started + 1]
        slot.ticket = slot.asleep = 0
        slot.worker = pool.started + 1
        if pthread_mutex_init(&slot.mutex, NULL) != 0 or pthread_cond_init(&slot.wake, NULL) != 0:
            break
        if pthread_create(&thread, &attributes, help_out, slot) != 0:
            break
        pool.started += 1
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)


# ------------------------------------------------------------------ the caller

cdef bint worthwhile(double work_us) noexcept nogil:
    cdef int64_t time = now()
    # Twice: what was estimated for hot caches may take that long with cold ones.
    cdef bint follows_closely = time - pool.last_open < <int64_t> (2000.0 * work_us) + load(&spin_ns)
    pool.last_open = time
    pool.streak = pool.streak + 1 if follows_closely else 0
    if time < pool.rest_until:
        return False
    if work_us >= ASLEEP_US or pool.streak >= STREAK:
        return True
    return pool.started > 0 and not load(&pool.slots[1].asleep)


cdef int open_team(int threads, double work_us) noexcept nogil:
    cdef int helpers = min(threads, MAX_WORKERS) - 1
    cdef int64_t now_rule = load(&rule)
    if helpers < 1 or now_rule == NEVER or (now_rule == MEASURED and not work_us >= AWAKE_US):
        return 0
    if load(&pool.taken) or swap(&pool.taken, 1):
        return 0
    if now_rule == MEASURED:
        if pool.processors == 0:
            pool.processors = processors()
        helpers = min(helpers, pool.processors - 1)
        helpers = <int> min(<double> helpers, work_us / AWAKE_US)
        if helpers < 1 or not worthwhile(work_us):
            store(&pool.taken, 0)
            return 0
    if pool.started < helpers:
        start_helpers(helpers)
    helpers = min(helpers, pool.started)
    if helpers < 1:
        store(&pool.taken, 0)
        return 0
    pool.team = helpers + 1
    store(&pool.processor, processor())
    pool.work = <int64_t> (1000.0 * min(work_us, 1e12))
    pool.gained = pool.lost = 0
    return pool.team


cdef void share(Work work, void* context, Py_ssize_t items, Py_ssize_t grain) noexcept nogil:
    hand_out(work, context, items, grain)
    finish()


cdef void hand_out(Work work, void* context, Py_ssize_t items, Py_ssize_t grain) noexcept nogil:
    cdef int64_t pieces
    cdef int workers, i
    cdef bint woken = False
    cdef Job* job
    grain = max(grain, 1)
    pieces = 0 if items <= 0 else (items - 1) // grain + 1
    workers = <int> min(<int64_t> pool.team, pieces)
    if pieces > 0:
        pool.ticket += 1
    job = pool.handed_out = &pool.jobs[pool.ticket % JOBS]
    pool.is_shared = workers >= 2 and load(&job.active) == 0
    if not pool.is_shared:
        pool.alone.work, pool.alone.context, pool.alone.items, pool.alone.grain = work, context, items, grain
        return
    pool.begun = now()
    job.work, job.context, job.items, job.grain, job.workers = work, context, items, grain, workers
    for i in range(workers):
        job.ranges[i].next = pieces * i // workers
        job.ranges[i].end = pieces * (i + 1) // workers
        job.ranges[i].done = job.ranges[i].units = 0
    store(&job.open, pool.ticket)
    for i in range(1, workers):
        store(&pool.slots[i].ticket, pool.ticket)
    for i in range(1, workers):
        woken |= wake(&pool.slots[i])
    pool.ready = now() if woken else pool.begun


cdef void finish() noexcept nogil:
    cdef Job* job = pool.handed_out
    cdef int64_t pieces, done, begun, idle, finished, all_units, units
    cdef int i
    if not pool.is_shared:
        job = &pool.alone
        pieces = 0 if job.items <= 0 else (job.items - 1) // job.grain + 1
        for done in range(pieces):
            do_piece(job.work, job.context, job.items, job.grain, done)
        return
    pieces = (job.items - 1) // job.grain + 1
    begun = now()
    done = take_part(job, 0)
    store(&job.open, 0)
    idle = now()
    finished = await_others(job, pieces, idle)
    all_units, units = 0, job.ranges[0].units
    for i in range(job.workers):
        all_units += job.ranges[i].units
    if all_units == 0:
        all_units, units = pieces, done
    if units > 0:
        pool.gained += (all_units - units) * (idle - begun) // units
    else:
        pool.gained += begun - pool.ready  # all was done while the caller did something else
    pool.lost += finished - idle + pool.ready - pool.begun


cdef int64_t await_others(Job* job, int64_t pieces, int64_t begun) noexcept nogil:
    """Return when all pieces are done, and what time it is then."""
    cdef int64_t done, time = begun
    cdef int i
    while True:
        done = 0
        for i in range(job.workers):
            done += load(&job.ranges[i].done)
        if done == pieces:
            return time
        if time - begun > YIELD_NS:
            sched_yield()
        relax()
        time = now()


cdef void close_team() noexcept nogil:
    # A worker's share is the most another can spare it; more means that the caller was kept from working.
    pool.gained = min(pool.gained, pool.work - pool.work // pool.team)
    pool.balance = min(pool.balance + pool.gained - pool.lost, CREDIT_NS)
    if pool.balance == CREDIT_NS:
        pool.rest = REST
    elif pool.balance < -DEBT_NS:
        pool.rest = min(max(pool.rest, REST), MAX_REST)
        pool.rest_until = now() + min(-pool.balance * pool.rest, MAX_REST_NS)
        pool.rest *= 2
        pool.balance = 0
        pool.processors = 0  # count them again: the process may be confined to fewer now
    store(&pool.taken, 0)


# ------------------------------------------------------------------ for tests and tools

def started():
    """Return how many helper threads this process has; they stay until it ends."""
    return pool.started


def configure(rule_name=None, spin_us=None):
    """Change when work is shared and how long helpers look for more; return the former values.

    Parameters
    ----------
    rule_name : "measured" (the default: where it pays), "always" (whatever the size and the machine) or "never".
    spin_us : microseconds, >= 0, after which a helper without work sleeps.
    """
    global rule, spin_ns
    rules = ("measured", "always", "never")
    former = (rules[rule], spin_ns / 1000.0)
    if rule_name is not None and rule_name not in rules:
        raise ValueError(f"rule_name must be one of {', '.join(rules)}, got {rule_name!r}")
    if spin_us is not None and not 0 <= spin_us <= 1e6:
        raise ValueError(f"spin_us must be in [0, 1e6], got {spin_us}")
    if rule_name is not None:
        store(&rule, rules.index(rule_name))
    if spin_us is not None:
        store(&spin_ns, <int64_t> (1000 * spin_us))
    return former
