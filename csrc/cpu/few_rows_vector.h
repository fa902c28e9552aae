// The engine of few_rows.h, written once over Vec<T>. Query rows are taken kRows at a time; a
// vector of scores holds kRows rows times kLanes / kRows keys, row by row, so that the softmax of
// any number of rows fills its lanes. Include after one vec_<isa>.h. Everything here has internal
// linkage, so that code compiled for one instruction set is never linked into another.
#pragma once
#include <math.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "few_rows.h"
#include "reduced_float.h"
#include "vec_sums.h"

namespace longctx::cpu {
namespace {

template <int kCount>
struct Size {
  static constexpr int value = kCount;
};

// Of rows in sequence: brings them into the L2 cache line by line while something else computes:
// more lines are in flight there than towards L1 (measured: 9.0 against 6.1 GB/s of random rows of
// 256 bytes). Evenly spread, or the loads of the computation queue up behind a burst.
class LinePrefetch {
 public:
  LinePrefetch(const void* const* rows, int64_t count, int64_t bytes)
      : row_(rows), end_(rows + count), bytes_(bytes) {}
  // Spreads what is left over `calls` calls.
  void spread(int64_t calls) {
    const int64_t lines = (end_ - row_) * ((bytes_ + 63) / 64);
    rate_ = (lines + calls - 1) / calls;
  }
  void operator()() {
    for (int64_t i = 0; i < rate_ && row_ < end_; ++i) {
      __builtin_prefetch(static_cast<const char*>(*row_) + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= bytes_) {
        offset_ = 0;
        ++row_;
      }
    }
  }

 private:
  const void* const* row_;
  const void* const* end_;
  int64_t bytes_;
  int64_t offset_ = 0;
  int64_t rate_ = 0;
};

// Of scattered rows: brings those of a step into the L1 cache while those of the next one come from
// memory. Of those of the step after that one line each is asked for, which finds their pages: four
// lines of a row at once would wait for the same page walk (measured: rows alone 0.29 ms, with this
// 0.25). Prefetching in the midst of the computation is no faster, probably because a prefetch that
// waits for a page walk holds up what follows it.
struct RowRange {
  const void* const* k_rows;
  const void* const* v_rows;
  int64_t count;
};

inline void fetch_rows(const RowRange& now, const RowRange& next, const RowRange& later,
                       int64_t k_bytes, int64_t v_bytes) {
  // A row that is not aligned reaches into one more line.
  const auto crosses = [](const void* row, int64_t bytes) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 64) + (bytes - 1) % 64 >= 64;
  };
  const auto touch = [&](const void* row, int64_t bytes) {
    const volatile char* data = static_cast<const char*>(row);
    for (int64_t b = 0; b < bytes; b += 64) (void)data[b];
    if (crosses(row, bytes)) (void)data[bytes - 1];
  };
  const auto prefetch = [&](const void* row, int64_t bytes) {
    const char* data = static_cast<const char*>(row);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(data + b, 0, 2);
    if (crosses(row, bytes)) __builtin_prefetch(data + bytes - 1, 0, 2);
  };
  int64_t count = now.count > next.count ? now.count : next.count;
  if (later.count > count) count = later.count;
  for (int64_t i = 0; i < count; ++i) {
    if (i < later.count) __builtin_prefetch(later.k_rows[i], 0, 2);
    if (i < next.count) prefetch(next.k_rows[i], k_bytes);
    if (i < now.count) touch(now.k_rows[i], k_bytes);
    if (i < later.count) __builtin_prefetch(later.v_rows[i], 0, 2);
    if (i < next.count) prefetch(next.v_rows[i], v_bytes);
    if (i < now.count) touch(now.v_rows[i], v_bytes);
  }
}

// T: what is computed in; In: the dtype of q, k, v and out.
template <class T, class In>
struct VectorFewRows {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr T kInf = std::numeric_limits<T>::infinity();
  // Keys of a softmax step: their rows of K and V stay in the L1 cache for all query rows.
  static constexpr int64_t kStepKeys = kPrefetchKeys;
  static_assert(kStepKeys % kLanes == 0);
  // A longer head_dim is summed in parts: no chain of additions is long enough to lose a digit.
  static constexpr int64_t kDepth = 32 * kLanes;

  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static int rows_of(int64_t num_rows) {
    const int rows = num_rows >= 3 ? 4 : static_cast<int>(num_rows);
    return rows < kLanes ? rows : kLanes;
  }
  template <class F>
  static void with_rows(int64_t num_rows, const F& f) {
    switch (rows_of(num_rows)) {
      case 1:
        return f(Size<1>{});
      case 2:
        return f(Size<2>{});
      default:
        if constexpr (kLanes >= 4) return f(Size<4>{});
    }
  }
  static int64_t num_blocks(int64_t num_rows) {
    return (num_rows + rows_of(num_rows) - 1) / rows_of(num_rows);
  }
  static int64_t padded_rows(int64_t num_rows) { return num_blocks(num_rows) * rows_of(num_rows); }

  // Of a block of kRows rows.
  struct State {
    State(void* memory, int64_t block, int rows, int64_t columns)
        : reference(static_cast<T*>(memory) + block * (2 * kLanes + rows * columns)),
          sum(reference + kLanes),
          acc(sum + kLanes) {}
    T* reference;  // [kLanes] of the lane's row: the maximum of s when last raised; -inf: none seen
    T* sum;        // [kLanes] of exp(s - reference) of the lane's row and keys
    T* acc;        // [kRows][columns], relative to the same reference
  };

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
      widen_rotated(static_cast<const In*>(rows[r]), rope[r], shape, q);
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
      values.spread(num_blocks(num_rows) * score_calls(shape, num_rows, count));
      keys.spread(num_blocks(num_rows) * value_calls(shape, num_rows, count));
      const Step step{num_rows, count, static_cast<const T*>(queries), s, state};
      const void* const* k_rows = list.k_rows + first;
      const void* const* v_rows = list.v_rows + first;
      const bool k_in_place = shape.head_dim % kLanes == 0 && shape.rotary_dim == 0;
      const bool v_in_place = shape.head_dim_v % kLanes == 0;
      const T* wide_k_rows[kStepKeys];
      const T* wide_v_rows[kStepKeys];
      if (shape.rotary_dim > 0) {
        rotate(k_rows, list.rope + first, count, shape, wide_k, wide_k_rows);
      } else if (!k_in_place) {
        pack(k_rows, count, shape.head_dim, wide_k, wide_k_rows);
      }
      if (!v_in_place) pack(v_rows, count, shape.head_dim_v, wide_v, wide_v_rows);
      with_rows(num_rows, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        for (int64_t block = 0; block < num_blocks(num_rows); ++block) {
          // s = q k^T
          if (k_in_place) {
            score<kRows>(shape, step, block, reinterpret_cast<const In* const*>(k_rows), values);
          } else {
            score<kRows>(shape, step, block, wide_k_rows, values);
          }
          if (shape.softcap > 0) apply_softcap<kRows>(shape, step);
          if (list.has_bias) add_bias<kRows>(step, list.bias + first);
          hide_padding<kRows>(step);
          // softmax update
          update_softmax<kRows>(shape, step, block);
          if (masses != nullptr)
            add_masses<kRows>(shape, step, block, list.entries + first, masses);
          // acc += p v
          if (v_in_place) {
            add_values<kRows>(shape, step, block, reinterpret_cast<const In* const*>(v_rows), keys);
          } else {
            add_values<kRows>(shape, step, block, wide_v_rows, keys);
          }
        }
      });
    }
  }

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

 private:
  // Up to kStepKeys keys and the query rows that see them.
  struct Step {
    int64_t num_rows;
    int64_t count;
    const T* queries;
    T* s;  // [blocks of kLanes / kRows keys][kRows][kLanes / kRows]
    void* state;
  };

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

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

  // Keys and vectors of values whose accumulators, times kRows, take half of the registers.
  static constexpr int at_once(int rows) { return kLanes / rows < 4 ? kLanes / rows : 4; }
  static constexpr int max_vecs(int rows) { return kLanes == 16 ? (rows == 4 ? 4 : 8) : 8 / rows; }
  // How often the loops over a step and one block of rows call their prefetch.
  static int64_t score_calls(const FewRowsShape& shape, int64_t num_rows, int64_t count) {
    const int64_t keys = kLanes / rows_of(num_rows);
    const int64_t parts = keys / at_once(rows_of(num_rows));
    return (count + keys - 1) / keys * parts * (round_up(shape.head_dim) / kLanes);
  }
  static int64_t value_calls(const FewRowsShape& shape, int64_t num_rows, int64_t count) {
    const int64_t columns = max_vecs(rows_of(num_rows)) * kLanes;
    return count * ((shape.head_dim_v + columns - 1) / columns);
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
  static int64_t num_scores(const Step& step) {
    constexpr int kKeys = kLanes / kRows;
    return (step.count + kKeys - 1) / kKeys * kLanes;
  }

  template <int kRows>
  static void apply_softcap(const FewRowsShape& shape, const Step& step) {
    const V cap = V::broadcast(static_cast<T>(shape.softcap));
    const V inverse = V::broadcast(static_cast<T>(1 / shape.softcap));
    for (int64_t i = 0; i < num_scores<kRows>(step); i += kLanes) {
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

  // Turns s into exp(s - reference) in place. The reference follows the row's maximum only when
  // that has grown by kSlack: probabilities above 1 lose nothing, and rescaling becomes rare.
  static constexpr T kSlack = 5;
  template <int kRows>
  static void update_softmax(const FewRowsShape& shape, const Step& step, int64_t block) {
    const State st(step.state, block, kRows, round_up(shape.head_dim_v));
    const int64_t size = num_scores<kRows>(step);
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

template <class T, class In>
constexpr FewRowsEngine few_rows_engine() {
  using Rows = VectorFewRows<T, In>;
  return {Rows::query_bytes, Rows::state_bytes, Rows::work_bytes, Rows::pack_queries,
          Rows::reset,       Rows::accumulate,  Rows::store,      Rows::merge};
}

}  // namespace
}  // namespace longctx::cpu
