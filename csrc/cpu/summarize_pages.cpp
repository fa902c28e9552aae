// Summaries of pages of keys: extremes (Quest), means, means of the keys with the highest scores
// (InfLLM), and means weighted by the softmax of a query of the page (LongHeads). A page is
// computed from its keys alone, in their order, so that an update gives the bits of a new start.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "dense_chunk.h"
#include "few_rows_run.h"
#include "kernels.h"
#include "key_rows.h"
#include "longctx/float_order.h"
#include "longctx/sequence.h"
#include "scratch.h"

namespace longctx::cpu {
namespace {

// The pages to be computed, numbered through.
class Pages {
 public:
  struct Page {
    int64_t batch, head, page;
  };

  explicit Pages(const SummarizePagesParams& p) : p_(p) {
    for (int64_t b = 0; b < p.seqs.batch; ++b) {
      int64_t first = 0, last = p.num_pages;
      if (p.update) {
        const int64_t start = std::max<int64_t>(p.starts == nullptr ? p.start : p.starts[b], 0);
        first = start / p.page_size;
        last = start >= used(b) ? first : (used(b) + p.page_size - 1) / p.page_size;
      }
      first_.push_back(first);
      ends_.push_back((ends_.empty() ? 0 : ends_.back()) + last - first);
    }
  }

  // Of one head of the summary in each batch entry.
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  Page at(int64_t index, int64_t head) const {
    const auto found = std::upper_bound(ends_.begin(), ends_.end(), index);
    const int64_t batch = found - ends_.begin();
    const int64_t before = batch == 0 ? 0 : ends_[static_cast<size_t>(batch - 1)];
    return {batch, head, first_[static_cast<size_t>(batch)] + index - before};
  }

  int64_t used(int64_t batch) const { return sequence_at(p_.seqs, batch).k_len; }

 private:
  const SummarizePagesParams& p_;
  std::vector<int64_t> first_, ends_;
};

// The keys of a page that exist, up to so many at a time.
class PageKeys {
 public:
  PageKeys() = default;
  PageKeys(const SummarizePagesParams& p, int64_t batch, int64_t kv_head, int64_t page,
           int64_t used)
      : p_(&p),
        begin_(std::min(page * p.page_size, used)),
        end_(std::min(begin_ + p.page_size, used)) {
    const bool in_pages = p.pages.page_table != nullptr;
    rows_ = row_address(p.k, element_bytes(p.dtype), in_pages ? 0 : batch, kv_head, 0);
    if (in_pages) table_ = p.pages.page_table + batch * p.pages.max_pages;
  }

  // Null where the page of the cache does not exist.
  const void* row(int64_t key) const {
    int64_t offset = key * p_->k.seq_stride;
    if (table_ != nullptr) {
      const int64_t page = table_[key / p_->pages.page_size];
      if (page < 0 || page >= p_->pages.num_pages) return nullptr;
      offset = page * p_->k.batch_stride + key % p_->pages.page_size * p_->k.seq_stride;
    }
    return rows_ + offset * element_bytes(p_->dtype);
  }

  // Appends at most `capacity` rows; 0 when none is left.
  int64_t next(int64_t capacity, const void** rows) {
    int64_t count = 0;
    for (; begin_ < end_ && count < capacity; ++begin_) {
      const void* found = row(begin_);
      if (found != nullptr) rows[count++] = found;
    }
    return count;
  }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

 private:
  const SummarizePagesParams* p_ = nullptr;
  int64_t begin_ = 0, end_ = 0;
  const char* rows_ = nullptr;
  const int32_t* table_ = nullptr;
};

char* summary_row(const SummarizePagesParams& p, const Pages::Page& page) {
  return const_cast<char*>(
      row_address(p.summary, element_bytes(p.dtype), page.batch, page.head, page.page));
}

PageKeys keys_of(const SummarizePagesParams& p, const Pages& pages, const Pages::Page& page) {
  return {p, page.batch, page.head * p.num_kv_heads / p.heads, page.page, pages.used(page.batch)};
}

template <class T>
class Summary {
 public:
  Summary(const SummarizePagesParams& params, const Pages& pages)
      : p_(params),
        pages_(pages),
        engine_(choose_key_rows(params.dtype, active_isa())),
        rows_(kListRows),
        low_(static_cast<size_t>(params.head_dim)),
        high_(static_cast<size_t>(params.head_dim)) {}

  void write(const Pages::Page& page) {
    PageKeys keys = keys_of(p_, pages_, page);
    char* to = summary_row(p_, page);
    switch (p_.method) {
      case SummaryMethod::kMinMax:
        return write_extremes(keys, to);
      case SummaryMethod::kRepresentative:
        return write_representative(page, keys, to);
      default:
        return write_mean(keys, to);
    }
  }

 private:
  void write_extremes(PageKeys& keys, char* to) {
    constexpr T kInf = std::numeric_limits<T>::infinity();
    std::fill(low_.begin(), low_.end(), kInf);
    std::fill(high_.begin(), high_.end(), -kInf);
    while (const int64_t count = keys.next(kListRows, rows_.data())) {
      engine_.extremes(rows_.data(), count, p_.head_dim, low_.data(), high_.data());
    }
    engine_.round_row(low_.data(), p_.head_dim, 1, to);
    engine_.round_row(high_.data(), p_.head_dim, 1, to + p_.head_dim * element_bytes(p_.dtype));
  }

  void write_mean(PageKeys& keys, char* to) {
    int64_t total = 0;
    std::fill(low_.begin(), low_.end(), T(0));
    while (const int64_t count = keys.next(kListRows, rows_.data())) {
      add(count, &total);
    }
    engine_.round_row(low_.data(), p_.head_dim, std::max<int64_t>(total, 1), to);
  }

  void write_representative(const Pages::Page& page, const PageKeys& keys, char* to) {
    const float* scores = p_.key_scores.row(page.batch, page.head, 0);
    const FloatFormat format = float_format(DType::kFloat32);
    best_.clear();
    for (int64_t key = keys.begin(); key < keys.end(); ++key) {
      uint32_t bits;
      std::memcpy(&bits, scores + key, sizeof(bits));
      if (keys.row(key) != nullptr) best_.push_back({order_key(bits, format), key});
    }
    const size_t kept =
        std::min(best_.size(), static_cast<size_t>(std::min(p_.num_representative, p_.page_size)));
    const auto end = best_.begin() + static_cast<std::ptrdiff_t>(kept);
    std::nth_element(best_.begin(), end, best_.end(), [](const Best& a, const Best& b) {
      return a.order != b.order ? a.order > b.order : a.key < b.key;
    });
    std::sort(best_.begin(), end, [](const Best& a, const Best& b) { return a.key < b.key; });
    int64_t total = 0;
    std::fill(low_.begin(), low_.end(), T(0));
    while (total < static_cast<int64_t>(kept)) {
      const int64_t count = std::min(kListRows, static_cast<int64_t>(kept) - total);
      for (int64_t i = 0; i < count; ++i) {
        rows_[static_cast<size_t>(i)] = keys.row(best_[static_cast<size_t>(total + i)].key);
      }
      add(count, &total);
    }
    engine_.round_row(low_.data(), p_.head_dim, std::max<int64_t>(total, 1), to);
  }

  void add(int64_t count, int64_t* total) {
    engine_.add_rows(rows_.data(), count, p_.head_dim, low_.data());
    *total += count;
  }

  struct Best {
    uint32_t order;
    int64_t key;
  };

  const SummarizePagesParams& p_;
  const Pages& pages_;
  const KeyRowsEngine& engine_;
  std::vector<const void*> rows_;
  std::vector<T> low_, high_;  // [head_dim]
  std::vector<Best> best_;
};

// Attention of a page's queries over its keys, which are their own values. A unit is a page of a kv
// head; the heads of the summary that read it are its rows.
class PooledSource : public FewRowsSource {
 public:
  class Keys {
   public:
    Keys() = default;
    explicit Keys(const PageKeys& keys) : keys_(keys) {}
    bool next(KeyList* list) {
      list->has_bias = false;
      list->count = keys_.next(kListKeys, list->k_rows);
      std::copy(list->k_rows, list->k_rows + list->count, list->v_rows);
      return list->count > 0;
    }

   private:
    PageKeys keys_;
  };

  PooledSource(const SummarizePagesParams& params, const Pages& pages) : p_(params), pages_(pages) {
    job_.shape.dtype = p_.dtype;
    job_.shape.head_dim = job_.shape.head_dim_v = p_.head_dim;
    job_.shape.softmax_scale = p_.softmax_scale;
    job_.num_units = pages.count() * p_.num_kv_heads;
    job_.heads = p_.heads / p_.num_kv_heads;
    lse_.reset(new double[static_cast<size_t>(job_.num_units * job_.heads)]);
  }
  const FewRowsJob& job() const { return job_; }

  Keys keys(int64_t unit, int64_t) const { return Keys(keys_of(p_, pages_, page(unit, 0))); }
  const void* query(int64_t unit, int64_t row) const {
    const Pages::Page of = page(unit, row);
    return row_address(p_.queries, element_bytes(p_.dtype), of.batch, of.head, of.page);
  }
  FewRowsOutput output(int64_t unit, int64_t row) const {
    return {summary_row(p_, page(unit, row)), lse_.get() + unit * job_.heads + row};
  }

 private:
  Pages::Page page(int64_t unit, int64_t row) const {
    return pages_.at(unit / p_.num_kv_heads, unit % p_.num_kv_heads * job_.heads + row);
  }

  const SummarizePagesParams& p_;
  const Pages& pages_;
  FewRowsJob job_;
  std::unique_ptr<double[]> lse_;  // what attention returns beside; not wanted
};

template <class T>
void run_as(const SummarizePagesParams& p, const Pages& pages) {
  constexpr int64_t kPagesPerItem = 32;
  const int64_t items = (pages.count() + kPagesPerItem - 1) / kPagesPerItem;
  for_each_item(
      items * p.heads, [&] { return Summary<T>(p, pages); },
      [&](int64_t item, Summary<T>& summary) {
        const int64_t first = item % items * kPagesPerItem;
        for (int64_t i = first; i < std::min(first + kPagesPerItem, pages.count()); ++i) {
          summary.write(pages.at(i, item / items));
        }
      });
}

}  // namespace

void run_summarize_pages_cpu(const SummarizePagesParams& p) {
  if (!p.update) {  // a new, contiguous tensor
    const int64_t bytes = p.seqs.batch * p.summary.batch_stride * element_bytes(p.dtype);
    prefer_huge_pages(p.summary.data, static_cast<size_t>(bytes));
  }
  const Pages pages(p);
  if (p.method == SummaryMethod::kPooled) {
    const PooledSource source(p, pages);
    return run_few_rows(source.job(), source);
  }
  if (p.dtype == DType::kFloat64) return run_as<double>(p, pages);
  run_as<float>(p, pages);
}

}  // namespace longctx::cpu
