// The engine of key_rows.h, written once over Vec<T>. Include after one vec_<isa>.h. Everything
// here has internal linkage, so that code compiled for one instruction set is never linked into
// another.
#pragma once
#include <math.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "key_rows.h"
#include "reduced_float.h"
#include "vec_sums.h"

namespace longctx::cpu {
namespace {

// T: what is computed in; In: the dtype of queries and rows.
template <class T, class In>
struct VectorKeyRows {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  static constexpr int64_t kAddedRows = 32;  // in one chain: a longer one loses digits

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static const In* row_of(const void* row) { return static_cast<const In*>(row); }

  // A vector of `count` < kLanes elements and zeros.
  static V load_part(const In* from, int64_t count) {
    alignas(64) T lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(from[i]);
    return V::load(lanes);
  }

  // ---- summaries ----

  static void extremes(const void* const* rows, int64_t count, int64_t dim, void* low, void* high) {
    for_columns(dim, [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      T* lows = static_cast<T*>(low) + d;
      T* highs = static_cast<T*>(high) + d;
      V lo[kVecs], hi[kVecs];
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        lo[j] = V::load(lows + j * kLanes);
        hi[j] = V::load(highs + j * kLanes);
      }
      for (int64_t i = 0; i < count; ++i) {
        const In* row = row_of(rows[i]) + d;
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          const V x = V::load(row + j * kLanes);
          lo[j] = min(x, lo[j]);
          hi[j] = max(x, hi[j]);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        lo[j].store(lows + j * kLanes);
        hi[j].store(highs + j * kLanes);
      }
    });
    for (int64_t d = dim / kLanes * kLanes; d < dim; ++d) {
      T &lo = static_cast<T*>(low)[d], &hi = static_cast<T*>(high)[d];
      for (int64_t i = 0; i < count; ++i) {
        const T x = widen(row_of(rows[i])[d]);
        lo = x < lo ? x : lo;
        hi = x > hi ? x : hi;
      }
    }
  }

  static void add_rows(const void* const* rows, int64_t count, int64_t dim, void* sum) {
    for_columns(dim, [&](auto vecs, int64_t d) {
      constexpr int kVecs = decltype(vecs)::value;
      T* to = static_cast<T*>(sum) + d;
      for (int64_t first = 0; first < count; first += kAddedRows) {
        const int64_t last = smaller(first + kAddedRows, count);
        V acc[kVecs];
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) acc[j] = V::broadcast(0);
        for (int64_t i = first; i < last; ++i) {
          const In* row = row_of(rows[i]) + d;
#pragma GCC unroll 4
          for (int j = 0; j < kVecs; ++j) acc[j] = acc[j] + V::load(row + j * kLanes);
        }
#pragma GCC unroll 4
        for (int j = 0; j < kVecs; ++j) {
          (V::load(to + j * kLanes) + acc[j]).store(to + j * kLanes);
        }
      }
    });
    for (int64_t d = dim / kLanes * kLanes; d < dim; ++d) {
      for (int64_t first = 0; first < count; first += kAddedRows) {
        T acc = 0;
        for (int64_t i = first; i < smaller(first + kAddedRows, count); ++i) {
          acc += widen(row_of(rows[i])[d]);
        }
        static_cast<T*>(sum)[d] += acc;
      }
    }
  }

  static void round_row(const void* from, int64_t dim, double divisor, void* to) {
    const T* wide = static_cast<const T*>(from);
    const T by = static_cast<T>(divisor);
    for (int64_t d = 0; d < dim; ++d) narrow(wide[d] / by, static_cast<In*>(to)[d]);
  }

  // ---- scores ----

  static int rows_of(int64_t num_rows) {
    const int rows = num_rows >= 3 ? 4 : static_cast<int>(num_rows);
    return rows < kLanes ? rows : kLanes;
  }
  static int64_t padded_rows(int64_t num_rows) {
    return (num_rows + rows_of(num_rows) - 1) / rows_of(num_rows) * rows_of(num_rows);
  }

  static int64_t query_bytes(const KeyRowsShape& shape, int64_t num_rows) {
    return sizeof(T) * padded_rows(num_rows) * round_up(shape.row_dim());
  }

  // sum_d max(q_d high_d, q_d low_d) is a product of rows: negative elements of q meet the minima,
  // positive ones the maxima, zeros what is left.
  static void pack_queries(const KeyRowsShape& shape, const void* const* queries, int64_t num_rows,
                           void* packed) {
    T* to = static_cast<T*>(packed);
    const int64_t columns = round_up(shape.row_dim());
    for (int64_t r = 0; r < padded_rows(num_rows); ++r, to += columns) {
      for (int64_t d = 0; d < columns; ++d) to[d] = 0;
      if (r >= num_rows) continue;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const T x = widen(row_of(queries[r])[d]) * static_cast<T>(shape.softmax_scale);
        to[place(shape.minmax && !(x < 0) ? shape.head_dim + d : d, shape.row_dim())] = x;
      }
    }
  }

  static void score(const KeyRowsShape& shape, int64_t num_rows, const void* packed,
                    const void* const* rows, int64_t count, int64_t ahead, void* tile) {
    switch (rows_of(num_rows)) {
      case 1:
        score_list<1>(shape, num_rows, packed, rows, count, ahead, static_cast<T*>(tile));
        break;
      case 2:
        score_list<2>(shape, num_rows, packed, rows, count, ahead, static_cast<T*>(tile));
        break;
      default:
        if constexpr (kLanes >= 4) {
          score_list<4>(shape, num_rows, packed, rows, count, ahead, static_cast<T*>(tile));
        }
    }
    if (shape.softcap > 0) {
      for (int64_t r = 0; r < num_rows; ++r) {
        cap(static_cast<T>(shape.softcap), static_cast<T*>(tile) + r * kListRows, count);
      }
    }
  }

  static void combine(Combine how, const void* from, int64_t count, void* to) {
    const T* x = static_cast<const T*>(from);
    T* y = static_cast<T*>(to);
    switch (how) {
      case Combine::kCopy:
        for (int64_t i = 0; i < count; ++i) y[i] = x[i];
        return;
      case Combine::kAdd:
        for (int64_t i = 0; i < count; ++i) y[i] += x[i];
        return;
      case Combine::kMax:
        for (int64_t i = 0; i < count; ++i) y[i] = x[i] > y[i] ? x[i] : y[i];
        return;
    }
  }

  static void round_scores(const void* from, int64_t count, double divisor, float* to) {
    const T* x = static_cast<const T*>(from);
    const T by = static_cast<T>(divisor);
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(x[i] / by);
  }

  static void softmax(void* scores, const int32_t* counts, int64_t count) {
    T* s = static_cast<T*>(scores);
    T top = std::numeric_limits<T>::lowest();
    for (int64_t i = 0; i < count; ++i) top = s[i] > top ? s[i] : top;
    double sum = 0;
    const V highest = V::broadcast(top);
    for (int64_t first = 0; first < count; first += kChunk) {
      // weights of a chunk in the place of its scores, but those of -inf
      alignas(64) T weights[kChunk];
      const int64_t n = smaller(kChunk, count - first);
      T* chunk = s + first;
      for (int64_t i = 0; i < n; ++i) weights[i] = chunk[i];
      for (int64_t i = n; i < round_up(n); ++i) weights[i] = -kInf;
      T part = 0;
      for (int64_t i = 0; i < n; i += kLanes) {
        exp(V::load(weights + i) - highest).store(weights + i);
      }
      if (counts == nullptr) {
        for (int64_t i = 0; i < n; ++i) part += weights[i];
      } else {
        for (int64_t i = 0; i < n; ++i) part += static_cast<T>(counts[first + i]) * weights[i];
      }
      for (int64_t i = 0; i < n; ++i) chunk[i] = chunk[i] == -kInf ? -kInf : weights[i];
      sum += part;
    }
    const T inverse = static_cast<T>(1 / sum);
    for (int64_t i = 0; i < count; ++i) s[i] *= inverse;
  }

 private:
  template <int kCount>
  struct Size {
    static constexpr int value = kCount;
  };
  static constexpr int64_t kChunk = 256;

  // body(vectors at once, first column) over the whole vectors of a row.
  template <class F>
  static void for_columns(int64_t dim, const F& body) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) body(Size<4>{}, d);
    for (; d + kLanes <= dim; d += kLanes) body(Size<1>{}, d);
  }

  static constexpr int at_once(int rows) { return kLanes / rows < 4 ? kLanes / rows : 4; }

  template <int kRows>
  static void score_list(const KeyRowsShape& shape, int64_t num_rows, const void* packed,
                         const void* const* rows, int64_t count, int64_t ahead, T* tile) {
    constexpr int kKeys = kLanes / kRows;
    const int64_t dim = shape.row_dim(), columns = round_up(dim);
    const T* queries = static_cast<const T*>(packed);
    for (int64_t first = 0; first < count; first += kKeys) {
      const In *keys[kKeys], *later[kKeys];
      for (int c = 0; c < kKeys; ++c) {
        keys[c] = row_of(rows[smaller(first + c, count - 1)]);
        later[c] = row_of(rows[smaller(first + c + kRowsAhead, count + ahead - 1)]);
      }
      const int64_t used = smaller(kKeys, count - first);
      for (int64_t r = 0; r < num_rows; r += kRows) {
        alignas(64) T s[kLanes];
        score_keys<kRows>(keys, r == 0 ? later : keys, queries + r * columns, columns, dim, s);
        for (int64_t i = 0; i < smaller(kRows, num_rows - r); ++i) {
          T* to = tile + (r + i) * kListRows + first;
          for (int64_t c = 0; c < used; ++c) to[c] = s[i * kKeys + c];
        }
      }
    }
  }

  // Vectors of even and odd elements, where that is cheaper than in order.
  static constexpr bool kPairs = std::is_same_v<In, BFloat16> && kLanes >= 8;
  static constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;

  // Where element d of a row of `dim` meets the query.
  static int64_t place(int64_t d, int64_t dim) {
    const int64_t within = d % kStep;
    if (!kPairs || d - within + kStep > dim) return d;
    return d - within + within % 2 * kLanes + within / 2;
  }

  // One vector of scores: row by row, kKeys keys each. Meanwhile the rows `later` are brought into
  // the L2 cache, a line for every line that is computed with: in bursts they would hold up the
  // loads. Not inlined, or the accumulators compete with the caller for registers.
  template <int kRows>
  __attribute__((noinline)) static void score_keys(const In* const* rows, const In* const* later,
                                                   const T* q, int64_t columns, int64_t dim, T* s) {
    constexpr int kKeys = kLanes / kRows;
    constexpr int kAtOnce = at_once(kRows);
    V x[kLanes];
#pragma GCC unroll 4
    for (int part = 0; part < kKeys; part += kAtOnce) {
      const In *k[kAtOnce], *next[kAtOnce];
#pragma GCC unroll 4
      for (int c = 0; c < kAtOnce; ++c) {
        k[c] = rows[part + c];
        next[c] = later[part + c];
      }
      V acc[kRows][kAtOnce];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce; ++c) acc[r][c] = V::broadcast(0);
      }
      const auto add = [&](const V(&key)[kAtOnce], int64_t d) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V query = V::load(q + r * columns + d);
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) acc[r][c] = fma(query, key[c], acc[r][c]);
        }
      };
      int64_t d = 0;
      for (; d + kStep <= dim; d += kStep) {
        V key[kAtOnce];
        if constexpr (kPairs) {
          V odd[kAtOnce];
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) V::load_pair(k[c] + d, key[c], odd[c]);
          add(key, d);
          add(odd, d + kLanes);
        } else {
#pragma GCC unroll 4
          for (int c = 0; c < kAtOnce; ++c) key[c] = V::load(k[c] + d);
          add(key, d);
        }
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce; ++c) __builtin_prefetch(next[c] + d, 0, 2);
      }
      for (; d < dim; d += kLanes) {
        V key[kAtOnce];
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce; ++c) {
          key[c] = d + kLanes <= dim ? V::load(k[c] + d) : load_part(k[c] + d, dim - d);
        }
        add(key, d);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce; ++c) x[r * kKeys + part + c] = acc[r][c];
      }
    }
    sum_lanes(x).store(s);
  }

  static void cap(T softcap, T* s, int64_t count) {
    const V limit = V::broadcast(softcap), inverse = V::broadcast(1 / softcap);
    for (int64_t first = 0; first < count; first += kLanes) {
      alignas(64) T lanes[kLanes] = {};
      const int64_t n = smaller(kLanes, count - first);
      for (int64_t i = 0; i < n; ++i) lanes[i] = s[first + i];
      (limit * tanh(V::load(lanes) * inverse)).store(lanes);
      for (int64_t i = 0; i < n; ++i) s[first + i] = lanes[i];
    }
  }
};

template <class T, class In>
constexpr KeyRowsEngine key_rows_engine() {
  using Rows = VectorKeyRows<T, In>;
  return {Rows::extremes, Rows::add_rows, Rows::round_row,    Rows::query_bytes, Rows::pack_queries,
          Rows::score,    Rows::combine,  Rows::round_scores, Rows::softmax};
}

}  // namespace
}  // namespace longctx::cpu
