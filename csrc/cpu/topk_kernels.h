// Loops over the scores of a row and over the few of them that may be chosen. One implementation,
// compiled for each instruction set.
#pragma once
#include <cstdint>

#include "longctx/float_order.h"
#include "strip_engine.h"

namespace longctx::cpu {

constexpr int64_t kListSlack = 64;  // entries behind a list's capacity that loops may overwrite

// Scores that may be chosen, ascending by index.
struct ScoreList {
  uint32_t* keys = nullptr;    // [capacity + kListSlack]: order keys; bits as long as they are new
  int32_t* indices = nullptr;  // [capacity + kListSlack]
  int64_t capacity = 0;
  int64_t count = 0;
};

struct KeyRange {
  uint32_t low = 0;
  uint32_t high = 0;
};

struct TopKKernels {
  // Appends the elements of row[begin, end) whose bits are in the range, as bits, until the end or
  // until a block might not fit; returns where it stopped.
  int64_t (*scan32)(const uint32_t* row, int64_t begin, int64_t end, BitRange range,
                    ScoreList& list);
  int64_t (*scan16)(const uint16_t* row, int64_t begin, int64_t end, BitRange range,
                    ScoreList& list);
  // Bits to order keys, in place.
  void (*order_keys)(FloatFormat format, int64_t count, uint32_t* keys);
  // The lowest and the highest of at least one key.
  KeyRange (*key_range)(const uint32_t* keys, int64_t count);
  // Copies the keys in [low, high] in order; `to` [count + kListSlack] may be `keys`.
  int64_t (*collect)(const uint32_t* keys, int64_t count, KeyRange range, uint32_t* to);
  // Keeps the entries above `key` and the first `num_ties` at it, in order.
  void (*keep)(uint32_t key, int64_t num_ties, ScoreList& list);
  // The sum of logit_mass(score, best, shift) over scores of `dtype`.
  int64_t (*mass_sum)(DType dtype, const void* scores, int64_t count, float best, int shift);
};

const TopKKernels& generic_topk_kernels();
const TopKKernels& avx2_topk_kernels();
const TopKKernels& avx512_topk_kernels();

inline const TopKKernels& choose_topk_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512_topk_kernels();
  if (isa >= Isa::kAvx2) return avx2_topk_kernels();
#endif
  (void)isa;
  return generic_topk_kernels();
}

}  // namespace longctx::cpu
