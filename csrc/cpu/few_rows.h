// Attention of a few query rows over keys that are given one by one: decoding, dense or gathered.
// One implementation per instruction set.
//
// Bound by memory: each row of K and V is read once for all query rows. A vector holds elements of
// one key, so that a key's row is read where the user left it (strip_engine.h: a vector holds
// queries, which wastes its lanes on fewer than kStripRows of them).
// The driver (few_rows_run.h) owns which keys are visited and prefetches nothing itself but the
// first of them; an engine prefetches the rows of its next step while it computes.
#pragma once
#include <cstdint>

#include "longctx/params.h"
#include "strip_engine.h"

namespace longctx::cpu {

constexpr int64_t kListKeys = 512;      // keys handed over at a time
constexpr int64_t kPrefetchKeys = 64;   // rows in flight: 16 to 128 draw the full bandwidth
constexpr int64_t kScatteredKeys = 32;  // the same of scattered keys, and those of V

struct FewRowsShape {
  DType dtype = DType::kFloat32;  // of q, k, v and out
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  double softmax_scale = 1.0;
  double softcap = 0.0;    // <= 0: none
  int64_t rotary_dim = 0;  // > 0: queries and keys are rotated (longctx/params.h, RopeParams)
};

// Keys that all rows of a call see. Only the first `count` entries are set.
struct KeyList {
  int64_t count = 0;
  const void* k_rows[kListKeys];  // -> [head_dim]
  const void* v_rows[kListKeys];  // -> [head_dim_v]
  const float* rope[kListKeys];   // -> [2, rotary_dim / 2] of the key's position; with a rotary_dim
  bool scattered = false;         // no long runs of rows that follow each other in memory
  bool has_bias = false;
  float bias[kListKeys];       // added to the scores
  int32_t entries[kListKeys];  // where their weights are summed (EntryMass), if anywhere
};

// What some keys contribute to one query row, unnormalised, in T (float, or double for float64).
template <class T>
struct PartialRow {
  static constexpr int64_t kHead = 64 / sizeof(T);
  static int64_t size(int64_t head_dim_v) {
    return kHead + (head_dim_v + kHead - 1) / kHead * kHead;
  }
  T* data;                                    // [size]
  T& reference() const { return data[0]; }    // weights are exp(s - reference); -inf: no key
  T& sum() const { return data[1]; }          // of the weights
  T* values() const { return data + kHead; }  // [head_dim_v] weighted sum of values
};

// Weights of some keys for one query row: of value sum * exp(reference), in T. No key: all zero.
template <class T>
struct EntryMass {
  T reference;
  T sum;
};

struct FewRowsEngine {
  // Scratch, in bytes: packed queries and states of num_rows rows, and what a call works on.
  int64_t (*query_bytes)(const FewRowsShape&, int64_t num_rows);
  int64_t (*state_bytes)(const FewRowsShape&, int64_t num_rows);
  int64_t (*work_bytes)(const FewRowsShape&, int64_t num_rows);

  // rows[r] -> [head_dim]; rope[r] -> [2, rotary_dim / 2], or null: not rotated.
  void (*pack_queries)(const FewRowsShape&, const void* const* rows, const float* const* rope,
                       int64_t num_rows, void* queries);
  void (*reset)(const FewRowsShape&, int64_t num_rows, void* state);
  // s = q k^T + bias, online softmax, acc += p v. `next` (or null) is the list of the next call:
  // its first rows of K are prefetched. masses[r] (or masses null) are EntryMass of row r, by the
  // entry of a key.
  void (*accumulate)(const FewRowsShape&, int64_t num_rows, const void* queries, const KeyList&,
                     const KeyList* next, void* const* masses, void* work, void* state);
  // partials[r] is the data of a PartialRow.
  void (*store)(const FewRowsShape&, int64_t num_rows, const void* state, void* const* partials);
  // Joins `count` partial rows, `stride` elements apart, of one query row. sink (or null) is one
  // more logit, without a value; lse leaves it out.
  void (*merge)(const FewRowsShape&, const void* partials, int64_t stride, int64_t count,
                const float* sink, void* out, void* lse);
};

const FewRowsEngine& generic_few_rows(DType dtype);
const FewRowsEngine& avx2_few_rows(DType dtype);
const FewRowsEngine& avx512_few_rows(DType dtype);

inline const FewRowsEngine& choose_few_rows(DType dtype, Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512 && dtype != DType::kFloat64) return avx512_few_rows(dtype);
  if (isa >= Isa::kAvx2 && dtype != DType::kFloat64) return avx2_few_rows(dtype);
#endif
  (void)isa;
  return generic_few_rows(dtype);
}

}  // namespace longctx::cpu
