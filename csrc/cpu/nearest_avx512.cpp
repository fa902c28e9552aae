// clang-format off: the loops are written over the vectors before them
#include "vec_avx512.h"
#include "nearest_loops.h"
// clang-format on

namespace longctx::cpu {
const NearestKernels<float>& avx512_nearest_kernels() { return kNearestKernels<float>; }
}  // namespace longctx::cpu
