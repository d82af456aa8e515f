// Rows of logits on the CPU: walked over in blocks that stay in the first-level cache, as float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "exponential.h"
#include "vectors.h"

namespace clinkd {

constexpr int kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// cap * tanh(x / cap)
template <int W>
CLINKD_INLINE Floats<W> capped(Floats<W> x, float cap) {
  const Floats<W> y = x * (2.0f * kLog2E / cap);
  const Floats<W> e = exp2<W>(y > 126.0f ? zero<W>() + 126.0f : y);
  return cap * (1.0f - 2.0f / (e + 1.0f));
}

// `count` logits as float32, filled up with -inf to a multiple of W. Gives the largest.
template <int W, typename T>
CLINKD_INLINE float fill(const T* row, int count, float cap, float* block) {
  using F = Floats<W>;
  F top = zero<W>() - kInfinity;
  int i = 0;
  for (; i + W <= count; i += W) {
    F x = load<W>(row + i);
    if (cap > 0) x = capped<W>(x, cap);
    store<W>(block + i, x);
    top = x > top ? x : top;
  }
  if (i < count) {
    alignas(64) T rest[W] = {};
    for (int j = 0; j < count - i; ++j) rest[j] = row[i + j];
    F x = load<W>(rest);
    if (cap > 0) x = capped<W>(x, cap);
    for (int j = count - i; j < W; ++j) x[j] = -kInfinity;
    store<W>(block + i, x);
    top = x > top ? x : top;
  }
  return largest<W>(top);
}

// Outputs of this size leave every cache before anybody reads them: reading their lines for a write
// is a loss. Smaller ones are often still in the last cache, before and after.
constexpr int64_t kStreamBytes = 32 << 20;

// Whether `count` elements from `out` on are better written past the caches: too many to be read
// from them later, and on 16 bytes.
template <typename T>
CLINKD_INLINE bool can_stream(const T* out, int64_t count) {
  return count * int64_t(sizeof(T)) >= kStreamBytes && reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

// `count` floats of a block, which holds a multiple of W, as elements; `past_caches`: where `out`
// lies on 16 bytes.
template <int W, typename T>
CLINKD_INLINE void empty_out(const float* block, int count, T* out, bool past_caches) {
  int i = 0;
  for (; i + W <= count; i += W) {
    alignas(64) T some[W];
    store<W>(some, load<W>(block + i));
    if (past_caches)
      stream_out(out + i, some, sizeof(some));
    else
      std::memcpy(out + i, some, sizeof(some));
  }
  if (i < count) {
    alignas(64) T rest[W];
    store<W>(rest, load<W>(block + i));
    for (int j = 0; j < count - i; ++j) out[i + j] = rest[j];
  }
}

// A sum of exponentials relative to a maximum that may still grow.
struct Sum {
  float top = -kInfinity;
  double total = 0.0;

  CLINKD_INLINE float level() const { return top == -kInfinity ? 0.0f : top; }
  // Returns what sums so far are multiplied by.
  CLINKD_INLINE double raise(float candidate, float scale) {
    if (!(candidate > top)) return 1.0;
    const double keep = total > 0 ? std::exp2(double(top - candidate) * scale) : 0.0;
    top = candidate;
    total *= keep;
    return keep;
  }
  CLINKD_INLINE double log() const { return total > 0 ? std::log(total) : double(kNaN); }
  CLINKD_INLINE float inverse() const { return total > 0 ? float(1.0 / total) : kNaN; }
};

// Elements of the rows that a thread takes at a time. Two threads that write fresh memory side by
// side meet in its large pages, and the system clears those for each.
constexpr int64_t kTaken = 2 << 20;

// Run `run(args, row)` for each of args.rows, of so many columns.
template <typename Args, typename Row>
void over_rows(const Args& args, int64_t columns, int threads, Row run) {
  const int parts = int(std::max<int64_t>(1, std::min<int64_t>(threads, args.rows)));
  if (parts == 1) {
    for (int64_t row = 0; row < args.rows; ++row) run(args, row);
    return;
  }
  // rows without a label cost nothing: enough turns for each thread to even that out
  const int64_t turn = std::min(kTaken / std::max<int64_t>(columns, 1), args.rows / (8 * parts));
#pragma omp parallel for num_threads(parts) schedule(dynamic, std::max<int64_t>(turn, 1))
  for (int64_t row = 0; row < args.rows; ++row) run(args, row);
}

}  // namespace clinkd
