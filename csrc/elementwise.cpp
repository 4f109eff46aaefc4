// The drivers of the elementwise kernels: soft mask, update mask, masked SGD and Adam over whole lists of tensors.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "parallel.h"

namespace spg {
namespace {

bool is_floating(int32_t dtype) { return dtype >= SPG_FLOAT32 && dtype <= SPG_FLOAT16; }

bool is_gamma(int32_t dtype) { return dtype == SPG_FLOAT32 || dtype == SPG_CODE8 || dtype == SPG_ONE_VALUE; }

bool dtypes_are_known(int64_t n, const int32_t* dtype, const int32_t* gamma_dtype, const int32_t* state_dtype) {
  for (int64_t i = 0; i < n; i++) {
    if (!is_floating(dtype[i]) || !is_gamma(gamma_dtype[i])) return false;
    if (state_dtype && state_dtype[i] != dtype[i] && state_dtype[i] != SPG_FLOAT32) return false;
  }
  return true;
}

// Where a position in the list cuts a tensor: on 64 elements, so that two threads share no cache line of even 8-bit codes.
int64_t cut(int64_t position, int64_t before, int64_t numel) {
  const int64_t inside = position - before;
  if (inside >= numel) return numel;
  return inside <= 0 ? 0 : inside / 64 * 64;
}

// body(i, begin, end) over all elements of all tensors, each thread a contiguous part of the list.
template <class Body>
void for_each_span(int64_t n, const int64_t* numel, int32_t threads, const Body& body) {
  const int64_t total = total_elements(n, numel);
  [[maybe_unused]] const int team = threads_for(total, threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int rank = team_rank(), size = team_size();
    const int64_t share = share_begin(total, rank, size), share_end = share_begin(total, rank + 1, size);
    int64_t before = 0;
    for (int64_t i = 0; i < n && before < share_end; before += numel[i++]) {
      const int64_t begin = cut(share, before, numel[i]), end = cut(share_end, before, numel[i]);
      if (begin < end) body(i, begin, end);
    }
  }
}

}  // namespace
}  // namespace spg

using namespace spg;

int32_t spg_soft_mask(int64_t n, const int64_t* numel, const int32_t* grad_dtype, void* const* grads,
                      const int32_t* gamma_dtype, const void* const* gammas, int32_t threads) {
  if (!dtypes_are_known(n, grad_dtype, gamma_dtype, nullptr)) return SPG_BAD_DTYPE;
  for_each_span(n, numel, threads, [&](int64_t i, int64_t begin, int64_t end) {
    kernels().soft_mask(grad_dtype[i], grads[i], {gamma_dtype[i], gammas[i]}, begin, end);
  });
  return SPG_OK;
}

int32_t spg_update_mask(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                        const void* const* old_params, const int32_t* gamma_dtype, const void* const* gammas,
                        int32_t threads) {
  if (!dtypes_are_known(n, dtype, gamma_dtype, nullptr)) return SPG_BAD_DTYPE;
  for_each_span(n, numel, threads, [&](int64_t i, int64_t begin, int64_t end) {
    kernels().update_mask(dtype[i], params[i], old_params[i], {gamma_dtype[i], gammas[i]}, begin, end);
  });
  return SPG_OK;
}

int32_t spg_masked_sgd(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                       const void* const* grads, const int32_t* gamma_dtype, const void* const* gammas,
                       const int32_t* state_dtype, void* const* momentum_buffers, double lr, double momentum,
                       double dampening, double weight_decay, double grad_factor, int32_t nesterov, int32_t is_first_step,
                       int32_t mask_gradient, int32_t threads) {
  const bool has_momentum = momentum != 0.0 && momentum_buffers;
  if (!dtypes_are_known(n, dtype, gamma_dtype, has_momentum ? state_dtype : nullptr)) return SPG_BAD_DTYPE;
  const SgdStep step = {float(grad_factor),  float(lr),     float(momentum),    float(1.0 - dampening),
                        float(weight_decay), nesterov != 0, is_first_step != 0, mask_gradient != 0};
  for_each_span(n, numel, threads, [&](int64_t i, int64_t begin, int64_t end) {
    const Sgd tensors = {dtype[i], params[i], grads[i], has_momentum ? state_dtype[i] : SPG_FLOAT32,
                         has_momentum ? momentum_buffers[i] : nullptr};
    kernels().sgd(step, tensors, {gamma_dtype[i], gammas[i]}, begin, end);
  });
  return SPG_OK;
}

int32_t spg_masked_adamw(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                         const void* const* grads, const int32_t* gamma_dtype, const void* const* gammas,
                         const int32_t* state_dtype, void* const* exp_avgs, void* const* exp_avg_sqs,
                         void* const* max_exp_avg_sqs, float* const* steps, double lr, double beta1, double beta2,
                         double eps, double weight_decay, double grad_factor, int32_t decoupled, int32_t mask_gradient,
                         int32_t threads) {
  if (!dtypes_are_known(n, dtype, gamma_dtype, state_dtype)) return SPG_BAD_DTYPE;
  for (int64_t i = 0; i < n; i++) *steps[i] += 1.0f;
  for_each_span(n, numel, threads, [&](int64_t i, int64_t begin, int64_t end) {
    const double count = *steps[i];
    const double bias_correction1 = 1.0 - std::pow(beta1, count);
    const double bias_correction2 = 1.0 - std::pow(beta2, count);
    const AdamStep step = {float(grad_factor),
                           float(beta1),
                           float(1.0 - beta1),
                           float(beta2),
                           float(1.0 - beta2),
                           float(lr / bias_correction1),
                           float(1.0 / std::sqrt(bias_correction2)),
                           float(eps),
                           decoupled ? 0.0f : float(weight_decay),
                           decoupled ? float(lr * weight_decay) : 0.0f,
                           mask_gradient != 0};
    const Adam tensors = {dtype[i], params[i], grads[i], state_dtype[i], exp_avgs[i], exp_avg_sqs[i],
                          max_exp_avg_sqs ? max_exp_avg_sqs[i] : nullptr};
    kernels().adam(step, tensors, {gamma_dtype[i], gammas[i]}, begin, end);
  });
  return SPG_OK;
}
