// The two products of the vector strip engine. Both keep a register block of kBlockRows rows (keys
// of S^T, value columns of O^T) times kBlockVecs vectors of queries and run over the whole depth,
// broadcasting one factor. Include after one vec_<isa>.h.
#pragma once
#include <cstdint>

#include "strip_engine.h"

namespace longctx::cpu {
namespace {

// Calls f(Count<n>) for a run-time n in [1, kMax].
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <int kMax, class F>
inline void with_count(int64_t n, const F& f) {
  if constexpr (kMax > 0) {
    if (n == kMax) {
      f(Count<kMax>{});
    } else {
      with_count<kMax - 1>(n, f);
    }
  }
}

// Transposes kLanes x kLanes elements: each round of zips rotates the bits of (row, lane) by one.
template <class V, int kRounds = V::kLanes>
inline void transpose(V (&x)[V::kLanes]) {
  constexpr int kHalf = V::kLanes / 2;
  V y[V::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kHalf; ++i) {
    y[2 * i] = zip_low(x[i], x[i + kHalf]);
    y[2 * i + 1] = zip_high(x[i], x[i + kHalf]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < V::kLanes; ++i) x[i] = y[i];
  if constexpr (kRounds > 2) transpose<V, kRounds / 2>(x);
}

template <class T>
struct StripProducts {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kBlockRows = V::kBlockRows;
  static constexpr int kBlockVecs = V::kBlockVecs;
  static constexpr int kBlockLanes = kBlockVecs * kLanes;

  // Calls block(Count<rows>, first) on blocks of nearly equal size that cover [0, count).
  template <class Block>
  static void for_each_block(int64_t count, const Block& block) {
    const int64_t num_blocks = (count + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t first = count * b / num_blocks;
      with_count<kBlockRows>(count * (b + 1) / num_blocks - first,
                             [&](auto rows) { block(rows, first); });
    }
  }

  // s_t[i][row] = k_rows[i] . q[row]. A wide head_dim is summed kDepth at a time: q stays in the L1
  // cache, and no chain of additions is long enough to lose a digit.
  static constexpr int64_t kDepth = 128;
  template <class AfterBlock>
  static void score_rows(const T* const* k_rows, int count, const T* q_t, int64_t head_dim, T* s_t,
                         const AfterBlock& after_block) {
    for (int64_t first = 0; first < head_dim; first += kDepth) {
      const int64_t last = first + kDepth < head_dim ? first + kDepth : head_dim;
      for_each_block(count, [&](auto rows, int64_t i) {
        score_block<decltype(rows)::value>(k_rows + i, q_t, first, last, s_t + i * kStripRows);
        after_block();
      });
    }
  }

  // Not inlined, or the accumulators compete with the caller for registers.
  template <int kRows>
  __attribute__((noinline)) static void score_block(const T* const* k_rows, const T* q_t,
                                                    int64_t first, int64_t last, T* s_t) {
    const T* k[kRows];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) k[n] = k_rows[n];
    for (int lane = 0; lane < kStripRows; lane += kBlockLanes) {
      V acc[kRows][kBlockVecs];
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) acc[n][j] = V::broadcast(0);
      }
      const T* q = q_t + first * kStripRows + lane;
      for (int64_t d = first; d < last; ++d, q += kStripRows) {
        V x[kBlockVecs];
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) x[j] = V::load(q + j * kLanes);
#pragma GCC unroll 16
        for (int n = 0; n < kRows; ++n) {
          const V key = V::broadcast(k[n][d]);
#pragma GCC unroll 16
          for (int j = 0; j < kBlockVecs; ++j) acc[n][j] = fma(key, x[j], acc[n][j]);
        }
      }
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) {
          T* s = s_t + n * kStripRows + lane + j * kLanes;
          (first == 0 ? acc[n][j] : V::load(s) + acc[n][j]).store(s);
        }
      }
    }
  }

  // out_t[d][row] += sum_i v_rows[i][d] * p_t[i][row]
  template <class AfterBlock>
  static void add_values(const T* const* v_rows, int count, const T* p_t, int64_t head_dim_v,
                         T* out_t, const AfterBlock& after_block) {
    for_each_block(head_dim_v, [&](auto rows, int64_t d) {
      value_block<decltype(rows)::value>(v_rows, count, p_t, d, out_t + d * kStripRows);
      after_block();
    });
  }

  template <int kRows>
  __attribute__((noinline)) static void value_block(const T* const* v_rows, int count, const T* p_t,
                                                    int64_t d, T* out_t) {
    for (int lane = 0; lane < kStripRows; lane += kBlockLanes) {
      V acc[kRows][kBlockVecs];
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) {
          acc[n][j] = V::broadcast(0);
        }
      }
      const T* p = p_t + lane;
      for (int i = 0; i < count; ++i, p += kStripRows) {
        V x[kBlockVecs];
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) x[j] = V::load(p + j * kLanes);
        const T* v = v_rows[i] + d;
#pragma GCC unroll 16
        for (int n = 0; n < kRows; ++n) {
          const V value = V::broadcast(v[n]);
#pragma GCC unroll 16
          for (int j = 0; j < kBlockVecs; ++j) acc[n][j] = fma(value, x[j], acc[n][j]);
        }
      }
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
        for (int j = 0; j < kBlockVecs; ++j) {
          T* out = out_t + n * kStripRows + lane + j * kLanes;
          (V::load(out) + acc[n][j]).store(out);
        }
      }
    }
  }
};

}  // namespace
}  // namespace longctx::cpu
