// Importance: statistics of a gradient's chunk, and the fold of its standardized values into gamma.
// Included once per instruction set: no include guard.

static inline float element(int32_t dtype, const void* data, int64_t i) {
  float value;
  copy_floats(dtype, data, i, 1, &value);
  return value;
}

static double first_element(int32_t dtype, const void* data) { return element(dtype, data, 0); }

// float64 from float32 and back, a vector at a time, with the upper half of the floats loaded by itself. Compilers load all of
// them and take that half out, and processors have one unit for such moves where they have two for loads.
#if defined(SPG_AVX512)
typedef __m512d Doubles;
static inline Doubles doubles(const float* x) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x)); }
static inline Doubles doubles(const Bfloat16* x) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm512_maskz_cvtps_pd(0xff, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  const __m512 lower = _mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(0xff, low));
  _mm512_storeu_ps(x, _mm512_maskz_insertf32x8(0xffff, lower, _mm512_maskz_cvtpd_ps(0xff, high), 1));
}
#elif SPG_VECTOR_BYTES == 32
typedef __m256d Doubles;
static inline Doubles doubles(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
static inline Doubles doubles(const Bfloat16* x) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits)));
}
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  _mm256_storeu_ps(x, _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)));
}
#else
typedef double Doubles __attribute__((vector_size(16)));
template <class T>
static inline Doubles doubles(const T* x) {
  return Doubles{load(x), load(x + 1)};
}
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  x[0] = float(low[0]), x[1] = float(low[1]), x[2] = float(high[0]), x[3] = float(high[1]);
}
#endif
constexpr int64_t kDoubles = sizeof(Doubles) / sizeof(double);

// Sixteen running sums, whatever the vector width, so that every instruction set adds in the same order.
constexpr int64_t kLanes = 16, kSums = kLanes / kDoubles;

// Two streams at once. Lane by lane, x's and y's: one after the other, there are too few registers for the compiler's order.
template <class T>
static inline void add_lanes(const T* x, const T* y, double shift, Doubles* sum, Doubles* square) {
  for (int64_t k = 0; k < kSums; k++) {
    const Doubles d = doubles(x + k * kDoubles) - shift, e = doubles(y + k * kDoubles) - shift;
    sum[k] = (sum[k] + d) + e;
    square[k] = multiply_add(e, e, multiply_add(d, d, square[k]));
  }
}

template <class T>
static inline void add_streams(const T* x, const T* y, int64_t count, double shift, Doubles* sum, Doubles* square) {
  for (int64_t i = 0; i < count; i += kLanes) {
    prefetch(kLanes, x + i, y + i);
    add_lanes(x + i, y + i, shift, sum, square);
  }
}

// Sums are of g - shift, with the chunk's first element as the shift. Because the shift is itself an element, the
// cancellation in m2 is bounded by the chunk's length, and a constant chunk gives exactly 0.
// The chunk is read in two halves at once: from memory, two streams are a fifth faster than one.
static Moments moments(int32_t dtype, const void* grad, double first, int64_t begin, int64_t end) {
  const double shift = element(dtype, grad, begin);
  const int64_t half = (end - begin) / (2 * kLanes) * kLanes, middle = begin + half, rest = middle + half;
  Doubles sum[kSums] = {}, square[kSums] = {};
  if (dtype == SPG_FLOAT32) {
    const float* g = static_cast<const float*>(grad);
    add_streams(g + begin, g + middle, half, shift, sum, square);
  } else if (dtype == SPG_BFLOAT16) {
    const Bfloat16* g = static_cast<const Bfloat16*>(grad);
    add_streams(g + begin, g + middle, half, shift, sum, square);
  } else {
    float scratch[2][kBlock];
    for (int64_t i = 0; i < half; i += kBlock) {
      const int64_t count = std::min(kBlock, half - i);
      const float* x = read(dtype, grad, begin + i, count, scratch[0]);
      add_streams(x, read(dtype, grad, middle + i, count, scratch[1]), count, shift, sum, square);
    }
  }
  float last[2 * kLanes];
  std::fill(last, last + 2 * kLanes, float(shift));  // which adds 0
  copy_floats(dtype, grad, rest, end - rest, last);
  add_lanes(last, last + kLanes, shift, sum, square);
  double s[kLanes], q[kLanes];
  std::memcpy(s, sum, sizeof s);
  std::memcpy(q, square, sizeof q);
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    for (int lane = 0; lane < lanes; lane++) s[lane] += s[lane + lanes], q[lane] += q[lane + lanes];
  }
  const double mean = s[0] / double(end - begin);
  return {(shift - first) + mean, q[0] - s[0] * mean};
}

// Bounds of what is folded. Volatile, because of a minimum with a constant GCC 12 makes two computations, one of a constant,
// and selects between their results.
static const volatile float kMaxExponent = 60.0f, kMaxCode = 255.0f;

// tanh(y / 2) = (exp(y) - 1) / (exp(y) + 1) for y >= 0, from t = y log2(e). With n = round(t) and f = t - n, exp(y) is
// 2^n (1 + f Q(f)); divided by 2^n, with s = 2^-n, both are sums that lose nothing: for n = 0 the numerator is f Q(f) itself.
// Over every float32 t at most 1.4e-7 off, and 6.3e-7 of its value; 0 at 0, never above 1, and 1 from 26 on, as tanh is.
// t is at most kMaxExponent.
static inline float tanh_of_half(float t) {
  const float shifted = t + 12582912.0f;  // 1.5 * 2^23 puts n, rounded, into the low bits
  const float f = t - (shifted - 12582912.0f);
  const float s = float_of(0x3f800000u - (bits_of(shifted) << 23));
  float q = SPG_FMA(0.00133335392f, f, 0.00966624543f);
  q = SPG_FMA(q, f, 0.0555050038f);
  q = SPG_FMA(q, f, 0.240223512f);
  q = SPG_FMA(q, f, 0.693147123f);
  const float numerator = SPG_FMA(q, f, 1.0f - s);
  return numerator / (numerator + (s + s));
}

// Elements that are folded at once, in loops of a few steps each: a core looks ahead too little for all steps in one.
constexpr int64_t kFold = 64;
static_assert(kBlock % kFold == 0 && kBlock % kLanes == 0, "blocks of halves are whole folds and whole lanes");

template <class Grad>
static inline void fold_blocks(float* gamma, const Grad* g, const Standardize& z, int64_t count) {
  const double log2_scale = 2.88539008177792681 * z.power_scale;  // 2 log2(e)
  const float power = z.power, high = z.high, scale = float(log2_scale), offset = float(-z.low * log2_scale);
  const float max = kMaxExponent;
  const auto fold_block = [=](int64_t first, const Grad* __restrict x) {
    float* __restrict y = gamma + first;
    float t[kFold];
#pragma omp simd
    for (int64_t i = 0; i < kFold; i++) {
      t[i] = std::fabs(SPG_FMA(SPG_FMA(load(x + i), power, -high), scale, offset));
      t[i] = t[i] < max ? t[i] : max;
    }
#pragma omp simd
    for (int64_t i = 0; i < kFold; i++) {
      const float a = tanh_of_half(t[i]);
      y[i] = a > y[i] ? a : y[i];
    }
  };
  in_blocks<kFold>(count, fold_block, [=](int64_t first) {
    prefetch(kFold, g + first, gamma + first);
    return g + first;
  });
}

// The product with 28 is rounded to float32 before it is rounded up: a |z| that is a code in exact arithmetic stays that code.
template <class Grad>
static inline void fold_blocks(uint8_t* gamma, const Grad* g, const Standardize& z, int64_t count) {
  const double shift = z.first;
  const Doubles scale = Doubles{} + 28.0 * z.scale, offset = Doubles{} + 28.0 * z.offset;
  const float max = kMaxCode;
  const auto fold_block = [=](int64_t first, const Grad* __restrict x) {
    uint8_t* __restrict y = gamma + first;
    float scaled[kFold];
    int32_t code[kFold];
    for (int64_t i = 0; i < kFold; i += 2 * kDoubles) {
      store_floats(scaled + i, multiply_add(doubles(x + i) - shift, scale, offset),
                   multiply_add(doubles(x + i + kDoubles) - shift, scale, offset));
    }
#pragma omp simd
    for (int64_t i = 0; i < kFold; i++) {
      const float a = std::fabs(scaled[i]), t = a < max ? a : max;
      code[i] = int32_t(t) + (t > float(int32_t(t)));
    }
#pragma omp simd
    for (int64_t i = 0; i < kFold; i++) {
      const uint8_t c = uint8_t(code[i]);
      y[i] = c > y[i] ? c : y[i];
    }
  };
  in_blocks<kFold>(count, fold_block, [=](int64_t first) {
    prefetch(kFold, g + first, gamma + first);
    return g + first;
  });
}

template <class Grad>
static void fold_all(int32_t gamma_dtype, void* gamma, int64_t begin, const Grad* g, const Standardize& z, int64_t count) {
  const auto fold_in = [&](int64_t count, auto* gamma, const Grad* g) { fold_blocks(gamma, g, z, count); };
  if (gamma_dtype == SPG_CODE8) {
    by_blocks<kFold>(count, fold_in, static_cast<uint8_t*>(gamma) + begin, g);
  } else {
    by_blocks<kFold>(count, fold_in, static_cast<float*>(gamma) + begin, g);
  }
}

static void fold(int32_t gamma_dtype, void* gamma, int32_t grad_dtype, const void* grad, const Standardize& z, int64_t begin,
                 int64_t end) {
  if (grad_dtype == SPG_FLOAT32) {
    return fold_all(gamma_dtype, gamma, begin, static_cast<const float*>(grad) + begin, z, end - begin);
  }
  if (grad_dtype == SPG_BFLOAT16) {
    return fold_all(gamma_dtype, gamma, begin, static_cast<const Bfloat16*>(grad) + begin, z, end - begin);
  }
  float scratch[kBlock];
  through_scratch(begin, end, [&](int64_t first, int64_t count) {
    const float* g = read(grad_dtype, grad, first, count, scratch);
    fold_all(gamma_dtype, gamma, first, g, z, count);
  });
}
