#include "vec_avx512.h"
// clang-format off: the loops are written over the Vec included before them
#include "lane_loops.h"
// clang-format on

namespace longctx::cpu {
const LaneKernels& avx512_lane_kernels() { return kLaneKernels; }
}  // namespace longctx::cpu
