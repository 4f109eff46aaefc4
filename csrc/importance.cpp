// accumulate_importance: gamma <- max(gamma, |tanh((g - mean) / std)|) for a whole list of tensors in one parallel region.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace spg {
namespace {

// Gradients are read twice. Tensors are grouped so that a thread's part of a group is still in its L2 cache the second time.
constexpr int64_t kGroupBytesPerThread = 1 << 20;

struct Work {
  int64_t n;
  const int64_t* numel;
  const int32_t* gamma_dtype;
  void* const* gammas;
  const int32_t* grad_dtype;
  const void* const* grads;
  uint8_t* finite;
  std::vector<int64_t> first_chunk;  // of tensor i among all chunks
  std::vector<Moments> moments;      // of every chunk

  int64_t chunks(int64_t i) const { return (numel[i] + kChunk - 1) / kChunk; }
  int64_t chunk_end(int64_t i, int64_t chunk) const { return std::min(numel[i], (chunk + 1) * kChunk); }
};

// Tensors [begin, end); a tensor larger than the target is a group of its own.
struct Group {
  int64_t begin;
  int64_t end;
  int64_t elements;
};

Group next_group(const Work& w, int64_t begin, int threads) {
  Group group = {begin, begin, 0};
  int64_t bytes = 0;
  while (group.end < w.n) {
    const int64_t size = w.numel[group.end] * (w.grad_dtype[group.end] == SPG_FLOAT32 ? 4 : 2);
    if (bytes > 0 && bytes + size > kGroupBytesPerThread * threads) break;
    bytes += size;
    group.elements += w.numel[group.end++];
  }
  return group;
}

// The chunks of a tensor that start inside this thread's share of the group's elements; `before` is where the tensor starts.
struct Range {
  int64_t begin;
  int64_t end;
};

Range my_chunks(const Work& w, int64_t i, int64_t before, int64_t share_begin, int64_t share_end) {
  const auto first_at = [&](int64_t element) {
    const int64_t inside = std::max<int64_t>(0, element - before);
    return std::min(w.chunks(i), (inside + kChunk - 1) / kChunk);
  };
  return {first_at(share_begin), first_at(share_end)};
}

// Two sweeps over the chunks' moments, in index order: the mean first, so that nothing cancels in m2.
// Every thread that needs a tensor's statistics merges them for itself, which saves a barrier.
bool merge(const Work& w, int64_t i, Standardize* z) {
  const Moments* moments = &w.moments[w.first_chunk[i]];
  const int64_t chunks = w.chunks(i);
  double sum = 0.0;
  for (int64_t c = 0; c < chunks; c++) sum += moments[c].mean * double(w.chunk_end(i, c) - c * kChunk);
  const double mean = sum / double(w.numel[i]);
  double m2 = 0.0;
  for (int64_t c = 0; c < chunks; c++) {
    const double distance = moments[c].mean - mean;
    m2 += moments[c].m2 + distance * distance * double(w.chunk_end(i, c) - c * kChunk);
  }
  if (!std::isfinite(m2)) return false;
  // Nothing stands out among equal elements, or in a single one: the importance is 0.
  const bool varies = m2 > 0.0 && w.numel[i] > 1;
  const double first = kernels().first_element(w.grad_dtype[i], w.grads[i]);
  const double scale = varies ? 1.0 / std::sqrt(m2 / double(w.numel[i] - 1)) : 0.0;
  const double power = std::ldexp(1.0, std::min(127, std::max(-126, varies ? std::ilogb(scale) : 0)));
  const double high = float((first + mean) * power);
  const double low = (first * power - high) + mean * power;
  *z = {first, scale, -mean * scale, float(power), float(high), float(low), float(scale / power)};
  return true;
}

void measure(Work& w, const Group& group, int64_t share_begin, int64_t share_end) {
  int64_t before = 0;
  for (int64_t i = group.begin; i < group.end; before += w.numel[i++]) {
    const Range range = my_chunks(w, i, before, share_begin, share_end);
    if (range.begin == range.end) continue;
    const double first = kernels().first_element(w.grad_dtype[i], w.grads[i]);
    for (int64_t c = range.begin; c < range.end; c++) {
      w.moments[w.first_chunk[i] + c] =
          kernels().moments(w.grad_dtype[i], w.grads[i], first, c * kChunk, w.chunk_end(i, c));
    }
  }
}

// The last tensor first: what was read last is what the cache still has. But forwards in a tensor, all of it at once: each
// jump back costs the hardware prefetcher its streams, more than the cache saves in one too large for it.
void apply(const Work& w, const Group& group, int64_t share_begin, int64_t share_end) {
  int64_t before = group.elements;
  for (int64_t i = group.end - 1; i >= group.begin; i--) {
    before -= w.numel[i];
    const Range range = my_chunks(w, i, before, share_begin, share_end);
    if (range.begin == range.end) continue;
    Standardize z;
    const bool finite = merge(w, i, &z);
    if (range.begin == 0) w.finite[i] = finite;
    if (!finite || z.scale == 0.0) continue;
    kernels().fold(w.gamma_dtype[i], w.gammas[i], w.grad_dtype[i], w.grads[i], z, range.begin * kChunk,
                   w.chunk_end(i, range.end - 1));
  }
}

void accumulate(Work& w, int32_t threads) {
  [[maybe_unused]] const int team = threads_for(total_elements(w.n, w.numel), threads);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const int rank = team_rank(), size = team_size();
    for (Group group = next_group(w, 0, size); group.begin < w.n; group = next_group(w, group.end, size)) {
      const int64_t begin = share_begin(group.elements, rank, size);
      const int64_t end = share_begin(group.elements, rank + 1, size);
      measure(w, group, begin, end);
#pragma omp barrier
      apply(w, group, begin, end);
    }
  }
}

}  // namespace
}  // namespace spg

int32_t spg_accumulate_importance(int64_t n, const int64_t* numel, const int32_t* gamma_dtype, void* const* gammas,
                                  const int32_t* grad_dtype, const void* const* grads, uint8_t* finite, int32_t threads) {
  try {
    spg::Work w = {n, numel, gamma_dtype, gammas, grad_dtype, grads, finite, {}, {}};
    w.first_chunk.reserve(n);
    int64_t chunks = 0;
    for (int64_t i = 0; i < n; i++) {
      const bool gamma_is_known = gamma_dtype[i] == SPG_FLOAT32 || gamma_dtype[i] == SPG_CODE8;
      if (!gamma_is_known || grad_dtype[i] < SPG_FLOAT32 || grad_dtype[i] > SPG_FLOAT16) return SPG_BAD_DTYPE;
      w.first_chunk.push_back(chunks);
      chunks += w.chunks(i);
    }
    w.moments.resize(chunks);
    std::fill(finite, finite + n, uint8_t(1));
    spg::accumulate(w, threads);
    return SPG_OK;
  } catch (const std::bad_alloc&) {
    return SPG_OUT_OF_MEMORY;
  }
}
