#include "vec_generic.h"
// clang-format off: the loops are written over the Vec included before them
#include "lane_loops.h"
// clang-format on

namespace longctx::cpu {
const LaneKernels& generic_lane_kernels() { return kLaneKernels; }
}  // namespace longctx::cpu
