// PTX instructions without memory: each is a function of its own name, with underscores. Registers are bits, as in PTX.
//
// What is not here does not compile, so no instruction is ever passed over. Approximate instructions are off by as much as
// PTX lets them be, by an amount that only depends on the operands.
#pragma once

#include <bit>
#include <cstdint>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// Builtins, because <cmath> takes longer to compile than most kernels do.
inline bool is_nan(double x) { return __builtin_isnan(x); }
inline float f32(u32 bits) { return std::bit_cast<float>(bits); }
inline double f64(u64 bits) { return std::bit_cast<double>(bits); }
// Every NaN that float32 arithmetic makes is this one.
inline u32 bits(float x) { return is_nan(x) ? 0x7fffffffu : std::bit_cast<u32>(x); }
inline u64 bits(double x) { return std::bit_cast<u64>(x); }
inline u32 flushed(u32 x) { return (x & 0x7f800000u) ? x : x & 0x80000000u; }

// `exact`, off by up to two units in the last place.
inline float approximately(float exact, u32 a, u32 b) {
    if (!__builtin_isfinite(exact) || exact == 0) return exact;
    const u32 hash = (a * 0x9e3779b1u ^ b * 0x85ebca77u) * 0xc2b2ae3du >> 16;
    const float off = std::bit_cast<float>(std::bit_cast<u32>(exact) + hash % 5 - 2);
    return __builtin_isfinite(off) ? off : exact;
}

// Arithmetic

#define FLOAT_OPERATION(name, operator) \
    inline u32 name##_rn_f32(u32 a, u32 b) { return bits(f32(a) operator f32(b)); } \
    inline u64 name##_rn_f64(u64 a, u64 b) { return bits(f64(a) operator f64(b)); }
FLOAT_OPERATION(add, +)
FLOAT_OPERATION(sub, -)
FLOAT_OPERATION(mul, *)
FLOAT_OPERATION(div, /)

inline u32 fma_rn_f32(u32 a, u32 b, u32 c) { return bits(__builtin_fmaf(f32(a), f32(b), f32(c))); }
inline u64 fma_rn_f64(u64 a, u64 b, u64 c) { return bits(__builtin_fma(f64(a), f64(b), f64(c))); }
inline u32 sqrt_rn_f32(u32 a) { return bits(__builtin_sqrtf(f32(a))); }
inline u64 sqrt_rn_f64(u64 a) { return bits(__builtin_sqrt(f64(a))); }
inline u32 neg_f32(u32 a) { return bits(-f32(a)); }
inline u32 abs_f32(u32 a) { return bits(__builtin_fabsf(f32(a))); }
inline u64 abs_f64(u64 a) { return bits(__builtin_fabs(f64(a))); }
inline u32 div_full_f32(u32 a, u32 b) { return bits(approximately(f32(a) / f32(b), a, b)); }
inline u32 ex2_approx_f32(u32 a) { return bits(approximately(float(__builtin_exp2(double(f32(a)))), a, 0)); }

#define PAIRED_OPERATION(name) /* of two float32 in 64 bits */ \
    inline u64 name##_rn_f32x2(u64 a, u64 b) { \
        return u64(name##_rn_f32(u32(a >> 32), u32(b >> 32))) << 32 | name##_rn_f32(u32(a), u32(b)); \
    }
PAIRED_OPERATION(add)
PAIRED_OPERATION(sub)
PAIRED_OPERATION(mul)
inline u64 fma_rn_f32x2(u64 a, u64 b, u64 c) {
    return u64(fma_rn_f32(u32(a >> 32), u32(b >> 32), u32(c >> 32))) << 32 | fma_rn_f32(u32(a), u32(b), u32(c));
}

// -0 is less than +0; of a number and a NaN, the number.
template <class T> T smaller(T a, T b) {
    if (is_nan(a) || is_nan(b)) return is_nan(a) ? b : a;
    return a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
template <class T> T larger(T a, T b) {
    if (is_nan(a) || is_nan(b)) return is_nan(a) ? b : a;
    return a > b || (a == b && __builtin_signbit(b)) ? a : b;
}
inline u32 min_f32(u32 a, u32 b) { return bits(smaller(f32(a), f32(b))); }
inline u32 max_f32(u32 a, u32 b) { return bits(larger(f32(a), f32(b))); }
inline u64 min_f64(u64 a, u64 b) { return bits(smaller(f64(a), f64(b))); }
inline u64 max_f64(u64 a, u64 b) { return bits(larger(f64(a), f64(b))); }
inline u32 max_NaN_f32(u32 a, u32 b) {
    return is_nan(f32(a)) || is_nan(f32(b)) ? 0x7fffffffu : max_f32(a, b);
}

#define INTEGER_OPERATIONS(type, unsigned_type) \
    inline unsigned_type add_##type(unsigned_type a, unsigned_type b) { return a + b; } \
    inline unsigned_type sub_##type(unsigned_type a, unsigned_type b) { return a - b; } \
    inline unsigned_type mul_lo_##type(unsigned_type a, unsigned_type b) { return a * b; } \
    inline unsigned_type neg_##type(unsigned_type a) { return -a; } \
    inline unsigned_type min_##type(unsigned_type a, unsigned_type b) { return type(a) < type(b) ? a : b; } \
    inline unsigned_type max_##type(unsigned_type a, unsigned_type b) { return type(a) > type(b) ? a : b; } \
    inline unsigned_type shr_##type(unsigned_type a, u32 by) { /* clamps */ \
        return by < 8 * sizeof a ? type(a) >> by : type(a) < 0 ? -1 : 0; \
    }
INTEGER_OPERATIONS(s32, u32)
INTEGER_OPERATIONS(u32, u32)
INTEGER_OPERATIONS(s64, u64)
INTEGER_OPERATIONS(u64, u64)

inline u32 mul_wide_u16(u16 a, u16 b) { return u32(a) * b; }
inline u64 mul_wide_u32(u32 a, u32 b) { return u64(a) * b; }
inline u64 mul_wide_s32(u32 a, u32 b) { return s64(s32(a)) * s32(b); }
inline u64 mad_wide_u32(u32 a, u32 b, u64 c) { return mul_wide_u32(a, b) + c; }
inline u64 mad_wide_s32(u32 a, u32 b, u64 c) { return mul_wide_s32(a, b) + c; }

// Bits

#define BIT_OPERATIONS(size) \
    inline u##size and_b##size(u##size a, u##size b) { return a & b; } \
    inline u##size or_b##size(u##size a, u##size b) { return a | b; } \
    inline u##size xor_b##size(u##size a, u##size b) { return a ^ b; } \
    inline u##size not_b##size(u##size a) { return ~a; } \
    inline u##size shl_b##size(u##size a, u32 by) { return by >= size ? 0 : a << by; } \
    inline u##size selp_b##size(u##size a, u##size b, bool p) { return p ? a : b; }
BIT_OPERATIONS(16)
BIT_OPERATIONS(32)
BIT_OPERATIONS(64)

inline u32 selp_f32(u32 a, u32 b, bool p) { return p ? a : b; }
inline u64 selp_f64(u64 a, u64 b, bool p) { return p ? a : b; }
inline bool and_pred(bool a, bool b) { return a && b; }
inline bool or_pred(bool a, bool b) { return a || b; }
inline bool xor_pred(bool a, bool b) { return a != b; }
inline bool not_pred(bool a) { return !a; }

inline u32 lesser(u32 a, u32 b) { return a < b ? a : b; }
inline u64 field(u64 a, u32 start, u32 length) {
    return start >= 64 ? 0 : (a >> start) & (length >= 64 ? ~u64(0) : (u64(1) << length) - 1);
}
inline u32 bfe_u32(u32 a, u32 start, u32 length) { return u32(field(a, start & 255, length & 255)); }
inline u64 bfe_s64(u64 a, u32 start, u32 length) {
    start &= 255, length &= 255;
    if (length == 0) return 0;
    const bool negative = a >> lesser(start + length - 1, 63) & 1;
    const u64 found = field(a, start, length);
    const u32 own = start >= 64 ? 0 : lesser(length, 64 - start);  // what lies past the end is the sign
    return negative && own < 64 ? found | ~u64(0) << own : found;
}
inline u32 prmt_b32(u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 choice = selector >> 4 * i;
        u8 byte = u8(bytes >> 8 * (choice & 7));
        if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= u32(byte) << 8 * i;
    }
    return result;
}

// Comparisons: with a NaN only those that end in u are true, and neu is the one that says so of "not equal".

#define COMPARISON(name, operator) \
    inline bool setp_##name##_b16(u16 a, u16 b) { return s16(a) operator s16(b); } \
    inline bool setp_##name##_b32(u32 a, u32 b) { return s32(a) operator s32(b); } \
    inline bool setp_##name##_b64(u64 a, u64 b) { return s64(a) operator s64(b); } \
    inline bool setp_##name##_s32(u32 a, u32 b) { return s32(a) operator s32(b); } \
    inline bool setp_##name##_u32(u32 a, u32 b) { return a operator b; } \
    inline bool setp_##name##_s64(u64 a, u64 b) { return s64(a) operator s64(b); } \
    inline bool setp_##name##_u64(u64 a, u64 b) { return a operator b; } \
    inline bool setp_##name##_f32(u32 a, u32 b) { return !unordered(f32(a), f32(b)) && f32(a) operator f32(b); } \
    inline bool setp_##name##_f64(u64 a, u64 b) { return !unordered(f64(a), f64(b)) && f64(a) operator f64(b); } \
    inline bool setp_##name##u_f32(u32 a, u32 b) { return unordered(f32(a), f32(b)) || f32(a) operator f32(b); } \
    inline bool setp_##name##u_f64(u64 a, u64 b) { return unordered(f64(a), f64(b)) || f64(a) operator f64(b); }
template <class T> bool unordered(T a, T b) { return is_nan(a) || is_nan(b); }
inline bool setp_nan_f32(u32 a, u32 b) { return unordered(f32(a), f32(b)); }
inline bool setp_nan_f64(u64 a, u64 b) { return unordered(f64(a), f64(b)); }
COMPARISON(eq, ==)
COMPARISON(ne, !=)
COMPARISON(lt, <)
COMPARISON(le, <=)
COMPARISON(gt, >)
COMPARISON(ge, >=)

// Conversions

inline u64 cvt_s64_s32(u32 a) { return s64(s32(a)); }
inline u64 cvt_s64_s32(u64 a) { return s64(s32(a)); }  // of a wider register, its low half
inline u64 cvt_u64_u32(u32 a) { return a; }
inline u32 cvt_u32_u64(u64 a) { return u32(a); }
inline u32 cvt_u32_u16(u16 a) { return a; }
inline u16 cvt_u16_u32(u32 a) { return u16(a); }
inline u64 cvt_rn_f64_s32(u32 a) { return bits(double(s32(a))); }
inline u64 cvt_rn_f64_u32(u32 a) { return bits(double(a)); }
inline u64 cvt_rn_f64_s64(u64 a) { return bits(double(s64(a))); }
inline u64 cvt_rn_f64_u64(u64 a) { return bits(double(a)); }
inline u64 cvt_f64_f32(u32 a) { return bits(double(f32(a))); }
inline u32 cvt_rn_f32_f64(u64 a) { return bits(float(f64(a))); }
inline u32 cvt_rpi_ftz_f32_f32(u32 a) { return flushed(bits(__builtin_ceilf(f32(flushed(a))))); }
inline u32 cvt_rzi_s32_f32(u32 a) {
    const float x = f32(a);
    if (is_nan(x)) return 0;
    if (x >= 2147483648.0f) return 0x7fffffffu;
    return x <= -2147483648.0f ? 0x80000000u : u32(s32(x));
}

inline u32 cvt_f32_bf16(u16 a) { return bits(f32(u32(a) << 16)); }
inline u64 cvt_f64_bf16(u16 a) { return cvt_f64_f32(cvt_f32_bf16(a)); }
inline u16 cvt_rn_bf16_f32(u32 a) {  // to nearest, ties to even; the carry out of the largest number gives infinity
    return is_nan(f32(a)) ? 0x7fff : u16((a + 0x7fff + (a >> 16 & 1)) >> 16);
}
inline u32 cvt_f32_f16(u16 a) { return bits(float(std::bit_cast<_Float16>(a))); }
inline u64 cvt_f64_f16(u16 a) { return cvt_f64_f32(cvt_f32_f16(a)); }
inline u16 cvt_rn_f16_f32(u32 a) { return is_nan(f32(a)) ? 0x7fff : std::bit_cast<u16>(_Float16(f32(a))); }
inline u32 cvt_rn_bf16x2_f32(u32 high, u32 low) { return u32(cvt_rn_bf16_f32(high)) << 16 | cvt_rn_bf16_f32(low); }
inline u32 cvt_rn_f16x2_f32(u32 high, u32 low) { return u32(cvt_rn_f16_f32(high)) << 16 | cvt_rn_f16_f32(low); }

// What Blackwell has besides: arithmetic of a half and a float32, and of three numbers
inline u32 add_rn_f32_bf16(u16 a, u32 b) { return add_rn_f32(cvt_f32_bf16(a), b); }
inline u32 sub_rn_f32_bf16(u16 a, u32 b) { return sub_rn_f32(cvt_f32_bf16(a), b); }
inline u32 add_rn_f32_f16(u16 a, u32 b) { return add_rn_f32(cvt_f32_f16(a), b); }
inline u32 sub_rn_f32_f16(u16 a, u32 b) { return sub_rn_f32(cvt_f32_f16(a), b); }
inline u32 min_f32(u32 a, u32 b, u32 c) { return min_f32(min_f32(a, b), c); }
inline u32 max_f32(u32 a, u32 b, u32 c) { return max_f32(max_f32(a, b), c); }
