// acc += p v of a step.
#pragma once
#include <cstdint>

#include "few_rows_layout.h"
#include "few_rows_prefetch.h"

namespace longctx::cpu {
namespace {

template <class T>
struct FewRowsValues : FewRowsLayout<T> {
  using Layout = FewRowsLayout<T>;
  using Layout::kLanes;
  using Layout::max_vecs;
  using Layout::round_up;
  using Layout::rows_of;
  using Layout::smaller;
  using typename Layout::State;
  using typename Layout::Step;
  using typename Layout::V;

  // How often add_values calls its prefetch in a step and one block of rows.
  static int64_t value_calls(const FewRowsShape& shape, int64_t num_rows, int64_t count) {
    const int64_t columns = max_vecs(rows_of(num_rows)) * kLanes;
    return count * ((shape.head_dim_v + columns - 1) / columns);
  }

  template <int kRows, class Row>
  static void add_values(const FewRowsShape& shape, const Step& step, int64_t block,
                         const Row* const* v_rows, LinePrefetch& prefetch) {
    const int64_t columns = round_up(shape.head_dim_v);
    const State st(step.state, block, kRows, columns);
    constexpr int kMaxVecs = max_vecs(kRows);
    for (int64_t d = 0; d < columns; d += kMaxVecs * kLanes) {
      const int64_t vecs = smaller(kMaxVecs, (columns - d) / kLanes);
      with_vecs<kMaxVecs>(vecs, [&](auto n) {
        add_columns<kRows, decltype(n)::value>(v_rows, step, d, columns, st.acc, prefetch);
      });
    }
  }

  template <int kMax, class F>
  static void with_vecs(int64_t n, const F& f) {
    if constexpr (kMax > 0) {
      if (n == kMax) return f(Size<kMax>{});
      with_vecs<kMax - 1>(n, f);
    }
  }

  template <int kRows, int kVecs, class Row>
  __attribute__((noinline)) static void add_columns(const Row* const* v_rows, const Step& step,
                                                    int64_t first, int64_t columns, T* out,
                                                    LinePrefetch& prefetch) {
    constexpr int kKeys = kLanes / kRows;
    out += first;
    V acc[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[r][j] = V::broadcast(0);
    }
    const T* p = step.s;
    LinePrefetch ahead = prefetch;
    for (int64_t i = 0; i < step.count; ++i) {
      const Row* v = v_rows[i] + first;
      V value[kVecs];
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) value[j] = V::load(v + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V weight = V::broadcast(p[r * kKeys]);
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) acc[r][j] = fma(weight, value[j], acc[r][j]);
      }
      p += (i + 1) % kKeys == 0 ? kLanes - kKeys + 1 : 1;
      ahead();
    }
    prefetch = ahead;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        T* to = out + r * columns + j * kLanes;
        (V::load(to) + acc[r][j]).store(to);
      }
    }
  }
};

}  // namespace
}  // namespace longctx::cpu
