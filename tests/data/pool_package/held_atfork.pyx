"""For LD_PRELOAD: pthread_atfork of the GNU C library, which waits before it registers anything while ``hold`` is 1."""

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <dlfcn.h>
    #include <unistd.h>

    typedef void (*held_handler)(void);

    int hold, entered;

    int __register_atfork(held_handler prepare, held_handler parent, held_handler child, void *object) {
        int (*next)(held_handler, held_handler, held_handler, void *);
        *(void **) &next = dlsym(RTLD_NEXT, "__register_atfork");
        if (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) __atomic_store_n(&entered, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&hold, __ATOMIC_SEQ_CST)) usleep(100);
        return next(prepare, parent, child, object);
    }
    """
