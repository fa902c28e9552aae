// clang-format off: the loops are written over the vectors before them
#include "vec_generic.h"
#include "nearest_loops.h"
// clang-format on

namespace longctx::cpu {
const NearestKernels<double>& generic_nearest_kernels(double) { return kNearestKernels<double>; }
const NearestKernels<float>& generic_nearest_kernels(float) { return kNearestKernels<float>; }
}  // namespace longctx::cpu
