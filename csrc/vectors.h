// Short vectors of float for kernels on the CPU, and the 16-bit types in memory.
// GCC's and Clang's vector types, as wide as a register: GCC compares wider ones number by number.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define CLINKD_INLINE inline __attribute__((always_inline))

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // everything here is inlined, so no ABI is involved

namespace clinkd {

template <int W>
struct Vector {
  typedef float floats __attribute__((vector_size(4 * W)));
  typedef uint32_t words __attribute__((vector_size(4 * W)));
  typedef int32_t ints __attribute__((vector_size(4 * W)));
  typedef uint16_t halves __attribute__((vector_size(2 * W)));
};
template <int W>
using Floats = typename Vector<W>::floats;
template <int W>
using Words = typename Vector<W>::words;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <int W>
CLINKD_INLINE Words<W> bits_of(Floats<W> value) {
  return (Words<W>)value;
}
template <int W>
CLINKD_INLINE Floats<W> floats_of(Words<W> bits) {
  return (Floats<W>)bits;
}

template <int W>
CLINKD_INLINE Words<W> load_halves(const void* place) {
  typename Vector<W>::halves halves;
  std::memcpy(&halves, place, sizeof(halves));
  return __builtin_convertvector(halves, Words<W>);
}
template <int W>
CLINKD_INLINE void store_halves(void* place, Words<W> words) {
  const typename Vector<W>::halves halves =
      __builtin_convertvector(words, typename Vector<W>::halves);
  std::memcpy(place, &halves, sizeof(halves));
}

template <int W>
CLINKD_INLINE Floats<W> load(const float* place) {
  Floats<W> value;
  std::memcpy(&value, place, sizeof(value));
  return value;
}
template <int W>
CLINKD_INLINE void store(float* place, Floats<W> value) {
  std::memcpy(place, &value, sizeof(value));
}

template <int W>
CLINKD_INLINE Floats<W> load(const BFloat16* place) {
  return floats_of<W>(load_halves<W>(place) << 16);
}
template <int W>
CLINKD_INLINE void store(BFloat16* place, Floats<W> value) {
  const Words<W> bits = bits_of<W>(value);
  const Words<W> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // ties to even
  store_halves<W>(place, value == value ? rounded : Words<W>{} + 0x7fc0u);
}

// Float16 in integer arithmetic: that runs in vectors with every compiler and processor.
template <int W>
CLINKD_INLINE Floats<W> load(const Float16* place) {
  const Words<W> half = load_halves<W>(place);
  const Words<W> magnitude = (half & 0x7fffu) << 13;
  const Words<W> scaled = bits_of<W>(floats_of<W>(magnitude) * 0x1p112f);  // biases differ by 112
  const Words<W> zero = {};
  const Words<W> special = magnitude >= 0x0f800000u ? zero + 0x7f800000u : zero;  // infinity, NaN
  return floats_of<W>(scaled | special | (half & 0x8000u) << 16);
}
template <int W>
CLINKD_INLINE void store(Float16* place, Floats<W> value) {
  const Words<W> zero = {};
  const Words<W> bits = bits_of<W>(value);
  const Words<W> magnitude = bits & 0x7fffffffu;
  // below 2^-14 adding 1/2 leaves the rounded result in the last bits of the sum
  const Words<W> small = bits_of<W>(floats_of<W>(magnitude) + 0.5f) - 0x3f000000u;
  const Words<W> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const Words<W> large = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  const Words<W> finite = magnitude < 0x38800000u ? small : normal;
  const Words<W> rounded = magnitude >= 0x47800000u ? large : finite;
  store_halves<W>(place, rounded | ((bits & 0x80000000u) >> 16));
}

template <int W>
CLINKD_INLINE Floats<W> zero() {
  return Floats<W>{};
}

template <int W>
CLINKD_INLINE float sum(Floats<W> v) {
  float total = 0.0f;
  for (int i = 0; i < W; ++i) total += v[i];
  return total;
}
template <int W>
CLINKD_INLINE float largest(Floats<W> v) {
  float top = v[0];
  for (int i = 1; i < W; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// (1, 0, 3, 2, …)
template <int W>
CLINKD_INLINE Floats<W> swap_neighbours(Floats<W> v) {
  if constexpr (W == 2) {
    return __builtin_shufflevector(v, v, 1, 0);
  } else if constexpr (W == 4) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2);
  } else if constexpr (W == 8) {
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else {
    static_assert(W == 16);
    return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  }
}

// Write past the caches, 16 bytes at a time, without reading the lines first; fewer than that, or
// on another processor, as any other write. Where it streams both are on 16 bytes.
CLINKD_INLINE void stream_out(void* to, const void* from, int64_t bytes) {
#ifdef __SSE2__
  if (bytes % 16 == 0) {
    const __m128i* source = static_cast<const __m128i*>(from);
    __m128i* target = static_cast<__m128i*>(to);
    for (int64_t i = 0; i < bytes / 16; ++i)
      _mm_stream_si128(target + i, _mm_load_si128(source + i));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// After the last of them: other threads see them in order with what is written next.
CLINKD_INLINE void end_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace clinkd

#pragma GCC diagnostic pop
