"""For LD_PRELOAD: pthread_atfork of the GNU C library, which waits before it registers anything while ``hold`` is 1.

A fork makes it 0 and gives whoever was waiting time to go on, after the library has decided which handlers the child will run.
"""

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <dlfcn.h>
    #include <unistd.h>

    typedef void (*held_handler)(void);

    int hold, entered;

    static int held_register(held_handler prepare, held_handler parent, held_handler child, void *object) {
        int (*next)(held_handler, held_handler, held_handler, void *);
        *(void **) &next = dlsym(RTLD_NEXT, "__register_atfork");
        return next(prepare, parent, child, object);
    }

    int __register_atfork(held_handler prepare, held_handler parent, held_handler child, void *object) {
        if (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) __atomic_store_n(&entered, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) usleep(100);
        return held_register(prepare, parent, child, object);
    }

    static void held_let_go(void) {
        if (__atomic_exchange_n(&hold, 0, __ATOMIC_SEQ_CST)) usleep(300000);
    }

    __attribute__((constructor)) static void held_begin(void) { held_register(held_let_go, 0, 0, 0); }
    """
