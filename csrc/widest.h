// One binary for every x86 processor: kernels for vectors of 16, 8 and 4 floats, of which the widest
// that this processor has is run. CLINKD_VECTORS=8 or 4 in the environment asks for narrower ones;
// compiled with CLINKD_WIDTH there are those of that width alone, whatever the processor has.
#pragma once

#include <cstdlib>

#include "floats.h"
#include "vectors.h"

#ifndef CLINKD_WIDTH
#define CLINKD_WIDTH 4
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLINKD_X86_VERSIONS
#endif
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
void run_least(Arguments... arguments) {
  Kernel::template run<CLINKD_WIDTH>(arguments...);
}

// Floats of the vectors that run on this processor.
inline int vector_width() {
  static const int width = [] {
    const char* asked = std::getenv("CLINKD_VECTORS");
    [[maybe_unused]] const int most = asked == nullptr ? 16 : std::atoi(asked);
#ifdef CLINKD_X86_VERSIONS
    if (most >= 16 && __builtin_cpu_supports("x86-64-v4")) return 16;
    if (most >= 8 && __builtin_cpu_supports("x86-64-v3")) return 8;
#endif
    return CLINKD_WIDTH;
  }();
  return width;
}

// `Kernel::run<W>`, which must be CLINKD_INLINE, for this processor.
template <typename Kernel, typename... Arguments>
auto widest() -> void (*)(Arguments...) {
#ifdef CLINKD_X86_VERSIONS
  if (vector_width() == 16) return run_16<Kernel, Arguments...>;
  if (vector_width() == 8) return run_8<Kernel, Arguments...>;
#endif
  return run_least<Kernel, Arguments...>;
}

// The same of `Kernel<T>` for elements of a `FloatType`.
template <template <typename> class Kernel, typename... Arguments>
auto widest_of(int type) -> void (*)(Arguments...) {
  if (type == kFloat32) return widest<Kernel<float>, Arguments...>();
  if (type == kFloat16) return widest<Kernel<Float16>, Arguments...>();
  return widest<Kernel<BFloat16>, Arguments...>();
}

}  // namespace clinkd
