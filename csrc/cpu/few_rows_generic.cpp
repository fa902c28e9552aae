#include "vec_generic.h"
// clang-format off: the engine is written over the Vec included before it
#include "few_rows_vector.h"
// clang-format on

namespace longctx::cpu {

const FewRowsEngine& generic_few_rows(DType dtype) {
  static constexpr FewRowsEngine kFloat32 = few_rows_engine<float, float>();
  static constexpr FewRowsEngine kFloat64 = few_rows_engine<double, double>();
  static constexpr FewRowsEngine kBFloat16 = few_rows_engine<float, BFloat16>();
  static constexpr FewRowsEngine kFloat16 = few_rows_engine<float, Float16>();
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
