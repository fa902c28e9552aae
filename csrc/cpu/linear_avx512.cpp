// The engine of linear attention on AVX-512 (F, BW, VL, DQ).
#include "vec_avx512.h"
// clang-format off: the engine is written over the Vec included before it
#include "linear_vector.h"
// clang-format on

namespace longctx::cpu {

const LinearEngine<float>& avx512_linear_engine(DType dtype) {
  return vector_linear_engine_of(dtype);
}

}  // namespace longctx::cpu
