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
      q[lane] += d * d;
    }
  }
  for (int64_t i = whole; i < count; i++) {
    const double d = double(x[i]) - shift;
    s[i - whole] += d;
    q[i - whole] += d * d;
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

// tanh(x) = x P(x^2) / Q(x^2) for x >= 0, fitted to 2.1e-8 relative on [0, 9.02], where float32's tanh becomes 1.
// All coefficients are positive, so nothing cancels.
static inline float tanh_of(float x) {
  const float t = x < 9.02f ? x : 9.02f;
  const float y = t * t;
  float p = SPG_FMA(1.33199094675e-8f, y, 2.05841576983e-5f);
  p = SPG_FMA(p, y, 0.00349407898398f);
  p = SPG_FMA(p, y, 0.13379756538f);
  p = SPG_FMA(p, y, 0.999999979307f);
  float q = SPG_FMA(7.7623831919e-7f, y, 0.000328316311277f);
  q = SPG_FMA(q, y, 0.0258712458347f);
  q = SPG_FMA(q, y, 0.467130718601f);
  q = SPG_FMA(q, y, 1.0f);
  const float r = t * p / q;
  return r < 1.0f ? r : 1.0f;
}

static inline void fold_value(float* __restrict gamma, const float* __restrict g, const Standardize& z, int64_t count) {
  const double first = z.first, mean = z.mean, inverse_std = z.inverse_std;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float a = tanh_of(std::fabs(float(((double(g[i]) - first) - mean) * inverse_std)));
    gamma[i] = a > gamma[i] ? a : gamma[i];
  }
}

// The product is rounded to float32 before it is rounded up: a |z| that is a code in exact arithmetic stays that code.
static inline void fold_code(uint8_t* __restrict gamma, const float* __restrict g, const Standardize& z, int64_t count) {
  const double first = z.first, mean = z.mean, inverse_std = 28.0 * z.inverse_std;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    float scaled = std::fabs(float(((double(g[i]) - first) - mean) * inverse_std));
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
