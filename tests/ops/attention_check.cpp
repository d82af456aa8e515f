// Attention on the CPU against its definition in double, in memory of exactly its size.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention.h"

using namespace clinkd;
using Numbers = std::vector<float>;

struct Shape {
  int64_t queries, keys, heads, key_heads, dim, window;
  bool causal;
  int pairs, pair_stride;
};

Numbers drawn(int64_t n) {
  Numbers found(n);
  for (float& x : found) x = float(std::rand() % 2001 - 1000) / 500.0f;
  return found;
}

Heads heads_of(Numbers& x, int64_t heads, int64_t dim) { return {x.data(), 0, heads * dim, dim}; }

// Each pair of a head, at `n`, turned by its angle at `position`; direction -1: back.
void turn(double* x, const Shape& s, float position, const Numbers& speed, double direction) {
  for (int i = 0; i < s.pairs; ++i) {
    const int first = i / s.pair_stride * 2 * s.pair_stride + i % s.pair_stride;
    const double angle = direction * position * speed[i], a = x[first];
    double& b = x[first + s.pair_stride];
    x[first] = a * std::cos(angle) - b * std::sin(angle);
    b = a * std::sin(angle) + b * std::cos(angle);
  }
}

bool differ(const char* name, const Shape& s, const Numbers& found, const std::vector<double>& exact) {
  for (size_t i = 0; i < exact.size(); ++i)
    if (!(std::abs(found[i] - exact[i]) <= 2e-4 * std::max(1.0, std::abs(exact[i])))) {
      std::printf("%s[%zu] %g, not %g: %ld queries, %ld keys, dim %ld, window %ld\n", name, i,
                  found[i], exact[i], long(s.queries), long(s.keys), long(s.dim), long(s.window));
      return true;
    }
  return false;
}

bool wrong(const Shape& s, int threads) {
  const float scale = 1.0f / std::sqrt(float(s.dim));
  Numbers q = drawn(s.queries * s.heads * s.dim), grad = drawn(q.size()), out(q.size(), NAN);
  Numbers k = drawn(s.keys * s.key_heads * s.dim), v = drawn(k.size());
  Numbers of_q(q.size(), NAN), of_k(k.size(), NAN), of_v(k.size(), NAN);
  Numbers lse(s.queries * s.heads, NAN);
  Numbers places = drawn(s.queries), key_places = drawn(s.keys), speed(s.pairs), hi(s.pairs);
  const Numbers lo(s.pairs, 0.0f);
  const std::vector<int32_t> axis(s.pairs, 0);
  for (int i = 0; i < s.pairs; ++i) {
    hi[i] = 0.5f / float(1 + i);
    speed[i] = float(hi[i] * M_PI / 2);
  }
  AttentionArgs a = {};
  const auto rotated = [&](const Numbers& x, int64_t tokens, int64_t heads, const Numbers& at) {
    RotaryArgs r = {};
    r.x = x.data(), r.positions = at.data(), r.axis = axis.data();
    r.hi = hi.data(), r.lo = lo.data();
    r.batch = 1, r.tokens = tokens, r.heads = heads, r.head_dim = s.dim;
    r.x_stride[1] = heads * s.dim, r.x_stride[2] = s.dim, r.positions_stride[2] = 1;
    r.pairs = s.pairs, r.pair_stride = s.pair_stride, r.type = kFloat32;
    return r;
  };
  a.q = rotated(q, s.queries, s.heads, places);
  a.k = rotated(k, s.keys, s.key_heads, key_places);
  a.v = heads_of(v, s.key_heads, s.dim), a.out = heads_of(out, s.heads, s.dim);
  a.lse = lse.data(), a.lse_token = s.heads, a.lse_head = 1;
  a.sequences = 1, a.window = s.window, a.causal = s.causal, a.scale = scale;
  attention_cpu(a, threads);
  attention_backward_cpu(a, {heads_of(grad, s.heads, s.dim), heads_of(of_q, s.heads, s.dim),
                             heads_of(of_k, s.key_heads, s.dim), heads_of(of_v, s.key_heads, s.dim)},
                         threads);
  std::vector<double> eq(q.begin(), q.end()), ek(k.begin(), k.end());
  std::vector<double> e_out(q.size()), e_of_q(q.size()), e_of_k(k.size()), e_of_v(k.size());
  for (int64_t i = 0; i < s.queries * s.heads; ++i)
    turn(&eq[i * s.dim], s, places[i / s.heads], speed, 1);
  for (int64_t j = 0; j < s.keys * s.key_heads; ++j)
    turn(&ek[j * s.dim], s, key_places[j / s.key_heads], speed, 1);
  for (int64_t i = 0; i < s.queries; ++i)
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t at = (i * s.heads + h) * s.dim, own = s.keys - s.queries + i;
      const auto key = [&](int64_t j) {
        return (j * s.key_heads + h * s.key_heads / s.heads) * s.dim;
      };
      std::vector<double> p(s.keys, 0.0);
      double total = 0, inner = 0;
      for (int64_t j = 0; j < s.keys; ++j) {
        if ((s.causal && j > own) || (s.window && j <= own - s.window)) continue;
        double score = 0;
        for (int64_t d = 0; d < s.dim; ++d) score += eq[at + d] * ek[key(j) + d];
        total += p[j] = std::exp(score * scale);
      }
      for (int64_t j = 0; j < s.keys && total > 0; ++j)
        for (int64_t d = 0; d < s.dim; ++d) e_out[at + d] += p[j] / total * v[key(j) + d];
      for (int64_t d = 0; d < s.dim; ++d) inner += e_out[at + d] * grad[at + d];
      for (int64_t j = 0; j < s.keys && total > 0; ++j) {
        double of_p = 0;
        for (int64_t d = 0; d < s.dim; ++d) of_p += grad[at + d] * v[key(j) + d];
        const double of_score = p[j] / total * (of_p - inner) * scale;
        for (int64_t d = 0; d < s.dim; ++d) {
          e_of_v[key(j) + d] += p[j] / total * grad[at + d];
          e_of_q[at + d] += of_score * ek[key(j) + d];
          e_of_k[key(j) + d] += of_score * eq[at + d];
        }
      }
    }
  for (int64_t i = 0; i < s.queries * s.heads; ++i)
    turn(&e_of_q[i * s.dim], s, places[i / s.heads], speed, -1);
  for (int64_t j = 0; j < s.keys * s.key_heads; ++j)
    turn(&e_of_k[j * s.dim], s, key_places[j / s.key_heads], speed, -1);
  return differ("out", s, out, e_out) || differ("dq", s, of_q, e_of_q) ||
         differ("dk", s, of_k, e_of_k) || differ("dv", s, of_v, e_of_v);
}

int main() {
  const Shape shapes[] = {
      {1, 1, 1, 1, 16, 0, true, 0, 1},       {100, 100, 2, 1, 34, 0, true, 11, 1},
      {97, 193, 2, 2, 72, 0, false, 36, 36}, {193, 97, 1, 1, 80, 0, true, 20, 20},
      {200, 250, 3, 1, 48, 60, true, 8, 4},  {130, 130, 2, 1, 256, 90, false, 128, 128},
      {5, 400, 6, 2, 18, 0, true, 9, 9},     {96, 192, 1, 1, 128, 1, true, 64, 64},
  };
  for (const Shape& shape : shapes)
    for (int threads : {1, 3})
      if (wrong(shape, threads)) return 1;
  return 0;
}
