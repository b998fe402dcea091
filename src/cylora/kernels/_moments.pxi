"""Adam's moments in less memory: bfloat16, and 8-bit codes with a shared exponent for every chunk of 256.

Both round stochastically: up with the probability of the part cut off, so that increments far below the spacing of the
stored numbers (a second moment moves by 0.1 % a step, bfloat16 numbers lie 0.4 to 0.8 % apart) count in the mean, where
rounding to nearest would drop them for good. The noise is a function of element and step alone: a table of one chunk,
new for each step, plus a number of its own for each chunk, modulo 2^32. Any two elements' noises are independent.

8 bits (blocks of 256 with their own scale and codes of a dynamic range, as Dettmers et al. 2022, arXiv:2110.02861; the
codes are ours, made for shifts instead of tables): x = c * (2^e * (1 + f/8) - 1), e and f/8 the code's exponent and
fraction, c a power of two for the chunk, and for m the code's sign. The grid is linear up to c, where every step is
c/8, and has 8 steps an octave above. m: -127..127, so 4 bits e and 3 bits f: 16 octaves. v: 0..255, so 32 octaves, and
never below c/8: where m is not 0, v is not either, and what an element with a gradient far below its chunk's largest
loses is speed, not safety. c is a power of two, so that the grid stays where it is while the largest of a chunk moves,
and 2^-100 at least, so that nothing here is subnormal.
"""

cdef extern from *:
    """
    /* The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection whose output bits look independent. */
    CYLORA_INLINE uint64_t cylora_mix(uint64_t x) {
        x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
        x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
        return x ^ x >> 31;
    }
    CYLORA_INLINE uint32_t cylora_noise_at(uint64_t key, uint64_t index) {
        return (uint32_t) (cylora_mix(key + (index + 1) * UINT64_C(0x9e3779b97f4a7c15)) >> 32);
    }
    CYLORA_INLINE void cylora_fill_noise(uint32_t *noise, Py_ssize_t n, uint64_t key) {
        for (Py_ssize_t i = 0; i < n; i++) noise[i] = cylora_noise_at(~key, (uint64_t) i);
    }

    CYLORA_INLINE float cylora_from_bfloat16(uint16_t bits) { return cylora_float_of((uint32_t) bits << 16); }
    typedef uint16_t cylora_h8 __attribute__((vector_size(16)));
    CYLORA_INLINE cylora_f8 cylora_load_bfloat16(const uint16_t *x) {
    #ifdef __AVX2__
        return (cylora_f8) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) x)), 16);
    #else
        cylora_h8 halves;
        memcpy(&halves, x, 16);
        return (cylora_f8) (__builtin_convertvector(halves, cylora_u8) << 16);
    #endif
    }
    CYLORA_INLINE void cylora_store_bfloat16(
        uint16_t *m_place, uint16_t *v_place, cylora_f8 m, cylora_f8 v, const uint32_t *noise, uint32_t shift
    ) {
        cylora_u8 r;
        memcpy(&r, noise, 32);
        r += shift;
        const cylora_u8 m_bits = ((cylora_u8) m + (r & 0xffffu)) >> 16, v_bits = ((cylora_u8) v + (r >> 16)) >> 16;
    #ifdef __AVX2__
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i) m_bits, (__m256i) v_bits), 0xd8);
        _mm_storeu_si128((__m128i *) m_place, _mm256_castsi256_si128(packed));
        _mm_storeu_si128((__m128i *) v_place, _mm256_extracti128_si256(packed, 1));
    #else
        const cylora_h8 m_halves = __builtin_convertvector(m_bits, cylora_h8);
        const cylora_h8 v_halves = __builtin_convertvector(v_bits, cylora_h8);
        memcpy(m_place, &m_halves, 16);
        memcpy(v_place, &v_halves, 16);
    #endif
    }
    """
    uint64_t mix "cylora_mix"(uint64_t x) noexcept nogil
    uint32_t noise_at "cylora_noise_at"(uint64_t key, uint64_t index) noexcept nogil
    void fill_noise "cylora_fill_noise"(uint32_t* noise, Py_ssize_t n, uint64_t key) noexcept nogil
    float from_bfloat16 "cylora_from_bfloat16"(uint16_t bits) noexcept nogil
    f8 load_bfloat16 "cylora_load_bfloat16"(const uint16_t* x) noexcept nogil
    void store_bfloat16 "cylora_store_bfloat16"(
        uint16_t* m_place, uint16_t* v_place, f8 m, f8 v, const uint32_t* noise, uint32_t shift) noexcept nogil


cdef api void draw_noise(uint32_t* noise, Py_ssize_t n, uint64_t key) noexcept nogil:
    """Fill the table that chunks of up to n elements take their noise from, for steps with this ``noise_key``."""
    fill_noise(noise, min(n, CHUNK), key)


# The 8-bit codes of up to one chunk, to and from float32. The AVX2 blocks do what the loops after them do, which GCC turns
# into three times as many instructions, most of them for packing.
cdef extern from *:
    """
    CYLORA_INLINE cylora_f8 cylora_decode_m(const uint8_t *codes, uint32_t base) {
        typedef int8_t c8 __attribute__((vector_size(8)));
    #ifdef __AVX2__
        const cylora_i8 code = (cylora_i8) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) codes));
        const cylora_u8 magnitude = (cylora_u8) _mm256_abs_epi32((__m256i) code) << 20;
    #else
        c8 narrow;
        memcpy(&narrow, codes, 8);
        const cylora_i8 code = __builtin_convertvector(narrow, cylora_i8), negative = code >> 31;
        const cylora_u8 magnitude = (cylora_u8) ((code ^ negative) - negative) << 20;
    #endif
        const cylora_f8 x = (cylora_f8) (magnitude + base) - cylora_splat(cylora_float_of(base));
        return (cylora_f8) ((cylora_u8) x | ((cylora_u8) code & 0x80000000u));
    }

    CYLORA_INLINE cylora_f8 cylora_decode_v(const uint8_t *codes, uint32_t base) {
        typedef uint8_t c8 __attribute__((vector_size(8)));
    #ifdef __AVX2__
        const cylora_u8 code = (cylora_u8) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) codes));
    #else
        c8 narrow;
        memcpy(&narrow, codes, 8);
        const cylora_u8 code = __builtin_convertvector(narrow, cylora_u8);
    #endif
        return (cylora_f8) ((code << 20) + base) - cylora_splat(cylora_float_of(base));
    }

    CYLORA_INLINE void cylora_encode(
        uint8_t *m_codes, uint8_t *v_codes, const float *m, const float *v, Py_ssize_t n, uint32_t m_base, uint32_t v_base,
        const uint32_t *noise, uint32_t shift
    ) {
        Py_ssize_t i = 0;
    #ifdef __AVX2__
        const __m256i mb = _mm256_set1_epi32((int) m_base), vb = _mm256_set1_epi32((int) v_base);
        const __m256i sh = _mm256_set1_epi32((int) shift), low = _mm256_set1_epi32(0xfffff);
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        for (; i + 32 <= n; i += 32) {
            __m256i cm[4], cv[4];
            for (int j = 0; j < 4; j++) {
                const __m256i r = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *) (noise + i + 8 * j)), sh);
                const __m256i xm = _mm256_loadu_si256((const __m256i *) (m + i + 8 * j));
                const __m256 magnitude = _mm256_castsi256_ps(_mm256_and_si256(xm, _mm256_set1_epi32(0x7fffffff)));
                const __m256 lifted = _mm256_add_ps(magnitude, _mm256_castsi256_ps(mb));
                const __m256 raised = _mm256_add_ps(_mm256_loadu_ps(v + i + 8 * j), _mm256_castsi256_ps(vb));
                const __m256i tm = _mm256_sub_epi32(_mm256_add_epi32(_mm256_castps_si256(lifted), _mm256_srli_epi32(r, 12)), mb);
                const __m256i tv = _mm256_sub_epi32(_mm256_add_epi32(_mm256_castps_si256(raised), _mm256_and_si256(r, low)), vb);
                cm[j] = _mm256_sign_epi32(_mm256_srli_epi32(tm, 20), xm);
                cv[j] = _mm256_srli_epi32(tv, 20);
            }
            const __m256i packed_m = _mm256_packs_epi16(_mm256_packs_epi32(cm[0], cm[1]), _mm256_packs_epi32(cm[2], cm[3]));
            const __m256i packed_v = _mm256_packus_epi16(_mm256_packs_epi32(cv[0], cv[1]), _mm256_packs_epi32(cv[2], cv[3]));
            _mm256_storeu_si256((__m256i *) (m_codes + i), _mm256_permutevar8x32_epi32(packed_m, order));
            _mm256_storeu_si256((__m256i *) (v_codes + i),
                _mm256_max_epu8(_mm256_permutevar8x32_epi32(packed_v, order), _mm256_set1_epi8(1)));
        }
    #endif
        for (; i < n; i++) {
            const uint32_t r = noise[i] + shift, bits = cylora_bits_of(m[i]);
            const float lifted = cylora_float_of(bits & 0x7fffffffu) + cylora_float_of(m_base);
            const float raised = v[i] + cylora_float_of(v_base);
            const uint32_t code = (cylora_bits_of(raised) + (r & 0xfffffu) - v_base) >> 20;
            const int32_t magnitude = (int32_t) ((cylora_bits_of(lifted) + (r >> 12) - m_base) >> 20);
            m_codes[i] = (uint8_t) (bits >> 31 ? -magnitude : magnitude);
            v_codes[i] = (uint8_t) (code > 0 ? code : 1);
        }
    }
    """
    f8 decode_m "cylora_decode_m"(const uint8_t* codes, uint32_t base) noexcept nogil
    f8 decode_v "cylora_decode_v"(const uint8_t* codes, uint32_t base) noexcept nogil
    void encode "cylora_encode"(
        uint8_t* m_codes, uint8_t* v_codes, const float* m, const float* v, Py_ssize_t n, uint32_t m_base, uint32_t v_base,
        const uint32_t* noise, uint32_t shift) noexcept nogil


cdef inline uint32_t base_of(uint32_t largest, uint32_t octaves) noexcept nogil:
    """Bits of the chunk's c, given those of its largest magnitude, which no noise may lift above the last code.

    The last code stands for 1.875 octaves' ends: what is above that (less what c itself adds) takes the next exponent.
    """
    cdef uint32_t exponent = (largest + 0x100200u) >> 23
    return max(exponent, 27 + octaves - 1) - (octaves - 1) << 23
