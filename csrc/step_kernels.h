// The soft mask alone, and SGD and Adam steps with the mask inside. All arithmetic is float32, rounded once on the way out.
// Included once per instruction set: no include guard.

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

static_assert(kBlock % kCodes == 0, "or every block of halves ends in a block of copies");

template <Order kOrder = kForwards, class Body>
static inline void with_factor(Gamma gamma, int64_t count, Body body) {
  if (gamma.dtype == SPG_FLOAT32) {
    const float* value = static_cast<const float*>(gamma.data);
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t i) {
      prefetch(kCodes, value + i);
      return FactorOfValue{value + i};
    });
  } else if (gamma.dtype == SPG_CODE8) {
    const uint8_t* code = static_cast<const uint8_t*>(gamma.data);
    alignas(64) float decoded[kCodes];
    float* factor = decoded;
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t i) {
      prefetch(kCodes, code + i);
      decode(code + i, factor);
      return FactorDecoded{factor};
    });
  } else {
    const float f = 1.0f - *static_cast<const float*>(gamma.data);
    in_blocks<kCodes, kOrder>(count, body, [=](int64_t) { return FactorOfOne{f}; });
  }
}

// body(true or false, as a type): a loop for each of the two. Options that stay data cost instructions, three apiece in
// 256-bit loops, so the usual options are constants in a loop of their own.
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

template <class Grad, class Factor>
static inline void soft_mask_block(Grad* __restrict g, Factor factor) {
#pragma omp simd
  for (int64_t i = 0; i < kCodes; i++) store(g + i, masked(load(g + i), factor(i)));  // a product with 1 is exact
}

#if defined(SPG_AVX512)
// The loop that waits for memory most. The fewer instructions wait for a load, the further ahead a core loads: the fixup is a
// compare and a select in one, which no compiler finds, and two 256-bit halves of a line take less time than all of it at
// once. On 64 million elements 5 % faster than the loop above on Zen 4, level with the bare product.
static inline void soft_mask_block(float* __restrict g, FactorOfValue factor) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256i zero_where_zero = _mm256_set1_epi32(0x800);  // for operands of class 2, zeros, answer 8, +0; else no change
  const auto mask = [=](float* at, const float* gamma) __attribute__((always_inline)) {
    const __m256 f = _mm256_sub_ps(one, _mm256_loadu_ps(gamma));
    _mm256_storeu_ps(at, _mm256_fixupimm_ps(_mm256_mul_ps(_mm256_loadu_ps(at), f), f, zero_where_zero, 0));
  };
  for (int64_t i = 0; i < kCodes; i += 16) {
    mask(g + i, factor.gamma + i);
    mask(g + i + 8, factor.gamma + i + 8);
  }
}
#endif

template <class Grad>
static void soft_mask_all(Gamma gamma, Grad* g, int64_t count) {
  by_blocks<kCodes>(count, [](int64_t count, Gamma gamma, Grad* g) {
    with_factor<kBothHalves>(gamma, count, [=](int64_t i, auto factor) { soft_mask_block(g + i, factor); });
  }, gamma, g);
}

static void soft_mask(int32_t dtype, void* grad, Gamma gamma, int64_t begin, int64_t end) {
  if (dtype == SPG_FLOAT32) return soft_mask_all(from(gamma, begin), static_cast<float*>(grad) + begin, end - begin);
  if (dtype == SPG_BFLOAT16) return soft_mask_all(from(gamma, begin), static_cast<Bfloat16*>(grad) + begin, end - begin);
  float scratch[kBlock];
  through_scratch(begin, end, [&](int64_t first, int64_t count) {
    float* g = read(dtype, grad, first, count, scratch);
    soft_mask_all(from(gamma, first), g, count);
    write(dtype, grad, first, count, g);
  });
}

template <class Param, class Factor>
static inline void update_mask_block(Param* __restrict p, const Param* __restrict old, Factor factor) {
#pragma omp simd
  for (int64_t i = 0; i < kCodes; i++) {
    const float f = factor(i), stepped = load(p + i), before = load(old + i);
    store(p + i, select(mask_if(f == 1.0f), stepped, moved(before, f, 1.0f, stepped - before)));
  }
}

template <class Param>
static void update_mask_all(Gamma gamma, Param* p, const Param* old, int64_t count) {
  by_blocks<kCodes>(count, [](int64_t count, Gamma gamma, Param* p, const Param* old) {
    with_factor<kBothHalves>(gamma, count, [=](int64_t i, auto factor) { update_mask_block(p + i, old + i, factor); });
  }, gamma, p, old);
}

template <class Param>
static void update_mask_in_place(void* param, const void* old, Gamma gamma, int64_t begin, int64_t end) {
  update_mask_all(from(gamma, begin), static_cast<Param*>(param) + begin, static_cast<const Param*>(old) + begin, end - begin);
}

static void update_mask(int32_t dtype, void* param, const void* old_param, Gamma gamma, int64_t begin, int64_t end) {
  if (dtype == SPG_FLOAT32) return update_mask_in_place<float>(param, old_param, gamma, begin, end);
  if (dtype == SPG_BFLOAT16) return update_mask_in_place<Bfloat16>(param, old_param, gamma, begin, end);
  float p_scratch[kBlock], old_scratch[kBlock];
  through_scratch(begin, end, [&](int64_t first, int64_t count) {
    float* p = read(dtype, param, first, count, p_scratch);
    const float* old = read(dtype, old_param, first, count, old_scratch);
    update_mask_all(from(gamma, first), p, old, count);
    write(dtype, param, first, count, p);
  });
}

// In the steps, the mask on the gradient and the mask on the update are one code path: the other factor is 1, and a
// product with 1 is exact. The fused multiply-adds are where torch's own kernels have them, so that with f = 1 the bits are
// torch's (SGD) or within rounding (Adam, whose update and decay are one sum here) even where a sum cancels.
template <class Usual, class Plain, class Momentum, class Param, class State, class Factor>
static inline void sgd_block(Usual usual, Plain plain, Momentum has_momentum, const SgdStep& s, Param* __restrict p,
                             const Param* __restrict g, State* __restrict buf, Factor factor) {
  const float grad_factor = s.grad_factor, lr = s.lr, momentum = s.momentum, share = s.gradient_share, decay = s.weight_decay;
  const uint32_t on_gradient = mask_if(!usual && s.mask_gradient), decays = mask_if(!plain && decay != 0.0f);
  const uint32_t first = mask_if(!usual && s.first), nesterov = mask_if(!usual && s.nesterov);
#pragma omp simd
  for (int64_t i = 0; i < kCodes; i++) {
    const float f = factor(i), x = load(p + i), grad = load(g + i);
    float d = masked(plain ? grad : grad_factor * grad, select(on_gradient, f, 1.0f));
    d = select(decays, SPG_FMA(decay, x, d), d);
    if (has_momentum) {
      const float b = select(first, d, SPG_FMA(share, d, momentum * load(buf + i)));
      store(buf + i, b);
      d = select(nesterov, SPG_FMA(momentum, b, d), b);
    }
    store(p + i, moved(x, select(on_gradient, 1.0f, f), -lr, d));
  }
}

template <class Param, class State>
static void sgd_all(const SgdStep& step, Gamma gamma, Param* p, const Param* g, State* buf, int64_t count) {
  const bool usual = !step.mask_gradient && !step.first && !step.nesterov;
  const bool plain = usual && step.grad_factor == 1.0f && step.weight_decay == 0.0f;
  by_blocks<kCodes>(count, [&](int64_t count, Gamma gamma, Param* p, const Param* g, State* buf) {
    const auto run = [&](auto usual_type, auto plain_type) {
      with_choice(buf, [&](auto has_momentum) {
        with_factor(gamma, count, [=](int64_t i, auto factor) {
          prefetch(kCodes, p + i, g + i);
          if (has_momentum) prefetch(kCodes, buf + i);
          sgd_block(usual_type, plain_type, has_momentum, step, p + i, g + i, from(buf, i), factor);
        });
      });
    };
    if (plain) return run(std::true_type(), std::true_type());
    with_choice(usual, [&](auto usual_type) { run(usual_type, std::false_type()); });
  }, gamma, p, g, buf);
}

template <class Param, class State>
static void sgd_in_place(const SgdStep& step, const Sgd& t, Gamma gamma, int64_t begin, int64_t end) {
  sgd_all(step, from(gamma, begin), static_cast<Param*>(t.param) + begin, static_cast<const Param*>(t.grad) + begin,
          from(static_cast<State*>(t.momentum_buffer), begin), end - begin);
}

static void sgd(const SgdStep& step, const Sgd& t, Gamma gamma, int64_t begin, int64_t end) {
  if (t.dtype == SPG_FLOAT32) return sgd_in_place<float, float>(step, t, gamma, begin, end);  // the state is float32 too
  if (t.dtype == SPG_BFLOAT16 && t.state_dtype == SPG_FLOAT32) {
    return sgd_in_place<Bfloat16, float>(step, t, gamma, begin, end);
  }
  if (t.dtype == SPG_BFLOAT16) return sgd_in_place<Bfloat16, Bfloat16>(step, t, gamma, begin, end);
  float p_scratch[kBlock], g_scratch[kBlock], buf_scratch[kBlock];
  through_scratch(begin, end, [&](int64_t first, int64_t count) {
    float* p = read(t.dtype, t.param, first, count, p_scratch);
    const float* g = read(t.dtype, t.grad, first, count, g_scratch);
    float* buf = read(t.state_dtype, t.momentum_buffer, first, count, buf_scratch);
    sgd_all(step, from(gamma, first), p, g, buf, count);
    write(t.state_dtype, t.momentum_buffer, first, count, buf);
    write(t.dtype, t.param, first, count, p);
  });
}

template <class Usual, class Amsgrad, class Param, class State, class Factor>
static inline void adam_block(Usual usual, Amsgrad amsgrad, const AdamStep& s, Param* __restrict p,
                              const Param* __restrict g, State* __restrict m, State* __restrict v, State* __restrict v_max,
                              Factor factor) {
  const float grad_factor = s.grad_factor, beta2 = s.beta2, square_share = s.exp_avg_sq_share, step_size = s.step_size;
  const float correction = s.inverse_correction2, eps = s.eps, coupled = s.coupled_decay, decoupled = s.decoupled_decay;
  const uint32_t on_gradient = mask_if(!usual && s.mask_gradient);
  const uint32_t decays_gradient = mask_if(!usual && coupled != 0.0f), decays = mask_if(decoupled != 0.0f);
  // lerp(m, d, share) from its nearer end, as torch does: with beta1 = 0 the average is the gradient exactly.
  const uint32_t from_average = mask_if(usual || s.exp_avg_share < 0.5f);
  const float share = s.exp_avg_share < 0.5f ? s.exp_avg_share : -s.beta1;
#pragma omp simd
  for (int64_t i = 0; i < kCodes; i++) {
    const float f = factor(i), x = load(p + i), was = load(m + i);
    float d = masked(grad_factor * load(g + i), select(on_gradient, f, 1.0f));
    d = select(decays_gradient, SPG_FMA(coupled, x, d), d);
    const float average = SPG_FMA(share, d - was, select(from_average, was, d));
    const float square = SPG_FMA(square_share * d, d, beta2 * load(v + i));
    store(m + i, average);
    store(v + i, square);
    float bound = square;
    if (amsgrad) {
      const float max_square = load(v_max + i);
      bound = select(mask_if(max_square > square) | mask_if(max_square != max_square), max_square, square);  // a NaN stays one
      store(v_max + i, bound);
    }
    const float denominator = SPG_FMA(std::sqrt(bound), correction, eps);
    float delta = -step_size * average / denominator;
    delta = select(decays, SPG_FMA(-decoupled, x, delta), delta);
    store(p + i, moved(x, select(on_gradient, 1.0f, f), 1.0f, delta));
  }
}

template <class Param, class State>
static void adam_all(const AdamStep& step, Gamma gamma, Param* p, const Param* g, State* m, State* v, State* v_max,
                     int64_t count) {
  const bool usual = !step.mask_gradient && step.coupled_decay == 0.0f && step.exp_avg_share < 0.5f;
  by_blocks<kCodes>(count, [&](int64_t count, Gamma gamma, Param* p, const Param* g, State* m, State* v, State* v_max) {
    with_choice(usual, [&](auto usual_type) {
      with_choice(v_max, [&](auto amsgrad) {
        with_factor(gamma, count, [=](int64_t i, auto factor) {
          prefetch(kCodes, p + i, g + i, m + i, v + i);
          adam_block(usual_type, amsgrad, step, p + i, g + i, m + i, v + i, from(v_max, i), factor);
        });
      });
    });
  }, gamma, p, g, m, v, v_max);
}

template <class Param, class State>
static void adam_in_place(const AdamStep& step, const Adam& t, Gamma gamma, int64_t begin, int64_t end) {
  adam_all(step, from(gamma, begin), static_cast<Param*>(t.param) + begin, static_cast<const Param*>(t.grad) + begin,
           static_cast<State*>(t.exp_avg) + begin, static_cast<State*>(t.exp_avg_sq) + begin,
           from(static_cast<State*>(t.max_exp_avg_sq), begin), end - begin);
}

static void adam(const AdamStep& step, const Adam& t, Gamma gamma, int64_t begin, int64_t end) {
  if (t.dtype == SPG_FLOAT32) return adam_in_place<float, float>(step, t, gamma, begin, end);
  if (t.dtype == SPG_BFLOAT16 && t.state_dtype == SPG_FLOAT32) {
    return adam_in_place<Bfloat16, float>(step, t, gamma, begin, end);
  }
  if (t.dtype == SPG_BFLOAT16) return adam_in_place<Bfloat16, Bfloat16>(step, t, gamma, begin, end);
  float p_scratch[kBlock], g_scratch[kBlock], m_scratch[kBlock], v_scratch[kBlock], max_scratch[kBlock];
  through_scratch(begin, end, [&](int64_t first, int64_t count) {
    float* p = read(t.dtype, t.param, first, count, p_scratch);
    const float* g = read(t.dtype, t.grad, first, count, g_scratch);
    float* m = read(t.state_dtype, t.exp_avg, first, count, m_scratch);
    float* v = read(t.state_dtype, t.exp_avg_sq, first, count, v_scratch);
    float* v_max = read(t.state_dtype, t.max_exp_avg_sq, first, count, max_scratch);
    adam_all(step, from(gamma, first), p, g, m, v, v_max, count);
    write(t.state_dtype, t.max_exp_avg_sq, first, count, v_max);
    write(t.dtype, t.param, first, count, p);
    write(t.state_dtype, t.exp_avg, first, count, m);
    write(t.state_dtype, t.exp_avg_sq, first, count, v);
  });
}
