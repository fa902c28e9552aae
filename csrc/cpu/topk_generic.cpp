#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

// All compared before the first is looked at: a loop without branches, which vectorises.
template <class Bits>
inline uint32_t hits_of(const Bits* x, BitRange range) {
  const Bits low = static_cast<Bits>(range.low), last = static_cast<Bits>(range.range);
  Bits any = 0;
  for (int i = 0; i < 32; ++i) any |= static_cast<Bits>(static_cast<Bits>(x[i] - low) <= last);
  uint32_t found = 0;
  if (any == 0) return found;
  for (int i = 0; i < 32; ++i) {
    found |= static_cast<uint32_t>(static_cast<Bits>(x[i] - low) <= last) << i;
  }
  return found;
}

inline uint32_t hits32(const uint32_t* x, BitRange range) { return hits_of(x, range); }
inline uint32_t hits16(const uint16_t* x, BitRange range) { return hits_of(x, range); }

}  // namespace
}  // namespace longctx::cpu

// clang-format off: the loops are written over the functions before them
#include "topk_loops.h"
// clang-format on

namespace longctx::cpu {
const TopKKernels& generic_topk_kernels() { return kTopKKernels; }
}  // namespace longctx::cpu
