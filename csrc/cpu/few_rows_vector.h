// The engine of few_rows.h, written once over Vec<T>. Include after one vec_<isa>.h. Everything
// here and in what it is made of has internal linkage, so that code compiled for one instruction
// set is never linked into another.
#pragma once
#include <cstdint>

#include "few_rows.h"
#include "few_rows_layout.h"
#include "few_rows_partials.h"
#include "few_rows_prefetch.h"
#include "few_rows_scores.h"
#include "few_rows_softmax.h"
#include "few_rows_values.h"

namespace longctx::cpu {
namespace {

// T: what is computed in; In: the dtype of q, k, v and out.
template <class T, class In>
struct VectorFewRows : FewRowsLayout<T> {
  using Layout = FewRowsLayout<T>;
  using typename Layout::State;
  using typename Layout::Step;
  using typename Layout::V;
  using Scores = FewRowsScores<T, In>;
  using Softmax = FewRowsSoftmax<T>;
  using Values = FewRowsValues<T>;
  using Layout::kInf;
  using Layout::kLanes;
  using Layout::kStepKeys;
  using Layout::num_blocks;
  using Layout::padded_rows;
  using Layout::round_up;
  using Layout::rows_of;
  using Layout::smaller;
  using Layout::with_rows;

  static int64_t query_bytes(const FewRowsShape& shape, int64_t num_rows) {
    return sizeof(T) * padded_rows(num_rows) * round_up(shape.head_dim);
  }
  static int64_t state_bytes(const FewRowsShape& shape, int64_t num_rows) {
    return sizeof(T) *
           (num_blocks(num_rows) * 2 * kLanes + padded_rows(num_rows) * round_up(shape.head_dim_v));
  }
  // Scores [kStepKeys][4], then rows of K and V that vectors cannot read in place.
  static int64_t work_bytes(const FewRowsShape& shape, int64_t) {
    return sizeof(T) * kStepKeys * (4 + round_up(shape.head_dim) + round_up(shape.head_dim_v));
  }

  static void pack_queries(const FewRowsShape& shape, const void* const* rows,
                           const float* const* rope, int64_t num_rows, void* queries) {
    T* q = static_cast<T*>(queries);
    const int64_t columns = round_up(shape.head_dim);
    for (int64_t r = 0; r < padded_rows(num_rows); ++r, q += columns) {
      for (int64_t d = 0; d < columns; ++d) q[d] = 0;
      if (r >= num_rows) continue;
      Scores::widen_rotated(static_cast<const In*>(rows[r]), rope[r], shape, q);
      for (int64_t d = 0; d < shape.head_dim; ++d) q[d] *= static_cast<T>(shape.softmax_scale);
    }
  }

  static void reset(const FewRowsShape& shape, int64_t num_rows, void* state) {
    const int64_t columns = round_up(shape.head_dim_v);
    const int rows = rows_of(num_rows);
    for (int64_t b = 0; b < num_blocks(num_rows); ++b) {
      const State st(state, b, rows, columns);
      for (int i = 0; i < kLanes; ++i) st.reference[i] = -kInf;
      for (int i = 0; i < kLanes; ++i) st.sum[i] = 0;
      for (int64_t i = 0; i < rows * columns; ++i) st.acc[i] = 0;
    }
  }

  static void accumulate(const FewRowsShape& shape, int64_t num_rows, const void* queries,
                         const KeyList& list, const KeyList* next, void* const* masses, void* work,
                         void* state) {
    T* s = static_cast<T*>(work);
    T* wide_k = s + kStepKeys * 4;
    T* wide_v = wide_k + kStepKeys * round_up(shape.head_dim);
    const int64_t k_bytes = shape.head_dim * sizeof(In), v_bytes = shape.head_dim_v * sizeof(In);
    const int64_t step_keys = list.scattered ? kScatteredKeys : kStepKeys;
    for (int64_t first = 0; first < list.count; first += step_keys) {
      const int64_t count = smaller(step_keys, list.count - first);
      const int64_t later = first + count;
      const RowRange now{list.k_rows + first, list.v_rows + first, count};
      const RowRange ahead = rows_from(later, step_keys, list, next);
      if (list.scattered) {
        const RowRange then = rows_from(later + ahead.count, step_keys, list, next);
        fetch_rows(now, ahead, then, k_bytes, v_bytes);
      }
      LinePrefetch values(now.v_rows, list.scattered ? 0 : count, v_bytes);
      LinePrefetch keys(ahead.k_rows, list.scattered ? 0 : ahead.count, k_bytes);
      values.spread(num_blocks(num_rows) * Scores::score_calls(shape, num_rows, count));
      keys.spread(num_blocks(num_rows) * Values::value_calls(shape, num_rows, count));
      const Step step{num_rows, count, static_cast<const T*>(queries), s, state};
      const void* const* k_rows = list.k_rows + first;
      const void* const* v_rows = list.v_rows + first;
      const bool k_in_place = shape.head_dim % kLanes == 0 && shape.rotary_dim == 0;
      const bool v_in_place = shape.head_dim_v % kLanes == 0;
      const T* wide_k_rows[kStepKeys];
      const T* wide_v_rows[kStepKeys];
      if (shape.rotary_dim > 0) {
        Scores::rotate(k_rows, list.rope + first, count, shape, wide_k, wide_k_rows);
      } else if (!k_in_place) {
        Scores::pack(k_rows, count, shape.head_dim, wide_k, wide_k_rows);
      }
      if (!v_in_place) Scores::pack(v_rows, count, shape.head_dim_v, wide_v, wide_v_rows);
      with_rows(num_rows, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
          // s = q k^T
          if (k_in_place) {
            Scores::template score<kRows>(shape, step, block,
                                          reinterpret_cast<const In* const*>(k_rows), values);
          } else {
            Scores::template score<kRows>(shape, step, block, wide_k_rows, values);
          }
          if (shape.softcap > 0) Scores::template apply_softcap<kRows>(shape, step);
          if (list.has_bias) Scores::template add_bias<kRows>(step, list.bias + first);
          Scores::template hide_padding<kRows>(step);
          // softmax update
          Softmax::template update_softmax<kRows>(shape, step, block);
          if (masses != nullptr)
            Softmax::template add_masses<kRows>(shape, step, block, list.entries + first, masses);
          // acc += p v
          if (v_in_place) {
            Values::template add_values<kRows>(shape, step, block,
                                               reinterpret_cast<const In* const*>(v_rows), keys);
          } else {
            Values::template add_values<kRows>(shape, step, block, wide_v_rows, keys);
          }
        }
      });
    }
  }

 private:
  // Up to `count` keys from a position on, counted through `list` and then `next`.
  static RowRange rows_from(int64_t position, int64_t count, const KeyList& list,
                            const KeyList* next) {
    const KeyList* from = &list;
    if (position >= list.count) {
      position -= list.count;
      from = next;
    }
    if (from == nullptr || position >= from->count) return {nullptr, nullptr, 0};
    return {from->k_rows + position, from->v_rows + position,
            smaller(count, from->count - position)};
  }
};

template <class T, class In>
constexpr FewRowsEngine few_rows_engine() {
  using Rows = VectorFewRows<T, In>;
  using Partials = FewRowsPartials<T, In>;
  return {Rows::query_bytes, Rows::state_bytes, Rows::work_bytes, Rows::pack_queries,
          Rows::reset,       Rows::accumulate,  Partials::store,  Partials::merge};
}

}  // namespace
}  // namespace longctx::cpu
