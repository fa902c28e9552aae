// Arguments of the ops that read selected keys, checked once.
#pragma once
#include "checks.h"

namespace longctx {

constexpr int64_t kMaxBlock = int64_t{1} << 20;  // keys; positions stay far from overflow

// The keys of k in pages; returns how many a batch entry has room for. `first` is the tensor whose
// device they share; batch may be kAnySize.
inline int64_t fill_pages(const Checker& check, const Tensor& first, int64_t batch, const Tensor& k,
                          const Tensor& page_table, PagesParams& pages) {
  check.same_device("page_table", page_table, first);
  check.dtype("page_table", page_table, ScalarType::Int);
  check.shape("page_table", page_table, "[batch, max_pages]", {batch, kAnySize});
  check.contiguous("page_table", page_table);
  check.require(k.size(2) > 0, "k", "have a page_size of at least 1", k.sizes());
  pages = {page_table.const_data_ptr<int32_t>(), page_table.size(1), k.size(0), k.size(2)};
  return pages.max_pages * pages.page_size;
}

// One row for all tokens where dim 2 has size 1.
template <class T>
RowsView<T> rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1),
          tensor.size(2) == 1 ? 0 : tensor.stride(2)};
}

}  // namespace longctx
