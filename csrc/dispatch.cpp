// The kernels, compiled once per instruction set from the same loops, and the choice among them.
// Everything that is not a kernel is compiled for the baseline, so the library loads and runs on any machine.
#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPG_TABLE(name) \
  const Kernels table = {name, first_element, moments, fold, soft_mask, update_mask, sgd, adam}

namespace spg {

// Where the baseline has no fused multiply-add, __builtin_fmaf would be a call into libm.
#define SPG_FMA(a, b, c) ((a) * (b) + (c))
#define SPG_FMA64(a, b, c) ((a) * (b) + (c))
namespace baseline {
#include "convert.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("baseline");
}  // namespace baseline
#undef SPG_FMA
#undef SPG_FMA64

#if defined(__x86_64__)
#define SPG_FMA(a, b, c) __builtin_fmaf(a, b, c)
#define SPG_FMA64(a, b, c) __builtin_fma(a, b, c)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "convert.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("avx2");
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define SPG_FIXUP
namespace avx512 {
#include "convert.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("avx512");
}  // namespace avx512
#undef SPG_FIXUP
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static const Kernels& choose() {
  const char* cap = std::getenv("SPG_CPU_CAPABILITY");
  const bool capped_to_baseline = cap && !std::strcmp(cap, "baseline");
  const bool capped_to_avx2 = cap && !std::strcmp(cap, "avx2");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !capped_to_avx2 && !capped_to_baseline) return avx512::table;
  if (has_avx2 && !capped_to_baseline) return avx2::table;
  return baseline::table;
}
#else
static const Kernels& choose() { return baseline::table; }
#endif

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void decode(const uint8_t* code, int64_t count, float* factor) {
#if defined(__x86_64__)
  static const bool permutes = &kernels() == &avx512::table && __builtin_cpu_supports("avx512vbmi");
  if (permutes) return decode_by_permutation(code, count, factor);
#endif
  decode_by_lookup(code, count, factor);
}

}  // namespace spg

int32_t spg_abi_version(void) { return 3; }

const char* spg_isa(void) { return spg::kernels().isa; }

int32_t spg_has_openmp(void) {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
