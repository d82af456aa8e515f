// Rotary embedding on the CPU: sine and cosine once for a pair and token, shared by all heads.

// rintf and floorf in vectors: nothing here reads errno or floating-point flags
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rotary.h"
#include "rotary_turn.h"
#include "vectors.h"
#include "widest.h"

namespace clinkd {
namespace {

// under so many components a second thread costs more than it saves
constexpr int64_t kComponentsPerThread = 16384;

// Intel's own prefetch ends with a page, and the heads of one token can fill two; AMD's does not, and
// there a second one took 10 to 20 % of the time.
inline bool fetches_ahead() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool is_intel = __builtin_cpu_is("intel");
  return is_intel;
#else
  return false;
#endif
}

// Bring in what comes after next; addresses past the end are no error.
template <typename T>
CLINKD_INLINE void fetch(const T* head, int64_t components) {
  for (int64_t i = 0; i < components; i += 64 / sizeof(T)) __builtin_prefetch(head + i);
}

CLINKD_INLINE void angles_of(const RotaryArgs& a, int64_t token, int axes, float* cos, float* sin) {
  angles(a, positions_of(a, token / a.tokens, token % a.tokens), axes, cos, sin);
}

template <int W, typename T>
CLINKD_INLINE void turn_tokens(const RotaryArgs& a, int64_t begin, int64_t end) {
  alignas(64) float cos[2][2 * kMaxPairs], sin[2][2 * kMaxPairs];  // of even and of odd tokens
  const int64_t rest = a.head_dim - 2 * a.pairs;
  const int axes = axes_of(a);
  const bool fetches = fetches_ahead();
  angles_of(a, begin, axes, cos[begin % 2], sin[begin % 2]);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.tokens, s = token % a.tokens, next = token + 1;
    // those of the next token already: they are made while this one's heads wait for memory
    if (next < end) angles_of(a, next, axes, cos[next % 2], sin[next % 2]);
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + s * a.x_stride[1];
    T* out = static_cast<T*>(a.out) + b * a.out_stride[0] + s * a.out_stride[1];
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* head = x + h * a.x_stride[2];
      T* turned = out + h * a.out_stride[2];
      if (fetches) fetch(head + 2 * a.x_stride[2], a.head_dim);
      turn_head<W>(head, turned, cos[token % 2], sin[token % 2], a.pairs, a.pair_stride);
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
