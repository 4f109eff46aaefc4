// The kernels, compiled once per instruction set from the same loops, and the choice among them.
// Everything that is not a kernel is compiled for the baseline, so the library loads and runs on any machine.
#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "code_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define SPG_TABLE(name) \
  const Kernels table = {name, first_element, moments, fold, soft_mask, update_mask, sgd, adam}

namespace spg {

// Where the baseline has no fused multiply-add, __builtin_fmaf would be a call into libm.
#define SPG_FMA(a, b, c) ((a) * (b) + (c))
#define SPG_VECTOR_BYTES 16
namespace baseline {
#include "blocks.h"
#include "convert.h"
#include "decode.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("baseline");
}  // namespace baseline
#undef SPG_FMA
#undef SPG_VECTOR_BYTES

#if defined(__x86_64__)
#define SPG_FMA(a, b, c) __builtin_fmaf(a, b, c)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define SPG_VECTOR_BYTES 32
namespace avx2 {
#include "blocks.h"
#include "convert.h"
#include "decode.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("avx2");
}  // namespace avx2
#undef SPG_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define SPG_AVX512
namespace avx512 {
#include "blocks.h"
#include "convert.h"
#include "decode.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("avx512");
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512vbmi")
#endif
#define SPG_VBMI
namespace avx512vbmi {
#include "blocks.h"
#include "convert.h"
#include "decode.h"
#include "importance_kernels.h"
#include "step_kernels.h"
SPG_TABLE("avx512vbmi");
}  // namespace avx512vbmi
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// Compilers before GCC 11 do not know it as a name of __builtin_cpu_supports.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// The best table that the machine has and SPG_CPU_CAPABILITY does not rule out.
static const Kernels& choose() {
  const char* cap = std::getenv("SPG_CPU_CAPABILITY");
  const auto capped_to = [cap](const char* isa) { return cap && !std::strcmp(cap, isa); };
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!has_avx2 || capped_to("baseline")) return baseline::table;
  if (!has_avx512 || capped_to("avx2")) return avx2::table;
  if (!__builtin_cpu_supports("avx512vbmi") || capped_to("avx512")) return avx512::table;
  return avx512vbmi::table;
}
#else
static const Kernels& choose() { return baseline::table; }
#endif

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
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
