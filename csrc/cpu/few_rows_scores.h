// s = q k^T of a step, softcap and bias; rows of K that vectors cannot read in place, widened or
// rotated.
#pragma once
#include <cstdint>

#include "few_rows_layout.h"
#include "few_rows_prefetch.h"
#include "reduced_float.h"

namespace longctx::cpu {
namespace {

template <class T, class In>
struct FewRowsScores : FewRowsLayout<T> {
  using Layout = FewRowsLayout<T>;
  using Layout::at_once;
  using Layout::kDepth;
  using Layout::kInf;
  using Layout::kLanes;
  using Layout::round_up;
  using Layout::rows_of;
  using Layout::smaller;
  using typename Layout::Step;
  using typename Layout::V;

  // How often score calls its prefetch in a step and one block of rows.
  static int64_t score_calls(const FewRowsShape& shape, int64_t num_rows, int64_t count) {
    const int64_t keys = kLanes / rows_of(num_rows);
    const int64_t parts = keys / at_once(rows_of(num_rows));
    return (count + keys - 1) / keys * parts * (round_up(shape.head_dim) / kLanes);
  }

  // Widens rows whose length is no whole number of vectors, padded with zeros.
  static void pack(const void* const* rows, int64_t count, int64_t dim, T* wide,
                   const T** wide_rows) {
    const int64_t columns = round_up(dim);
    for (int64_t i = 0; i < count; ++i, wide += columns) {
      const In* row = static_cast<const In*>(rows[i]);
      for (int64_t d = 0; d < dim; ++d) wide[d] = widen(row[d]);
      for (int64_t d = dim; d < columns; ++d) wide[d] = 0;
      wide_rows[i] = wide;
    }
  }

  // The same for rows of K, rotated.
  static void rotate(const void* const* rows, const float* const* rope, int64_t count,
                     const FewRowsShape& shape, T* wide, const T** wide_rows) {
    const int64_t columns = round_up(shape.head_dim);
    for (int64_t i = 0; i < count; ++i, wide += columns) {
      widen_rotated(static_cast<const In*>(rows[i]), rope[i], shape, wide);
      for (int64_t d = shape.head_dim; d < columns; ++d) wide[d] = 0;
      wide_rows[i] = wide;
    }
  }

  // angles: [2, rotary_dim / 2] cosines and sines, or null: not rotated.
  static void widen_rotated(const In* row, const float* angles, const FewRowsShape& shape, T* to) {
    const int64_t rotary = angles == nullptr ? 0 : shape.rotary_dim, half = rotary / 2;
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const V cos = V::load(angles + d), sin = V::load(angles + half + d);
      const V a = V::load(row + d), b = V::load(row + half + d);
      (a * cos - b * sin).store(to + d);
      (b * cos + a * sin).store(to + half + d);
    }
    for (; d < half; ++d) {
      const T cos = angles[d], sin = angles[half + d];
      const T a = widen(row[d]), b = widen(row[half + d]);
      to[d] = a * cos - b * sin;
      to[half + d] = b * cos + a * sin;
    }
    for (d = rotary; d < shape.head_dim; ++d) to[d] = widen(row[d]);
  }

  template <int kRows, class Row>
  static void score(const FewRowsShape& shape, const Step& step, int64_t block,
                    const Row* const* k_rows, LinePrefetch& prefetch) {
    constexpr int kKeys = kLanes / kRows;
    const int64_t columns = round_up(shape.head_dim);
    const T* q = step.queries + block * kRows * columns;
    T* s = step.s;
    for (int64_t first = 0; first < step.count; first += kKeys, s += kLanes) {
      const Row* rows[kKeys];
      for (int c = 0; c < kKeys; ++c) rows[c] = k_rows[smaller(first + c, step.count - 1)];
      score_keys<kRows>(rows, q, columns, s, prefetch);
    }
  }

  // One vector of scores. Not inlined, or the accumulators compete with the caller for registers.
  template <int kRows, class Row>
  __attribute__((noinline)) static void score_keys(const Row* const* rows, const T* q,
                                                   int64_t columns, T* s, LinePrefetch& prefetch) {
    constexpr int kKeys = kLanes / kRows;
    constexpr int kAtOnce = at_once(kRows);
    LinePrefetch ahead = prefetch;
    V x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = V::broadcast(0);
#pragma GCC unroll 4
    for (int part = 0; part < kKeys; part += kAtOnce) {
      const Row* k[kAtOnce];
#pragma GCC unroll 4
      for (int c = 0; c < kAtOnce; ++c) k[c] = rows[part + c];
      for (int64_t first = 0; first < columns; first += kDepth) {
        V acc[kRows][kAtOnce];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) acc[r][c] = V::broadcast(0);
        }
        const int64_t last = smaller(first + kDepth, columns);
        for (int64_t d = first; d < last; d += kLanes) {
          V key[kAtOnce];
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) key[c] = V::load(k[c] + d);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const V query = V::load(q + r * columns + d);
#pragma GCC unroll 4
            for (int c = 0; c < kAtOnce; ++c) acc[r][c] = fma(query, key[c], acc[r][c]);
          }
          ahead();
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) {
            V& sum = x[r * kKeys + part + c];
            sum = first == 0 ? acc[r][c] : sum + acc[r][c];
          }
        }
      }
    }
    prefetch = ahead;
    sum_lanes(x).store(s);
  }

  template <int kRows>
  static void apply_softcap(const FewRowsShape& shape, const Step& step) {
    const V cap = V::broadcast(static_cast<T>(shape.softcap));
    const V inverse = V::broadcast(static_cast<T>(1 / shape.softcap));
    for (int64_t i = 0; i < Layout::template num_scores<kRows>(step); i += kLanes) {
      (cap * tanh(V::load(step.s + i) * inverse)).store(step.s + i);
    }
  }

  template <int kRows>
  static void add_bias(const Step& step, const float* bias) {
    constexpr int kKeys = kLanes / kRows;
    T* s = step.s;
    for (int64_t first = 0; first < step.count; first += kKeys, s += kLanes) {
      alignas(64) T lanes[kLanes];
      for (int c = 0; c < kKeys; ++c) {
        const T of_key = static_cast<T>(bias[smaller(first + c, step.count - 1)]);
        for (int r = 0; r < kRows; ++r) lanes[r * kKeys + c] = of_key;
      }
      (V::load(s) + V::load(lanes)).store(s);
    }
  }

  // Lanes of the last vector that have no key.
  template <int kRows>
  static void hide_padding(const Step& step) {
    constexpr int kKeys = kLanes / kRows;
    const int64_t whole = step.count / kKeys * kKeys;
    if (whole == step.count) return;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t c = step.count - whole; c < kKeys; ++c) {
        step.s[whole * kRows + r * kKeys + c] = -kInf;
      }
    }
  }
};

}  // namespace
}  // namespace longctx::cpu
