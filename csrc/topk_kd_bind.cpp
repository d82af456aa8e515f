// Python's way to the top-k distillation loss: pointers, sizes and strides as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "topk_kd.h"

namespace clinkd {
namespace {

// places: student, ids, labels, statistics, factors of top, tail, soft tail and label, grad (0: not
// used); sizes: rows, columns, k, student and gradient row strides
TopKArgs arguments(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 5>& sizes,
                   int64_t ignore_index, float temperature, float softcap, int type) {
  TopKArgs a;
  a.student = reinterpret_cast<const void*>(places[0]);
  a.ids = reinterpret_cast<const int32_t*>(places[1]);
  a.labels = reinterpret_cast<const int64_t*>(places[2]);
  a.statistics = reinterpret_cast<float*>(places[3]);
  a.top_factor = reinterpret_cast<const float*>(places[4]);
  a.tail_factor = reinterpret_cast<const float*>(places[5]);
  a.soft_factor = reinterpret_cast<const float*>(places[6]);
  a.picked_factor = reinterpret_cast<const float*>(places[7]);
  a.grad = reinterpret_cast<void*>(places[8]);
  a.rows = sizes[0];
  a.columns = sizes[1];
  a.k = sizes[2];
  a.student_stride = sizes[3];
  a.grad_stride = sizes[4];
  a.ignore_index = ignore_index;
  a.temperature = temperature;
  a.softcap = softcap;
  a.type = type;
  return a;
}

template <void (*RUN)(const TopKArgs&, int)>
void on_cpu(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 5>& sizes,
            int64_t ignore_index, float temperature, float softcap, int type, int threads) {
  const TopKArgs a = arguments(places, sizes, ignore_index, temperature, softcap, type);
  pybind11::gil_scoped_release release;
  RUN(a, threads);
}

#ifdef CLINKD_WITH_CUDA
template <int (*RUN)(const TopKArgs&, void*)>
int on_cuda(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 5>& sizes,
            int64_t ignore_index, float temperature, float softcap, int type, uintptr_t stream) {
  return RUN(arguments(places, sizes, ignore_index, temperature, softcap, type),
             reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_topk_kd(pybind11::module_& m) {
  m.def("topk_tails_cpu", on_cpu<topk_tails_cpu>);
  m.def("topk_gradient_cpu", on_cpu<topk_gradient_cpu>);
#ifdef CLINKD_WITH_CUDA
  m.def("topk_tails_cuda", on_cuda<topk_tails_cuda>);
  m.def("topk_gradient_cuda", on_cuda<topk_gradient_cuda>);
#endif
}

}  // namespace clinkd
