// Loops over blocks of elements: how many at once, and what is fetched ahead of them.
// Included once per instruction set: no include guard.

// What a loop over `count` elements reads 1 KiB later, into the L2 cache. The hardware does that too, but not across the
// borders of pages, and with three streams and more less than it could: momentum, AdamW and importance take up to a tenth less
// time. Lines in the order in which the loop comes to them: tensor after tensor, 8-bit AdamW takes 5 % longer.
template <class... Data>
static inline void prefetch(int64_t count, const Data*... data) {
  constexpr int64_t step = 64 / std::max({sizeof(Data)...});
  const auto line = [](int64_t i, const auto* at) {
    if (i * sizeof *at % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(at + i) + 1024, 0, 2);
  };
  for (int64_t i = 0; i < count; i += step) (line(i, data), ...);
}

// From memory, the masks alone take up to a tenth less time as two streams through each tensor: hardware follows a stream to
// the end of its page, and while one finds its next page the other goes on. Steps take longer that way, up to 29 %.
enum Order { kForwards, kBothHalves };

// body(first, input) for each block of kSize elements, of which there are a whole number. input_of(first) comes before it.
// Both come, and hold what they use, by value: behind a reference lies memory that the body may have written, to be read
// again for every block.
template <int64_t kSize, Order kOrder = kForwards, class Body, class InputOf>
static inline void in_blocks(int64_t count, Body body, InputOf input_of) {
  const int64_t blocks = count / kSize;
  // An odd number of blocks each: where addresses in a page are equal, loads of one half would wait for stores of the other.
  const int64_t half = kOrder == kBothHalves && blocks > 1 ? ((blocks / 2 - 1) | 1) * kSize : 0;
  for (int64_t i = 0; i < half; i += kSize) {
    body(i, input_of(i));
    body(half + i, input_of(half + i));
  }
  for (int64_t i = 2 * half; i < count; i += kSize) body(i, input_of(i));
}

// Where a tensor's elements from `begin` on are, if there is such a tensor.
template <class T>
static inline T* from(T* data, int64_t begin) { return data ? data + begin : nullptr; }

static inline Gamma from(Gamma gamma, int64_t begin) {
  if (gamma.dtype == SPG_FLOAT32) return {gamma.dtype, static_cast<const float*>(gamma.data) + begin};
  if (gamma.dtype == SPG_CODE8) return {gamma.dtype, static_cast<const uint8_t*>(gamma.data) + begin};
  return gamma;
}

// The last elements of a tensor, in a block of kSize that is 0 behind them. Unless they are const they are written back.
template <int64_t kSize, class Tensor>
struct Last;

template <int64_t kSize, class T>
struct Last<kSize, T*> {
  T* const tensor;
  const int64_t count;
  std::remove_const_t<T> copy[kSize] = {};

  Last(T* tensor, int64_t count) : tensor(tensor), count(count) {
    if (tensor) std::memcpy(copy, tensor, count * sizeof(T));
  }
  ~Last() {
    if constexpr (!std::is_const<T>()) {
      if (tensor) std::memcpy(tensor, copy, count * sizeof(T));
    }
  }
  T* block() { return tensor ? copy : nullptr; }
};

template <int64_t kSize>
struct Last<kSize, Gamma> {
  Gamma gamma;
  float copy[kSize] = {};

  Last(Gamma gamma, int64_t count) : gamma(gamma) {
    if (gamma.dtype == SPG_ONE_VALUE) return;
    std::memcpy(copy, gamma.data, count * (gamma.dtype == SPG_FLOAT32 ? sizeof(float) : 1));
    this->gamma.data = copy;
  }
  Gamma block() { return gamma; }
};

// body(count, tensors...) for the elements in whole blocks of kSize, then for a block with those that are left. So that loops
// are over blocks alone: with loops of any length besides, the library is twice as large.
template <int64_t kSize, class Body, class... Tensor>
static inline void by_blocks(int64_t count, const Body& body, Tensor... tensors) {
  const int64_t whole = count / kSize * kSize;
  if (whole) body(whole, tensors...);
  if (whole == count) return;
  [&](Last<kSize, Tensor>... last) {
    body(kSize, last.block()...);
  }(Last<kSize, Tensor>(from(tensors, whole), count - whole)...);
}
