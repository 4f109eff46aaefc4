// bfloat16 and float16 to float32 and back, round to nearest even, on integers: no branch, so the loops vectorize, and
// inf, NaN (payload included) and subnormals come back as they went in. Included once per instruction set: no include guard.

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

static inline float from_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

static inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | ((bits & 0x7f0000) ? 0 : 0x40);  // a payload cut to 0 would read as inf
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

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

// The elements [begin, begin + count) as float32: in place, or converted into `scratch`, which holds kBlock of them.
static inline float* read(int32_t dtype, const void* data, int64_t begin, int64_t count, float* scratch) {
  if (dtype == SPG_FLOAT32) return const_cast<float*>(static_cast<const float*>(data)) + begin;
  const uint16_t* half = static_cast<const uint16_t*>(data) + begin;
  if (dtype == SPG_BFLOAT16) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) scratch[i] = from_bfloat16(half[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) scratch[i] = from_float16(half[i]);
  }
  return scratch;
}

// The way back; nothing to do for float32, which was changed in place.
static inline void write(int32_t dtype, void* data, int64_t begin, int64_t count, const float* values) {
  if (dtype == SPG_FLOAT32) return;
  uint16_t* half = static_cast<uint16_t*>(data) + begin;
  if (dtype == SPG_BFLOAT16) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) half[i] = to_bfloat16(values[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) half[i] = to_float16(values[i]);
  }
}
