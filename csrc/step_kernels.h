// The soft mask alone, and SGD and Adam steps with the mask inside. All arithmetic is float32, rounded once on the way out.
// Included once per instruction set: no include guard.

// Choices as bit masks, for options of the whole loop and for single elements alike: they stay data. Given a condition,
// GCC 12 makes control flow of it, then masked loads of what one side does not need, or no vector loop at all.
static inline uint32_t mask_if(bool condition) { return 0u - uint32_t(condition); }

static inline float select(uint32_t mask, float yes, float no) {
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// The factor f = 1 - gamma of element i of a block, one type for each way gamma comes.
struct FactorOfValue {
  const float* gamma;
  inline float operator()(int64_t i) const { return 1.0f - gamma[i]; }
};

struct FactorDecoded {
  const float* factor;
  inline float operator()(int64_t i) const { return factor[i]; }
};

struct FactorOfOne {
  float f;
  inline float operator()(int64_t) const { return f; }
};

static_assert(kBlock % kCodes == 0, "or every block of halves ends in a padded decode");

template <Order kOrder = kForwards, class Body>
static inline void with_factor(Gamma gamma, int64_t begin, int64_t count, Body body) {
  if (gamma.dtype == SPG_FLOAT32) {
    const float* value = static_cast<const float*>(gamma.data) + begin;
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t i, int64_t n) {
      prefetch(n, value + i);
      return FactorOfValue{value + i};
    });
  } else if (gamma.dtype == SPG_CODE8) {
    const uint8_t* code = static_cast<const uint8_t*>(gamma.data) + begin;
    alignas(64) float decoded[kCodes];
    float* factor = decoded;
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t i, int64_t n) {
      prefetch(1, code + i);
      if (n == kCodes) {
        decode(code + i, factor);
      } else {
        uint8_t last[kCodes] = {};
        std::memcpy(last, code + i, n);
        decode(last, factor);
      }
      return FactorDecoded{factor};
    });
  } else {
    const float f = 1.0f - *static_cast<const float*>(gamma.data);
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t, int64_t) { return FactorOfOne{f}; });
  }
}

// body(true or false, as a type): a loop for each of the two. Options that stay data cost instructions, three apiece in 256-bit
// loops, so the usual options are constants in a loop of their own.
template <class Body>
static inline void with_choice(bool choice, const Body& body) {
  if (choice) {
    body(std::true_type());
  } else {
    body(std::false_type());
  }
}

// A select and not a product alone: 0 * inf is NaN, and a protected parameter must not see it.
static inline float masked(float g, float f) { return select(mask_if(f != 0.0f), g * f, 0.0f); }

// A parameter with f = 0 keeps its bits, whatever the update is.
static inline float moved(float p, float f, float scale, float update) {
  return select(mask_if(f != 0.0f), SPG_FMA(f * scale, update, p), p);
}

template <class Factor, class Count>
static inline void soft_mask_block(float* __restrict g, Factor factor, Count count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) g[i] = masked(g[i], factor(i));  // a product with 1 is exact
}

#if defined(SPG_AVX512)
// The loop that waits for memory most. The fewer instructions wait for a load, the further ahead a core loads: the fixup is a
// compare and a select in one, which no compiler finds, and two 256-bit halves of a line take less time than all of it at once.
// On 64 million elements 5 % faster than the loop above on Zen 4, level with the bare product.
template <class Count>
static inline void soft_mask_block(float* __restrict g, FactorOfValue factor, Count count) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256i zero_where_zero = _mm256_set1_epi32(0x800);  // for operands of class 2, zeros, answer 8, +0; else no change
  const auto mask = [=](float* at, const float* gamma) __attribute__((always_inline)) {
    const __m256 f = _mm256_sub_ps(one, _mm256_loadu_ps(gamma));
    _mm256_storeu_ps(at, _mm256_fixupimm_ps(_mm256_mul_ps(_mm256_loadu_ps(at), f), f, zero_where_zero, 0));
  };
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    mask(g + i, factor.gamma + i);
    mask(g + i + 8, factor.gamma + i + 8);
  }
  for (int64_t i = whole; i < count; i++) g[i] = masked(g[i], factor(i));
}
#endif

static void soft_mask(int32_t dtype, void* grad, Gamma gamma, int64_t begin, int64_t end) {
  float scratch[kBlock];
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* g = read(dtype, grad, b, count, scratch);
    with_factor<kBothHalves>(gamma, b, count, [=](int64_t i, auto n, auto factor) { soft_mask_block(g + i, factor, n); });
    write(dtype, grad, b, count, g);
  }
}

template <class Factor, class Count>
static inline void update_mask_block(float* __restrict p, const float* __restrict old, Factor factor, Count count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    p[i] = select(mask_if(f == 1.0f), p[i], moved(old[i], f, 1.0f, p[i] - old[i]));
  }
}

static void update_mask(int32_t dtype, void* param, const void* old_param, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], old_scratch[kBlock];
  const int64_t block = block_size(dtype == SPG_FLOAT32, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(dtype, param, b, count, p_scratch);
    const float* old = read(dtype, old_param, b, count, old_scratch);
    with_factor<kBothHalves>(gamma, b, count,
                             [=](int64_t i, auto n, auto factor) { update_mask_block(p + i, old + i, factor, n); });
    write(dtype, param, b, count, p);
  }
}

// Element i of a tensor that may not be there.
static inline float* at(float* data, int64_t i) { return data ? data + i : nullptr; }

// In the steps, the mask on the gradient and the mask on the update are one code path: the other factor is 1, and a
// product with 1 is exact. The fused multiply-adds are where torch's own kernels have them, so that with f = 1 the bits are
// torch's (SGD) or within rounding (Adam, whose update and decay are one sum here) even where a sum cancels.
template <class Usual, class Plain, class Momentum, class Factor, class Count>
static inline void sgd_block(Usual usual, Plain plain, Momentum has_momentum, const SgdStep& s, float* __restrict p,
                             const float* __restrict g, float* __restrict buf, Factor factor, Count count) {
  const float grad_factor = s.grad_factor, lr = s.lr, momentum = s.momentum, share = s.gradient_share, decay = s.weight_decay;
  const uint32_t on_gradient = mask_if(!usual && s.mask_gradient), decays = mask_if(!plain && decay != 0.0f);
  const uint32_t first = mask_if(!usual && s.first), nesterov = mask_if(!usual && s.nesterov);
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    float d = masked(plain ? g[i] : grad_factor * g[i], select(on_gradient, f, 1.0f));
    d = select(decays, SPG_FMA(decay, p[i], d), d);
    if (has_momentum) {
      const float b = select(first, d, SPG_FMA(share, d, momentum * buf[i]));
      buf[i] = b;
      d = select(nesterov, SPG_FMA(momentum, b, d), b);
    }
    p[i] = moved(p[i], select(on_gradient, 1.0f, f), -lr, d);
  }
}

static void sgd(const SgdStep& step, const Sgd& t, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], g_scratch[kBlock], buf_scratch[kBlock];
  const bool usual = !step.mask_gradient && !step.first && !step.nesterov;
  const bool plain = step.grad_factor == 1.0f && step.weight_decay == 0.0f;
  const bool in_place = t.dtype == SPG_FLOAT32;  // the state is then float32 too
  const int64_t block = block_size(in_place, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(t.dtype, t.param, b, count, p_scratch);
    const float* g = read(t.dtype, t.grad, b, count, g_scratch);
    float* buf = t.momentum_buffer ? read(t.state_dtype, t.momentum_buffer, b, count, buf_scratch) : nullptr;
    with_choice(usual, [&](auto usual_type) {
      with_choice(plain, [&](auto plain_type) {
        with_choice(buf, [&](auto has_momentum) {
          with_factor(gamma, b, count, [=](int64_t i, auto n, auto factor) {
            prefetch(n, p + i, g + i);
            if (has_momentum) prefetch(n, buf + i);
            sgd_block(usual_type, plain_type, has_momentum, step, p + i, g + i, at(buf, i), factor, n);
          });
        });
      });
    });
    if (buf) write(t.state_dtype, t.momentum_buffer, b, count, buf);
    write(t.dtype, t.param, b, count, p);
  }
}

template <class Usual, class Amsgrad, class Factor, class Count>
static inline void adam_block(Usual usual, Amsgrad amsgrad, const AdamStep& s, float* __restrict p, const float* __restrict g,
                              float* __restrict m, float* __restrict v, float* __restrict v_max, Factor factor,
                              Count count) {
  const float grad_factor = s.grad_factor, beta2 = s.beta2, square_share = s.exp_avg_sq_share, step_size = s.step_size;
  const float correction = s.inverse_correction2, eps = s.eps, coupled = s.coupled_decay, decoupled = s.decoupled_decay;
  const uint32_t on_gradient = mask_if(!usual && s.mask_gradient);
  const uint32_t decays_gradient = mask_if(!usual && coupled != 0.0f), decays = mask_if(decoupled != 0.0f);
  // lerp(m, d, share) from its nearer end, as torch does: with beta1 = 0 the average is the gradient exactly.
  const uint32_t from_average = mask_if(usual || s.exp_avg_share < 0.5f);
  const float share = s.exp_avg_share < 0.5f ? s.exp_avg_share : -s.beta1;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float f = factor(i);
    float d = masked(grad_factor * g[i], select(on_gradient, f, 1.0f));
    d = select(decays_gradient, SPG_FMA(coupled, p[i], d), d);
    const float average = SPG_FMA(share, d - m[i], select(from_average, m[i], d));
    const float square = SPG_FMA(square_share * d, d, beta2 * v[i]);
    m[i] = average;
    v[i] = square;
    float bound = square;
    if (amsgrad) {
      bound = v_max[i] > square ? v_max[i] : square;
      v_max[i] = bound;
    }
    const float denominator = SPG_FMA(std::sqrt(bound), correction, eps);
    float delta = -step_size * average / denominator;
    delta = select(decays, SPG_FMA(-decoupled, p[i], delta), delta);
    p[i] = moved(p[i], select(on_gradient, 1.0f, f), 1.0f, delta);
  }
}

static void adam(const AdamStep& step, const Adam& t, Gamma gamma, int64_t begin, int64_t end) {
  float p_scratch[kBlock], g_scratch[kBlock], m_scratch[kBlock], v_scratch[kBlock], max_scratch[kBlock];
  const bool usual = !step.mask_gradient && step.coupled_decay == 0.0f && step.exp_avg_share < 0.5f;
  const bool in_place = t.dtype == SPG_FLOAT32;
  const int64_t block = block_size(in_place, begin, end);
  for (int64_t b = begin; b < end; b += block) {
    const int64_t count = std::min(block, end - b);
    float* p = read(t.dtype, t.param, b, count, p_scratch);
    const float* g = read(t.dtype, t.grad, b, count, g_scratch);
    float* m = read(t.state_dtype, t.exp_avg, b, count, m_scratch);
    float* v = read(t.state_dtype, t.exp_avg_sq, b, count, v_scratch);
    float* v_max = t.max_exp_avg_sq ? read(t.state_dtype, t.max_exp_avg_sq, b, count, max_scratch) : nullptr;
    with_choice(usual, [&](auto usual_type) {
      with_choice(v_max, [&](auto amsgrad) {
        with_factor(gamma, b, count, [=](int64_t i, auto n, auto factor) {
          prefetch(n, p + i, g + i, m + i, v + i);
          adam_block(usual_type, amsgrad, step, p + i, g + i, m + i, v + i, at(v_max, i), factor, n);
        });
      });
    });
    if (v_max) write(t.state_dtype, t.max_exp_avg_sq, b, count, v_max);
    write(t.dtype, t.param, b, count, p);
    write(t.state_dtype, t.exp_avg, b, count, m);
    write(t.state_dtype, t.exp_avg_sq, b, count, v);
  }
}
