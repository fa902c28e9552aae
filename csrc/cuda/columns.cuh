// Neighbouring columns of a row, in one memory access.
#pragma once

namespace longctx::cuda {

template <class E, int count>
struct alignas(sizeof(E) * count) Columns {
  E values[count];
};

}  // namespace longctx::cuda
