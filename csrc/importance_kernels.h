// Importance: statistics of a gradient's chunk, and the fold of its standardized values into gamma.
// Included once per instruction set: no include guard.

static double first_element(int32_t dtype, const void* data) {
  float scratch[1];
  return *read(dtype, data, 0, 1, scratch);
}

constexpr int kLanes = 16;

// Sixteen running sums, whatever the vector width, so that every instruction set adds in the same order.
static inline void add_moments(const float* __restrict x, int64_t count, double shift, double* __restrict sum,
                               double* __restrict square) {
  const int64_t whole = count / kLanes * kLanes;
  double s[kLanes], q[kLanes];
  for (int lane = 0; lane < kLanes; lane++) s[lane] = sum[lane], q[lane] = square[lane];
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; lane++) {
      const double d = double(x[i + lane]) - shift;
      s[lane] += d;
      q[lane] = SPG_FMA64(d, d, q[lane]);
    }
  }
  for (int64_t i = whole; i < count; i++) {
    const double d = double(x[i]) - shift;
    s[i - whole] += d;
    q[i - whole] = SPG_FMA64(d, d, q[i - whole]);
  }
  for (int lane = 0; lane < kLanes; lane++) sum[lane] = s[lane], square[lane] = q[lane];
}

// Sums are of g - shift, with the chunk's first element as the shift. Because the shift is itself an element, the
// cancellation in m2 is bounded by the chunk's length, and a constant chunk gives exactly 0.
static Moments moments(int32_t dtype, const void* grad, double first, int64_t begin, int64_t end) {
  float scratch[kBlock];
  double sum[kLanes] = {}, square[kLanes] = {};
  const double shift = *read(dtype, grad, begin, 1, scratch);
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    add_moments(read(dtype, grad, b, count, scratch), count, shift, sum, square);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half], square[lane] += square[lane + half];
  }
  const double mean = sum[0] / double(end - begin);
  return {(shift - first) + mean, square[0] - sum[0] * mean};
}

// tanh(y / 2) = (exp(y) - 1) / (exp(y) + 1) for y >= 0, from t = y log2(e). With n = round(t) and f = t - n, exp(y) is
// 2^n (1 + f Q(f)); divided by 2^n, with s = 2^-n, both are sums that lose nothing: for n = 0 the numerator is f Q(f) itself.
// Over every float32 t at most 1.4e-7 off, and 6.3e-7 of its value; 0 at 0, never above 1, and 1 from 26 on, as tanh is.
static inline float tanh_of_half(float t) {
  t = t < 60.0f ? t : 60.0f;
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

static inline void fold_value(float* __restrict gamma, const float* __restrict g, const Standardize& z, int64_t count) {
  const double log2_scale = 2.88539008177792681 * z.power_scale;  // 2 log2(e)
  const float power = z.power, high = z.high, scale = float(log2_scale), offset = float(-z.low * log2_scale);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float a = tanh_of_half(std::fabs(SPG_FMA(SPG_FMA(g[i], power, -high), scale, offset)));
    gamma[i] = a > gamma[i] ? a : gamma[i];
  }
}

// The product is rounded to float32 before it is rounded up: a |z| that is a code in exact arithmetic stays that code.
static inline void fold_code(uint8_t* __restrict gamma, const float* __restrict g, const Standardize& z, int64_t count) {
  const double first = z.first, scale = 28.0 * z.scale, offset = 28.0 * z.offset;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    float scaled = std::fabs(float(SPG_FMA64(double(g[i]) - first, scale, offset)));
    scaled = scaled < 255.0f ? scaled : 255.0f;
    const int32_t floor = int32_t(scaled);
    const int32_t code = floor + (scaled > float(floor));
    const int32_t old = gamma[i];
    gamma[i] = uint8_t(code > old ? code : old);
  }
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
