// Products of blocks of float that lie in the caches, in tiles whose sums stay in registers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace clinkd {

// Floats from one row of a block to the next: not a power of two, so that a column's numbers do not
// fall into the same few sets of the cache.
constexpr int64_t kBlockRow = 256 + 16;

// Rows of a tile: with two vectors in each, its sums fill the registers.
constexpr int tile_rows(int W) { return W == 16 ? 12 : W == 8 ? 6 : 4; }
// Columns of a tile, and of the panels in which the right factor lies: [panel, depth, columns].
constexpr int panel_columns(int W) { return 2 * W; }
// A multiple of the tiles' rows and columns for every width of vectors: blocks are made of so many.
constexpr int64_t kTiles = 96;

constexpr int64_t kUnbounded = int64_t(1) << 40;

// What a row r of a block takes of the other dimension: [r + low, r + high).
struct Band {
  int64_t low, high;
};
constexpr Band kEverything = {-kUnbounded, kUnbounded};

// The same seen from the other dimension.
CLINKD_INLINE Band transposed(Band band) { return {1 - band.high, 1 - band.low}; }

struct Range {
  int64_t begin, end;
};

// Union of what rows [first, last] take, of n.
CLINKD_INLINE Range taken(Band band, int64_t first, int64_t last, int64_t n) {
  const int64_t begin = std::clamp<int64_t>(first + band.low, 0, n);
  return {begin, std::clamp<int64_t>(last + band.high, begin, n)};
}

enum class Left { kRows, kColumns };  // a block, or a block transposed

// `c` [rows, V * W] = or += `a` [rows, depth] @ `b` [depth, panel].
template <int W, int V, Left left>
CLINKD_INLINE void tile(const float* a, const float* b, int64_t depth, float* c, int64_t c_row,
                        bool add) {
  constexpr int kRows = tile_rows(W);
  constexpr int64_t kRow = left == Left::kRows ? kBlockRow : 1;
  constexpr int64_t kStep = left == Left::kRows ? 1 : kBlockRow;
  Floats<W> sums[kRows][V];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sums[r][v] = add ? load<W>(c + r * c_row + v * W) : Floats<W>{};
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d) {
    Floats<W> right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load<W>(b + d * panel_columns(W) + v * W);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] += a[r * kRow + d * kStep] * right[v];
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store<W>(c + r * c_row + v * W, sums[r][v]);
}

// A product whose rows are cut to a band of its columns or of its depth. `rows` are rounded up to
// whole tiles, columns to whole vectors: all of these must be there.
struct BlockProduct {
  const float* a;
  const float* b;
  int64_t b_panel;  // floats from one panel to the next
  float* c;
  int64_t c_row;
  int64_t rows, columns, depth;
  Band of_columns, of_depth;
  bool add;
};

template <int W, Left left>
CLINKD_INLINE void multiply(const BlockProduct& p) {
  constexpr int kRows = tile_rows(W), kColumns = panel_columns(W);
  constexpr int64_t kRow = left == Left::kRows ? kBlockRow : 1;
  constexpr int64_t kStep = left == Left::kRows ? 1 : kBlockRow;
  for (int64_t column = 0; column < p.columns; column += kColumns) {
    const float* panel = p.b + column / kColumns * p.b_panel;
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t last = row + kRows - 1;
      const Range columns = taken(p.of_columns, row, last, p.columns);
      if (column + kColumns <= columns.begin || column >= columns.end) continue;
      const Range depth = taken(p.of_depth, row, last, p.depth);
      const float* a = p.a + row * kRow + depth.begin * kStep;
      const float* b = panel + depth.begin * kColumns;
      float* c = p.c + row * p.c_row + column;
      const int64_t steps = depth.end - depth.begin;
      if (p.columns - column > W)
        tile<W, 2, left>(a, b, steps, c, p.c_row, p.add);
      else
        tile<W, 1, left>(a, b, steps, c, p.c_row, p.add);
    }
  }
}

}  // namespace clinkd
