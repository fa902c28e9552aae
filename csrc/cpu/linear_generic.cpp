// The engine of linear attention for any CPU, and the only one that computes in float64.
#include "vec_generic.h"
// clang-format off: the engine is written over the Vec included before it
#include "linear_vector.h"
// clang-format on

namespace longctx::cpu {

const LinearEngine<float>& generic_linear_engine(DType dtype) {
  return vector_linear_engine_of(dtype);
}

const LinearEngine<double>& generic_linear_engine_float64() {
  static constexpr LinearEngine<double> kFloat64 = vector_linear_engine<double, double>("vector");
  return kFloat64;
}

}  // namespace longctx::cpu
