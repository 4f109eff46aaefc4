// The few OpenMP calls the drivers need, so that they also compile, single-threaded, without OpenMP.
#pragma once
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace spg {

// Below this many elements a parallel region costs more than it saves.
constexpr int64_t kSerialLimit = 32768;

inline int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

inline int team_rank() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int threads_for(int64_t elements, int32_t threads) {
  return threads > 1 && elements > kSerialLimit ? threads : 1;
}

inline int64_t total_elements(int64_t n, const int64_t* numel) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; i++) total += numel[i];
  return total;
}

// Thread `rank`'s first element of `total`, in double because total * rank may overflow.
inline int64_t share_begin(int64_t total, int rank, int size) {
  return rank == size ? total : int64_t(double(total) * rank / size);
}

}  // namespace spg
