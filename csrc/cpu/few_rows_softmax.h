// The softmax of a step, and the probability that each entry got.
#pragma once
#include <math.h>

#include <cstdint>
#include <limits>

#include "few_rows_layout.h"

namespace longctx::cpu {
namespace {

template <class T>
struct FewRowsSoftmax : FewRowsLayout<T> {
  using Layout = FewRowsLayout<T>;
  using Layout::kInf;
  using Layout::kLanes;
  using Layout::round_up;
  using Layout::smaller;
  using typename Layout::State;
  using typename Layout::Step;
  using typename Layout::V;

  // Turns s into exp(s - reference) in place. The reference follows the row's maximum only when
  // that has grown by kSlack: probabilities above 1 lose nothing, and rescaling becomes rare.
  static constexpr T kSlack = 5;
  template <int kRows>
  static void update_softmax(const FewRowsShape& shape, const Step& step, int64_t block) {
    const State st(step.state, block, kRows, round_up(shape.head_dim_v));
    const int64_t size = Layout::template num_scores<kRows>(step);
    V top = V::broadcast(-kInf);
    for (int64_t i = 0; i < size; i += kLanes) top = max(V::load(step.s + i), top);
    if (any_greater(top, V::load(st.reference) + V::broadcast(kSlack))) {
      raise_reference<kRows>(shape, top, st);
    }
    const V reference = finite(V::load(st.reference));
    V sum = V::broadcast(0);
    for (int64_t i = 0; i < size; i += kLanes) {
      const V p = exp(V::load(step.s + i) - reference);
      sum = sum + p;
      p.store(step.s + i);
    }
    (V::load(st.sum) + sum).store(st.sum);
  }

  template <int kRows>
  static void add_masses(const FewRowsShape& shape, const Step& step, int64_t block,
                         const int32_t* entries, void* const* masses) {
    constexpr int kKeys = kLanes / kRows;
    const State st(step.state, block, kRows, round_up(shape.head_dim_v));
    const int64_t rows = smaller(kRows, step.num_rows - block * kRows);
    for (int64_t r = 0; r < rows; ++r) {
      const T reference = st.reference[r * kKeys];
      EntryMass<T>* of_row = static_cast<EntryMass<T>*>(masses[block * kRows + r]);
      for (int64_t i = 0; i < step.count; ++i) {
        const T weight = step.s[i / kKeys * kLanes + r * kKeys + i % kKeys];
        EntryMass<T>& mass = of_row[entries[i]];
        if (mass.reference != reference && mass.sum != 0) {
          mass.sum *= static_cast<T>(::exp(mass.reference - reference));
        }
        mass.reference = reference;
        mass.sum += weight;
      }
    }
  }

  template <int kRows>
  __attribute__((noinline)) static void raise_reference(const FewRowsShape& shape, V top,
                                                        const State& st) {
    constexpr int kKeys = kLanes / kRows;
    alignas(64) T raised[kLanes];
    max(top, V::load(st.reference)).store(raised);
    for (int r = 0; r < kRows; ++r) {
      T row_top = -kInf;
      for (int c = 0; c < kKeys; ++c) {
        if (raised[r * kKeys + c] > row_top) row_top = raised[r * kKeys + c];
      }
      for (int c = 0; c < kKeys; ++c) raised[r * kKeys + c] = row_top;
    }
    alignas(64) T factor[kLanes];
    exp(V::load(st.reference) - finite(V::load(raised))).store(factor);
    V::load(raised).store(st.reference);
    (V::load(st.sum) * V::load(factor)).store(st.sum);
    const int64_t columns = round_up(shape.head_dim_v);
    for (int r = 0; r < kRows; ++r) {
      const V row_factor = V::broadcast(factor[r * kKeys]);
      T* acc = st.acc + r * columns;
      for (int64_t d = 0; d < columns; d += kLanes) {
        (V::load(acc + d) * row_factor).store(acc + d);
      }
    }
  }

  // The reference of a row that has seen nothing, -inf, cannot be subtracted.
  static V finite(V x) { return max(x, V::broadcast(std::numeric_limits<T>::lowest())); }
};

}  // namespace
}  // namespace longctx::cpu
