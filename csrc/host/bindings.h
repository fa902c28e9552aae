// What the parts of longctx._host add to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace longctx::host {

void bind_page_file(pybind11::module_& m);
void bind_frame_table(pybind11::module_& m);

}  // namespace longctx::host
