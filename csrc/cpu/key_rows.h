// Loops over rows of keys: summaries of them, and their products with a few query rows. One
// implementation per instruction set.
//
// Bound by memory: a row is read once, where it stands, for all query rows. A vector holds elements
// of one row.
#pragma once
#include <cstdint>

#include "longctx/params.h"
#include "strip_engine.h"

namespace longctx::cpu {

constexpr int64_t kListRows = 256;  // rows scored at a time
constexpr int64_t kRowsAhead = 64;  // of which so many are prefetched: 16 to 32 KiB

struct KeyRowsShape {
  DType dtype = DType::kFloat32;  // of queries and rows
  int64_t head_dim = 0;
  bool minmax = false;  // a row is [2, head_dim], minima before maxima; else [head_dim]
  double softmax_scale = 1.0;
  double softcap = 0.0;  // <= 0: none

  int64_t row_dim() const { return minmax ? 2 * head_dim : head_dim; }
};

enum class Combine { kCopy, kAdd, kMax };

// T is float, or double for float64. `rows` are pointers to rows.
struct KeyRowsEngine {
  // low and high, both T [head_dim], become the extremes of themselves and of the rows. NaN is left
  // out.
  void (*extremes)(const void* const* rows, int64_t count, int64_t head_dim, void* low, void* high);
  // sum T [head_dim] += the rows.
  void (*add_rows)(const void* const* rows, int64_t count, int64_t head_dim, void* sum);
  // to [head_dim] in the dtype of the rows = from / divisor.
  void (*round_row)(const void* from, int64_t head_dim, double divisor, void* to);

  // Queries as `score` takes them.
  int64_t (*query_bytes)(const KeyRowsShape&, int64_t num_rows);
  void (*pack_queries)(const KeyRowsShape&, const void* const* queries, int64_t num_rows,
                       void* packed);
  // tile T [num_rows][kListRows] = the scores of `count` rows; `ahead` more rows are listed behind
  // them, which will be next.
  void (*score)(const KeyRowsShape&, int64_t num_rows, const void* packed, const void* const* rows,
                int64_t count, int64_t ahead, void* tile);
  // Scores, all T [count], element by element.
  void (*combine)(Combine, const void* from, int64_t count, void* to);
  void (*round_scores)(const void* from, int64_t count, double divisor, float* to);
  // In place: exp(s) / sum_j counts[j] exp(s_j); a score of -inf stays.
  void (*softmax)(void* scores, const int32_t* counts, int64_t count);
};

const KeyRowsEngine& generic_key_rows(DType dtype);
const KeyRowsEngine& avx2_key_rows(DType dtype);
const KeyRowsEngine& avx512_key_rows(DType dtype);

inline const KeyRowsEngine& choose_key_rows(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512 && dtype != DType::kFloat64) return avx512_key_rows(dtype);
  if (isa >= Isa::kAvx2 && dtype != DType::kFloat64) return avx2_key_rows(dtype);
#endif
  (void)isa;
  return generic_key_rows(dtype);
}

}  // namespace longctx::cpu
