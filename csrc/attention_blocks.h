// Attention on the CPU in blocks: where sequences lie, what a block sees, and its numbers as floats,
// turned, in the order in which products read them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "block_product.h"
#include "rotary_turn.h"
#include "widest.h"

namespace clinkd {

constexpr int64_t kQueries = kTiles;   // of a block
constexpr int64_t kKeys = 2 * kTiles;  // of a block
static_assert(kKeys <= kBlockRow && 2 * kMaxPairs <= kBlockRow);

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory on a cache line, not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : at_(static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats + 1, 64)))) {
    if (at_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return at_; }

 private:
  float* at_;
};

// work(i, part) for i below n, on up to so many threads, each of which takes the next when done.
template <typename Work>
void share(int64_t n, int threads, const Work& work) {
  const int parts = int(std::min<int64_t>(n, threads));
  if (parts == 0) return;
  std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part)
    for (int64_t i; (i = next++) < n;) work(i, part);
}

struct Sequence {
  int64_t batch;
  int64_t query, queries;  // the first, and how many
  int64_t key, keys;
  int64_t rows_before;  // `rows_of` the sequences before
};

// Room for so many keys in panels, and for whole tiles of their gradients.
inline int64_t rows_of(int64_t keys) {
  return std::max(round_up(keys, panel_columns(vector_width())),
                  round_up(keys, tile_rows(vector_width())));
}

// Of packed ones, where each starts; raises unless they rise from 0 to the end.
inline void check_starts(const int32_t* starts, int64_t sequences, int64_t tokens) {
  bool right = starts[0] == 0 && starts[sequences] == tokens;
  for (int64_t s = 0; s < sequences; ++s) right = right && starts[s] <= starts[s + 1];
  if (!right) throw std::invalid_argument("cu_seqlens must rise from 0 to the number of tokens");
}

inline std::vector<Sequence> sequences_of(const AttentionArgs& a) {
  std::vector<Sequence> found;
  if (a.starts != nullptr) {
    check_starts(a.starts, a.sequences, a.q.tokens);
    check_starts(a.key_starts, a.sequences, a.k.tokens);
  }
  int64_t rows = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    Sequence here = {s, 0, a.q.tokens, 0, a.k.tokens, rows};
    if (a.starts != nullptr)
      here = {0, a.starts[s], a.starts[s + 1] - a.starts[s], a.key_starts[s],
              a.key_starts[s + 1] - a.key_starts[s], rows};
    rows += rows_of(here.keys);
    found.push_back(here);
  }
  return found;
}

// What the queries from `query` on see of the keys from `key` on.
inline Band band_of(const AttentionArgs& a, const Sequence& s, int64_t query, int64_t key) {
  const int64_t place = s.keys - s.queries + query - key;  // of the query's own key
  return {a.window ? place - a.window + 1 : -kUnbounded, a.causal ? place + 1 : kUnbounded};
}

template <typename T>
CLINKD_INLINE T* head_of(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}
template <typename T>
CLINKD_INLINE const T* head_of(const RotaryArgs& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<const T*>(x.x) + batch * x.x_stride[0] + token * x.x_stride[1] +
         head * x.x_stride[2];
}

// Cosine and sine of all tokens, computed once for all heads: [B * S, 2, factors].
class Angles {
 public:
  // those of `like` where x has its positions
  Angles(const RotaryArgs& x, int threads, const Angles* like = nullptr)
      : x_(x),
        shared_(like != nullptr && same(x, like->x_)),
        own_(shared_ ? 0 : x.batch * x.tokens * 2 * factors(x)),
        data_(shared_ ? like->data_ : own_) {
    if (shared_) return;
    constexpr int64_t kTokens = 32;
    const auto fill = widest<Fill, const RotaryArgs&, int64_t, int64_t, float*>();
    const int64_t tokens = x_.pairs == 0 ? 0 : x_.batch * x_.tokens;
    share((tokens + kTokens - 1) / kTokens, threads, [&](int64_t i, int) {
      fill(x_, i * kTokens, std::min(tokens, (i + 1) * kTokens), data_);
    });
  }

  // The row turned, or with sign -1 back.
  template <int W>
  CLINKD_INLINE void turn(float* row, int64_t batch, int64_t token, float sign) const {
    const float* cos = data_ + (batch * x_.tokens + token) * 2 * factors(x_);
    turn_head<W>(row, row, cos, cos + factors(x_), x_.pairs, x_.pair_stride, sign);
  }

 private:
  static bool same(const RotaryArgs& x, const RotaryArgs& y) {
    return x.positions == y.positions && x.tokens == y.tokens && x.pairs == y.pairs &&
           std::equal(x.positions_stride, x.positions_stride + 3, y.positions_stride);
  }
  // of a token, see `angles`
  static int64_t factors(const RotaryArgs& x) { return x.pair_stride == 1 ? 2 * x.pairs : x.pairs; }

  struct Fill {
    template <int W>
    static CLINKD_INLINE void run(const RotaryArgs& x, int64_t begin, int64_t end, float* to) {
      const int axes = axes_of(x);
      for (int64_t i = begin; i < end; ++i) {
        float* cos = to + i * 2 * factors(x);
        angles(x, positions_of(x, i / x.tokens, i % x.tokens), axes, cos, cos + factors(x));
      }
    }
  };

  const RotaryArgs& x_;
  bool shared_;
  Buffer own_;
  float* data_;
};

// Numbers of a head in panels of so many components: [panel, token, component].
struct Panels {
  float* data;
  int64_t panel;  // floats from one to the next
};

// Keys of one head after the other, each with components up to whole panels.
class KeyRows {
 public:
  KeyRows(int64_t heads, int64_t dim)
      : heads_(heads), width_(round_up(dim, panel_columns(vector_width()))) {}
  int64_t width() const { return width_; }
  int64_t of(const Sequence& s) const { return rows_of(s.keys) * width_; }  // in a head
  int64_t at(const Sequence& s, int64_t head) const {
    return s.rows_before * heads_ * width_ + head * of(s);
  }
  int64_t size(const std::vector<Sequence>& sequences) const {
    return sequences.empty() ? 0 : at(sequences.back(), heads_);
  }

 private:
  int64_t heads_, width_;
};

inline int64_t panel_of(const Sequence& s) {
  return rows_of(s.keys) * panel_columns(vector_width());
}

// T as floats times `factor`; zeros up to whole panels.
template <int W, typename T>
CLINKD_INLINE void load_row(const T* x, int64_t dim, float factor, float* row) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store<W>(row + d, load<W>(x + d) * factor);
  for (; d < dim; ++d) store<1>(row + d, load<1>(x + d) * factor);
  for (; d % panel_columns(W); ++d) row[d] = 0;
}

template <int W, typename T>
CLINKD_INLINE void store_row(const float* row, int64_t dim, float factor, T* out) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store<W>(out + d, load<W>(row + d) * factor);
  for (; d < dim; ++d) store<1>(out + d, load<1>(row + d) * factor);
}

// Rows of a head in a block, with rows of zeros up to a multiple of `whole`.
template <int W, typename T>
CLINKD_INLINE void load_rows(const T* x, int64_t stride, int64_t rows, int64_t whole, int64_t dim,
                             float factor, float* block) {
  for (int64_t r = 0; r < rows; ++r) load_row<W>(x + r * stride, dim, factor, block + r * kBlockRow);
  for (; rows % whole; ++rows)
    std::fill_n(block + rows * kBlockRow, round_up(dim, panel_columns(W)), 0.0f);
}

// The same of queries or keys, turned.
template <int W, typename T>
CLINKD_INLINE void load_turned(const RotaryArgs& x, const Angles& angles, int64_t batch,
                               int64_t token, int64_t head, int64_t rows, int64_t whole,
                               float factor, float* block) {
  load_rows<W>(head_of<T>(x, batch, token, head), x.x_stride[1], rows, whole, x.head_dim, factor,
               block);
  for (int64_t r = 0; r < rows; ++r) angles.turn<W>(block + r * kBlockRow, batch, token + r, 1.0f);
}

// Rows of a block in panels of components.
template <int W>
CLINKD_INLINE void to_panels(const float* block, int64_t rows, int64_t dim, const Panels& to) {
  constexpr int kColumns = panel_columns(W);
  for (int64_t d = 0; d < dim; d += kColumns) {
    float* panel = to.data + d / kColumns * to.panel;
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kColumns; v += W)
        store<W>(panel + r * kColumns + v, load<W>(block + r * kBlockRow + d + v));
  }
}

// Vectors of two halves in turn, first or last halves of both.
template <int W>
CLINKD_INLINE Floats<W> zip(Floats<W> a, Floats<W> b, bool last) {
  if constexpr (W == 4) {
    return last ? __builtin_shufflevector(a, b, 2, 6, 3, 7)
                : __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else if constexpr (W == 8) {
    return last ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else {
    static_assert(W == 16);
    return last ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                          30, 15, 31)
                : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                          23);
  }
}

// As many rows of a block as a panel has columns, as one panel: [component, row].
template <int W>
CLINKD_INLINE void to_transposed_panel(const float* block, int64_t dim, float* panel) {
  constexpr int kColumns = panel_columns(W);
  for (int64_t d = 0; d < dim; d += W)
    for (int first = 0; first < kColumns; first += W) {
      Floats<W> square[W], next[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) square[i] = load<W>(block + (first + i) * kBlockRow + d);
#pragma GCC unroll 4
      for (int stage = 1; stage < W; stage *= 2) {  // each moves the top bit of a place to its end
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          next[i] = zip<W>(square[i / 2], square[i / 2 + W / 2], i % 2 == 1);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = next[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store<W>(panel + (d + i) * kColumns + first, square[i]);
    }
}

}  // namespace clinkd
