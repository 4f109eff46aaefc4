// The table of kernels that the drivers call: one filled table per instruction set, one of them chosen at run time.
#pragma once
#include <cstdint>

#include "spg_kernels.h"

namespace spg {

// Statistics are taken per chunk of this many elements and merged in index order, so that the bits of a mean do not
// depend on the number of threads.
constexpr int64_t kChunk = 32768;

// One chunk of a gradient. The mean is relative to the tensor's first element, so that mean >> std loses no digits.
struct Moments {
  double mean;
  double m2;  // sum of squared distances from the chunk's own mean
};

// z = (g - first) * scale + offset in float64. The tensor's first element is near enough to the mean, no more than sqrt(n)
// standard deviations away, for this to lose nothing, where g * scale + offset would when mean >> std.
// z = ((g * power - high) - low) * power_scale in float32, a rounding error in z from it. high + low is mean * power, and the
// subtraction of high is exact near the mean; the power of two keeps 1e-38 and 1e38 in range.
struct Standardize {
  double first;
  double scale;   // 1 / std, or 0 where nothing stands out
  double offset;  // -(mean - first) / std
  float power;
  float high;
  float low;
  float power_scale;  // 1 / (std * power)
};

struct Gamma {
  int32_t dtype;
  const void* data;
};

// Hyper-parameters are combined in double and cast once, as torch's fused optimizers do.
struct SgdStep {
  float grad_factor;  // negative to maximize
  float lr;
  float momentum;
  float gradient_share;  // 1 - dampening
  float weight_decay;
  bool nesterov;
  bool first;
  bool mask_gradient;
};

struct AdamStep {
  float grad_factor;
  float beta1;
  float exp_avg_share;     // 1 - beta1
  float beta2;
  float exp_avg_sq_share;  // 1 - beta2
  float step_size;         // lr / bias_correction1
  float inverse_correction2;  // 1 / sqrt(bias_correction2): one division an element less
  float eps;
  float coupled_decay;    // weight_decay, or 0 when it is decoupled
  float decoupled_decay;  // lr * weight_decay, or 0 when it is coupled
  bool mask_gradient;
};

struct Sgd {
  int32_t dtype;
  void* param;
  const void* grad;
  int32_t state_dtype;
  void* momentum_buffer;  // null without momentum
};

struct Adam {
  int32_t dtype;
  void* param;
  const void* grad;
  int32_t state_dtype;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
};

// Every kernel works on the elements [begin, end) of one tensor.
struct Kernels {
  const char* isa;
  double (*first_element)(int32_t dtype, const void* data);
  Moments (*moments)(int32_t dtype, const void* grad, double first, int64_t begin, int64_t end);
  void (*fold)(int32_t gamma_dtype, void* gamma, int32_t grad_dtype, const void* grad, const Standardize& z, int64_t begin,
               int64_t end);
  void (*soft_mask)(int32_t dtype, void* grad, Gamma gamma, int64_t begin, int64_t end);
  void (*update_mask)(int32_t dtype, void* param, const void* old_param, Gamma gamma, int64_t begin, int64_t end);
  void (*sgd)(const SgdStep& step, const Sgd& tensors, Gamma gamma, int64_t begin, int64_t end);
  void (*adam)(const AdamStep& step, const Adam& tensors, Gamma gamma, int64_t begin, int64_t end);
};

const Kernels& kernels();

}  // namespace spg
