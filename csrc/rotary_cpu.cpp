// Rotary embedding on the CPU: sine and cosine once for a pair and token, shared by all heads.

// rintf and floorf in vectors: nothing here reads errno or floating-point flags
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rotary.h"
#include "rotary_angle.h"
#include "vectors.h"
#include "widest.h"

namespace clinkd {
namespace {

constexpr int kMaxPairs = 128;
constexpr int kFewAxes = 3;
// under so many components a second thread costs more than it saves
constexpr int64_t kComponentsPerThread = 16384;

// Factors of one token, for the layout of its heads.
struct Factors {
  alignas(64) float cos[2 * kMaxPairs];
  alignas(64) float sin[2 * kMaxPairs];
};

// Cosine and sine of every pair, the sine with the sign of the direction. Where the components of a
// pair are neighbours they are laid out for `x * cos + swapped(x) * sin`: twice each, first -sin.
CLINKD_INLINE void angles(const RotaryArgs& a, const float* positions, int axes, Factors& f) {
  alignas(64) float cos[kMaxPairs], sin[kMaxPairs];
  const float sign = a.inverse ? -1.0f : 1.0f;
  float* c = a.pair_stride == 1 ? cos : f.cos;
  float* s = a.pair_stride == 1 ? sin : f.sin;
  if (axes <= kFewAxes) {  // choosing among a few is cheaper than gathering
    float place[kFewAxes];
    for (int k = 0; k < kFewAxes; ++k)
      place[k] = positions[k < axes ? k * a.positions_stride[0] : 0];
#pragma omp simd
    for (int i = 0; i < a.pairs; ++i) {
      const int32_t axis = a.axis[i];
      const float position = axis == 0 ? place[0] : axis == 1 ? place[1] : place[2];
      float pair_cos, pair_sin;
      cos_sin(position, a.hi[i], a.lo[i], pair_cos, pair_sin);
      c[i] = pair_cos;
      s[i] = pair_sin * sign;
    }
  } else {
    for (int i = 0; i < a.pairs; ++i) {
      cos_sin(positions[a.axis[i] * a.positions_stride[0]], a.hi[i], a.lo[i], c[i], s[i]);
      s[i] *= sign;
    }
  }
  if (a.pair_stride != 1) return;
#pragma omp simd
  for (int i = 0; i < a.pairs; ++i) {
    f.cos[2 * i] = f.cos[2 * i + 1] = cos[i];
    f.sin[2 * i] = -sin[i];
    f.sin[2 * i + 1] = sin[i];
  }
}

// W pairs at distance n. Both components are read before one is written: `out` may be `x`.
template <int W, typename T>
CLINKD_INLINE void turn_pairs(const T* x, T* out, const float* cos, const float* sin, int n) {
  const Floats<W> first = load<W>(x), second = load<W>(x + n);
  const Floats<W> c = load<W>(cos), s = load<W>(sin);
  store<W>(out, first * c - second * s);
  store<W>(out + n, first * s + second * c);
}

// W components whose neighbours are their partners.
template <int W, typename T>
CLINKD_INLINE void turn_neighbours(const T* x, T* out, const float* cos, const float* sin) {
  const Floats<W> both = load<W>(x);
  store<W>(out, both * load<W>(cos) + swap_neighbours<W>(both) * load<W>(sin));
}

template <int W, typename T>
CLINKD_INLINE void turn_head(const T* x, T* out, const Factors& f, int pairs, int n) {
  if (n == 1) {
    int i = 0;
    for (; i + W <= 2 * pairs; i += W) turn_neighbours<W>(x + i, out + i, f.cos + i, f.sin + i);
    for (; i < 2 * pairs; i += 2) turn_neighbours<2>(x + i, out + i, f.cos + i, f.sin + i);
    return;
  }
  for (int i = 0; i < pairs; i += n) {
    int j = 0;
    for (; j + W <= n; j += W)
      turn_pairs<W>(x + 2 * i + j, out + 2 * i + j, f.cos + i + j, f.sin + i + j, n);
    for (; j + 4 <= n; j += 4)
      turn_pairs<4>(x + 2 * i + j, out + 2 * i + j, f.cos + i + j, f.sin + i + j, n);
    for (; j < n; ++j)
      turn_pairs<1>(x + 2 * i + j, out + 2 * i + j, f.cos + i + j, f.sin + i + j, n);
  }
}

// Bring in what comes after next; addresses past the end are no error.
template <typename T>
CLINKD_INLINE void fetch(const T* head, int64_t components) {
  for (int64_t i = 0; i < components; i += 64 / sizeof(T)) __builtin_prefetch(head + i);
}

template <int W, typename T>
CLINKD_INLINE void turn_tokens(const RotaryArgs& a, int64_t begin, int64_t end) {
  Factors factors;
  const int64_t rest = a.head_dim - 2 * a.pairs;
  const int axes = *std::max_element(a.axis, a.axis + a.pairs) + 1;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.tokens, s = token % a.tokens;
    angles(a, a.positions + b * a.positions_stride[1] + s * a.positions_stride[2], axes,
           factors);
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + s * a.x_stride[1];
    T* out = static_cast<T*>(a.out) + b * a.out_stride[0] + s * a.out_stride[1];
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* head = x + h * a.x_stride[2];
      T* turned = out + h * a.out_stride[2];
      fetch(head + 2 * a.x_stride[2], a.head_dim);
      turn_head<W>(head, turned, factors, a.pairs, a.pair_stride);
      if (rest > 0 && head != turned)
        std::memcpy(turned + 2 * a.pairs, head + 2 * a.pairs, rest * sizeof(T));
    }
  }
}

template <typename T>
struct Turn {
  template <int W>
  static CLINKD_INLINE void run(const RotaryArgs& a, int64_t begin, int64_t end) {
    turn_tokens<W, T>(a, begin, end);
  }
};

}  // namespace

void rotary_cpu(const RotaryArgs& args, int threads) {
  const auto turn = widest_of<Turn, const RotaryArgs&, int64_t, int64_t>(args.type);
  const int64_t tokens = args.batch * args.tokens;
  const int64_t work = tokens * args.heads * args.head_dim;
  const int64_t parts = std::min<int64_t>({threads, tokens, work / kComponentsPerThread});
  if (parts <= 1) return turn(args, 0, tokens);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; ++part)
    turn(args, tokens * part / parts, tokens * (part + 1) / parts);
}

}  // namespace clinkd
