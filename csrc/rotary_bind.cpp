// Python's way to the rotary kernels: pointers, sizes and strides as integers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rotary_append.h"
#include "rotary_arguments.h"

namespace clinkd {
namespace {

// places: values, their cache, starts; strides: of both
RotaryAppendArgs appending(const RotaryArgs& keys, const std::array<uintptr_t, 3>& places,
                           const std::array<Strides, 2>& strides, int64_t slots) {
  RotaryAppendArgs a;
  a.keys = keys;
  a.values = reinterpret_cast<const void*>(places[0]);
  a.value_cache = reinterpret_cast<void*>(places[1]);
  a.starts = reinterpret_cast<const int64_t*>(places[2]);
  a.slots = slots;
  for (int i = 0; i < 3; ++i) {
    a.value_stride[i] = strides[0][i];
    a.value_cache_stride[i] = strides[1][i];
  }
  return a;
}

}  // namespace

void bind_rotary(pybind11::module_& m) {
  pybind11::class_<RotaryArgs>(m, "Rotation")
      .def(pybind11::init(&rotation))
      .def_property_readonly("tables", [](const RotaryArgs& a) {
        return std::array<uintptr_t, 3>{reinterpret_cast<uintptr_t>(a.axis),
                                        reinterpret_cast<uintptr_t>(a.hi),
                                        reinterpret_cast<uintptr_t>(a.lo)};
      });
  m.def("rotary_cpu", [](uintptr_t x, uintptr_t out, uintptr_t positions, const RotaryArgs& how,
                         bool inverse, int type, int threads) {
    const RotaryArgs a = placed(how, x, out, positions, inverse, type);
    pybind11::gil_scoped_release release;
    rotary_cpu(a, threads);
  });
  m.def("rotary_append_cpu",
        [](uintptr_t keys, uintptr_t cache, uintptr_t positions, const RotaryArgs& how,
           const std::array<uintptr_t, 3>& places, const std::array<Strides, 2>& strides,
           int64_t slots, int type, int threads) {
          const RotaryArgs a = placed(how, keys, cache, positions, false, type);
          pybind11::gil_scoped_release release;
          rotary_append_cpu(appending(a, places, strides, slots), threads);
        });
#ifdef CLINKD_WITH_CUDA
  m.def("rotary_cuda", [](uintptr_t x, uintptr_t out, uintptr_t positions, const RotaryArgs& how,
                          bool inverse, int type, uintptr_t stream) {
    return rotary_cuda(placed(how, x, out, positions, inverse, type),
                       reinterpret_cast<void*>(stream));
  });
  m.def("rotary_append_cuda",
        [](uintptr_t keys, uintptr_t cache, uintptr_t positions, const RotaryArgs& how,
           const std::array<uintptr_t, 3>& places, const std::array<Strides, 2>& strides,
           int64_t slots, int type, uintptr_t stream) {
          const RotaryArgs a = placed(how, keys, cache, positions, false, type);
          return rotary_append_cuda(appending(a, places, strides, slots),
                                    reinterpret_cast<void*>(stream));
        });
#endif
}

}  // namespace clinkd
