// Attention on the CPU in blocks: where sequences lie, what a block sees, and its numbers as floats
// in the order in which products read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "block_product.h"

namespace clinkd {

constexpr int64_t kQueries = kTiles;   // of a block
constexpr int64_t kKeys = 2 * kTiles;  // of a block
static_assert(kKeys <= kBlockRow);

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory on a cache line, not cleared.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : at_(static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats + 64, 64)))) {
    if (at_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator float*() const { return at_; }

 private:
  float* at_;
};

template <typename T>
CLINKD_INLINE T* head_of(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

struct Sequence {
  int64_t batch;
  int64_t query, queries;  // the first, and how many
  int64_t key, keys;
  int64_t packed;  // keys of the sequences before, each rounded up to whole tiles
};

inline std::vector<Sequence> sequences_of(const AttentionArgs& a) {
  std::vector<Sequence> found;
  int64_t packed = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    Sequence here = {s, 0, a.queries, 0, a.keys, packed};
    if (a.starts != nullptr)
      here = {0, a.starts[s], a.starts[s + 1] - a.starts[s], a.key_starts[s],
              a.key_starts[s + 1] - a.key_starts[s], packed};
    packed += round_up(here.keys, kTiles);
    found.push_back(here);
  }
  return found;
}

inline int64_t packed_keys(const std::vector<Sequence>& sequences) {
  return sequences.empty() ? 0 : sequences.back().packed + round_up(sequences.back().keys, kTiles);
}

// What the queries from `query` on see of the keys from `key` on.
inline Band band_of(const AttentionArgs& a, const Sequence& s, int64_t query, int64_t key) {
  const int64_t place = s.keys - s.queries + query - key;  // of the query's own key
  return {a.window ? place - a.window + 1 : -kUnbounded, a.causal ? place + 1 : kUnbounded};
}

// Keys or values of a head, in panels.
struct Panels {
  float* data;
  int64_t panel;  // floats from one to the next
};

// `rows` of T as floats times `factor`, in a block; zeros up to whole tiles and vectors.
template <int W, typename T>
CLINKD_INLINE void load_rows(const T* x, int64_t stride, int64_t rows, int64_t dim, float factor,
                             float* block, int64_t block_row) {
  for (int64_t r = 0; r < rows; ++r, x += stride, block += block_row) {
    int64_t d = 0;
    for (; d + W <= dim; d += W) store<W>(block + d, load<W>(x + d) * factor);
    for (; d < dim; ++d) store<1>(block + d, load<1>(x + d) * factor);
    for (; d % panel_columns(W); ++d) block[d] = 0;
  }
  const int64_t width = round_up(dim, panel_columns(W));
  for (; rows % tile_rows(W); ++rows, block += block_row) std::fill_n(block, width, 0.0f);
}

// The same in panels of components, [panel, row, component], of which each has `panel_rows`.
template <int W, typename T>
CLINKD_INLINE void load_panels(const T* x, int64_t stride, int64_t rows, int64_t dim,
                               const Panels& to) {
  constexpr int kColumns = panel_columns(W);
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    float* row = to.data + r * kColumns;
    int64_t d = 0;
    for (; d + W <= dim; d += W)
      store<W>(row + d / kColumns * to.panel + d % kColumns, load<W>(x + d));
    for (; d < dim; ++d)
      store<1>(row + d / kColumns * to.panel + d % kColumns, load<1>(x + d));
    for (; d % kColumns; ++d) row[d / kColumns * to.panel + d % kColumns] = 0;
  }
}

// The same turned, in panels of rows, [panel, component, row]; zeros up to whole panels.
template <int W, typename T>
CLINKD_INLINE void load_turned(const T* x, int64_t stride, int64_t rows, int64_t dim, float* to) {
  constexpr int kColumns = panel_columns(W);
  for (int64_t first = 0; first < rows; first += kColumns, to += kColumns * dim) {
    for (int64_t r = 0; r < kColumns; ++r, x += stride) {
      if (first + r < rows)
        for (int64_t d = 0; d < dim; ++d) store<1>(to + d * kColumns + r, load<1>(x + d));
      else
        for (int64_t d = 0; d < dim; ++d) to[d * kColumns + r] = 0;
    }
  }
}

// Rows of a block times `factors` of their own, or all times `factor`, as T.
template <int W, typename T>
CLINKD_INLINE void store_row(const float* row, int64_t dim, float factor, T* out) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store<W>(out + d, load<W>(row + d) * factor);
  for (; d < dim; ++d) store<1>(out + d, load<1>(row + d) * factor);
}

template <int W>
CLINKD_INLINE float sum_of(Floats<W> v) {
  float sum = 0;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sum += v[i];
  return sum;
}

template <int W>
CLINKD_INLINE float max_of(Floats<W> v) {
  float most = v[0];
#pragma GCC unroll 16
  for (int i = 1; i < W; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace clinkd
