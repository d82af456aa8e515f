// Gradients of attention on the CPU: probabilities are computed again, block by block. Every head's
// gradients of keys and values are summed apart, and then in order: the same bits each time.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_blocks.h"
#include "exponential.h"
#include "widest.h"

namespace clinkd {
namespace {

// A head of the keys: turned keys and values, and keys, in panels.
struct KeyHead {
  float *turned_keys, *turned_values;
  Panels keys;
};

struct Task {
  const Sequence* sequence;
  int64_t head;
  KeyHead key_head;
  float *of_keys, *of_values;  // sums [keys, width]
};

struct Blocks {
  explicit Blocks(int64_t width)
      : query_panels(kQueries * width), grad_panels(kQueries * width) {}
  Buffer queries{kQueries * kBlockRow}, grads{kQueries * kBlockRow}, out{kQueries * kBlockRow};
  Buffer scores{kQueries * kBlockRow}, of_scores{kQueries * kBlockRow};
  Buffer query_panels, grad_panels;
  float lse[kQueries], inner[kQueries];  // in powers of two; of output and gradient
};

// One row's scores to probabilities, and their gradients to those of the scores.
template <int W>
CLINKD_INLINE void turn_back(float* row, float* grad, Range seen, int64_t width, float lse,
                             float inner) {
  const int64_t begin = seen.begin / W * W, end = round_up(seen.end, W);
  if (seen.begin < seen.end)
    for (int64_t j = begin; j < end; j += W) {
      const Floats<W> p = exp2<W>(load<W>(row + j) - lse);
      store<W>(row + j, p);
      store<W>(grad + j, p * (load<W>(grad + j) - inner));
    }
  for (float* numbers : {row, grad}) {
    std::fill_n(numbers, seen.begin, 0.0f);
    std::fill(numbers + seen.end, numbers + width, 0.0f);
  }
}

template <typename T>
struct Backward {
  // All queries of one head.
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const AttentionGradients& g, const Task& t,
                                Blocks& b) {
    const Sequence& s = *t.sequence;
    const int64_t width = round_up(a.head_dim, panel_columns(W));
    const int64_t rows = round_up(s.keys, kTiles);
    std::fill_n(t.of_keys, rows * width, 0.0f);
    std::fill_n(t.of_values, rows * width, 0.0f);
    for (int64_t query = 0; query < s.queries; query += kQueries)
      block<W>(a, g, t, query, std::min(kQueries, s.queries - query), b);
  }

  template <int W>
  static CLINKD_INLINE void block(const AttentionArgs& a, const AttentionGradients& g,
                                  const Task& t, int64_t query, int64_t queries, Blocks& b) {
    const Sequence& s = *t.sequence;
    const int64_t dim = a.head_dim, width = round_up(dim, panel_columns(W));
    const int64_t rows = round_up(queries, tile_rows(W)), first = s.query + query;
    load_inputs<W>(a, g, t, first, queries, b);
    float* of_queries = b.out;
    std::fill_n(of_queries, rows * kBlockRow, 0.0f);
    const Range seen = taken(band_of(a, s, query, 0), 0, queries - 1, s.keys);
    for (int64_t key = seen.begin / kKeys * kKeys; key < seen.end; key += kKeys) {
      const int64_t keys = std::min(kKeys, s.keys - key);
      const int64_t columns = round_up(keys, panel_columns(W));
      const Band band = band_of(a, s, query, key);
      multiply<W, Left::kRows>({b.queries, t.key_head.turned_keys + key * dim,
                                dim * panel_columns(W), b.scores, kBlockRow, rows, columns, dim,
                                band, kEverything, false});
      multiply<W, Left::kRows>({b.grads, t.key_head.turned_values + key * dim,
                                dim * panel_columns(W), b.of_scores, kBlockRow, rows, columns, dim,
                                band, kEverything, false});
      for (int64_t r = 0; r < rows; ++r) {
        const Range range = r < queries ? taken(band, r, r, keys) : Range{0, 0};
        turn_back<W>(b.scores + r * kBlockRow, b.of_scores + r * kBlockRow, range,
                     round_up(keys, kTiles), b.lse[r], b.inner[r]);
      }
      multiply<W, Left::kRows>({b.of_scores, t.key_head.keys.data + key * panel_columns(W),
                                t.key_head.keys.panel, of_queries, kBlockRow, rows, dim, keys,
                                kEverything, band, true});
      const int64_t key_rows = round_up(keys, tile_rows(W));
      multiply<W, Left::kColumns>({b.scores, b.grad_panels, kQueries * panel_columns(W),
                                   t.of_values + key * width, width, key_rows, dim, queries,
                                   kEverything, turned(band), true});
      multiply<W, Left::kColumns>({b.of_scores, b.query_panels, kQueries * panel_columns(W),
                                   t.of_keys + key * width, width, key_rows, dim, queries,
                                   kEverything, turned(band), true});
    }
    T* out = head_of<T>(g.q, s.batch, first, t.head);
    for (int64_t r = 0; r < queries; ++r)
      store_row<W>(of_queries + r * kBlockRow, dim, a.scale, out + r * g.q.token);
  }

  template <int W>
  static CLINKD_INLINE void load_inputs(const AttentionArgs& a, const AttentionGradients& g,
                                        const Task& t, int64_t first, int64_t queries, Blocks& b) {
    const int64_t dim = a.head_dim, batch = t.sequence->batch;
    load_rows<W>(head_of<const T>(a.q, batch, first, t.head), a.q.token, queries, dim,
                 a.scale * kLog2E, b.queries, kBlockRow);
    load_rows<W>(head_of<const T>(g.grad, batch, first, t.head), g.grad.token, queries, dim, 1.0f,
                 b.grads, kBlockRow);
    load_rows<W>(head_of<const T>(a.out, batch, first, t.head), a.out.token, queries, dim, 1.0f,
                 b.out, kBlockRow);
    const float* rows = b.queries;
    load_panels<W>(rows, kBlockRow, queries, dim, {b.query_panels, kQueries * panel_columns(W)});
    const float* grads = b.grads;
    load_panels<W>(grads, kBlockRow, queries, dim, {b.grad_panels, kQueries * panel_columns(W)});
    const float* lse = a.lse + batch * a.lse_batch + first * a.lse_token + t.head * a.lse_head;
    for (int64_t r = 0; r < queries; ++r) {
      Floats<W> inner = {};
      for (int64_t d = 0; d < dim; d += W)
        inner += load<W>(b.grads + r * kBlockRow + d) * load<W>(b.out + r * kBlockRow + d);
      b.inner[r] = sum_of<W>(inner);
      b.lse[r] = lse[r * a.lse_token] * kLog2E;
    }
  }
};

template <typename T>
struct Pack {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Sequence& s, int64_t head,
                                const KeyHead& to) {
    const T* keys = head_of<const T>(a.k, s.batch, s.key, head);
    load_turned<W>(keys, a.k.token, s.keys, a.head_dim, to.turned_keys);
    load_panels<W>(keys, a.k.token, s.keys, a.head_dim, to.keys);
    load_turned<W>(head_of<const T>(a.v, s.batch, s.key, head), a.v.token, s.keys, a.head_dim,
                   to.turned_values);
  }
};

// The sums of the query heads that share a head of the keys, added and written.
template <typename T>
struct Gather {
  template <int W>
  static CLINKD_INLINE void run(const AttentionArgs& a, const Heads& to, const Sequence& s,
                                int64_t head, const float* sums, float factor) {
    const int64_t dim = a.head_dim, width = round_up(dim, panel_columns(W));
    const int64_t size = round_up(s.keys, kTiles) * width;
    T* out = head_of<T>(to, s.batch, s.key, head);
    for (int64_t r = 0; r < s.keys; ++r) {
      alignas(64) float row[kBlockRow];
      std::copy_n(sums + r * width, width, row);
      for (int64_t h = 1; h < a.heads / a.key_heads; ++h)
        for (int64_t d = 0; d < width; d += W)
          store<W>(row + d, load<W>(row + d) + load<W>(sums + h * size + r * width + d));
      store_row<W>(row, dim, factor, out + r * to.token);
    }
  }
};

}  // namespace

void attention_backward_cpu(const AttentionArgs& a, const AttentionGradients& g, int threads) {
  const auto pack =
      widest_of<Pack, const AttentionArgs&, const Sequence&, int64_t, const KeyHead&>(a.type);
  const auto backward =
      widest_of<Backward, const AttentionArgs&, const AttentionGradients&, const Task&, Blocks&>(
          a.type);
  const auto gather = widest_of<Gather, const AttentionArgs&, const Heads&, const Sequence&,
                                int64_t, const float*, float>(a.type);
  const std::vector<Sequence> sequences = sequences_of(a);
  const int64_t columns = panel_columns(vector_width()), width = round_up(a.head_dim, columns);
  const int64_t group = a.heads / a.key_heads, keys = packed_keys(sequences);
  const int64_t total = keys * a.key_heads * width;
  Buffer turned_keys(total), turned_values(total), key_panels(total);
  Buffer of_keys(total * group), of_values(total * group);
  const int64_t heads = int64_t(sequences.size()) * a.key_heads;
  // of a head of the keys
  const auto place = [&](const Sequence& s, int64_t head) {
    return (s.packed * a.key_heads + head * round_up(s.keys, kTiles)) * width;
  };
  const auto key_head = [&](const Sequence& s, int64_t head) {
    const int64_t at = place(s, head);
    return KeyHead{turned_keys + at, turned_values + at,
                   {key_panels + at, round_up(s.keys, kTiles) * columns}};
  };
  const auto sums = [&](const Sequence& s, int64_t head) {
    return (s.packed * a.heads + head * round_up(s.keys, kTiles)) * width;
  };
#pragma omp parallel num_threads(threads)
  {
    Blocks blocks(width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads; ++i) {
      const Sequence& s = sequences[i / a.key_heads];
      pack(a, s, i % a.key_heads, key_head(s, i % a.key_heads));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * group; ++i) {
      const Sequence& s = sequences[i / a.heads];
      const int64_t head = i % a.heads, at = sums(s, head);
      backward(a, g, {&s, head, key_head(s, head / group), of_keys + at, of_values + at}, blocks);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads; ++i) {
      const Sequence& s = sequences[i / a.key_heads];
      const int64_t head = i % a.key_heads, at = sums(s, head * group);
      gather(a, g.k, s, head, of_keys + at, kLn2);
      gather(a, g.v, s, head, of_values + at, 1.0f);
    }
  }
}

}  // namespace clinkd
