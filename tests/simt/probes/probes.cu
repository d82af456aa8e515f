#include "probes.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace clinkd {
namespace {

// Sum of each block's 64 inputs, in a tree.
__global__ void block_sum(const ProbeArgs a) {
  __shared__ float part[64];
  const unsigned i = threadIdx.x;
  part[i] = a.in[blockIdx.x * 64 + i];
  for (unsigned half = 32; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) part[i] += part[i + half];
  }
  if (i == 0) a.out[blockIdx.x] = part[0];
}

// What every kind of exchange gives a thread of 64.
__global__ void exchange(const ProbeArgs a) {
  const float v = a.in[threadIdx.x];
  float* out = a.out + threadIdx.x * 6;
  out[0] = __shfl_sync(0xffffffffu, v, 5);
  out[1] = __shfl_down_sync(0xffffffffu, v, 3);
  out[2] = __shfl_up_sync(0xffffffffu, v, 3);
  out[3] = __shfl_xor_sync(0xffffffffu, v, 1);
  out[4] = __shfl_down_sync(0xffffffffu, v, 1, 8);
  // half of the warp among themselves
  out[5] = threadIdx.x % 32 < 16 ? __shfl_xor_sync(0x0000ffffu, v, 8) : v;
  __syncwarp();
  int* words = a.words + threadIdx.x * 3;
  words[0] = static_cast<int>(__ballot_sync(0xffffffffu, v > 0));
  words[1] = __any_sync(0xffffffffu, v > 2);
  words[2] = __all_sync(0xffffffffu, v > -2);
}

// A map of which numbers are there, in memory that the launch sizes; then how many.
__global__ void count_distinct(const ProbeArgs a) {
  extern __shared__ uint32_t map[];
  for (int i = threadIdx.x; i < a.dynamic_bytes / 4; i += blockDim.x) map[i] = 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) a.words[0] = 0;
  __syncthreads();
  const int number = static_cast<int>(a.in[threadIdx.x]);
  const uint32_t bit = 1u << (number % 32);
  if (!(atomicOr(map + number / 32, bit) & bit)) atomicAdd(a.words, 1);
}

__global__ void barrier_in_a_branch(const ProbeArgs a) {
  if (threadIdx.x != 3) __syncthreads();
  a.out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(const ProbeArgs a) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  a.out[threadIdx.x] = 1.0f;
}

__global__ void lane_that_is_gone(const ProbeArgs a) {
  if (threadIdx.x == 7) return;
  a.out[threadIdx.x] = __shfl_down_sync(0xffffffffu, a.in[threadIdx.x], 1);
}

__global__ void foreign_mask(const ProbeArgs a) {
  a.out[threadIdx.x] = __shfl_sync(0x0000ffffu, a.in[threadIdx.x], 0);
}

__global__ void shared_past_the_end(const ProbeArgs a) {
  __shared__ float part[64];
  float* place = part;
  place[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  a.out[threadIdx.x] = place[threadIdx.x];
}

// Each input rounded to 16 bits: what __half and what __nv_bfloat16 make of it.
__global__ void rounded(const ProbeArgs a) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < a.size; i += gridDim.x * blockDim.x) {
    a.out[2 * i] = __half2float(__float2half_rn(a.in[i]));
    a.out[2 * i + 1] = __bfloat162float(__float2bfloat16_rn(a.in[i]));
  }
}

// A neighbour's value through shared memory, the warp waiting for itself.
__global__ void through_memory(const ProbeArgs a) {
  __shared__ float part[64];
  part[threadIdx.x] = a.in[threadIdx.x];
  __syncwarp();
  a.out[threadIdx.x] = part[threadIdx.x ^ 1];
}

__global__ void one_place_for_all_blocks(const ProbeArgs a) {
  if (threadIdx.x == 0) a.out[0] = a.in[0];
}

// Sum of the cluster's inputs, 64 a block: each block tells all others its own.
__global__ void cluster_sum(const ProbeArgs a) {
  __shared__ float parts[8];
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  if (threadIdx.x < cluster.num_blocks()) {
    float own = 0.0f;
    for (int i = 0; i < 64; ++i) own += a.in[blockIdx.x * 64 + i];
    *cluster.map_shared_rank(parts + cluster.block_rank(), threadIdx.x) = own;
  }
  cluster.sync();
  float sum = 0.0f;
  for (unsigned i = 0; i < cluster.num_blocks(); ++i) sum += parts[i];
  if (threadIdx.x == 0) a.out[blockIdx.x] = sum;
}

// What a neighbour has, `a.size` blocks on, in memory that the launch sizes.
__global__ void from_a_neighbour(const ProbeArgs a) {
  extern __shared__ float own[];
  const auto cluster = cooperative_groups::this_cluster();
  own[threadIdx.x] = a.in[blockIdx.x * 64 + threadIdx.x];
  cluster.sync();
  const float* other = cluster.map_shared_rank(own, cluster.block_rank() ^ a.size);
  a.out[blockIdx.x * 64 + threadIdx.x] = other[63 - threadIdx.x];
  cluster.sync();
}

__global__ void no_shared_memory(const ProbeArgs a) {
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  *cluster.map_shared_rank(a.out, 0) = 1.0f;
}

}  // namespace

int probe_cuda(const ProbeArgs& args, void* stream) {
  void (*const kernels[])(ProbeArgs) = {
      block_sum,         exchange,     count_distinct,      barrier_in_a_branch, two_barriers,
      lane_that_is_gone, foreign_mask, shared_past_the_end, rounded,
      through_memory,    one_place_for_all_blocks,  cluster_sum,         from_a_neighbour,
      no_shared_memory};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.blocks));
  config.blockDim = dim3(static_cast<unsigned>(args.threads));
  config.dynamicSmemBytes = static_cast<size_t>(args.dynamic_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(args.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernels[args.which], args));
}

}  // namespace clinkd
