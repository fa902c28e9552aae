// How query rows and keys lie in vectors, and the state of a row. Query rows are taken kRows at a
// time; a vector of scores holds kRows rows times kLanes / kRows keys, row by row, so that the
// softmax of any number of rows fills its lanes.
#pragma once
#include <cstdint>
#include <limits>

#include "few_rows.h"
#include "vec_sums.h"

namespace longctx::cpu {
namespace {

template <int kCount>
struct Size {
  static constexpr int value = kCount;
};

// T: what is computed in.
template <class T>
struct FewRowsLayout {
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

  // Up to kStepKeys keys and the query rows that see them.
  struct Step {
    int64_t num_rows;
    int64_t count;
    const T* queries;
    T* s;  // [blocks of kLanes / kRows keys][kRows][kLanes / kRows]
    void* state;
  };

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  template <int kRows>
  static int64_t num_scores(const Step& step) {
    constexpr int kKeys = kLanes / kRows;
    return (step.count + kKeys - 1) / kKeys * kLanes;
  }

  // Keys and vectors of values whose accumulators, times kRows, take half of the registers.
  static constexpr int at_once(int rows) { return kLanes / rows < 4 ? kLanes / rows : 4; }
  static constexpr int max_vecs(int rows) { return kLanes == 16 ? (rows == 4 ? 4 : 8) : 8 / rows; }
};

}  // namespace
}  // namespace longctx::cpu
