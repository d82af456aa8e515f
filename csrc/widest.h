// One binary for every x86 processor: kernels for vectors of 16, 8 and 4 floats, of which the widest
// that this processor has is run.
#pragma once

#include "floats.h"
#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLINKD_X86_VERSIONS
#endif

namespace clinkd {

#ifdef CLINKD_X86_VERSIONS
template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v4"))) void run_16(Arguments... arguments) {
  Kernel::template run<16>(arguments...);
}
template <typename Kernel, typename... Arguments>
__attribute__((target("arch=x86-64-v3"))) void run_8(Arguments... arguments) {
  Kernel::template run<8>(arguments...);
}
#endif
template <typename Kernel, typename... Arguments>
void run_4(Arguments... arguments) {
  Kernel::template run<4>(arguments...);
}

// `Kernel::run<W>`, which must be CLINKD_INLINE, for this processor.
template <typename Kernel, typename... Arguments>
auto widest() -> void (*)(Arguments...) {
#ifdef CLINKD_X86_VERSIONS
  if (__builtin_cpu_supports("x86-64-v4")) return run_16<Kernel, Arguments...>;
  if (__builtin_cpu_supports("x86-64-v3")) return run_8<Kernel, Arguments...>;
#endif
  return run_4<Kernel, Arguments...>;
}

// The same of `Kernel<T>` for elements of a `FloatType`.
template <template <typename> class Kernel, typename... Arguments>
auto widest_of(int type) -> void (*)(Arguments...) {
  if (type == kFloat32) return widest<Kernel<float>, Arguments...>();
  if (type == kFloat16) return widest<Kernel<Float16>, Arguments...>();
  return widest<Kernel<BFloat16>, Arguments...>();
}

}  // namespace clinkd
