// The part of OpenMP's runtime that csrc uses (parallel regions and barriers, as GCC calls them) over std::thread.
// ThreadSanitizer knows nothing of libgomp's own barriers and reports races across them; it knows these. Linked in libgomp's
// place under code compiled with -fopenmp, so that what runs is what the compiler makes of the pragmas.
#include <pthread.h>

#include <thread>
#include <vector>

namespace {

thread_local int rank = 0, size = 1;
thread_local pthread_barrier_t* barrier = nullptr;

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned team, unsigned) {
  pthread_barrier_t own;
  pthread_barrier_init(&own, nullptr, team);
  const auto run = [&](int of) {
    rank = of, size = int(team), barrier = &own;
    body(data);
  };
  std::vector<std::thread> others;
  for (unsigned of = 1; of < team; of++) others.emplace_back(run, of);
  run(0);
  for (std::thread& other : others) other.join();
  rank = 0, size = 1, barrier = nullptr;
  pthread_barrier_destroy(&own);
}

void GOMP_barrier(void) { pthread_barrier_wait(barrier); }
int omp_get_num_threads(void) { return size; }
int omp_get_thread_num(void) { return rank; }

}  // extern "C"
