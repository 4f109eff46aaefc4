// SPG for the CPU: importance, soft mask, and masked optimizer steps over lists of tensors.
//
// A plain C interface, so that one shared library serves every Python and every torch (it is loaded with ctypes).
// Every array argument has n entries, one per tensor. A tensor is a dense run of numel[i] elements; element k of every
// tensor of one index belongs together. Pointers need no more alignment than their element. numel may be 0 and may pass 2^31.
#pragma once
#include <stdint.h>

#define SPG_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
  SPG_FLOAT32 = 0,
  SPG_BFLOAT16 = 1,
  SPG_FLOAT16 = 2,
  SPG_CODE8 = 3,      // gamma as code = ceil(28 |z|), saturating at 255: gamma = tanh(code / 28); from 253 on, gamma = 1
  SPG_ONE_VALUE = 4,  // gamma as one float32 for the whole tensor (a head)
};

// What the functions below return. A dtype is checked before anything is written.
enum { SPG_OK = 0, SPG_OUT_OF_MEMORY = 1, SPG_BAD_DTYPE = 2 };

SPG_API int32_t spg_abi_version(void);  // 3
SPG_API const char* spg_isa(void);      // "avx512vbmi", "avx512", "avx2", "baseline"; the variable SPG_CPU_CAPABILITY caps it
SPG_API int32_t spg_has_openmp(void);

// gamma <- max(gamma, |tanh z|), z = (g - mean g) / std g over the whole tensor, whose statistics are float64. gammas: float32
// or 8-bit codes. finite[i] = 0, and that gamma untouched, where a gradient has an inf or NaN; else 1. Same bits for any
// number of threads.
SPG_API int32_t spg_accumulate_importance(int64_t n, const int64_t* numel, const int32_t* gamma_dtype, void* const* gammas,
                                          const int32_t* grad_dtype, const void* const* grads, uint8_t* finite,
                                          int32_t threads);

// grad <- (1 - gamma) grad. Where gamma is 1: +0, whatever the gradient; where gamma is 0: the gradient's own bits.
SPG_API int32_t spg_soft_mask(int64_t n, const int64_t* numel, const int32_t* grad_dtype, void* const* grads,
                              const int32_t* gamma_dtype, const void* const* gammas, int32_t threads);

// p <- p_old + (1 - gamma) (p - p_old): the mask around an optimizer step that has already been taken.
SPG_API int32_t spg_update_mask(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                                const void* const* old_params, const int32_t* gamma_dtype, const void* const* gammas,
                                int32_t threads);

// torch.optim.SGD with the mask in the same pass, on the update or (mask_gradient) on the gradient. State is the plain
// optimizer's. dtype is the parameters' and the gradients'; state_dtype is that or float32. momentum_buffers may be NULL
// when momentum is 0. Gradients are multiplied by grad_factor before anything else: 1, or -1 to maximize, over the loss scale.
SPG_API int32_t spg_masked_sgd(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                               const void* const* grads, const int32_t* gamma_dtype, const void* const* gammas,
                               const int32_t* state_dtype, void* const* momentum_buffers, double lr, double momentum,
                               double dampening, double weight_decay, double grad_factor, int32_t nesterov,
                               int32_t is_first_step, int32_t mask_gradient, int32_t threads);

// torch.optim.AdamW (decoupled) or Adam, the same way. steps[i] is one float32, incremented here first.
// max_exp_avg_sqs is NULL without amsgrad.
SPG_API int32_t spg_masked_adamw(int64_t n, const int64_t* numel, const int32_t* dtype, void* const* params,
                                 const void* const* grads, const int32_t* gamma_dtype, const void* const* gammas,
                                 const int32_t* state_dtype, void* const* exp_avgs, void* const* exp_avg_sqs,
                                 void* const* max_exp_avg_sqs, float* const* steps, double lr, double beta1, double beta2,
                                 double eps, double weight_decay, double grad_factor, int32_t decoupled,
                                 int32_t mask_gradient, int32_t threads);

// Functions of the Python that runs, and its framework's, handed over so that the library is linked to neither.
typedef struct {
  intptr_t (*tuple_size)(void*);
  void* (*tuple_item)(void*, intptr_t);
  intptr_t (*list_size)(void*);
  void* (*list_item)(void*, intptr_t);
  void* (*type_of)(void*);                      // a new reference
  void (*release)(void*);
  void (*clear_error)(void);
  int (*describe)(void* tensor, void* result);  // DLPack's dltensor_from_py_object_no_sync
  void *tensor_type, *parameter_type;           // a subclass may keep its numbers elsewhere
} SpgPython;

// Both are called with Python's lock held. `lists` is a tuple of lists of tensors.
// What the tensors are: how many, and device, dtype, shape and strides of each, one after the other, unless words is NULL.
// Returns the number of words, or -1 where something is no list or no plain tensor with memory of its own.
SPG_API int64_t spg_describe_tensors(const SpgPython* python, void* lists, int64_t* words);

// 1, and the tensors' addresses, where all tensors are what the words say, no more and no fewer.
SPG_API int32_t spg_locate_tensors(const SpgPython* python, void* lists, const int64_t* words, uint64_t* addresses);

// The n floats at these addresses, such as step counts that live in a tensor each: read into values; one more for each.
SPG_API void spg_read_floats(int64_t n, const float* const* at, float* values);
SPG_API void spg_increment_floats(int64_t n, float* const* at);

#ifdef __cplusplus
}
#endif
