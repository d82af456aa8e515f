// What attention on the CPU reads and writes. Strides are in elements.
#pragma once

#include <cstdint>

#include "rotary.h"

namespace clinkd {

// [B, S, H, D], or packed [N, H, D] with strides of batches of 0; components side by side.
struct Heads {
  void* data;
  int64_t batch, token, head;  // strides
};

struct AttentionArgs {
  RotaryArgs q, k;  // turned as they are read; with no pairs they are so already
  Heads v;
  Heads out;
  float* lse;  // [B, H, S] or [H, N]: log-sum-exp of a query's scores, -inf where it sees no key
  int64_t lse_batch, lse_token, lse_head;
  const int32_t* starts;      // [sequences + 1], where packed sequences start, or null
  const int32_t* key_starts;  // the same of the keys
  int64_t sequences;          // B where they are not packed
  int64_t window;             // keys that a query sees up to its own place, or 0: all
  int causal;  // 1: the last query sees the last key, the one before it the one before that
  float scale;
};

struct AttentionGradients {
  Heads grad;     // by the output
  Heads q, k, v;  // written
};

// Output and lse, with at most so many threads.
void attention_cpu(const AttentionArgs& args, int threads);

// The gradients, from the inputs, output and lse of `args`.
void attention_backward_cpu(const AttentionArgs& args, const AttentionGradients& gradients,
                            int threads);

}  // namespace clinkd
