// The factors 1 - gamma of kCodes 8-bit codes. Few enough, and inlined into the loop that uses them, that a core loads what
// the next loops need while it looks these up: with 512 at a time, steps took up to a quarter longer.
// Included once per instruction set: no include guard.

#if defined(SPG_VBMI)
constexpr int64_t kCodes = 64;

// Looks up a byte plane of 64 codes at once: two 128-entry permutations, and the codes' top bits choose between them.
static inline __m512i lookup(const uint8_t* plane, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), codes, _mm512_load_si512(plane + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), codes, _mm512_load_si512(plane + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

__attribute__((always_inline)) static inline void decode(const uint8_t* code, float* factor) {
  // Unpacking works within 128-bit lanes; transposing the 4 x 4 words of codes first brings the factors out in order.
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i codes = _mm512_maskz_permutexvar_epi32(0xffff, transpose, _mm512_loadu_si512(code));
  const __m512i byte0 = lookup(kCodeTable.plane[0], codes), byte1 = lookup(kCodeTable.plane[1], codes);
  const __m512i byte2 = lookup(kCodeTable.plane[2], codes), byte3 = lookup(kCodeTable.plane[3], codes);
  const __m512i low01 = _mm512_unpacklo_epi8(byte0, byte1), high01 = _mm512_unpackhi_epi8(byte0, byte1);
  const __m512i low23 = _mm512_unpacklo_epi8(byte2, byte3), high23 = _mm512_unpackhi_epi8(byte2, byte3);
  _mm512_storeu_si512(factor, _mm512_unpacklo_epi16(low01, low23));
  _mm512_storeu_si512(factor + 16, _mm512_unpackhi_epi16(low01, low23));
  _mm512_storeu_si512(factor + 32, _mm512_unpacklo_epi16(high01, high23));
  _mm512_storeu_si512(factor + 48, _mm512_unpackhi_epi16(high01, high23));
}

#elif defined(SPG_AVX512)
constexpr int64_t kCodes = 64;

// Looks up sixteen codes at once in each of the table's eight 32-entry parts, and the codes' top bits choose.
__attribute__((always_inline)) static inline void decode(const uint8_t* code, float* factor) {
  for (int64_t i = 0; i < kCodes; i += 16) {
    const __m512i codes = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i)));
    const auto part = [=](const float* at) __attribute__((always_inline)) {
      return _mm512_permutex2var_ps(_mm512_load_ps(at), codes, _mm512_load_ps(at + 16));
    };
    const auto parts = [=](int bit, __m512 low, __m512 high) __attribute__((always_inline)) {
      return _mm512_mask_blend_ps(_mm512_test_epi32_mask(codes, _mm512_set1_epi32(bit)), low, high);
    };
    const float* at = kCodeTable.factor;
    const __m512 low = parts(64, parts(32, part(at), part(at + 32)), parts(32, part(at + 64), part(at + 96)));
    const __m512 high = parts(64, parts(32, part(at + 128), part(at + 160)), parts(32, part(at + 192), part(at + 224)));
    _mm512_storeu_ps(factor + i, parts(128, low, high));
  }
}

#else
constexpr int64_t kCodes = 32;

// Vectors of the size that the loops load: a load of what several smaller stores wrote waits until they are in the cache.
typedef float Factors __attribute__((vector_size(SPG_VECTOR_BYTES)));
constexpr int64_t kFactors = SPG_VECTOR_BYTES / sizeof(float);

// One load a factor, written out, because gathers, which a compiler makes of a loop, take twice the time and more. Their codes
// come in one load, and the barriers keep a compiler from making one a code of it again: loads are what there is most of here.
static inline void lookup(const uint8_t* code, float* factor) {
  Factors factors = {};
#if SPG_VECTOR_BYTES == 32
  uint64_t codes;
  std::memcpy(&codes, code, sizeof codes);
  for (int64_t k = 0; k < kFactors; k += 2) {
    asm("" : "+r"(codes));
    factors[k] = kCodeTable.factor[uint8_t(codes)];
    factors[k + 1] = kCodeTable.factor[uint8_t(codes >> 8)];  // x86 takes the second byte of a register as it takes the first
    codes >>= 16;
  }
#else
  uint32_t codes;
  std::memcpy(&codes, code, sizeof codes);
  asm("" : "+r"(codes));
  const auto at = [=](int64_t k) {
    return kCodeTable.factor[uint8_t(codes >> 8 * (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? k : 3 - k))];
  };
  factors = Factors{at(0), at(1), at(2), at(3)};
#endif
  std::memcpy(factor, &factors, sizeof factors);
}

__attribute__((always_inline)) static inline void decode(const uint8_t* code, float* factor) {
  for (int64_t i = 0; i < kCodes; i += kFactors) lookup(code + i, factor + i);
}
#endif
