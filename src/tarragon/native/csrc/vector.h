// Eight float lanes, and the conversions between them and the storage types.
//
// Two implementations of the same arithmetic: AVX2 with FMA, and GCC/Clang vector extensions for every other
// CPU. Where the CPU has a fused multiply-add both give the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(TARRAGON_PORTABLE)
#define TARRAGON_AVX2 1
#include <immintrin.h>
#endif

#define TARRAGON_INLINE inline __attribute__((always_inline))

namespace tarragon {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr int kLanes = 8;
constexpr int kPanel = 16;  // columns of a packed weight panel: two vectors

#if TARRAGON_AVX2

struct Vec8 {
  __m256 v;
};

TARRAGON_INLINE Vec8 zero8() { return {_mm256_setzero_ps()}; }
TARRAGON_INLINE Vec8 broadcast8(const float* p) { return {_mm256_broadcast_ss(p)}; }
TARRAGON_INLINE Vec8 multiply_add(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TARRAGON_INLINE Vec8 multiply(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
TARRAGON_INLINE Vec8 add(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }

TARRAGON_INLINE Vec8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
TARRAGON_INLINE Vec8 load8(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}
TARRAGON_INLINE Vec8 load8(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

TARRAGON_INLINE void store8(float* p, Vec8 a) { _mm256_storeu_ps(p, a.v); }
TARRAGON_INLINE void store8(bf16* p, Vec8 a) {
  // Round to nearest, ties to even; every NaN becomes 0x7fc0, as in torch.
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i biased = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(biased, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
TARRAGON_INLINE void store8(fp16* p, Vec8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// One row of a packed bfloat16 panel: column j and column j + 8 share a 32-bit word, so that one load, one
// shift and one mask give sixteen floats.
TARRAGON_INLINE void load_panel_row(const bf16* p, Vec8& low, Vec8& high) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  low.v = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  high.v = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

#else

typedef float float8 __attribute__((vector_size(32)));
typedef uint32_t word8 __attribute__((vector_size(32)));

struct Vec8 {
  float8 v;
};

TARRAGON_INLINE Vec8 zero8() { return {float8{}}; }
TARRAGON_INLINE Vec8 broadcast8(const float* p) {
  const float s = *p;
  return {float8{s, s, s, s, s, s, s, s}};
}
TARRAGON_INLINE Vec8 multiply_add(Vec8 a, Vec8 b, Vec8 c) {
#if defined(FP_FAST_FMAF)
  Vec8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return out;
#else
  return {a.v * b.v + c.v};  // two roundings: the build forbids the compiler to fuse them
#endif
}
TARRAGON_INLINE Vec8 multiply(Vec8 a, Vec8 b) { return {a.v * b.v}; }
TARRAGON_INLINE Vec8 add(Vec8 a, Vec8 b) { return {a.v + b.v}; }

TARRAGON_INLINE float to_float(fp16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1f, mantissa = h.bits & 0x3ff;
  float magnitude;
  if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else if (exponent == 31) {
    const uint32_t quiet = mantissa ? 0x400000u : 0u;
    const uint32_t bits = 0x7f800000u | quiet | (mantissa << 13);
    std::memcpy(&magnitude, &bits, 4);
  } else {
    const uint32_t bits = ((exponent + 112) << 23) | (mantissa << 13);
    std::memcpy(&magnitude, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}
TARRAGON_INLINE fp16 to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00 | ((bits >> 13) & 0x3ff))};
  if (bits >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65536 and more
  if (bits < 0x38800000u) {  // subnormal: the float adder does the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1);  // rebias the exponent, round to nearest even
  return {static_cast<uint16_t>(sign | (bits >> 13))};
}

TARRAGON_INLINE Vec8 load8(const float* p) {
  Vec8 out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
TARRAGON_INLINE Vec8 load8(const bf16* p) {
  word8 words;
  for (int i = 0; i < kLanes; ++i) words[i] = static_cast<uint32_t>(p[i].bits) << 16;
  return {reinterpret_cast<float8>(words)};
}
TARRAGON_INLINE Vec8 load8(const fp16* p) {
  Vec8 out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = to_float(p[i]);
  return out;
}

TARRAGON_INLINE void store8(float* p, Vec8 a) { std::memcpy(p, &a, sizeof(a)); }
TARRAGON_INLINE void store8(bf16* p, Vec8 a) {
  const word8 bits = reinterpret_cast<word8>(a.v);
  for (int i = 0; i < kLanes; ++i) {
    const bool nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    p[i].bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16);
  }
}
TARRAGON_INLINE void store8(fp16* p, Vec8 a) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_half(a.v[i]);
}

TARRAGON_INLINE void load_panel_row(const bf16* p, Vec8& low, Vec8& high) {
  word8 raw;
  std::memcpy(&raw, p, sizeof(raw));
  low.v = reinterpret_cast<float8>(raw << 16);
  high.v = reinterpret_cast<float8>(raw & 0xffff0000u);
}

#endif

template <class Storage>
TARRAGON_INLINE void load_panel_row(const Storage* p, Vec8& low, Vec8& high) {
  low = load8(p);
  high = load8(p + kLanes);
}

// Where column c of a panel lies within its row (see load_panel_row).
template <class Storage>
constexpr int panel_position(int c) {
  return c;
}
template <>
constexpr int panel_position<bf16>(int c) {
  return c < kLanes ? 2 * c : 2 * (c - kLanes) + 1;
}

}  // namespace tarragon
