// Gradients of attention on the CPU: probabilities are computed again, block by block, and the
// gradients of queries and keys are turned back as they are written.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention_blocks.h"
#include "exponential.h"

namespace clinkd {
namespace {

// Keys and values of one head, in panels of keys, and its keys in panels of components.
struct KeyHead {
  float *transposed_keys, *transposed_values;
  Panels keys;
};

// Gradients of the keys, for scores in powers of two, and values of one head, [keys, width]: those
// of some queries' heads.
struct Sums {
  float *keys, *values;
};

struct Blocks {
  explicit Blocks(int64_t width) : query_panels(kQueries * width), grad_panels(kQueries * width) {}
  Buffer queries{kQueries * kBlockRow}, grads{kQueries * kBlockRow}, out{kQueries * kBlockRow};
  Buffer scores{kQueries * kBlockRow}, of_scores{kQueries * kBlockRow};
  Buffer query_panels, grad_panels;
  float lse[kQueries] = {};    // in powers of two
  float inner[kQueries] = {};  // product of output and gradient
};

// One row's scores to probabilities, and the gradients of those to the scores'.
template <int W>
CLINKD_INLINE void soften_back(float* row, float* grad, Range seen, int64_t width, float lse,
                               float inner) {
  if (seen.begin < seen.end)
    for (int64_t j = seen.begin / W * W; j < seen.end; j += W) {
      const Floats<W> p = exp2<W>(load<W>(row + j) - lse);
      store<W>(row + j, p);
      store<W>(grad + j, p * (load<W>(grad + j) - inner));
    }
  for (float* numbers : {row, grad}) {
    std::fill_n(numbers, seen.begin, 0.0f);
    std::fill(numbers + seen.end, numbers + width, 0.0f);
  }
}

// A block of queries of one head.
template <typename T>
struct Backward {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const AttentionGradients& g,
                                const Angles& angles, const Sequence& s, int64_t head,
                                int64_t query, const KeyHead& k, const Sums& sums, Blocks& b) {
    constexpr int kColumns = panel_columns(W);
    const int64_t queries = std::min(kQueries, s.queries - query), first = s.query + query;
    const int64_t rows = round_up(queries, tile_rows(W));
    const int64_t dim = a.q.head_dim, width = round_up(dim, kColumns);
    load_block<W>(a, g, angles, s, head, first, queries, b);
    float* of_queries = b.out;
    std::fill_n(of_queries, rows * kBlockRow, 0.0f);
    const Range seen = taken(band_of(a, s, query, 0), 0, queries - 1, s.keys);
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, s.keys - key);
      const int64_t columns = round_up(keys, kColumns), key_rows = round_up(keys, tile_rows(W));
      const Band band = band_of(a, s, query, key);
      multiply<W, Left::kRows>({b.queries, k.transposed_keys + key * width, width * kColumns, b.scores,
                                kBlockRow, rows, columns, dim, band, kEverything, false});
      multiply<W, Left::kRows>({b.grads, k.transposed_values + key * width, width * kColumns,
                                b.of_scores, kBlockRow, rows, columns, dim, band, kEverything,
                                false});
      for (int64_t r = 0; r < rows; ++r) {
        const Range range = r < queries ? taken(band, r, r, keys) : Range{0, 0};
        soften_back<W>(b.scores + r * kBlockRow, b.of_scores + r * kBlockRow, range,
                       round_up(keys, kTiles), b.lse[r], b.inner[r]);
      }
      multiply<W, Left::kRows>({b.of_scores, k.keys.data + key * kColumns, k.keys.panel, of_queries,
                                kBlockRow, rows, dim, keys, kEverything, band, true});
      multiply<W, Left::kColumns>({b.scores, b.grad_panels, kQueries * kColumns,
                                   sums.values + key * width, width, key_rows, dim, queries,
                                   kEverything, transposed(band), true});
      multiply<W, Left::kColumns>({b.of_scores, b.query_panels, kQueries * kColumns,
                                   sums.keys + key * width, width, key_rows, dim, queries,
                                   kEverything, transposed(band), true});
    }
    for (int64_t r = 0; r < queries; ++r) {
      angles.turn<W>(of_queries + r * kBlockRow, s.batch, first + r, -1.0f);
      store_row<W>(of_queries + r * kBlockRow, dim, a.scale,
                   head_of<T>(g.q, s.batch, first + r, head));
    }
  }

  template <int W>
  static CLINKD_INLINE void load_block(const AttentionArgs& a, const AttentionGradients& g,
                                       const Angles& angles, const Sequence& s, int64_t head,
                                       int64_t first, int64_t queries, Blocks& b) {
    constexpr int kRows = tile_rows(W), kColumns = panel_columns(W);
    const int64_t dim = a.q.head_dim;
    load_turned<W, T>(a.q, angles, s.batch, first, head, queries, kRows, a.scale * kLog2E,
                      b.queries);
    load_rows<W>(head_of<const T>(g.grad, s.batch, first, head), g.grad.token, queries, kRows, dim,
                 1.0f, b.grads);
    load_rows<W>(head_of<const T>(a.out, s.batch, first, head), a.out.token, queries, kRows, dim,
                 1.0f, b.out);
    to_panels<W>(b.queries, queries, dim, {b.query_panels, kQueries * kColumns});
    to_panels<W>(b.grads, queries, dim, {b.grad_panels, kQueries * kColumns});
    const float* lse = a.lse + s.batch * a.lse_batch + first * a.lse_token + head * a.lse_head;
    for (int64_t r = 0; r < queries; ++r) {
      Floats<W> inner = zero<W>();
      for (int64_t d = 0; d < dim; d += W)
        inner += load<W>(b.grads + r * kBlockRow + d) * load<W>(b.out + r * kBlockRow + d);
      b.inner[r] = sum<W>(inner);
      b.lse[r] = lse[r * a.lse_token] * kLog2E;
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
      to_panels<W>(block, keys, dim, {to.keys.data + key * kColumns, to.keys.panel});
      load_rows<W>(head_of<const T>(a.v, s.batch, first, head), a.v.token, keys, kColumns, dim, 1.0f,
                   block);
      to_transposed_panel<W>(block, dim, to.transposed_values + key * width);
    }
  }
};

// Several sums for one head of the keys, added in order and written.
template <typename T>
struct Gather {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const AttentionGradients& g,
                                const Angles& angles, const Sequence& s, int64_t head,
                                const Sums& sums, int64_t count, int64_t size) {
    const int64_t width = round_up(a.k.head_dim, panel_columns(W));
    for (int64_t r = 0; r < s.keys; ++r) {
      float* keys = sums.keys + r * width;
      float* values = sums.values + r * width;
      for (int64_t i = 1; i < count; ++i)
        for (int64_t d = 0; d < width; d += W) {
          store<W>(keys + d, load<W>(keys + d) + load<W>(keys + i * size + d));
          store<W>(values + d, load<W>(values + d) + load<W>(values + i * size + d));
        }
      angles.turn<W>(keys, s.batch, s.key + r, -1.0f);
      store_row<W>(keys, a.k.head_dim, kLn2, head_of<T>(g.k, s.batch, s.key + r, head));
      store_row<W>(values, a.k.head_dim, 1.0f, head_of<T>(g.v, s.batch, s.key + r, head));
    }
  }
};

}  // namespace

void attention_backward_cpu(const AttentionArgs& a, const AttentionGradients& g, int threads) {
  const auto pack = widest_of<Pack, const AttentionArgs&, const Angles&, const Sequence&, int64_t,
                              const KeyHead&, float*>(a.q.type);
  const auto backward =
      widest_of<Backward, const AttentionArgs&, const AttentionGradients&, const Angles&,
                const Sequence&, int64_t, int64_t, const KeyHead&, const Sums&, Blocks&>(a.q.type);
  const auto gather =
      widest_of<Gather, const AttentionArgs&, const AttentionGradients&, const Angles&,
                const Sequence&, int64_t, const Sums&, int64_t, int64_t>(a.q.type);
  const std::vector<Sequence> sequences = sequences_of(a);
  const int64_t group = a.q.heads / a.k.heads, key_heads = int64_t(sequences.size()) * a.k.heads;
  // a thread takes the queries' heads of one head of the keys, if those go round; or else one each,
  // whose sums need memory of their own
  const int64_t heads = key_heads % threads == 0 || key_heads >= 4 * threads ? group : 1;
  const int64_t parts = group / heads;
  const KeyRows rows(a.k.heads, a.k.head_dim), sum_rows(a.k.heads * parts, a.k.head_dim);
  const int64_t size = rows.size(sequences);
  const Buffer keys(size), values(size), key_panels(size);
  const Buffer of_keys(size * parts), of_values(size * parts);
  const auto key_head = [&](const Sequence& s, int64_t head) {
    const int64_t at = rows.at(s, head);
    return KeyHead{keys + at, values + at, {key_panels + at, panel_of(s)}};
  };
  const auto sums_of = [&](const Sequence& s, int64_t head, int64_t part) {
    const int64_t at = sum_rows.at(s, head * parts + part);
    return Sums{of_keys + at, of_values + at};
  };
  std::vector<std::unique_ptr<Blocks>> blocks;
  threads = int(std::min(int64_t(threads), key_heads * parts));
  for (int i = 0; i < threads; ++i) blocks.emplace_back(new Blocks(rows.width()));
  const Angles query_angles(a.q, threads), key_angles(a.k, threads, &query_angles);
  share(key_heads, threads, [&](int64_t i, int thread) {
    const Sequence& s = sequences[i / a.k.heads];
    const int64_t head = i % a.k.heads;
    pack(a, key_angles, s, head, key_head(s, head), blocks[thread]->queries);
  });
  share(key_heads * parts, threads, [&](int64_t i, int thread) {
    const Sequence& s = sequences[i / (a.k.heads * parts)];
    const int64_t head = i / parts % a.k.heads, part = i % parts;
    const Sums sums = sums_of(s, head, part);
    std::fill_n(sums.keys, rows.of(s), 0.0f);
    std::fill_n(sums.values, rows.of(s), 0.0f);
    const int64_t first = head * group + part * heads;
    for (int64_t query = 0; query < s.queries; query += kQueries)
      for (int64_t h = first; h < first + heads; ++h)
        backward(a, g, query_angles, s, h, query, key_head(s, head), sums, *blocks[thread]);
  });
  share(key_heads, threads, [&](int64_t i, int) {
    const Sequence& s = sequences[i / a.k.heads];
    const int64_t head = i % a.k.heads;
    gather(a, g, key_angles, s, head, sums_of(s, head, 0), parts, rows.of(s));
  });
}

}  // namespace clinkd
