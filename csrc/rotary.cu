// Launch of the rotary kernel.

#include "launch.cuh"
#include "rotary_kernel.cuh"

namespace clinkd {
namespace {

template <typename T, int V>
int run(const RotaryArgs& a, void* stream) {
  const int64_t chunks = (a.head_dim + 2 * V - 1) / (2 * V);
  const int64_t threads = a.batch * a.tokens * chunks;
  if (threads >= INT32_MAX) return static_cast<int>(cudaErrorInvalidValue);
  const dim3 grid(static_cast<unsigned>((threads + kRotaryThreads - 1) / kRotaryThreads),
                  static_cast<unsigned>((a.heads + kHeadsPerThread - 1) / kHeadsPerThread));
  const auto kernel = a.pair_stride == 1 ? rotary_kernel<T, V, true> : rotary_kernel<T, V, false>;
  return launch(kernel, grid, kRotaryThreads, stream, a);
}

// 16 bytes at a time where every head and every pair's two halves lie on 16 bytes.
template <typename T>
int with_width(const RotaryArgs& a, void* stream) {
  constexpr int V = 16 / sizeof(T);
  uintptr_t places = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.out);
  for (int i = 0; i < 3; ++i)
    places |= static_cast<uintptr_t>((a.x_stride[i] | a.out_stride[i]) * sizeof(T));
  const bool whole = a.pairs % V == 0 && (a.pair_stride == 1 || a.pair_stride % V == 0);
  return whole && places % 16 == 0 ? run<T, V>(a, stream) : run<T, 1>(a, stream);
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
