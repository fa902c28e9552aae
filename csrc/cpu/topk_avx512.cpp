// What is in range is compressed into the list: no branch but one for each block without any.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "mass_loops.h"
#include "topk_kernels.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kBlock = 64;  // scores between two branches
// The processor's own prefetching ends at every 4 KiB page: alone it draws two thirds of the
// memory's bandwidth.
constexpr int64_t kPrefetchBytes = 4096;
static_assert(kListSlack >= 16, "a compressed vector is stored whole");

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

inline __m512i lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline void append(ScoreList& list, __mmask16 chosen, __m512i keys, __m512i indices) {
  _mm512_storeu_si512(list.keys + list.count, _mm512_maskz_compress_epi32(chosen, keys));
  _mm512_storeu_si512(list.indices + list.count, _mm512_maskz_compress_epi32(chosen, indices));
  list.count += __builtin_popcount(chosen);
}

// The line kPrefetchBytes on; beyond the row it does no harm.
inline void prefetch(const void* line) {
  _mm_prefetch(static_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
}

int64_t scan32(const uint32_t* row, int64_t begin, int64_t end, BitRange range, ScoreList& list) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(range.low));
  const __m512i last = _mm512_set1_epi32(static_cast<int>(range.range));
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(range.sign));
  const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(range.magnitude));
  const auto inside = [&](__m512i x) {
    return _mm512_cmple_epu32_mask(_mm512_sub_epi32(x, low), last);
  };
  const auto ordered = [&](__mmask16 found, __m512i x) {
    return _mm512_mask_cmple_epu32_mask(found, _mm512_andnot_si512(sign, x), magnitude);
  };
  const auto append_at = [&](int64_t i, __mmask16 chosen, __m512i x) {
    append(list, chosen, x,
           _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(i))));
  };
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    __m512i x[4];
    __mmask16 found[4];
    for (int j = 0; j < 4; ++j) {
      prefetch(row + i + 16 * j);
      x[j] = _mm512_loadu_si512(row + i + 16 * j);
      found[j] = inside(x[j]);
    }
    if ((found[0] | found[1] | found[2] | found[3]) == 0) continue;
    if (list.count + kBlock > list.capacity) return i;
    for (int j = 0; j < 4; ++j) append_at(i + 16 * j, ordered(found[j], x[j]), x[j]);
  }
  for (; i < end; i += 16) {
    const __mmask16 exists = first_lanes(end - i);
    const __m512i x = _mm512_maskz_loadu_epi32(exists, row + i);
    const __mmask16 found = ordered(inside(x) & exists, x);
    if (list.count + __builtin_popcount(found) > list.capacity) return i;
    append_at(i, found, x);
  }
  return end;
}

int64_t scan16(const uint16_t* row, int64_t begin, int64_t end, BitRange range, ScoreList& list) {
  const __m512i low = _mm512_set1_epi16(static_cast<int16_t>(range.low));
  const __m512i last = _mm512_set1_epi16(static_cast<int16_t>(range.range));
  const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(range.sign));
  const __m512i magnitude = _mm512_set1_epi16(static_cast<int16_t>(range.magnitude));
  const auto inside = [&](__m512i x) {
    return _mm512_cmple_epu16_mask(_mm512_sub_epi16(x, low), last);
  };
  const auto ordered = [&](__mmask32 found, __m512i x) {
    return _mm512_mask_cmple_epu16_mask(found, _mm512_andnot_si512(sign, x), magnitude);
  };
  const auto append_at = [&](int64_t i, __mmask32 chosen, __m512i x) {
    const __m512i first = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(i)));
    append(list, static_cast<__mmask16>(chosen), _mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)),
           first);
    append(list, static_cast<__mmask16>(chosen >> 16),
           _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)),
           _mm512_add_epi32(first, _mm512_set1_epi32(16)));
  };
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    prefetch(row + i);
    prefetch(row + i + 32);
    const __m512i x0 = _mm512_loadu_si512(row + i), x1 = _mm512_loadu_si512(row + i + 32);
    const __mmask32 found0 = inside(x0), found1 = inside(x1);
    if ((found0 | found1) == 0) continue;
    if (list.count + kBlock > list.capacity) return i;
    append_at(i, ordered(found0, x0), x0);
    append_at(i + 32, ordered(found1, x1), x1);
  }
  for (; i < end; i += 32) {
    const __mmask32 exists = end - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (end - i)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(exists, row + i);
    const __mmask32 found = ordered(inside(x) & exists, x);
    if (list.count + __builtin_popcount(found) > list.capacity) return i;
    append_at(i, found, x);
  }
  return end;
}

void order_keys(FloatFormat format, int64_t count, uint32_t* keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key(keys[i], format);
}

KeyRange key_range(const uint32_t* keys, int64_t count) {
  __m512i lowest = _mm512_set1_epi32(static_cast<int>(keys[0])), highest = lowest;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i x = _mm512_mask_loadu_epi32(lowest, first_lanes(count - i), keys + i);
    lowest = _mm512_min_epu32(lowest, x);
    highest = _mm512_max_epu32(highest, x);
  }
  return {_mm512_reduce_min_epu32(lowest), _mm512_reduce_max_epu32(highest)};
}

int64_t collect(const uint32_t* keys, int64_t count, KeyRange range, uint32_t* to) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(range.low));
  const __m512i last = _mm512_set1_epi32(static_cast<int>(range.high - range.low));
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 exists = first_lanes(count - i);
    const __m512i x = _mm512_maskz_loadu_epi32(exists, keys + i);
    const __mmask16 chosen = _mm512_mask_cmple_epu32_mask(exists, _mm512_sub_epi32(x, low), last);
    _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(chosen, x));
    kept += __builtin_popcount(chosen);
  }
  return kept;
}

void keep(uint32_t key, int64_t num_ties, ScoreList& list) {
  const __m512i cut = _mm512_set1_epi32(static_cast<int>(key));
  const int64_t count = list.count;
  list.count = 0;  // never ahead of what was read
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 exists = first_lanes(count - i);
    const __m512i keys = _mm512_maskz_loadu_epi32(exists, list.keys + i);
    const __m512i indices = _mm512_maskz_loadu_epi32(exists, list.indices + i);
    uint32_t tied = num_ties > 0 ? _mm512_mask_cmpeq_epi32_mask(exists, keys, cut) : 0;
    while (__builtin_popcount(tied) > num_ties) tied &= ~(1u << (31 - __builtin_clz(tied)));
    num_ties -= __builtin_popcount(tied);
    const __mmask16 above = _mm512_mask_cmpgt_epu32_mask(exists, keys, cut);
    append(list, static_cast<__mmask16>(above | tied), keys, indices);
  }
}

constexpr TopKKernels kTopKKernels = {scan32,  scan16, order_keys, key_range,
                                      collect, keep,   mass_sum};

}  // namespace

const TopKKernels& avx512_topk_kernels() { return kTopKKernels; }

}  // namespace longctx::cpu
