// numpy arrays at the border to Python: pages come as two int64 arrays, frames as one int32 array.
#pragma once
#include <pybind11/numpy.h>

#include <cstdint>
#include <string>
#include <vector>

#include "page_format.h"

namespace longctx::host {

using Int64Array =
    pybind11::array_t<int64_t, pybind11::array::c_style | pybind11::array::forcecast>;
using Int32Array =
    pybind11::array_t<int32_t, pybind11::array::c_style | pybind11::array::forcecast>;

inline std::vector<PageId> page_ids(const Int64Array& lanes, const Int64Array& pages) {
  if (lanes.ndim() != 1 || pages.ndim() != 1 || lanes.size() != pages.size()) {
    throw pybind11::value_error("longctx: `lanes` and `pages` must be vectors of one length");
  }
  std::vector<PageId> ids(static_cast<size_t>(lanes.size()));
  for (pybind11::ssize_t i = 0; i < lanes.size(); ++i) ids[i] = {lanes.at(i), pages.at(i)};
  return ids;
}

template <class T, class Array>
std::vector<T> to_vector(const Array& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <class T>
pybind11::array_t<T> to_array(const std::vector<T>& values) {
  return pybind11::array_t<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

}  // namespace longctx::host
