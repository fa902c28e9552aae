#include "vec_generic.h"
// clang-format off: the engine is written over the Vec included before it
#include "key_rows_vector.h"
// clang-format on

namespace longctx::cpu {

const KeyRowsEngine& generic_key_rows(DType dtype) {
  static constexpr KeyRowsEngine kFloat32 = key_rows_engine<float, float>();
  static constexpr KeyRowsEngine kFloat64 = key_rows_engine<double, double>();
  static constexpr KeyRowsEngine kBFloat16 = key_rows_engine<float, BFloat16>();
  static constexpr KeyRowsEngine kFloat16 = key_rows_engine<float, Float16>();
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
