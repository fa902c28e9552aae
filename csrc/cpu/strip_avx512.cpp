// The strip engine on AVX-512 (F, BW, VL, DQ): computes in float32, for all dtypes but float64.
#include "vec_avx512.h"
// clang-format off: the engine is written over the Vec included before it
#include "strip_vector.h"
// clang-format on

namespace longctx::cpu {

const StripEngine& avx512_engine(DType dtype) {
  static constexpr StripEngine kFloat32 = vector_engine<float, float>("avx512");
  static constexpr StripEngine kBFloat16 = vector_engine<float, BFloat16>("avx512");
  static constexpr StripEngine kFloat16 = vector_engine<float, Float16>("avx512");
  switch (dtype) {
    case DType::kFloat64:
      return generic_engine(dtype);
    case DType::kBFloat16:
      return kBFloat16;
    case DType::kFloat16:
      return kFloat16;
    default:
      return kFloat32;
  }
}

}  // namespace longctx::cpu
