// Small kernels that say what the harness does; test_simt_harness.py.
#pragma once

#include <cstdint>

namespace clinkd {

struct ProbeArgs {
  const float* in;
  float* out;
  int* words;
  int64_t size;
  int blocks;
  int threads;
  int dynamic_bytes;
  int cluster;  // blocks of one
  int which;
};

int probe_cuda(const ProbeArgs& args, void* stream);

}  // namespace clinkd
