// The factors 1 - gamma of the 256 8-bit codes, correctly rounded: the same bits on every machine.
#pragma once
#include <cstdint>

namespace spg {

// Filled by the compiler: a constructor that fills it at run time is one that GCC 12 leaves out on aarch64.
struct CodeTable {
  alignas(64) float factor[256] = {};
  alignas(64) uint8_t plane[4][256] = {};  // byte k of every factor

  constexpr CodeTable() {
    for (int code = 0; code < 253; code++) {  // tanh(code / 28) is 1 in float32 from 253 on
      double exp = 1.0, term = 1.0;  // of code / 14: a sum of positive terms, so nothing cancels
      for (int k = 1; k < 100; k++) exp += term *= code / 14.0 / k;
      factor[code] = float(2.0 / (1.0 + exp));
      uint32_t exponent = 127;
      float fraction = factor[code];
      for (; fraction < 1.0f; fraction *= 2.0f) exponent--;
      const uint32_t bits = exponent << 23 | uint32_t((fraction - 1.0f) * 8388608.0f);
      for (int k = 0; k < 4; k++) plane[k][code] = uint8_t(bits >> (8 * k));
    }
  }
};

constexpr CodeTable kCodeTable;

}  // namespace spg
