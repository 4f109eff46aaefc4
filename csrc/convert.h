// bfloat16 and float16 to float32 and back, round to nearest even. inf, NaN and subnormals come back as they went in, except
// that a signalling NaN may come back quiet. Included once per instruction set: no include guard.

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Choices as bit masks, for options of the whole loop and for single elements alike: they stay data. Given a condition,
// GCC 12 makes control flow of it, then masked loads of what one side does not need, or no vector loop at all.
static inline uint32_t mask_if(bool condition) { return 0u - uint32_t(condition); }

static inline float select(uint32_t mask, float yes, float no) {
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// What loops read and write where it lies: float32, and bfloat16, which compilers convert in registers.
struct Bfloat16 {
  uint16_t bits;
};

static inline float load(const float* at) { return *at; }
static inline float load(const Bfloat16* at) { return float_of(uint32_t(at->bits) << 16); }

static inline void store(float* at, float value) { *at = value; }

// `value` is what arithmetic gave, or was bfloat16 before. A NaN of those is still one when cut; to round it could carry.
static inline void store(Bfloat16* at, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t half = 0x7fff + ((bits >> 16) & 1);
  at->bits = uint16_t((bits + (half & mask_if(value == value))) >> 16);
}

// float16 goes through float32 scratch, sixteen elements at a time: no compiler finds the instructions for it in a loop.
constexpr int64_t kHalves = 16;

#if defined(SPG_AVX512)
static inline void floats_of(const uint16_t* halves, float* floats) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
  _mm512_storeu_ps(floats, _mm512_maskz_cvtph_ps(0xffff, x));
}

static inline void halves_of(const float* floats, uint16_t* halves) {
  const __m256i x = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(floats), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves), x);
}
#elif SPG_VECTOR_BYTES == 32
static inline void floats_of(const uint16_t* halves, float* floats) {
  const __m128i* x = reinterpret_cast<const __m128i*>(halves);
  for (int k = 0; k < 2; k++) _mm256_storeu_ps(floats + 8 * k, _mm256_cvtph_ps(_mm_loadu_si128(x + k)));
}

static inline void halves_of(const float* floats, uint16_t* halves) {
  __m128i* x = reinterpret_cast<__m128i*>(halves);
  for (int k = 0; k < 2; k++) {
    _mm_storeu_si128(x + k, _mm256_cvtps_ph(_mm256_loadu_ps(floats + 8 * k), _MM_FROUND_TO_NEAREST_INT));
  }
}
#else
// On integers and without a branch, so that the loops vectorize.
static inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000;
  const uint32_t subnormal = bits_of(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return float_of(sign | (magnitude < 0x7c00 ? finite : special));
}

static inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // float32 at 0.5 has the spacing of float16's subnormals, so the addition rounds to them.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t payload = (magnitude >> 13) & 0x3ff;
  const uint32_t nan = 0x7c00 | (payload ? payload : 0x200);
  uint32_t h = magnitude < 0x38800000 ? subnormal : normal;
  h = magnitude >= 0x47800000 ? 0x7c00 : h;
  h = magnitude > 0x7f800000 ? nan : h;
  return uint16_t(sign | h);
}

static inline void floats_of(const uint16_t* halves, float* __restrict floats) {
#pragma omp simd
  for (int64_t i = 0; i < kHalves; i++) floats[i] = from_float16(halves[i]);
}

static inline void halves_of(const float* floats, uint16_t* __restrict halves) {
#pragma omp simd
  for (int64_t i = 0; i < kHalves; i++) halves[i] = to_float16(floats[i]);
}
#endif

// Elements that are converted at once: as few as a core looks ahead, but enough for the loops over them.
constexpr int64_t kBlock = 192;

// body(first, count) for the elements [begin, end) of a float16 tensor.
template <class Body>
static inline void through_scratch(int64_t begin, int64_t end, Body body) {
  for (int64_t first = begin; first < end; first += kBlock) body(first, std::min(kBlock, end - first));
}

// Elements [first, first + count) as float32: in place if that is what they are, else float16 and converted into `scratch`.
// Null for a tensor that is not there.
static inline float* read(int32_t dtype, const void* data, int64_t first, int64_t count, float* scratch) {
  if (!data) return nullptr;
  if (dtype == SPG_FLOAT32) return const_cast<float*>(static_cast<const float*>(data)) + first;
  const uint16_t* halves = static_cast<const uint16_t*>(data) + first;
  prefetch(count, halves);
  by_blocks<kHalves>(count, [](int64_t count, const uint16_t* halves, float* floats) {
    for (int64_t i = 0; i < count; i += kHalves) floats_of(halves + i, floats + i);
  }, halves, scratch);
  return scratch;
}

// A copy of them as float32, whatever they are.
static inline void copy_floats(int32_t dtype, const void* data, int64_t first, int64_t count, float* __restrict floats) {
  if (dtype == SPG_BFLOAT16) {
    const Bfloat16* values = static_cast<const Bfloat16*>(data) + first;
    for (int64_t i = 0; i < count; i++) floats[i] = load(values + i);
  } else {
    const float* values = read(dtype, data, first, count, floats);
    if (values != floats) std::memcpy(floats, values, count * sizeof(float));
  }
}

// The way back; nothing to do for float32, which was changed in place.
static inline void write(int32_t dtype, void* data, int64_t first, int64_t count, const float* values) {
  if (dtype == SPG_FLOAT32 || !data) return;
  by_blocks<kHalves>(count, [](int64_t count, const float* floats, uint16_t* halves) {
    for (int64_t i = 0; i < count; i += kHalves) halves_of(floats + i, halves + i);
  }, values, static_cast<uint16_t*>(data) + first);
}
