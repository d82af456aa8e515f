// Attention on the CPU, in blocks: scores of a block of queries and keys stay in the caches, what a
// mask hides is not computed, and both are turned as they are read: keys once for all queries.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_blocks.h"
#include "exponential.h"

namespace clinkd {
namespace {

constexpr float kNone = -INFINITY;

// Keys of one head, in panels of keys, and its values in panels of components.
struct KeyHead {
  float* transposed_keys;
  Panels values;
};

struct Blocks {
  Buffer queries{kQueries * kBlockRow}, scores{kQueries * kBlockRow}, out{kQueries * kBlockRow};
  float top[kQueries], total[kQueries];
};

// Scores of one row, in powers of two, to probabilities relative to the highest so far; zeros
// where nothing is seen. Returns what the sums over earlier keys are to be multiplied by.
template <int W>
CLINKD_INLINE float soften(float* row, Range seen, int64_t width, float& top, float& total) {
  std::fill_n(row, seen.begin, 0.0f);
  std::fill(row + seen.end, row + width, 0.0f);
  if (seen.begin == seen.end) return 1.0f;
  const int64_t begin = seen.begin / W * W, end = round_up(seen.end, W);
  std::fill(row + begin, row + seen.begin, kNone);
  std::fill(row + seen.end, row + end, kNone);
  Floats<W> most = zero<W>() + kNone;
  for (int64_t j = begin; j < end; j += W) {
    const Floats<W> score = load<W>(row + j);
    most = score > most ? score : most;
  }
  const float before = top;
  top = std::max(before, largest<W>(most));
  const float level = top == kNone ? 0.0f : top;
  Floats<W> found = zero<W>();
  for (int64_t j = begin; j < end; j += W) {
    const Floats<W> p = exp2<W>(load<W>(row + j) - level);
    found += p;
    store<W>(row + j, p);
  }
  const float kept = before == kNone ? 0.0f : std::exp2(before - top);
  total = total * kept + sum<W>(found);
  return kept;
}

// A block of queries of one head.
template <typename T>
struct Forward {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Angles& angles, const Sequence& s,
                                int64_t head, int64_t query, const KeyHead& k, Blocks& b) {
    const int64_t queries = std::min(kQueries, s.queries - query), first = s.query + query;
    const int64_t rows = round_up(queries, tile_rows(W));
    const int64_t dim = a.q.head_dim, width = round_up(dim, panel_columns(W));
    load_turned<W, T>(a.q, angles, s.batch, first, head, queries, tile_rows(W), a.scale * kLog2E,
                      b.queries);
    std::fill_n(static_cast<float*>(b.out), rows * kBlockRow, 0.0f);
    std::fill_n(b.top, kQueries, kNone);
    std::fill_n(b.total, kQueries, 0.0f);
    const Range seen = taken(band_of(a, s, query, 0), 0, queries - 1, s.keys);
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, s.keys - key);
      const int64_t columns = round_up(keys, panel_columns(W));
      const Band band = band_of(a, s, query, key);
      multiply<W, Left::kRows>({b.queries, k.transposed_keys + key * width, width * panel_columns(W),
                                b.scores, kBlockRow, rows, columns, dim, band, kEverything, false});
      for (int64_t r = 0; r < rows; ++r) {
        const Range range = r < queries ? taken(band, r, r, keys) : Range{0, 0};
        const float kept =
            soften<W>(b.scores + r * kBlockRow, range, columns, b.top[r], b.total[r]);
        if (kept == 1.0f) continue;
        float* out = b.out + r * kBlockRow;
        for (int64_t d = 0; d < dim; d += W) store<W>(out + d, load<W>(out + d) * kept);
      }
      multiply<W, Left::kRows>({b.scores, k.values.data + key * panel_columns(W), k.values.panel,
                                b.out, kBlockRow, rows, dim, keys, kEverything, band, true});
    }
    float* lse = a.lse + s.batch * a.lse_batch + first * a.lse_token + head * a.lse_head;
    for (int64_t r = 0; r < queries; ++r) {
      const Range of_row = taken(band_of(a, s, query, 0), r, r, s.keys);
      const bool any = of_row.begin < of_row.end;
      store_row<W>(b.out + r * kBlockRow, dim, any ? 1.0f / b.total[r] : 0.0f,
                   head_of<T>(a.out, s.batch, first + r, head));
      lse[r * a.lse_token] = any ? (b.top[r] + std::log2(b.total[r])) * kLn2 : kNone;
    }
  }
};

template <typename T>
struct Pack {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Angles& angles, const Sequence& s,
                                int64_t head, const KeyHead& to, float* block) {
    constexpr int kColumns = panel_columns(W);
    const int64_t dim = a.k.head_dim, width = round_up(dim, kColumns);
    for (int64_t key = 0; key < s.keys; key += kColumns) {
      const int64_t keys = std::min<int64_t>(kColumns, s.keys - key), first = s.key + key;
      load_turned<W, T>(a.k, angles, s.batch, first, head, keys, kColumns, 1.0f, block);
      to_transposed_panel<W>(block, dim, to.transposed_keys + key * width);
      load_rows<W>(head_of<T>(a.v, s.batch, first, head), a.v.token, keys, 1, dim, 1.0f, block);
      to_panels<W>(block, keys, dim, {to.values.data + key * kColumns, to.values.panel});
    }
  }
};

}  // namespace

void attention_cpu(const AttentionArgs& a, int threads) {
  const auto pack = widest_of<Pack, const AttentionArgs&, const Angles&, const Sequence&, int64_t,
                              const KeyHead&, float*>(a.q.type);
  const auto forward = widest_of<Forward, const AttentionArgs&, const Angles&, const Sequence&,
                                 int64_t, int64_t, const KeyHead&, Blocks&>(a.q.type);
  const std::vector<Sequence> sequences = sequences_of(a);
  const KeyRows rows(a.k.heads, a.k.head_dim);
  const Buffer keys(rows.size(sequences)), values(rows.size(sequences));
  const auto key_head = [&](const Sequence& s, int64_t head) {
    return KeyHead{keys + rows.at(s, head), {values + rows.at(s, head), panel_of(s)}};
  };
  const Angles query_angles(a.q, threads), key_angles(a.k, threads, &query_angles);
  struct Task {
    const Sequence* sequence;
    int64_t head, query;
  };
  std::vector<Task> tasks;
  for (const Sequence& s : sequences)
    for (int64_t block = (s.queries + kQueries - 1) / kQueries; block-- > 0;)  // the last see most
      for (int64_t head = 0; head < a.q.heads; ++head)
        tasks.push_back({&s, head, block * kQueries});
  const int64_t key_heads = int64_t(sequences.size()) * a.k.heads;
  threads = int(std::min<int64_t>(threads, std::max(key_heads, int64_t(tasks.size()))));
  const std::unique_ptr<Blocks[]> blocks(new Blocks[threads]);
  share(key_heads, threads, [&](int64_t i, int part) {
    const Sequence& s = sequences[i / a.k.heads];
    const int64_t head = i % a.k.heads;
    pack(a, key_angles, s, head, key_head(s, head), blocks[part].queries);
  });
  share(int64_t(tasks.size()), threads, [&](int64_t i, int part) {
    const Task& t = tasks[i];
    forward(a, query_angles, *t.sequence, t.head, t.query,
            key_head(*t.sequence, t.head * a.k.heads / a.q.heads), blocks[part]);
  });
}

}  // namespace clinkd
