// The engine of linear attention on AVX2 with FMA and F16C.
#include "vec_avx2.h"
// clang-format off: the engine is written over the Vec included before it
#include "linear_vector.h"
// clang-format on

namespace longctx::cpu {

const LinearEngine<float>& avx2_linear_engine(DType dtype) {
  return vector_linear_engine_of(dtype);
}

}  // namespace longctx::cpu
