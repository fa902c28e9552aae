#include "arrays.h"
#include "bindings.h"
#include "frame_table.h"

namespace py = pybind11;

namespace longctx::host {
namespace {

// int32 [num_lanes, capacity]: a view, which keeps its memory alive and shows later changes until
// the table outgrows it.
py::array_t<int32_t> view(const FrameTable& frames) {
  auto table = frames.table();
  const auto lanes = static_cast<py::ssize_t>(frames.num_lanes());
  const auto capacity = static_cast<py::ssize_t>(table->size()) / lanes;
  int32_t* data = table->data();
  const py::capsule owner(new std::shared_ptr<std::vector<int32_t>>(std::move(table)), [](void* p) {
    delete static_cast<std::shared_ptr<std::vector<int32_t>>*>(p);
  });
  return py::array_t<int32_t>({lanes, capacity}, data, owner);
}

py::dict stats(const FrameTable& frames) {
  const FrameStats counts = frames.stats();
  py::dict result;
  result["hits"] = counts.hits;
  result["misses"] = counts.misses;
  result["evictions"] = counts.evictions;
  result["read_ahead"] = counts.read_ahead;
  result["read_ahead_hits"] = counts.read_ahead_hits;
  result["read_ahead_unused"] = counts.read_ahead_unused;
  return result;
}

}  // namespace

void bind_frame_table(py::module_& m) {
  py::register_exception<NoFrameError>(m, "NoFrameError", PyExc_RuntimeError);
  py::class_<FrameTable>(m, "FrameTable",
                         "Pages in a bounded pool of frames: see csrc/host/frame_table.h.")
      .def(py::init<int64_t, int64_t>(), py::arg("num_frames"), py::arg("num_lanes"))
      .def_property_readonly("num_frames", &FrameTable::num_frames)
      .def_property_readonly("num_used", &FrameTable::num_used)
      .def_property_readonly("num_available", &FrameTable::num_available)
      .def_property_readonly("clock", &FrameTable::clock)
      .def_property_readonly("table", &view)
      .def_property_readonly("stats", &stats)
      .def("reset_stats", &FrameTable::reset_stats)
      .def("acquire",
           [](FrameTable& frames, const Int64Array& lanes, const Int64Array& pages) {
             std::vector<int32_t> taken;
             std::vector<char> loads;
             frames.acquire(page_ids(lanes, pages), &taken, &loads);
             py::array_t<bool> flags(static_cast<py::ssize_t>(loads.size()));
             std::copy(loads.begin(), loads.end(), flags.mutable_data());
             return py::make_tuple(to_array(taken), flags);
           })
      .def("acquire_ahead",
           [](FrameTable& frames, const Int64Array& lanes, const Int64Array& pages, int64_t since) {
             std::vector<int32_t> taken;
             frames.acquire_ahead(page_ids(lanes, pages), since, &taken);
             return to_array(taken);
           })
      .def("place",
           [](FrameTable& frames, const Int64Array& lanes, const Int64Array& pages) {
             std::vector<int32_t> taken;
             frames.place(page_ids(lanes, pages), &taken);
             return to_array(taken);
           })
      .def("loaded", [](FrameTable& frames,
                        const Int32Array& which) { frames.loaded(to_vector<int32_t>(which)); })
      .def("abandon", [](FrameTable& frames,
                         const Int32Array& which) { frames.abandon(to_vector<int32_t>(which)); })
      .def("release", [](FrameTable& frames,
                         const Int32Array& which) { frames.release(to_vector<int32_t>(which)); })
      .def("wait_loaded",
           [](FrameTable& frames, const Int64Array& lanes, const Int64Array& pages,
              const Int32Array& which) {
             const auto ids = page_ids(lanes, pages);
             const auto waited = to_vector<int32_t>(which);
             const py::gil_scoped_release release;
             return frames.wait_loaded(ids, waited);
           })
      .def("set_backed", [](FrameTable& frames, const Int64Array& lanes, const Int64Array& pages,
                            bool backed) { frames.set_backed(page_ids(lanes, pages), backed); })
      .def("set_pinned", &FrameTable::set_pinned, py::arg("lane"), py::arg("begin"), py::arg("end"),
           py::arg("pinned"))
      .def("drop", &FrameTable::drop, py::arg("lane"), py::arg("begin"))
      .def("share", &FrameTable::share, py::arg("lane"), py::arg("source"), py::arg("num_pages"))
      .def_property_readonly("eviction_order", [](const FrameTable& frames) {
        py::list order;
        for (const PageId& id : frames.eviction_order())
          order.append(py::make_tuple(id.lane, id.page));
        return order;
      });
}

}  // namespace longctx::host
