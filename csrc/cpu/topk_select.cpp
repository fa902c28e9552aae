// The k best scores of each row, as ascending indices. Rows are shared out to threads; where they
// are fewer, pieces of rows, whose lists are then joined.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "longctx/score_rows.h"
#include "parallel.h"
#include "row_selector.h"
#include "write_chosen.h"

namespace longctx::cpu {
namespace {

constexpr int64_t kMinPiece = 1 << 16;  // scores: below, the second pass over lists costs too much

template <class Bits>
class TopKSelect {
 public:
  explicit TopKSelect(const TopKSelectParams& params) : p_(params) {}

  void run() const {
    const int64_t threads = thread_pool().num_threads();
    int64_t pieces = 1;
    if (threads > 1 && p_.scores.num_rows < 4 * threads && p_.scores.num_rows > 0) {
      pieces = (2 * threads + p_.scores.num_rows - 1) / p_.scores.num_rows;
    }
    pieces = std::max<int64_t>(1, std::min(pieces, p_.scores.n / kMinPiece));
    pieces == 1 ? run_rows() : run_pieces(pieces);
  }

 private:
  RowSelector<Bits> selector() const {
    return {choose_topk_kernels(active_isa()), float_format(p_.scores.dtype), p_.scores.n, p_.k};
  }

  const Bits* scores(int64_t row) const {
    return static_cast<const Bits*>(p_.scores.data) + row_offset(p_.scores, row);
  }

  RowParts parts(int64_t row) const {
    return row_parts(row_length(p_.scores, row), p_.num_first, p_.num_last, p_.k);
  }

  static bool competes(const RowParts& parts) {
    return parts.places > 0 && parts.places < parts.last - parts.first;
  }

  void run_rows() const {
    for_each_item(
        p_.scores.num_rows, [&] { return selector(); },
        [&](int64_t row, RowSelector<Bits>& selector) {
          const RowParts r = parts(row);
          if (!competes(r)) return write(row, r, nullptr);
          write(row, r, &selector.best(scores(row), r.first, r.last, r.places, 0));
        });
  }

  struct Piece {
    std::vector<uint32_t> keys;
    std::vector<int32_t> indices;
  };

  void run_pieces(int64_t num_pieces) const {
    std::vector<uint32_t> bounds(static_cast<size_t>(p_.scores.num_rows));
    const auto make = [&] { return selector(); };
    for_each_item(p_.scores.num_rows, make, [&](int64_t row, RowSelector<Bits>& selector) {
      const RowParts r = parts(row);
      if (!competes(r)) return write(row, r, nullptr);
      bounds[static_cast<size_t>(row)] =
          selector.sample_bound(scores(row), r.first, r.last, r.places);
    });

    std::vector<Piece> lists(static_cast<size_t>(p_.scores.num_rows * num_pieces));
    for_each_item(p_.scores.num_rows * num_pieces, make,
                  [&](int64_t item, RowSelector<Bits>& selector) {
                    const int64_t row = item / num_pieces, piece = item % num_pieces;
                    const RowParts r = parts(row);
                    if (!competes(r)) return;
                    const int64_t size = r.last - r.first;
                    const ScoreList& list =
                        selector.best_above(scores(row), r.first + piece * size / num_pieces,
                                            r.first + (piece + 1) * size / num_pieces, r.places,
                                            bounds[static_cast<size_t>(row)]);
                    Piece& kept = lists[static_cast<size_t>(item)];
                    kept.keys.assign(list.keys, list.keys + list.count);
                    kept.indices.assign(list.indices, list.indices + list.count);
                  });

    for_each_item(p_.scores.num_rows, make, [&](int64_t row, RowSelector<Bits>& selector) {
      const RowParts r = parts(row);
      if (!competes(r)) return;
      selector.start();
      for (int64_t piece = 0; piece < num_pieces; ++piece) {
        const Piece& list = lists[static_cast<size_t>(row * num_pieces + piece)];
        selector.append(list.keys.data(), list.indices.data(),
                        static_cast<int64_t>(list.keys.size()), r.places);
      }
      const ScoreList* best = &selector.finish(r.places);
      if (best->count < r.places) {  // the sample misled
        best = &selector.best_above(scores(row), r.first, r.last, r.places, 0);
      }
      write(row, r, best);
    });
  }

  // `list` null: everything that competes is chosen, or nothing.
  void write(int64_t row, const RowParts& r, const ScoreList* list) const {
    write_chosen(p_, row, r, list);
  }

  const TopKSelectParams& p_;
};

}  // namespace

void run_topk_select_cpu(const TopKSelectParams& p) {
  if (p.scores.dtype == DType::kFloat32) return TopKSelect<uint32_t>(p).run();
  TopKSelect<uint16_t>(p).run();
}

}  // namespace longctx::cpu
