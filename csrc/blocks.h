// Loops over blocks of elements: how many at once, and what is fetched ahead of them.
// Included once per instruction set: no include guard.

// Elements that are converted at once: as few as a core looks ahead, but enough for the loops over them.
constexpr int64_t kBlock = 192;

// float32 needs no scratch, so a span is one block: a long loop is what the hardware prefetcher likes.
static inline int64_t block_size(bool in_place, int64_t begin, int64_t end) { return in_place ? end - begin : kBlock; }

// What a loop over `count` elements reads 1 KiB later, into the L2 cache. The hardware does that too, but not across the
// borders of pages, and with three streams and more less than it could: momentum, AdamW and importance take up to a tenth less
// time.
template <class... Data>
static inline void prefetch(int64_t count, const Data*... data) {
  const auto line = [](const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 1024, 0, 2); };
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(float))) (line(data + i), ...);
}

// From memory, loops over one or two tensors take up to a tenth less time as two streams through each: hardware follows a
// stream to the end of its page, and while one finds its next page the other goes on. Loops over more take longer that way.
enum Order { kForwards, kBothHalves };

// body(first, n, input) for kSize of the `count` elements at a time: n is then a constant, as a type, so that loops over them
// have no ends to look for. input_of(first, n) comes before it. Both come, and hold what they use, by value: behind a
// reference lies memory that the body may have written, to be read again for every block.
template <int64_t kSize, Order kOrder = kForwards, class Body, class InputOf>
static inline void in_blocks(int64_t count, Body body, InputOf input_of) {
  constexpr std::integral_constant<int64_t, kSize> size;
  const int64_t blocks = count / kSize;
  // An odd number of blocks each: where addresses in a page are equal, loads of one half would wait for stores of the other.
  const int64_t half = kOrder == kBothHalves && blocks > 1 ? ((blocks / 2 - 1) | 1) * kSize : 0;
  for (int64_t i = 0; i < half; i += kSize) {
    body(i, size, input_of(i, kSize));
    body(half + i, size, input_of(half + i, kSize));
  }
  const int64_t whole = blocks * kSize;
  for (int64_t i = 2 * half; i < whole; i += kSize) body(i, size, input_of(i, kSize));
  if (whole < count) body(whole, count - whole, input_of(whole, count - whole));
}
