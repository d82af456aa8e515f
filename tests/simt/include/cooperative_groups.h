// Of cooperative groups the cluster: blocks that run together and reach each other's shared memory.
#pragma once

#include "simt.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned num_blocks() { return simt::cluster_size(); }
  static unsigned block_rank() { return simt::cluster_rank(); }
  // the defaults are those of the caller: the place in the source tells two barriers apart
  static void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    simt::cluster_barrier(file, line);
  }
  template <typename T>
  static T* map_shared_rank(T* own, int rank) {
    return static_cast<T*>(simt::peer_place(own, static_cast<unsigned>(rank)));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
