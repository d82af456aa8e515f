// Launch of the rotary kernel.

#include "launch.cuh"
#include "rotary_kernel.cuh"

namespace clinkd {
namespace {

template <typename T, int V>
int run(const RotaryArgs& a, void* stream) {
  dim3 grid;
  if (!rotary_grid<V>(a, grid)) return static_cast<int>(cudaErrorInvalidValue);
  const auto kernel = a.pair_stride == 1 ? rotary_kernel<T, V, true> : rotary_kernel<T, V, false>;
  return launch(kernel, grid, kRotaryThreads, stream, a);
}

template <typename T>
int with_width(const RotaryArgs& a, void* stream) {
  return rotary_whole_packs<T>(a) ? run<T, 16 / sizeof(T)>(a, stream) : run<T, 1>(a, stream);
}

}  // namespace

int rotary_cuda(const RotaryArgs& args, void* stream) {
  switch (args.type) {
    case kFloat32:
      return with_width<float>(args, stream);
    case kFloat16:
      return with_width<__half>(args, stream);
    default:
      return with_width<__nv_bfloat16>(args, stream);
  }
}

}  // namespace clinkd
