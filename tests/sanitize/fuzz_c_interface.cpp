// A fuzz target for csrc/spg_kernels.h: the bytes of an input choose a function, the sizes, dtypes and alignments of a list of
// tensors, the number of threads, and what the tensors hold (any bits at all, too). Every tensor is an allocation of its own
// that ends with its last element, so that a sanitizer sees the first byte read or written beyond; what a function only
// reads must keep its bits, and a call that is refused must change nothing.
//
// With clang:  clang++ -std=c++17 -O1 -g -fopenmp -fsanitize=fuzzer,address,undefined -Icsrc
//              tests/sanitize/fuzz_c_interface.cpp csrc/*.cpp
// With gcc, as a program over random inputs of its own, `a.out SEED COUNT`: add -DSPG_STANDALONE, leave out "fuzzer,". It
// prints a hash of all that was written, NaNs aside the same bits with AVX-512 as with AVX2 and for any number of threads.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "spg_kernels.h"

namespace {

uint64_t written_hash = 0;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint32_t below(uint32_t limit) { return next() % limit; }

 private:
  // Bytes while they last, then a sequence that goes on from them.
  uint32_t next() {
    if (at_ < size_) return state_ = state_ * 1664525u + data_[at_++] + 1013904223u, data_[at_ - 1];
    state_ ^= state_ << 13, state_ ^= state_ >> 17, state_ ^= state_ << 5;
    return state_ >> 3;
  }

  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  uint32_t state_ = 2463534242u;
};

int64_t size_of(int32_t dtype) { return dtype == SPG_CODE8 ? 1 : dtype == SPG_FLOAT32 || dtype == SPG_ONE_VALUE ? 4 : 2; }

// One tensor: `offset` elements of padding, so that it is aligned to its element only, then exactly its elements.
struct Tensor {
  Tensor(Input& input, int32_t dtype, int64_t numel, bool unit_range)
      : dtype(dtype), bytes(size_of(dtype) * numel), padding(size_of(dtype) * input.below(4)),
        memory(new uint8_t[padding + bytes]) {
    const uint32_t kind = input.below(4);
    uint32_t state = input.below(1u << 30) * 2u + 1;
    for (int64_t i = 0; i < padding; i++) memory[i] = 0x5a;
    for (int64_t i = 0; i < bytes; i += size_of(dtype)) {
      state ^= state << 13, state ^= state >> 17, state ^= state << 5;
      uint32_t bits = state;  // kind 0: anything, inf, NaN and subnormals among it
      if (kind == 1) bits = 0;
      if (kind >= 2 && size_of(dtype) > 1) {
        float value = float(state & 0xffff) / 65536.0f;
        value = unit_range ? std::min(std::max(value * 1.5f - 0.25f, 0.0f), 1.0f) : kind == 2 ? value * 4 - 2 : 1000 + value;
        std::memcpy(&bits, &value, 4);
        if (size_of(dtype) == 2) bits >>= 16;  // the same as bfloat16; some finite float16
      }
      std::memcpy(memory.get() + padding + i, &bits, size_of(dtype));
    }
    kept.assign(memory.get(), memory.get() + padding + bytes);
  }

  void* data() const { return memory.get() + padding; }
  bool unchanged() const { return kept.empty() || !std::memcmp(memory.get(), kept.data(), kept.size()); }
  bool padding_unchanged() const { return !padding || !std::memcmp(memory.get(), kept.data(), padding); }

  // Of the element at this byte. All NaNs are one: which one of two comes out depends on the order a compiler put them in.
  uint32_t bits(int64_t at) const {
    uint32_t value = 0;
    std::memcpy(&value, memory.get() + padding + at, size_of(dtype));
    if (dtype == SPG_CODE8) return value;
    const uint32_t sign = size_of(dtype) == 4 ? 0x80000000 : 0x8000;
    const uint32_t infinity = dtype == SPG_FLOAT16 ? 0x7c00 : size_of(dtype) == 4 ? 0x7f800000 : 0x7f80;
    return (value & ~sign) > infinity ? infinity + 1 : value;
  }

  int32_t dtype;
  int64_t bytes, padding;
  std::unique_ptr<uint8_t[]> memory;
  std::vector<uint8_t> kept;
};

struct List {
  void add(Input& input, int32_t dtype, int64_t numel, bool unit_range = false) {
    tensors.emplace_back(input, dtype, numel, unit_range);
    pointers.push_back(tensors.back().data());
  }

  void check(bool may_change) const {
    for (const Tensor& tensor : tensors) {
      require(may_change ? tensor.padding_unchanged() : tensor.unchanged(), "what is only read");
      for (int64_t i = 0; i < tensor.bytes && may_change; i += size_of(tensor.dtype)) {
        written_hash = (written_hash ^ tensor.bits(i)) * 0x100000001b3u;
      }
    }
  }

  std::vector<Tensor> tensors;
  std::vector<void*> pointers;
};

constexpr int64_t kSizes[] = {0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 191, 192, 193, 255, 512, 1000, 4097};
constexpr int64_t kLongSizes[] = {16385, 32767, 32769, 70001};
constexpr double kRates[] = {0.0, 1e-3, 0.1, 0.9, 1.0, 1e30};
constexpr double kFactors[] = {1.0, -1.0, 1.0 / 65536.0, -1.0 / 3000.0, 0.0};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const uint32_t function = input.below(5);
  const bool fold = function == 0;
  const int64_t n = input.below(6);
  const int32_t threads = 1 + input.below(4);
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype, gamma_dtype, state_dtype;
  List written, read, gammas, first_state, second_state, third_state, steps;
  bool known = true;
  for (int64_t i = 0; i < n; i++) {
    const bool is_long = input.below(40) == 0;
    numel.push_back(is_long ? kLongSizes[input.below(4)] : kSizes[input.below(sizeof kSizes / sizeof *kSizes)]);
    dtype.push_back(input.below(3));
    constexpr int32_t kGammaDtypes[] = {SPG_FLOAT32, SPG_CODE8, SPG_ONE_VALUE};
    gamma_dtype.push_back(kGammaDtypes[input.below(fold ? 2 : 3)]);
    state_dtype.push_back(input.below(2) ? dtype.back() : SPG_FLOAT32);
    written.add(input, dtype.back(), numel.back());
    read.add(input, dtype.back(), numel.back());
    gammas.add(input, gamma_dtype.back(), gamma_dtype.back() == SPG_ONE_VALUE ? 1 : numel.back(), true);
    for (List* state : {&first_state, &second_state, &third_state}) state->add(input, state_dtype.back(), numel.back());
    steps.add(input, SPG_FLOAT32, 1, true);
    if (input.below(64) == 0) dtype.back() = 5 + input.below(3), known = false;
  }
  const double a = kRates[input.below(6)], b = kRates[input.below(6)], c = kRates[input.below(6)], d = kRates[input.below(6)];
  const double grad_factor = kFactors[input.below(5)];
  const int32_t flags = input.below(16);
  int32_t status = SPG_OK;
  if (fold) {
    std::vector<uint8_t> finite(n, 2);
    status = spg_accumulate_importance(n, numel.data(), gamma_dtype.data(), gammas.pointers.data(), dtype.data(),
                                       read.pointers.data(), finite.data(), threads);
    for (int64_t i = 0; i < n && status == SPG_OK; i++) {
      require(finite[i] < 2, "finite is told of every tensor");
      require(finite[i] || gammas.tensors[i].unchanged(), "a gradient that is not finite leaves gamma alone");
    }
  } else if (function == 1) {
    status = spg_soft_mask(n, numel.data(), dtype.data(), written.pointers.data(), gamma_dtype.data(), gammas.pointers.data(),
                           threads);
  } else if (function == 2) {
    status = spg_update_mask(n, numel.data(), dtype.data(), written.pointers.data(), read.pointers.data(), gamma_dtype.data(),
                             gammas.pointers.data(), threads);
  } else if (function == 3) {
    status = spg_masked_sgd(n, numel.data(), dtype.data(), written.pointers.data(), read.pointers.data(), gamma_dtype.data(),
                            gammas.pointers.data(), state_dtype.data(), b ? first_state.pointers.data() : nullptr, a, b, c, d,
                            grad_factor, flags & 1, flags & 4, flags & 8, threads);
  } else {
    status = spg_masked_adamw(n, numel.data(), dtype.data(), written.pointers.data(), read.pointers.data(), gamma_dtype.data(),
                              gammas.pointers.data(), state_dtype.data(), first_state.pointers.data(),
                              second_state.pointers.data(), flags & 1 ? third_state.pointers.data() : nullptr,
                              reinterpret_cast<float**>(steps.pointers.data()), a, b, c, 1e-8, d, grad_factor, flags & 2,
                              flags & 8, threads);
  }
  require(status == (known ? SPG_OK : SPG_BAD_DTYPE), "unknown dtypes, and only they, are refused");
  read.check(false);
  written.check(known && !fold);
  gammas.check(known && fold);
  for (const List* list : {&first_state, &second_state, &third_state}) list->check(known && function >= 3);
  steps.check(known && function == 4);
  return 0;
}

#if defined(SPG_STANDALONE)
int main(int argc, char** argv) {
  uint32_t state = argc > 1 ? std::strtoul(argv[1], nullptr, 10) * 2654435761u + 1 : 1;
  const long count = argc > 2 ? std::strtol(argv[2], nullptr, 10) : 1000;
  for (long k = 0; k < count; k++) {
    uint8_t bytes[96];
    for (uint8_t& byte : bytes) state = state * 1664525u + 1013904223u, byte = uint8_t(state >> 24);
    LLVMFuzzerTestOneInput(bytes, sizeof bytes);
  }
  std::printf("%ld inputs, %s, %016llx\n", count, spg_isa(), static_cast<unsigned long long>(written_hash));
}
#endif
