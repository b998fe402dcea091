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
    CYLORA_INLINE cylora_floats cylora_load_bfloat16(const uint16_t *x) {
    #ifdef __AVX2__
        return (cylora_floats) _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *) x)), 16);
    #elif defined(__x86_64__)
        return (cylora_floats) _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i *) x));
    #else
        cylora_words bits;
        for (int j = 0; j < CYLORA_WIDTH; j++) bits[j] = (uint32_t) x[j] << 16;
        return (cylora_floats) bits;
    #endif
    }
    /* Moments, up to a chunk of them, as bfloat16. The AVX2 block does what the loop does, in two thirds of the instructions. */
    CYLORA_INLINE void cylora_to_bfloat16(
        uint16_t *m_bits, uint16_t *v_bits, const float *m, const float *v, Py_ssize_t n, const uint32_t *noise, uint32_t shift
    ) {
        Py_ssize_t i = 0;
    #ifdef __AVX2__
        const __m256i sh = _mm256_set1_epi32((int) shift), zero = _mm256_setzero_si256();
        for (; i + 16 <= n; i += 16) {
            __m256i tm[2], tv[2];
            for (int j = 0; j < 2; j++) {
                const __m256i r = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *) (noise + i + 8 * j)), sh);
                const __m256i xm = _mm256_loadu_si256((const __m256i *) (m + i + 8 * j));
                const __m256i xv = _mm256_loadu_si256((const __m256i *) (v + i + 8 * j));
                tm[j] = _mm256_srli_epi32(_mm256_add_epi32(xm, _mm256_blend_epi16(r, zero, 0xaa)), 16);
                tv[j] = _mm256_srli_epi32(_mm256_add_epi32(xv, _mm256_srli_epi32(r, 16)), 16);
            }
            _mm256_storeu_si256((__m256i *) (m_bits + i), _mm256_permute4x64_epi64(_mm256_packus_epi32(tm[0], tm[1]), 0xd8));
            _mm256_storeu_si256((__m256i *) (v_bits + i), _mm256_permute4x64_epi64(_mm256_packus_epi32(tv[0], tv[1]), 0xd8));
        }
    #endif
        for (; i < n; i++) {
            const uint32_t r = noise[i] + shift;
            m_bits[i] = (uint16_t) ((cylora_bits_of(m[i]) + (r & 0xffffu)) >> 16);
            v_bits[i] = (uint16_t) ((cylora_bits_of(v[i]) + (r >> 16)) >> 16);
        }
    }
    """
    uint64_t mix "cylora_mix"(uint64_t x) noexcept nogil
    uint32_t noise_at "cylora_noise_at"(uint64_t key, uint64_t index) noexcept nogil
    void fill_noise "cylora_fill_noise"(uint32_t* noise, Py_ssize_t n, uint64_t key) noexcept nogil
    float from_bfloat16 "cylora_from_bfloat16"(uint16_t bits) noexcept nogil
    floats load_bfloat16 "cylora_load_bfloat16"(const uint16_t* x) noexcept nogil
    void to_bfloat16 "cylora_to_bfloat16"(
        uint16_t* m_bits, uint16_t* v_bits, const float* m, const float* v, Py_ssize_t n,
        const uint32_t* noise, uint32_t shift) noexcept nogil


cdef api void draw_noise(uint32_t* noise, Py_ssize_t n, uint64_t key) noexcept nogil:
    """Fill the table that chunks of up to n elements take their noise from, for steps with this ``noise_key``."""
    fill_noise(noise, min(n, CHUNK), key)


# The 8-bit codes of up to one chunk, to and from float32. The AVX2 blocks do what the loops after them do, which GCC turns
# into three times as many instructions, most of them for packing.
cdef extern from *:
    """
    CYLORA_INLINE void cylora_decode(
        float *m, float *v, const uint8_t *m_codes, const uint8_t *v_codes, Py_ssize_t n, uint32_t m_base, uint32_t v_base
    ) {
        Py_ssize_t i = 0;
    #ifdef __AVX2__
        const __m256i mb = _mm256_set1_epi32((int) m_base), vb = _mm256_set1_epi32((int) v_base);
        for (; i + 8 <= n; i += 8) {
            const __m256i cm = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (m_codes + i)));
            const __m256i cv = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (v_codes + i)));
            const __m256i magnitude = _mm256_slli_epi32(_mm256_abs_epi32(cm), 20);
            const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(cm), _mm256_set1_ps(-0.0f));
            const __m256 xm = _mm256_sub_ps(
                _mm256_castsi256_ps(_mm256_add_epi32(magnitude, mb)), _mm256_castsi256_ps(mb));
            const __m256 xv = _mm256_sub_ps(
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(cv, 20), vb)), _mm256_castsi256_ps(vb));
            _mm256_storeu_ps(m + i, _mm256_or_ps(xm, sign));
            _mm256_storeu_ps(v + i, xv);
        }
    #endif
        for (; i < n; i++) {
            const int32_t code = (int8_t) m_codes[i];
            const uint32_t magnitude = (uint32_t) (code < 0 ? -code : code) << 20;
            const float xm = cylora_float_of(magnitude + m_base) - cylora_float_of(m_base);
            m[i] = cylora_float_of(cylora_bits_of(xm) | ((uint32_t) code & 0x80000000u));
            v[i] = cylora_float_of(((uint32_t) v_codes[i] << 20) + v_base) - cylora_float_of(v_base);
        }
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
    void decode "cylora_decode"(
        float* m, float* v, const uint8_t* m_codes, const uint8_t* v_codes, Py_ssize_t n,
        uint32_t m_base, uint32_t v_base) noexcept nogil
    void encode "cylora_encode"(
        uint8_t* m_codes, uint8_t* v_codes, const float* m, const float* v, Py_ssize_t n, uint32_t m_base, uint32_t v_base,
        const uint32_t* noise, uint32_t shift) noexcept nogil


cdef inline uint32_t base_of(uint32_t largest, uint32_t octaves) noexcept nogil:
    """Bits of the chunk's c, given those of its largest magnitude, which no noise may lift above the last code.

    The last code stands for 1.875 octaves' ends: what is above that (less what c itself adds) takes the next exponent.
    """
    cdef uint32_t exponent = (largest + 0x100200u) >> 23
    return max(exponent, 27 + octaves - 1) - (octaves - 1) << 23
