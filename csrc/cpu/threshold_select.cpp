// As many scores of each row as a rule asks for, at most k: first the k best of those that may be
// chosen at all, as in topk_select, then, for the cumulative rule, the sum of the row's softmax
// weights and the cut where the best of them reach their share of it.
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "longctx/logit_mass.h"
#include "longctx/score_order.h"
#include "longctx/score_rows.h"
#include "parallel.h"
#include "reduced_float.h"
#include "row_selector.h"
#include "write_chosen.h"

namespace longctx::cpu {
namespace {

// T is the dtype, Bits holds its bits.
template <class T, class Bits>
class ThresholdSelect {
 public:
  explicit ThresholdSelect(const ThresholdSelectParams& params)
      : p_(params),
        format_(float_format(params.scores.dtype)),
        kernels_(choose_topk_kernels(active_isa())) {}

  void run() const {
    const uint32_t floor = p_.cumulative ? lowest() + 1 : threshold_key();
    for_each_item(
        p_.scores.num_rows, [&] { return RowSelector<Bits>(kernels_, format_, p_.scores.n, p_.k); },
        [&](int64_t row, RowSelector<Bits>& selector) {
          const int64_t length = row_length(p_.scores, row);
          const RowParts parts = row_parts(length, p_.num_first, p_.num_last, p_.k);
          if (parts.places == 0) return write_chosen(p_, row, parts, nullptr);
          const T* scores = static_cast<const T*>(p_.scores.data) + row_offset(p_.scores, row);
          const ScoreList* list = &selector.best(reinterpret_cast<const Bits*>(scores), parts.first,
                                                 parts.last, parts.places, floor);
          if (p_.cumulative) list = &share(selector, *list, scores, parts);
          write_chosen(p_, row, parts, list);
        });
  }

 private:
  uint32_t lowest() const { return format_.sign - 1 - format_.infinity; }  // the key of -inf

  float score_of(uint32_t key) const {
    const uint32_t bits = key_bits(key, format_);
    T score;
    const Bits narrow_bits = static_cast<Bits>(bits);
    std::memcpy(&score, &narrow_bits, sizeof(score));
    return widen(score);
  }

  // The lowest key whose score is at least `value`.
  uint32_t threshold_key() const {
    uint32_t low = lowest(), high = infinity_key(format_);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      score_of(middle) >= p_.value ? high = middle : low = middle + 1;
    }
    return low;
  }

  // Cuts the list of the best to those that hold the share `value` of the row.
  const ScoreList& share(RowSelector<Bits>& selector, const ScoreList& list, const T* scores,
                         const RowParts& parts) const {
    float best = -__builtin_huge_valf();
    if (list.count > 0) best = score_of(kernels_.key_range(list.keys, list.count).high);
    const auto look_at = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) best = std::max(best, widen(scores[i]));  // not NaN
    };
    look_at(0, parts.first);
    look_at(parts.last, parts.length);
    const int shift = logit_mass_shift(parts.length);
    const auto mass = [&](int64_t begin, int64_t end) {
      return kernels_.mass_sum(p_.scores.dtype, scores + begin, end - begin, best, shift);
    };
    const int64_t forced = mass(0, parts.first) + mass(parts.last, parts.length);
    const int64_t total = forced + mass(parts.first, parts.last);
    const int64_t wanted = mass_target(p_.value, total) - forced;
    if (list.count == 0) return list;
    if (wanted <= 0) return selector.none();
    return selector.reach(wanted,
                          [&](uint32_t key) { return logit_mass(score_of(key), best, shift); });
  }

  const ThresholdSelectParams& p_;
  FloatFormat format_;
  const TopKKernels& kernels_;
};

}  // namespace

void run_threshold_select_cpu(const ThresholdSelectParams& p) {
  switch (p.scores.dtype) {
    case DType::kBFloat16:
      return ThresholdSelect<BFloat16, uint16_t>(p).run();
    case DType::kFloat16:
      return ThresholdSelect<Float16, uint16_t>(p).run();
    default:
      return ThresholdSelect<float, uint32_t>(p).run();
  }
}

}  // namespace longctx::cpu
