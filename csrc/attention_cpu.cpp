// Attention on the CPU, in blocks: scores of a block of queries and keys stay in the caches, what a
// mask hides is not computed, and keys are turned into panels once for all heads and queries.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention_blocks.h"
#include "exponential.h"
#include "widest.h"

namespace clinkd {
namespace {

constexpr float kNone = -INFINITY;

struct Task {
  const Sequence* sequence;
  int64_t head, query, queries;
  const float* keys;      // of its head, turned
  const float* values;    // of its head
  int64_t value_panel;
};

struct Blocks {
  Buffer queries{kQueries * kBlockRow}, scores{kQueries * kBlockRow}, out{kQueries * kBlockRow};
  float top[kQueries], total[kQueries];
};

// Scores of one row, in powers of two, to probabilities relative to the highest so far; zeros
// where nothing is seen. Returns what the row's earlier sums are to be multiplied by.
template <int W>
CLINKD_INLINE float soften(float* row, Range seen, int64_t width, float& top, float& total) {
  std::fill_n(row, seen.begin, 0.0f);
  std::fill(row + seen.end, row + width, 0.0f);
  if (seen.begin == seen.end) return 1.0f;
  const int64_t begin = seen.begin / W * W, end = round_up(seen.end, W);
  std::fill(row + begin, row + seen.begin, kNone);
  std::fill(row + seen.end, row + end, kNone);
  Floats<W> most = Floats<W>{} + kNone;
  for (int64_t j = begin; j < end; j += W) {
    const Floats<W> score = load<W>(row + j);
    most = score > most ? score : most;
  }
  const float before = top;
  top = std::max(before, max_of<W>(most));
  Floats<W> sum = {};
  for (int64_t j = begin; j < end; j += W) {
    const Floats<W> p = exp2<W>(load<W>(row + j) - top);
    sum += p;
    store<W>(row + j, p);
  }
  const float kept = before == kNone ? 0.0f : std::exp2(before - top);
  total = total * kept + sum_of<W>(sum);
  return kept;
}

// A block of queries of one head.
template <typename T>
struct Forward {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Task& t, Blocks& b) {
    const Sequence& s = *t.sequence;
    const int64_t dim = a.head_dim, rows = round_up(t.queries, tile_rows(W));
    load_rows<W>(head_of<const T>(a.q, s.batch, s.query + t.query, t.head), a.q.token, t.queries,
                 dim, a.scale * kLog2E, b.queries, kBlockRow);
    std::fill_n(static_cast<float*>(b.out), rows * kBlockRow, 0.0f);
    std::fill_n(b.top, kQueries, kNone);
    std::fill_n(b.total, kQueries, 0.0f);
    const Range seen = taken(band_of(a, s, t.query, 0), 0, t.queries - 1, s.keys);
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, s.keys - key);
      const int64_t width = round_up(keys, panel_columns(W));
      const Band band = band_of(a, s, t.query, key);
      multiply<W, Left::kRows>({b.queries, t.keys + key * dim, dim * panel_columns(W), b.scores,
                                kBlockRow, rows, width, dim, band, kEverything, false});
      for (int64_t r = 0; r < rows; ++r) {
        const Range range = r < t.queries ? taken(band, r, r, keys) : Range{0, 0};
        const float kept = soften<W>(b.scores + r * kBlockRow, range, width, b.top[r], b.total[r]);
        if (kept == 1.0f) continue;
        float* out = b.out + r * kBlockRow;
        for (int64_t d = 0; d < dim; d += W) store<W>(out + d, load<W>(out + d) * kept);
      }
      multiply<W, Left::kRows>({b.scores, t.values + key * panel_columns(W), t.value_panel, b.out,
                                kBlockRow, rows, dim, keys, kEverything, band, true});
    }
    T* out = head_of<T>(a.out, s.batch, s.query + t.query, t.head);
    float* lse = a.lse + s.batch * a.lse_batch + (s.query + t.query) * a.lse_token +
                 t.head * a.lse_head;
    for (int64_t r = 0; r < t.queries; ++r) {
      const bool any = b.top[r] != kNone || b.total[r] != 0.0f;
      store_row<W>(b.out + r * kBlockRow, dim, any ? 1.0f / b.total[r] : 0.0f,
                   out + r * a.out.token);
      lse[r * a.lse_token] = any ? (b.top[r] + std::log2(b.total[r])) * kLn2 : kNone;
    }
  }
};

// Keys and values of one head, as `Forward` reads them.
template <typename T>
struct Pack {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Sequence& s, int64_t head,
                                float* keys, const Panels& values) {
    load_turned<W>(head_of<const T>(a.k, s.batch, s.key, head), a.k.token, s.keys, a.head_dim,
                   keys);
    load_panels<W>(head_of<const T>(a.v, s.batch, s.key, head), a.v.token, s.keys, a.head_dim,
                   values);
  }
};

}  // namespace

void attention_cpu(const AttentionArgs& a, int threads) {
  const auto pack = widest_of<Pack, const AttentionArgs&, const Sequence&, int64_t, float*,
                              const Panels&>(a.type);
  const auto forward = widest_of<Forward, const AttentionArgs&, const Task&, Blocks&>(a.type);
  const std::vector<Sequence> sequences = sequences_of(a);
  const int64_t width = round_up(a.head_dim, panel_columns(vector_width()));
  const int64_t total = packed_keys(sequences) * a.key_heads * width;
  Buffer keys(total), values(total);
  std::vector<Task> tasks;
  for (const Sequence& s : sequences)
    for (int64_t head = 0; head < a.heads; ++head)
      // the last queries see most: they come first
      for (int64_t end = s.queries; end > 0; end = (end - 1) / kQueries * kQueries) {
        const int64_t query = (end - 1) / kQueries * kQueries;
        const int64_t rows = round_up(s.keys, kTiles);
        const int64_t place = (s.packed * a.key_heads +
                               head / (a.heads / a.key_heads) * rows) * width;
        tasks.push_back({&s, head, query, end - query, keys + place, values + place,
                         rows * panel_columns(vector_width())});
      }
  const int64_t heads = int64_t(sequences.size()) * a.key_heads;
#pragma omp parallel num_threads(threads)
  {
    Blocks blocks;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads; ++i) {
      const Sequence& s = sequences[i / a.key_heads];
      const int64_t rows = round_up(s.keys, kTiles);
      const int64_t place = (s.packed * a.key_heads + i % a.key_heads * rows) * width;
      pack(a, s, i % a.key_heads, keys + place,
           {values + place, rows * panel_columns(vector_width())});
    }
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) forward(a, tasks[i], blocks);
  }
}

}  // namespace clinkd
