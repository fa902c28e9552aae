// The strip engine for any CPU and every dtype; the only one that computes in float64.
#include "vec_generic.h"
// clang-format off: the engine is written over the Vec included before it
#include "strip_vector.h"
// clang-format on

namespace longctx::cpu {

const StripEngine& generic_engine(DType dtype) {
  static constexpr StripEngine kFloat32 = vector_engine<float, float>("generic");
  static constexpr StripEngine kFloat64 = vector_engine<double, double>("generic");
  static constexpr StripEngine kBFloat16 = vector_engine<float, BFloat16>("generic");
  static constexpr StripEngine kFloat16 = vector_engine<float, Float16>("generic");
  switch (dtype) {
    case DType::kFloat64:
      return kFloat64;
    case DType::kBFloat16:
      return kBFloat16;
    case DType::kFloat16:
      return kFloat16;
    default:
      return kFloat32;
  }
}

}  // namespace longctx::cpu
