// Python's way to attention on the CPU: pointers, sizes and strides as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"

namespace clinkd {
namespace {

using Place = std::array<int64_t, 4>;  // pointer; strides of batch, token, head

Heads heads(const Place& p) { return {reinterpret_cast<void*>(p[0]), p[1], p[2], p[3]}; }

// places: queries, keys, values, output, lse; starts: of queries and keys, or 0; shape: sequences,
// queries, keys, heads, heads of the keys, components
AttentionArgs arguments(const std::array<Place, 5>& places, const std::array<uintptr_t, 2>& starts,
                        const std::array<int64_t, 6>& shape, bool causal, int64_t window,
                        float scale, int type) {
  AttentionArgs a;
  a.q = heads(places[0]);
  a.k = heads(places[1]);
  a.v = heads(places[2]);
  a.out = heads(places[3]);
  a.lse = reinterpret_cast<float*>(places[4][0]);
  a.lse_batch = places[4][1], a.lse_token = places[4][2], a.lse_head = places[4][3];
  a.starts = reinterpret_cast<const int32_t*>(starts[0]);
  a.key_starts = reinterpret_cast<const int32_t*>(starts[1]);
  a.sequences = shape[0];
  a.queries = shape[1], a.keys = shape[2];
  a.heads = shape[3], a.key_heads = shape[4], a.head_dim = shape[5];
  a.causal = causal, a.window = window, a.scale = scale, a.type = type;
  return a;
}

}  // namespace

void bind_attention(pybind11::module_& m) {
  m.def("attention_cpu",
        [](const std::array<Place, 5>& places, const std::array<uintptr_t, 2>& starts,
           const std::array<int64_t, 6>& shape, bool causal, int64_t window, float scale, int type,
           int threads) {
          const AttentionArgs a = arguments(places, starts, shape, causal, window, scale, type);
          pybind11::gil_scoped_release release;
          attention_cpu(a, threads);
        });
  m.def("attention_backward_cpu",
        [](const std::array<Place, 5>& places, const std::array<Place, 4>& gradients,
           const std::array<uintptr_t, 2>& starts, const std::array<int64_t, 6>& shape, bool causal,
           int64_t window, float scale, int type, int threads) {
          const AttentionArgs a = arguments(places, starts, shape, causal, window, scale, type);
          const AttentionGradients g = {heads(gradients[0]), heads(gradients[1]),
                                        heads(gradients[2]), heads(gradients[3])};
          pybind11::gil_scoped_release release;
          attention_backward_cpu(a, g, threads);
        });
}

}  // namespace clinkd
