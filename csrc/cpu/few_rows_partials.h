// What a segment found leaves its state, and the segments of a row are joined.
#pragma once
#include <math.h>

#include <cstdint>

#include "few_rows_layout.h"
#include "reduced_float.h"

namespace longctx::cpu {
namespace {

template <class T, class In>
struct FewRowsPartials : FewRowsLayout<T> {
  using Layout = FewRowsLayout<T>;
  using Layout::kInf;
  using Layout::kLanes;
  using Layout::round_up;
  using Layout::rows_of;
  using typename Layout::State;
  using typename Layout::V;

  static void store(const FewRowsShape& shape, int64_t num_rows, const void* state,
                    void* const* partials) {
    const int64_t columns = round_up(shape.head_dim_v);
    const int rows = rows_of(num_rows);
    const int keys = kLanes / rows;
    for (int64_t r = 0; r < num_rows; ++r) {
      const State st(const_cast<void*>(state), r / rows, rows, columns);
      const int64_t i = r % rows;
      const PartialRow<T> partial{static_cast<T*>(partials[r])};
      partial.reference() = st.reference[i * keys];
      T sum = 0;
      for (int c = 0; c < keys; ++c) sum += st.sum[i * keys + c];
      partial.sum() = sum;
      for (int64_t d = 0; d < shape.head_dim_v; ++d) partial.values()[d] = st.acc[i * columns + d];
    }
  }

  static void merge(const FewRowsShape& shape, const void* partials, int64_t stride, int64_t count,
                    const float* sink, void* out, void* lse) {
    T* data = static_cast<T*>(const_cast<void*>(partials));
    T top = -kInf;
    for (int64_t i = 0; i < count; ++i) {
      const T reference = PartialRow<T>{data + i * stride}.reference();
      if (reference > top) top = reference;
    }
    const T safe_top = top == -kInf ? T(0) : top;
    const PartialRow<T> total{data};
    T sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const PartialRow<T> part{data + i * stride};
      // A sum of NaN may stand beside a reference of -inf.
      const bool any = part.sum() != 0;
      const T weight =
          part.reference() == -kInf ? T(1) : static_cast<T>(::exp(part.reference() - safe_top));
      if (any) sum += weight * part.sum();
      for (int64_t d = 0; d < shape.head_dim_v; ++d) {
        const T value = any ? weight * part.values()[d] : T(0);
        total.values()[d] = i == 0 ? value : total.values()[d] + value;
      }
    }
    In* row = static_cast<In*>(out);
    if (sum == 0) {
      for (int64_t d = 0; d < shape.head_dim_v; ++d) narrow(T(0), row[d]);
      *static_cast<T*>(lse) = -kInf;
      return;
    }
    *static_cast<T*>(lse) = static_cast<T>(top + ::log(sum));
    // The sink joins the denominator; both are taken relative to the larger of the two.
    double scale = 1;
    double denominator = sum;
    if (sink != nullptr) {
      const double larger = *sink > top ? *sink : top;
      scale = ::exp(top - larger);
      denominator = sum * scale + ::exp(*sink - larger);
    }
    const T factor = static_cast<T>(scale / denominator);
    for (int64_t d = 0; d < shape.head_dim_v; ++d) narrow(total.values()[d] * factor, row[d]);
  }
};

}  // namespace
}  // namespace longctx::cpu
