#include "vec_avx2.h"
// clang-format off: the engine is written over the Vec included before it
#include "few_rows_vector.h"
// clang-format on

namespace longctx::cpu {

const FewRowsEngine& avx2_few_rows(DType dtype) {
  static constexpr FewRowsEngine kFloat32 = few_rows_engine<float, float>();
  static constexpr FewRowsEngine kBFloat16 = few_rows_engine<float, BFloat16>();
  static constexpr FewRowsEngine kFloat16 = few_rows_engine<float, Float16>();
  switch (dtype) {
    case DType::kFloat64:
      return generic_few_rows(dtype);
    case DType::kBFloat16:
      return kBFloat16;
    case DType::kFloat16:
      return kFloat16;
    default:
      return kFloat32;
  }
}

}  // namespace longctx::cpu
