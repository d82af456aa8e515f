// Python's way to attention on the CPU: pointers, sizes and strides as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"
#include "rotary_arguments.h"

namespace clinkd {
namespace {

using Place = std::array<int64_t, 4>;  // pointer; strides of batch, token and head

// Queries or keys, and how they are turned.
struct Turned {
  RotaryArgs args;
};

Heads heads(const Place& p) { return {reinterpret_cast<void*>(p[0]), p[1], p[2], p[3]}; }

}  // namespace

void bind_attention(pybind11::module_& m) {
  pybind11::class_<Turned>(m, "Turned")
      .def(pybind11::init([](uintptr_t x, uintptr_t positions, const RotaryArgs& how, bool already,
                             int type) {
        Turned turned = {placed(how, x, x, positions, false, type)};
        if (already) turned.args.pairs = 0;
        return turned;
      }));
  // places: values, output, lse; starts: of queries and keys, or 0
  pybind11::class_<AttentionArgs>(m, "Attention")
      .def(pybind11::init([](const Turned& q, const Turned& k,
                             const std::array<Place, 3>& places,
                             const std::array<uintptr_t, 2>& starts, int64_t sequences, bool causal,
                             int64_t window, float scale) {
        AttentionArgs a;
        a.q = q.args, a.k = k.args;
        a.v = heads(places[0]), a.out = heads(places[1]);
        a.lse = reinterpret_cast<float*>(places[2][0]);
        a.lse_batch = places[2][1], a.lse_token = places[2][2], a.lse_head = places[2][3];
        a.starts = reinterpret_cast<const int32_t*>(starts[0]);
        a.key_starts = reinterpret_cast<const int32_t*>(starts[1]);
        a.sequences = sequences, a.window = window, a.causal = causal, a.scale = scale;
        return a;
      }));
  m.def("attention_cpu", [](const AttentionArgs& a, int threads) {
    pybind11::gil_scoped_release release;
    attention_cpu(a, threads);
  });
  // places: gradients by the output; by queries, keys and values
  m.def("attention_backward_cpu",
        [](const AttentionArgs& a, const std::array<Place, 4>& places, int threads) {
          const AttentionGradients g = {heads(places[0]), heads(places[1]), heads(places[2]),
                                        heads(places[3])};
          pybind11::gil_scoped_release release;
          attention_backward_cpu(a, g, threads);
        });
}

}  // namespace clinkd
