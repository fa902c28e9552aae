// longctx._host: facts about this machine, and the page store's disk and its frames. No op depends
// on it.
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace {

std::string cpu_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

py::dict host_info() {
  py::dict info;
  info["cpu_model"] = cpu_model();
  info["num_cpus"] = sysconf(_SC_NPROCESSORS_ONLN);
  info["l1d_bytes"] = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  info["l2_bytes"] = sysconf(_SC_LEVEL2_CACHE_SIZE);
  info["memory_bytes"] = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE);
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the machine; pages of a KV store on disk and in memory.";
  m.def("host_info", &host_info,
        "CPU model, number of CPUs, and cache and memory sizes in bytes (0 where unknown).");
  longctx::host::bind_page_file(m);
  longctx::host::bind_frame_table(m);
}
