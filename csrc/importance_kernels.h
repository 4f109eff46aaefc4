// Importance: statistics of a gradient's chunk, and the fold of its standardized values into gamma.
// Included once per instruction set: no include guard.

static double first_element(int32_t dtype, const void* data) {
  float scratch[1];
  return *read(dtype, data, 0, 1, scratch);
}

// float64 from float32 and back, a vector at a time, with the upper half of the floats loaded by itself. Compilers load all of
// them and take that half out, and processors have one unit for such moves where they have two for loads.
#if defined(SPG_AVX512)
typedef __m512d Doubles;
static inline Doubles doubles(const float* x) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x)); }
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  const __m512 lower = _mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(0xff, low));
  _mm512_storeu_ps(x, _mm512_maskz_insertf32x8(0xffff, lower, _mm512_maskz_cvtpd_ps(0xff, high), 1));
}
#elif SPG_VECTOR_BYTES == 32
typedef __m256d Doubles;
static inline Doubles doubles(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  _mm256_storeu_ps(x, _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)));
}
#else
typedef double Doubles __attribute__((vector_size(16)));
static inline Doubles doubles(const float* x) { return Doubles{x[0], x[1]}; }
static inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
static inline void store_floats(float* x, Doubles low, Doubles high) {
  x[0] = float(low[0]), x[1] = float(low[1]), x[2] = float(high[0]), x[3] = float(high[1]);
}
#endif
constexpr int64_t kDoubles = sizeof(Doubles) / sizeof(double);

// Sixteen running sums, whatever the vector width, so that every instruction set adds in the same order.
constexpr int64_t kLanes = 16, kSums = kLanes / kDoubles;

static inline void add_lanes(const float* x, double shift, Doubles* sum, Doubles* square) {
  for (int64_t k = 0; k < kSums; k++) {
    const Doubles d = doubles(x + k * kDoubles) - shift;
    sum[k] += d;
    square[k] = multiply_add(d, d, square[k]);
  }
}

// Sums are of g - shift, with the chunk's first element as the shift. Because the shift is itself an element, the
// cancellation in m2 is bounded by the chunk's length, and a constant chunk gives exactly 0.
// The chunk is read in two halves at once: from memory, two streams are a fifth faster than one.
static Moments moments(int32_t dtype, const void* grad, double first, int64_t begin, int64_t end) {
  float scratch[2][kBlock];
  const double shift = *read(dtype, grad, begin, 1, scratch[0]);
  const int64_t half = (end - begin) / (2 * kLanes) * kLanes, middle = begin + half, rest = middle + half;
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, middle);
  Doubles sum[kSums] = {}, square[kSums] = {};
  for (int64_t b = 0; b < half; b += block) {
    const int64_t count = std::min(block, half - b);
    const float* x = read(dtype, grad, begin + b, count, scratch[0]);
    const float* y = read(dtype, grad, middle + b, count, scratch[1]);
    for (int64_t i = 0; i < count; i += kLanes) {
      prefetch(kLanes, x + i, y + i);
      add_lanes(x + i, shift, sum, square);
      add_lanes(y + i, shift, sum, square);
    }
  }
  float last[2 * kLanes];
  std::fill(last, last + 2 * kLanes, float(shift));  // which adds 0
  std::copy_n(read(dtype, grad, rest, end - rest, scratch[0]), end - rest, last);
  add_lanes(last, shift, sum, square);
  add_lanes(last + kLanes, shift, sum, square);
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
static const volatile float kMostExponent = 60.0f, kMostCode = 255.0f;

// tanh(y / 2) = (exp(y) - 1) / (exp(y) + 1) for y >= 0, from t = y log2(e). With n = round(t) and f = t - n, exp(y) is
// 2^n (1 + f Q(f)); divided by 2^n, with s = 2^-n, both are sums that lose nothing: for n = 0 the numerator is f Q(f) itself.
// Over every float32 t at most 1.4e-7 off, and 6.3e-7 of its value; 0 at 0, never above 1, and 1 from 26 on, as tanh is.
// t is at most kMostExponent.
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

static inline void fold_value(float* gamma, const float* g, const Standardize& z, int64_t count) {
  const double log2_scale = 2.88539008177792681 * z.power_scale;  // 2 log2(e)
  const float power = z.power, high = z.high, scale = float(log2_scale), offset = float(-z.low * log2_scale);
  const float most = kMostExponent;
  const auto fold_block = [=](int64_t first, auto n, const float* __restrict x) {
    float* __restrict y = gamma + first;
    float t[kFold];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      t[i] = std::fabs(SPG_FMA(SPG_FMA(x[i], power, -high), scale, offset));
      t[i] = t[i] < most ? t[i] : most;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float a = tanh_of_half(t[i]);
      y[i] = a > y[i] ? a : y[i];
    }
  };
  in_blocks<kFold>(count, fold_block, [=](int64_t first, int64_t n) {
    prefetch(n, g + first, gamma + first);
    return g + first;
  });
}

// scaled <- (g - shift) scale + offset, in float64, rounded to float32.
static inline void standardize(float* __restrict scaled, const float* __restrict g, int64_t count, double shift, double scale,
                               double offset) {
  const Doubles scales = Doubles{} + scale, offsets = Doubles{} + offset;
  const int64_t whole = count / (2 * kDoubles) * (2 * kDoubles);
  for (int64_t i = 0; i < whole; i += 2 * kDoubles) {
    store_floats(scaled + i, multiply_add(doubles(g + i) - shift, scales, offsets),
                 multiply_add(doubles(g + i + kDoubles) - shift, scales, offsets));
  }
  for (int64_t i = whole; i < count; i++) scaled[i] = float(SPG_FMA64(double(g[i]) - shift, scale, offset));
}

// The product is rounded to float32 before it is rounded up: a |z| that is a code in exact arithmetic stays that code.
static inline void fold_code(uint8_t* gamma, const float* g, const Standardize& z, int64_t count) {
  const double shift = z.first, scale = 28.0 * z.scale, offset = 28.0 * z.offset;
  const float most = kMostCode;
  const auto fold_block = [=](int64_t first, auto n, const float* x) {
    uint8_t* __restrict y = gamma + first;
    float scaled[kFold];
    int32_t code[kFold];
    standardize(scaled, x, n, shift, scale, offset);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const float a = std::fabs(scaled[i]), t = a < most ? a : most;
      code[i] = int32_t(t) + (t > float(int32_t(t)));
    }
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      const uint8_t c = uint8_t(code[i]);
      y[i] = c > y[i] ? c : y[i];
    }
  };
  in_blocks<kFold>(count, fold_block, [=](int64_t first, int64_t n) {
    prefetch(n, g + first);
    prefetch(1, gamma + first);
    return g + first;
  });
}

static void fold(int32_t gamma_dtype, void* gamma, int32_t grad_dtype, const void* grad, const Standardize& z, int64_t begin,
                 int64_t end) {
  float scratch[kBlock];
  const int64_t block = block_size(grad_dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    const float* g = read(grad_dtype, grad, b, count, scratch);
    if (gamma_dtype == SPG_CODE8) {
      fold_code(static_cast<uint8_t*>(gamma) + b, g, z, count);
    } else {
      fold_value(static_cast<float*>(gamma) + b, g, z, count);
    }
  }
}
