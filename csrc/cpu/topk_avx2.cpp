#include <immintrin.h>

#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

inline __m256i load(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }

// Unsigned x <= y is min(x, y) == x.
inline uint32_t hits32(const uint32_t* x, BitRange range) {
  const __m256i low = _mm256_set1_epi32(static_cast<int>(range.low));
  const __m256i last = _mm256_set1_epi32(static_cast<int>(range.range));
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    const __m256i offset = _mm256_sub_epi32(load(x + 8 * i), low);
    const __m256i inside = _mm256_cmpeq_epi32(_mm256_min_epu32(offset, last), offset);
    found |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(inside))) << (8 * i);
  }
  return found;
}

inline uint32_t hits16(const uint16_t* x, BitRange range) {
  const __m256i low = _mm256_set1_epi16(static_cast<int16_t>(range.low));
  const __m256i last = _mm256_set1_epi16(static_cast<int16_t>(range.range));
  const auto inside = [&](const uint16_t* from) {
    const __m256i offset = _mm256_sub_epi16(load(from), low);
    return _mm256_cmpeq_epi16(_mm256_min_epu16(offset, last), offset);
  };
  // Packing works within 128 bits: put the quarters back in order.
  const __m256i bytes = _mm256_packs_epi16(inside(x), inside(x + 16));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}

}  // namespace
}  // namespace longctx::cpu

// clang-format off: the loops are written over the functions before them
#include "topk_loops.h"
// clang-format on

namespace longctx::cpu {
const TopKKernels& avx2_topk_kernels() { return kTopKKernels; }
}  // namespace longctx::cpu
