// The sum of softmax weights over scores, as integers and so in any order. Internal linkage:
// compiled for each instruction set.
#pragma once
#include <cstdint>

#include "longctx/logit_mass.h"
#include "reduced_float.h"
#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

template <class T>
int64_t mass_of(const T* scores, int64_t count, float best, int shift) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += logit_mass(widen(scores[i]), best, shift);
  return sum;
}

int64_t mass_sum(DType dtype, const void* scores, int64_t count, float best, int shift) {
  switch (dtype) {
    case DType::kBFloat16:
      return mass_of(static_cast<const BFloat16*>(scores), count, best, shift);
    case DType::kFloat16:
      return mass_of(static_cast<const Float16*>(scores), count, best, shift);
    default:
      return mass_of(static_cast<const float*>(scores), count, best, shift);
  }
}

}  // namespace
}  // namespace longctx::cpu
