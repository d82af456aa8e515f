// Launch of the kernel that turns keys into their cache.

#include "launch.cuh"
#include "rotary_append_kernel.cuh"

namespace clinkd {
namespace {

template <typename T, int V>
int run(const RotaryAppendArgs& a, void* stream) {
  dim3 grid;
  if (!rotary_grid<V>(a.keys, grid)) return static_cast<int>(cudaErrorInvalidValue);
  const auto kernel = a.keys.pair_stride == 1 ? rotary_append_kernel<T, V, true>
                                              : rotary_append_kernel<T, V, false>;
  return launch(kernel, grid, kRotaryThreads, stream, a);
}

// 16 bytes at a time where that fits the keys, and every head of the values lies on 16 bytes.
template <typename T>
int with_width(const RotaryAppendArgs& a, void* stream) {
  uintptr_t places =
      reinterpret_cast<uintptr_t>(a.values) | reinterpret_cast<uintptr_t>(a.value_cache);
  for (int i = 0; i < 3; ++i)
    places |= static_cast<uintptr_t>((a.value_stride[i] | a.value_cache_stride[i]) * sizeof(T));
  const bool whole = rotary_whole_packs<T>(a.keys) && places % 16 == 0;
  return whole ? run<T, 16 / sizeof(T)>(a, stream) : run<T, 1>(a, stream);
}

}  // namespace

int rotary_append_cuda(const RotaryAppendArgs& args, void* stream) {
  switch (args.keys.type) {
    case kFloat32:
      return with_width<float>(args, stream);
    case kFloat16:
      return with_width<__half>(args, stream);
    default:
      return with_width<__nv_bfloat16>(args, stream);
  }
}

}  // namespace clinkd
