"""C types that the loops, their callers and foreign packages share. Types only: importing this runs nothing."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    LANES = 32      # float64 sums kept side by side; element i of a vector always belongs to lane i % LANES
    BLOCK = 8192    # elements whose lanes are folded into one block sum; block sums are added in index order
    CHUNK = 256     # elements that share a scale in 8-bit state, and that are judged together for a zero gradient

cdef enum:          # how numbers are stored
    FLOAT32 = 0
    FLOAT16 = 1     # gradients only
    BFLOAT16 = 2
    EIGHT_BIT = 3   # moments only

cdef struct NormState:
    double lanes[32]
    double total            # sum over the finished blocks
    Py_ssize_t filled       # elements in the unfinished block, 0 <= filled < BLOCK

cdef struct Piece:          # memory the caller lends
    const void* start
    Py_ssize_t n
    int kind

cdef struct Gradient:       # a flat vector in one piece or two
    Piece pieces[2]
    int count

cdef struct Moments:
    int kind
    void* m
    void* v
    uint8_t* m_exponents    # EIGHT_BIT: of each chunk
    uint8_t* v_exponents

cdef struct AdamRule:       # what stays the same from step to step
    double beta1
    double beta2
    double eps
    double weight_decay
    bint l2                 # decay enters the gradient (True) or the parameter directly (False)

cdef struct AdamScalars:    # what one step needs, each rounded once from float64
    float clip_scale
    float one_minus_beta1
    float one_minus_beta2
    float root_scale        # (1 - beta1^t) / (rate * sqrt(1 - beta2^t))
    float offset            # eps * (1 - beta1^t) / rate
    float paired_rate       # rate * sqrt(1 - beta2^t) / (1 - beta1^t)
    float paired_eps        # eps * sqrt(1 - beta2^t)
    int32_t paired_limit    # bits of what the product of two denominators that share a division must not reach; 0: none may
    float decay             # decoupled: rate * weight_decay; l2: weight_decay
    bint l2
    uint64_t noise_key      # of this step's rounding noise
    float average_weight    # of the new parameters in their running average

cdef struct AdamStep:       # one step over one flat vector
    float* p
    Py_ssize_t n
    Gradient gradient
    Moments moments
    AdamScalars scalars
    const uint32_t* noise   # (CHUNK,), of noise_key: needed by compact moments only
    Py_ssize_t first_chunk  # where this vector's chunks begin in the sequence that the noise is a function of
    double* block_sums      # (ceil(n / BLOCK),): written by square_blocks
    const AdamStep* next    # whose memory is asked for while this step is done, or NULL
    float* average          # (n,): exponential moving average of the parameters, or NULL

cdef struct Loops:          # one instruction set's loops
    void (*norm_begin)(NormState*) noexcept nogil
    void (*norm_add)(NormState*, const void*, Py_ssize_t, int) noexcept nogil
    double (*norm_finish)(const NormState*) noexcept nogil
    void (*square_blocks)(const AdamStep*, Py_ssize_t, Py_ssize_t) noexcept nogil
    double (*norm_of_blocks)(const double*, Py_ssize_t, double) noexcept nogil
    Py_ssize_t (*first_nonfinite)(const void*, Py_ssize_t, int) noexcept nogil
    double (*value_at)(const void*, Py_ssize_t, int) noexcept nogil
    double (*clip_scale)(double, double, double) noexcept nogil
    void (*scale)(float*, Py_ssize_t, double) noexcept nogil
    void (*accumulate)(float*, const void*, Py_ssize_t, int, double) noexcept nogil
    void (*adam_scalars)(AdamScalars*, const AdamRule*, double, double, int64_t) noexcept nogil
    void (*draw_noise)(uint32_t*, Py_ssize_t, uint64_t) noexcept nogil
    void (*update_blocks)(const AdamStep*, Py_ssize_t, Py_ssize_t) noexcept nogil
