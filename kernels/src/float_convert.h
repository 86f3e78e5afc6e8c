// Rows between float32 and the 16-bit types of frames, rounded to nearest even as torch does.
#ifndef FAASMOE_FLOAT_CONVERT_H
#define FAASMOE_FLOAT_CONVERT_H

#include <stdint.h>

#include <cstring>

namespace fk {

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
static inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t to_bfloat16(float value) {
  uint32_t bits = float_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
  bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return uint16_t(is_nan ? 0x7fc0 : rounded >> 16);
}
static inline float from_bfloat16(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

static inline uint16_t to_float16(float value) {
  uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: the addition aligns and rounds
    float shifted = bits_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_bits(shifted) - 0x3f000000));
  }
  uint32_t rounded = magnitude + 0xc8000fff + (magnitude >> 13 & 1);
  return uint16_t(sign | rounded >> 13);
}
static inline float from_float16(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  float scaled = bits_float(magnitude << 13) * 0x1p112f;  // exact
  return bits_float(sign | float_bits(scaled));
}

}  // namespace fk
#endif
