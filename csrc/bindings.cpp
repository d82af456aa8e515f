// clinkd._C: every kernel of csrc/, and how this build was made. A new op adds one line here.

#include <pybind11/pybind11.h>

#include "kept_memory.h"
#include "widest.h"

#ifdef CLINKD_WITH_CUDA
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace clinkd {
void bind_attention(pybind11::module_& m);
void bind_kd_loss(pybind11::module_& m);
void bind_rotary(pybind11::module_& m);
void bind_topk_kd(pybind11::module_& m);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Row-wise kernels of clinkd: pointers, sizes and strides as integers, no torch inside.";
  clinkd::bind_attention(m);
  clinkd::bind_kd_loss(m);
  clinkd::bind_rotary(m);
  clinkd::bind_topk_kd(m);
  m.def("large_pages", clinkd::large_pages);
#ifdef CLINKD_KEEPS_MEMORY
  py::class_<clinkd::KeptMemory>(m, "KeptMemory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](const clinkd::KeptMemory& memory) {
        return py::buffer_info(memory.begin(), 1, "B", memory.bytes());
      });
  m.def("release_memory", clinkd::release_memory);
#endif
  m.attr("vector_width") = clinkd::vector_width();

  m.attr("compiler") = __VERSION__;
#ifdef CLINKD_WITH_CUDA
  m.attr("with_cuda") = true;
  m.attr("cuda_archs") = CLINKD_CUDA_ARCHS;
  m.attr("cuda_version") = CUDART_VERSION;
  // 0 is success; without a driver an error code comes back, and nothing crashes
  m.def("cuda_device_count", [] {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? count : -static_cast<int>(error);
  });
#else
  m.attr("with_cuda") = false;
  m.attr("cuda_archs") = "";
#endif
}
