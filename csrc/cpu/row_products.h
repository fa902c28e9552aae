// C = carry * C + A B on vector registers: a block of kBlockRows rows times kBlockVecs vectors of C
// is kept in registers over the depth, A is broadcast. Include after one vec_<isa>.h.
#pragma once
#include <cstdint>

#include "strip_products.h"

namespace longctx::cpu {
namespace {

template <class T>
struct RowProducts {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  // A longer depth is summed kDepth at a time: the rows of B stay in the L1 cache.
  static constexpr int64_t kDepth = 128;

  // a[row * row_stride + depth * depth_stride].
  struct Factor {
    const T* data;
    int64_t row_stride;
    int64_t depth_stride;
  };

  // c [num_rows][c_stride] over `vecs` vectors of columns. `depth_of(row_end, column)` is the depth
  // that a block of rows ending at row_end takes at its first column; 0 leaves the block out.
  template <bool kTransposed, class DepthOf>
  static void multiply(const Factor& a, const T* b, int64_t b_stride, int64_t num_rows,
                       int64_t vecs, int64_t depth, const DepthOf& depth_of, T carry, T* c,
                       int64_t c_stride) {
    for (int64_t vec = 0; vec < vecs; vec += V::kBlockVecs) {
      const int64_t column = vec * kLanes;
      for (int64_t first = 0; first < depth; first += kDepth) {
        StripProducts<T>::for_each_block(num_rows, [&](auto rows, int64_t row) {
          constexpr int kRows = decltype(rows)::value;
          const int64_t whole = depth_of(row + kRows, column);
          const int64_t count = (whole < first + kDepth ? whole : first + kDepth) - first;
          if (count <= 0) return;
          const T* a_block = a.data + row * a.row_stride + first * a.depth_stride;
          const T* b_block = b + first * b_stride + column;
          T* c_block = c + row * c_stride + column;
          const T factor = first == 0 ? carry : T(1);
          const int64_t a_stride = kTransposed ? a.depth_stride : a.row_stride;
          if (vec + V::kBlockVecs <= vecs) {
            block<kTransposed, kRows, V::kBlockVecs>(a_block, a_stride, b_block, b_stride, count,
                                                     factor, c_block, c_stride);
          } else {
            block<kTransposed, kRows, 1>(a_block, a_stride, b_block, b_stride, count, factor,
                                         c_block, c_stride);
          }
        });
      }
    }
  }

 private:
  // kTransposed: the rows of A are adjacent, else its depth is. Not inlined, or the accumulators
  // compete with the caller for registers.
  template <bool kTransposed, int kRows, int kVecs>
  __attribute__((noinline)) static void block(const T* a, int64_t a_stride, const T* b,
                                              int64_t b_stride, int64_t depth, T carry, T* c,
                                              int64_t c_stride) {
    const T* rows[kRows];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) rows[n] = kTransposed ? a : a + n * a_stride;
    V acc[kRows][kVecs];
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[n][j] = V::broadcast(0);
    }
    for (int64_t d = 0; d < depth; ++d, b += b_stride) {
      V x[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) x[j] = V::load(b + j * kLanes);
#pragma GCC unroll 16
      for (int n = 0; n < kRows; ++n) {
        const V factor = V::broadcast(kTransposed ? a[d * a_stride + n] : rows[n][d]);
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) acc[n][j] = fma(factor, x[j], acc[n][j]);
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) {
        T* to = c + n * c_stride + j * kLanes;
        const V sum = acc[n][j];
        (carry == 0 ? sum : fma(V::load(to), V::broadcast(carry), sum)).store(to);
      }
    }
  }
};

}  // namespace
}  // namespace longctx::cpu
