#include <cstring>

#include "arrays.h"
#include "bindings.h"
#include "checksum.h"
#include "page_file.h"

namespace py = pybind11;

namespace longctx::host {
namespace {

using Buffer = py::array_t<uint8_t, py::array::c_style>;

PageGeometry geometry_from(const py::dict& fields) {
  PageGeometry geometry{};
  const auto size = [&fields](const char* name) { return fields[name].cast<int64_t>(); };
  geometry.num_layers = size("num_layers");
  geometry.batch = size("batch");
  geometry.num_kv_heads = size("num_kv_heads");
  geometry.page_size = size("page_size");
  geometry.head_dim = size("head_dim");
  geometry.head_dim_v = size("head_dim_v");
  geometry.element_bytes = size("element_bytes");
  const auto dtype = fields["dtype"].cast<std::string>();
  if (dtype.size() >= sizeof(geometry.dtype)) throw py::value_error("longctx: no dtype " + dtype);
  std::memcpy(geometry.dtype, dtype.data(), dtype.size());
  return geometry;
}

py::dict geometry_to(const PageGeometry& geometry) {
  py::dict fields;
  fields["num_layers"] = geometry.num_layers;
  fields["batch"] = geometry.batch;
  fields["num_kv_heads"] = geometry.num_kv_heads;
  fields["page_size"] = geometry.page_size;
  fields["head_dim"] = geometry.head_dim;
  fields["head_dim_v"] = geometry.head_dim_v;
  fields["element_bytes"] = geometry.element_bytes;
  fields["dtype"] = std::string(geometry.dtype);
  return fields;
}

// The address of each of `rows` in `buffer` [num_rows, page_bytes].
template <class Pointer, class Data>
std::vector<Pointer> addresses(Data* data, const Buffer& buffer, const PageFile& file,
                               const Int32Array& rows, size_t count) {
  const int64_t bytes = file.geometry().page_bytes();
  if (buffer.ndim() != 2 || buffer.shape(1) != bytes) {
    throw py::value_error("longctx: `buffer` must have shape [rows, " + std::to_string(bytes) +
                          "]");
  }
  if (rows.ndim() != 1 || static_cast<size_t>(rows.size()) != count) {
    throw py::value_error("longctx: `rows` must have an entry for each page");
  }
  std::vector<Pointer> result(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t row = rows.at(static_cast<py::ssize_t>(i));
    if (row < 0 || row >= buffer.shape(0)) {
      throw py::value_error("longctx: `buffer` has no row " + std::to_string(row));
    }
    result[i] = data + row * bytes;
  }
  return result;
}

void append(PageFile& file, const Int64Array& lanes, const Int64Array& pages,
            const Int64Array& num_tokens, const Buffer& buffer, const Int32Array& rows) {
  const std::vector<PageId> ids = page_ids(lanes, pages);
  const auto from = addresses<const void*>(buffer.data(), buffer, file, rows, ids.size());
  if (static_cast<size_t>(num_tokens.size()) != ids.size()) {
    throw py::value_error("longctx: `num_tokens` must have an entry for each page");
  }
  const auto tokens = to_vector<int64_t>(num_tokens);
  const py::gil_scoped_release release;
  file.append(ids, tokens, from);
}

void read(PageFile& file, const Int64Array& lanes, const Int64Array& pages, Buffer& buffer,
          const Int32Array& rows) {
  const std::vector<PageId> ids = page_ids(lanes, pages);
  const auto to = addresses<void*>(buffer.mutable_data(), buffer, file, rows, ids.size());
  const py::gil_scoped_release release;
  file.read(ids, to);
}

}  // namespace

void bind_page_file(py::module_& m) {
  py::register_exception<PageFileError>(m, "PageFileError", PyExc_RuntimeError);
  m.def(
      "crc32c",
      [](const py::bytes& data) {
        const std::string bytes = data;
        return py::make_tuple(crc32c(bytes.data(), bytes.size()),
                              crc32c_generic(bytes.data(), bytes.size()));
      },
      "CRC32C as this machine computes it, and by the generic code.");

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PageFile>(m, "PageFile", "Fixed-size pages on disk: see csrc/host/page_file.h.")
      .def_static(
          "create",
          [](const std::string& path, const py::dict& geometry, bool overwrite, bool direct,
             int num_threads) {
            return PageFile::create(path, geometry_from(geometry), overwrite, direct, num_threads);
          },
          py::arg("path"), py::arg("geometry"), py::kw_only(), py::arg("overwrite") = false,
          py::arg("direct") = false, py::arg("num_threads") = 16)
      .def_static("open", &PageFile::open, Release(), py::arg("path"), py::kw_only(),
                  py::arg("writable") = false, py::arg("direct") = false,
                  py::arg("num_threads") = 16)
      .def_property_readonly("geometry",
                             [](const PageFile& f) { return geometry_to(f.geometry()); })
      .def_property_readonly("path", &PageFile::path)
      .def_property_readonly("writable", &PageFile::writable)
      .def_property_readonly("page_bytes",
                             [](const PageFile& f) { return f.geometry().page_bytes(); })
      .def_property_readonly("bytes_read", &PageFile::bytes_read)
      .def_property_readonly("bytes_written", &PageFile::bytes_written)
      .def("num_pages", &PageFile::num_pages, py::arg("lane"))
      .def("num_tokens", &PageFile::num_tokens, py::arg("lane"))
      .def("append", &append, py::arg("lanes"), py::arg("pages"), py::arg("num_tokens"),
           py::arg("buffer").noconvert(), py::arg("rows"))
      .def("read", &read, py::arg("lanes"), py::arg("pages"), py::arg("buffer").noconvert(),
           py::arg("rows"))
      .def("share", &PageFile::share, Release(), py::arg("lane"), py::arg("source"),
           py::arg("num_pages"))
      .def("num_shared", &PageFile::num_shared, py::arg("lane"), py::arg("other"))
      .def("commit", &PageFile::commit, Release(), py::arg("sync") = false)
      .def("mark", &PageFile::mark, Release())
      .def("rollback", &PageFile::rollback, Release(), py::arg("mark") = -1)
      .def("refresh",
           [](PageFile& file) {
             const py::gil_scoped_release release;
             std::vector<int64_t> changed = file.refresh();
             const py::gil_scoped_acquire acquire;
             return to_array(changed);
           })
      .def("verify", &PageFile::verify, Release())
      .def("close_in_child", &PageFile::close_in_child);
}

}  // namespace longctx::host
