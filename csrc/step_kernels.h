// The soft mask alone, and SGD and Adam steps with the mask inside. All arithmetic is float32, rounded once on the way out.
// Included once per instruction set: no include guard.

// The factor f = 1 - gamma of element i, one type for each way gamma is stored.
struct FactorOfValue {
  const float* gamma;
  inline float operator()(int64_t i) const { return 1.0f - gamma[i]; }
};

struct FactorOfCode {
  const uint8_t* code;
  // f = 2 / (1 + exp(c / 14)). With c = 14 ln 2 n + t, exp(c / 14) = 2^n (1 + t P(t)) and, with s = 2^-n,
  // f = 2 s / (1 + (s + t P(t))): never more than one unit from the rounded f, over all 256 codes. Computed, because the
  // gather from a 256-entry table costs more than this arithmetic.
  inline float operator()(int64_t i) const {
    const float c = float(int32_t(code[i]));
    const float shifted = SPG_FMA(c, 0.10304964f, 12582912.0f);  // 1.5 * 2^23 puts n, rounded, into the low bits
    const float n = shifted - 12582912.0f;
    float t = SPG_FMA(n, -9.703125f, c);  // 14 ln 2 in two parts; n times the first is exact
    t = SPG_FMA(n, -0.00093552785f, t);
    float p = SPG_FMA(1.85055499e-10f, t, 1.55613957e-08f);
    p = SPG_FMA(p, t, 1.08461222e-06f);
    p = SPG_FMA(p, t, 6.0737988e-05f);
    p = SPG_FMA(p, t, 0.00255102036f);
    p = SPG_FMA(p, t, 0.0714285746f);
    const float s = float_of(0x3f800000u - (bits_of(shifted) << 23));
    const float f = (s + s) / (1.0f + SPG_FMA(p, t, s));
    return c < 253.0f ? f : 0.0f;
  }
};

struct FactorOfOne {
  float f;
  inline float operator()(int64_t) const { return f; }
};

template <class Body>
static inline void with_factor(Gamma gamma, int64_t begin, const Body& body) {
  if (gamma.dtype == SPG_FLOAT32) {
    body(FactorOfValue{static_cast<const float*>(gamma.data) + begin});
  } else if (gamma.dtype == SPG_CODE8) {
    body(FactorOfCode{static_cast<const uint8_t*>(gamma.data) + begin});
  } else {
    body(FactorOfOne{1.0f - *static_cast<const float*>(gamma.data)});
  }
}

// A select and not a product alone: 0 * inf is NaN, and a protected parameter must not see it.
static inline float masked(float g, float f) { return f == 0.0f ? 0.0f : g * f; }

// A parameter with f = 0 keeps its bits, whatever the update is.
static inline float moved(float p, float f, float delta) { return f == 0.0f ? p : p + f * delta; }

template <class Factor>
static inline void soft_mask_block(float* __restrict g, Factor factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    g[i] = f == 1.0f ? g[i] : masked(g[i], f);
  }
}

static void soft_mask(int32_t dtype, void* grad, Gamma gamma, int64_t begin, int64_t end) {
  float scratch[kBlock];
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* g = read(dtype, grad, b, count, scratch);
    with_factor(gamma, b, [=](auto factor) { soft_mask_block(g, factor, count); });
    write(dtype, grad, b, count, g);
  }
}

template <class Factor>
static inline void update_mask_block(float* __restrict p, const float* __restrict old, Factor factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    const float between = old[i] + f * (p[i] - old[i]);
    p[i] = f == 1.0f ? p[i] : f == 0.0f ? old[i] : between;
  }
}

static void update_mask(int32_t dtype, void* param, const void* old_param, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], old_scratch[kBlock];
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(dtype, param, b, count, p_scratch);
    const float* old = read(dtype, old_param, b, count, old_scratch);
    with_factor(gamma, b, [=](auto factor) { update_mask_block(p, old, factor, count); });
    write(dtype, param, b, count, p);
  }
}

// In the steps, the mask on the gradient and the mask on the update are one code path: the other factor is 1, and a
// product with 1 is exact.
template <bool has_momentum, class Factor>
static inline void sgd_block(const SgdStep& step, float* __restrict p, const float* __restrict g, float* __restrict buf,
                             Factor factor, int64_t count) {
  const SgdStep s = step;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    float d = masked(s.sign * g[i], s.mask_gradient ? f : 1.0f);
    d = s.weight_decay != 0.0f ? d + s.weight_decay * p[i] : d;
    if (has_momentum) {
      const float b = s.first ? d : s.momentum * buf[i] + s.gradient_share * d;
      buf[i] = b;
      d = s.nesterov ? d + s.momentum * b : b;
    }
    p[i] = moved(p[i], s.mask_gradient ? 1.0f : f, -s.lr * d);
  }
}

static void sgd(const SgdStep& step, const Sgd& t, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], g_scratch[kBlock], buf_scratch[kBlock];
  const bool in_place = t.dtype == SPG_FLOAT32;  // the state is then float32 too
  const int64_t block = block_size(in_place, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(t.dtype, t.param, b, count, p_scratch);
    const float* g = read(t.dtype, t.grad, b, count, g_scratch);
    if (t.momentum_buffer) {
      float* buf = read(t.state_dtype, t.momentum_buffer, b, count, buf_scratch);
      with_factor(gamma, b, [&](auto factor) { sgd_block<true>(step, p, g, buf, factor, count); });
      write(t.state_dtype, t.momentum_buffer, b, count, buf);
    } else {
      with_factor(gamma, b, [&](auto factor) { sgd_block<false>(step, p, g, nullptr, factor, count); });
    }
    write(t.dtype, t.param, b, count, p);
  }
}

template <bool amsgrad, class Factor>
static inline void adam_block(const AdamStep& step, float* __restrict p, const float* __restrict g, float* __restrict m,
                              float* __restrict v, float* __restrict v_max, Factor factor, int64_t count) {
  const AdamStep s = step;
  // lerp(m, d, share) from its nearer end, as torch does: with beta1 = 0 the average is the gradient exactly.
  const bool from_average = s.exp_avg_share < 0.5f;
  const float share = from_average ? s.exp_avg_share : -s.beta1;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    float d = masked(s.sign * g[i], s.mask_gradient ? f : 1.0f);
    d = s.coupled_decay != 0.0f ? d + s.coupled_decay * p[i] : d;
    const float average = (from_average ? m[i] : d) + share * (d - m[i]);
    const float square = s.beta2 * v[i] + s.exp_avg_sq_share * d * d;
    m[i] = average;
    v[i] = square;
    float bound = square;
    if (amsgrad) {
      bound = v_max[i] > square ? v_max[i] : square;
      v_max[i] = bound;
    }
    const float denominator = std::sqrt(bound) / s.bias_correction2_sqrt + s.eps;
    float delta = -s.step_size * (average / denominator);
    delta = s.decoupled_decay != 0.0f ? delta - s.decoupled_decay * p[i] : delta;
    p[i] = moved(p[i], s.mask_gradient ? 1.0f : f, delta);
  }
}

static void adam(const AdamStep& step, const Adam& t, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], g_scratch[kBlock], m_scratch[kBlock], v_scratch[kBlock], max_scratch[kBlock];
  const bool in_place = t.dtype == SPG_FLOAT32;
  const int64_t block = block_size(in_place, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(t.dtype, t.param, b, count, p_scratch);
    const float* g = read(t.dtype, t.grad, b, count, g_scratch);
    float* m = read(t.state_dtype, t.exp_avg, b, count, m_scratch);
    float* v = read(t.state_dtype, t.exp_avg_sq, b, count, v_scratch);
    if (t.max_exp_avg_sq) {
      float* v_max = read(t.state_dtype, t.max_exp_avg_sq, b, count, max_scratch);
      with_factor(gamma, b, [&](auto factor) { adam_block<true>(step, p, g, m, v, v_max, factor, count); });
      write(t.state_dtype, t.max_exp_avg_sq, b, count, v_max);
    } else {
      with_factor(gamma, b, [&](auto factor) { adam_block<false>(step, p, g, m, v, nullptr, factor, count); });
    }
    write(t.dtype, t.param, b, count, p);
    write(t.state_dtype, t.exp_avg, b, count, m);
    write(t.state_dtype, t.exp_avg_sq, b, count, v);
  }
}
