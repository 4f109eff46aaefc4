// The factors 1 - gamma of 8-bit codes, from a table of the 256 correctly rounded values: the same bits on every machine.
#include <cstring>

#include "dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spg {
namespace {

// Filled by the compiler: a constructor that fills it at run time is one that GCC 12 leaves out on aarch64.
struct Table {
  float factor[256] = {};
  alignas(64) uint8_t plane[4][256] = {};  // byte k of every factor

  constexpr Table() {
    for (int code = 0; code < 253; code++) {  // tanh(code / 28) is 1 in float32 from 253 on
      double exp = 1.0, term = 1.0;  // of code / 14: a sum of positive terms, so nothing cancels
      for (int k = 1; k < 100; k++) exp += term *= code / 14.0 / k;
      factor[code] = float(2.0 / (1.0 + exp));
      uint32_t exponent = 127;
      float fraction = factor[code];
      for (; fraction < 1.0f; fraction *= 2.0f) exponent--;
      const uint32_t bits = exponent << 23 | uint32_t((fraction - 1.0f) * 8388608.0f);
      for (int k = 0; k < 4; k++) plane[k][code] = uint8_t(bits >> (8 * k));
    }
  }
};

constexpr Table table;

}  // namespace

// Compiled for the baseline, where the compiler has no gather to make of it: scalar loads are faster. One load fetches eight
// codes, and factors are stored four at a time: the loads and stores are what a lookup is made of.
void decode_by_lookup(const uint8_t* code, int64_t count, float* factor) {
  int64_t i = 0;
#if defined(__x86_64__)
  const auto at = [](uint64_t codes, int k) { return table.factor[codes >> (8 * k) & 255]; };
  for (; i + 8 <= count; i += 8) {
    uint64_t codes;
    std::memcpy(&codes, code + i, sizeof codes);
    _mm_storeu_ps(factor + i, _mm_setr_ps(at(codes, 0), at(codes, 1), at(codes, 2), at(codes, 3)));
    _mm_storeu_ps(factor + i + 4, _mm_setr_ps(at(codes, 4), at(codes, 5), at(codes, 6), at(codes, 7)));
  }
#endif
  for (; i < count; i++) factor[i] = table.factor[code[i]];
}

#if defined(__x86_64__)
// Looks up a byte plane of 64 codes at once: two 128-entry permutations, and the codes' top bits choose between them.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) static inline __m512i lookup(const uint8_t* plane, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), codes, _mm512_load_si512(plane + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), codes, _mm512_load_si512(plane + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

// Intrinsics, where all else is plain loops: gathers, which the compiler would make of the lookup, are several times as slow
// and would leave 8-bit gammas slower than float32 ones.
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) void decode_by_permutation(const uint8_t* code, int64_t count,
                                                                                  float* factor) {
  // Unpacking works within 128-bit lanes; transposing the 4 x 4 words of codes first brings the factors out in order.
  const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const int64_t whole = count / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64) {
    const __m512i codes = _mm512_maskz_permutexvar_epi32(0xffff, transpose, _mm512_loadu_si512(code + i));
    const __m512i byte0 = lookup(table.plane[0], codes), byte1 = lookup(table.plane[1], codes);
    const __m512i byte2 = lookup(table.plane[2], codes), byte3 = lookup(table.plane[3], codes);
    const __m512i low01 = _mm512_unpacklo_epi8(byte0, byte1), high01 = _mm512_unpackhi_epi8(byte0, byte1);
    const __m512i low23 = _mm512_unpacklo_epi8(byte2, byte3), high23 = _mm512_unpackhi_epi8(byte2, byte3);
    _mm512_storeu_si512(factor + i, _mm512_unpacklo_epi16(low01, low23));
    _mm512_storeu_si512(factor + i + 16, _mm512_unpackhi_epi16(low01, low23));
    _mm512_storeu_si512(factor + i + 32, _mm512_unpacklo_epi16(high01, high23));
    _mm512_storeu_si512(factor + i + 48, _mm512_unpackhi_epi16(high01, high23));
  }
  decode_by_lookup(code + whole, count - whole, factor + whole);
}
#endif

}  // namespace spg
