// Python's way to the distillation loss: pointers, sizes and strides as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "kd_loss.h"

namespace clinkd {
namespace {

// places: student, teacher, labels, ce, kd, statistics, ce_factor, kd_factor, grad (0: not used)
// sizes: rows, student and teacher columns, student, teacher and gradient row strides, the factors'
KDArgs arguments(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 7>& sizes,
                 int64_t ignore_index, float temperature, float mix, float softcap, int divergence,
                 int type) {
  KDArgs a;
  a.student = reinterpret_cast<const void*>(places[0]);
  a.teacher = reinterpret_cast<const void*>(places[1]);
  a.labels = reinterpret_cast<const int64_t*>(places[2]);
  a.ce = reinterpret_cast<float*>(places[3]);
  a.kd = reinterpret_cast<float*>(places[4]);
  a.statistics = reinterpret_cast<float*>(places[5]);
  a.ce_factor = reinterpret_cast<const float*>(places[6]);
  a.kd_factor = reinterpret_cast<const float*>(places[7]);
  a.grad = reinterpret_cast<void*>(places[8]);
  a.rows = sizes[0];
  a.student_columns = sizes[1];
  a.teacher_columns = sizes[2];
  a.student_stride = sizes[3];
  a.teacher_stride = sizes[4];
  a.grad_stride = sizes[5];
  a.factor_stride = sizes[6];
  a.ignore_index = ignore_index;
  a.temperature = temperature;
  a.mix = mix;
  a.softcap = softcap;
  a.divergence = divergence;
  a.type = type;
  return a;
}

template <void (*RUN)(const KDArgs&, int)>
void on_cpu(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 7>& sizes,
            int64_t ignore_index, float temperature, float mix, float softcap, int divergence,
            int type, int threads) {
  const KDArgs a =
      arguments(places, sizes, ignore_index, temperature, mix, softcap, divergence, type);
  pybind11::gil_scoped_release release;
  RUN(a, threads);
}

#ifdef CLINKD_WITH_CUDA
template <int (*RUN)(const KDArgs&, void*)>
int on_cuda(const std::array<uintptr_t, 9>& places, const std::array<int64_t, 7>& sizes,
            int64_t ignore_index, float temperature, float mix, float softcap, int divergence,
            int type, uintptr_t stream) {
  return RUN(arguments(places, sizes, ignore_index, temperature, mix, softcap, divergence, type),
             reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_kd_loss(pybind11::module_& m) {
  m.def("kd_statistics_cpu", on_cpu<kd_statistics_cpu>);
  m.def("kd_divergence_cpu", on_cpu<kd_divergence_cpu>);
  m.def("kd_gradient_cpu", on_cpu<kd_gradient_cpu>);
  m.def("kd_at_once_cpu", on_cpu<kd_at_once_cpu>);
  m.def("kd_cluster_bytes", kd_cluster_bytes);
  m.attr("kd_cluster_most_bytes") = kKDClusterBytes;
#ifdef CLINKD_WITH_CUDA
  m.def("kd_statistics_cuda", on_cuda<kd_statistics_cuda>);
  m.def("kd_divergence_cuda", on_cuda<kd_divergence_cuda>);
  m.def("kd_gradient_cuda", on_cuda<kd_gradient_cuda>);
  m.def("kd_cluster_cuda", on_cuda<kd_cluster_cuda>);
  m.def("kd_scale_cuda", on_cuda<kd_scale_cuda>);
#endif
}

}  // namespace clinkd
