// longctx_lanes --replay DIR: runs every case on the inputs of its file, compares the outputs.
// longctx_lanes --record DIR: writes the files.
//
// A file: a comment with the words that the case runs, then a line per thread: inputs | outputs, in
// hexadecimal words.
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "cases.h"

#ifndef LONGCTX_SIMT
namespace longctx::cuda {
cudaStream_t current_stream() { return nullptr; }
void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  }
}
}  // namespace longctx::cuda
#endif

namespace longctx::lanes {
namespace {

std::vector<Case> all_cases() {
  std::vector<Case> cases = thread_cases();
  for (const Case& lanes : matrix_cases()) cases.push_back(lanes);
#ifdef LONGCTX_SM90
#ifndef LONGCTX_SIMT
  int device = 0, major = 0;
  cuda::check("lanes", cudaGetDevice(&device));
  cuda::check("lanes", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major != 9) {
    std::printf("not a Hopper GPU: the words of device/hopper.cuh are left out\n");
    return cases;
  }
#endif
  for (const Case& lanes : hopper_cases()) cases.push_back(lanes);
#else
  std::printf("built without LONGCTX_SM90: the words of device/hopper.cuh are left out\n");
#endif
  return cases;
}

// 32-bit words that kernels and the host see.
class Words {
 public:
  explicit Words(size_t count) {
    const size_t bytes = (count + 1) * sizeof(uint32_t);
#ifdef LONGCTX_SIMT
    data_ = static_cast<uint32_t*>(aligned_alloc(256, (bytes + 255) / 256 * 256));
#else
    cuda::check("lanes", cudaMallocManaged(&data_, bytes));
#endif
    std::memset(data_, 0, bytes);
  }
  ~Words() {
#ifdef LONGCTX_SIMT
    free(data_);
#else
    cudaFree(data_);
#endif
  }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  uint32_t* data() const { return data_; }

 private:
  uint32_t* data_ = nullptr;
};

void run(const Case& lanes, const Words& in, const Words& out) {
  lanes.run(in.data(), out.data());
#ifndef LONGCTX_SIMT
  cuda::check(lanes.name, cudaDeviceSynchronize());
#endif
}

std::string path_of(const Case& lanes, const std::string& folder) {
  return folder + "/" + lanes.name + ".txt";
}

void record(const Case& lanes, const std::string& folder) {
  const Words in(lanes.threads * lanes.words_in), out(lanes.threads * lanes.words_out);
  Random random;
  for (int thread = 0; thread < lanes.threads; ++thread) {
    lanes.fill(random, thread, in.data() + thread * lanes.words_in);
  }
  if (lanes.expected != nullptr) {
    lanes.expected(in.data(), out.data());
  } else {
    run(lanes, in, out);
  }
  std::ofstream file(path_of(lanes, folder));
  file << "# " << lanes.words << std::hex << "\n";
  for (int thread = 0; thread < lanes.threads; ++thread) {
    for (int i = 0; i < lanes.words_in; ++i) file << in.data()[thread * lanes.words_in + i] << " ";
    file << "|";
    for (int i = 0; i < lanes.words_out; ++i) {
      file << " " << out.data()[thread * lanes.words_out + i];
    }
    file << "\n";
  }
  if (!file) throw std::runtime_error("cannot write " + path_of(lanes, folder));
}

bool matches(const Case& lanes, uint32_t expected, uint32_t got) {
  if (expected == got) return true;
  const float want = bits_as<float>(expected), have = bits_as<float>(got);
  return std::fabs(want - have) <= lanes.absolute + lanes.relative * std::fabs(want) &&
         lanes.absolute + lanes.relative > 0;
}

// The number of words that differ.
int replay(const Case& lanes, const std::string& folder) {
  const std::string path = path_of(lanes, folder);
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line) || line != std::string("# ") + lanes.words) {
    throw std::runtime_error(path + " does not begin with # " + lanes.words);
  }
  const Words in(lanes.threads * lanes.words_in), out(lanes.threads * lanes.words_out);
  std::vector<uint32_t> expected;
  for (int thread = 0; thread < lanes.threads; ++thread) {
    std::getline(file, line);
    std::istringstream words(line);
    std::string bar;
    uint32_t word = 0;
    words >> std::hex;
    for (int i = 0; i < lanes.words_in; ++i) words >> in.data()[thread * lanes.words_in + i];
    words >> bar;
    for (int i = 0; i < lanes.words_out && words >> word; ++i) expected.push_back(word);
    if (!words || bar != "|") throw std::runtime_error(path + ": bad line: " + line);
  }
  run(lanes, in, out);
  int differ = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (matches(lanes, expected[i], out.data()[i])) continue;
    if (differ++ == 0) {
      std::printf("%s: thread %zu, output %zu: expected %08x, got %08x\n", lanes.name,
                  i / lanes.words_out, i % lanes.words_out, expected[i], out.data()[i]);
    }
  }
  std::printf("%s: %zu words, %d differ\n", lanes.name, expected.size(), differ);
  return differ;
}

}  // namespace
}  // namespace longctx::lanes

int main(int argc, char** argv) {
  using namespace longctx::lanes;
  const std::string mode = argc == 3 ? argv[1] : "";
  if (mode != "--replay" && mode != "--record") {
    std::fprintf(stderr, "usage: %s --replay DIR | --record DIR\n", argv[0]);
    return 2;
  }
  try {
    int differ = 0;
    for (const Case& lanes : all_cases()) {
      if (mode == "--record") {
        record(lanes, argv[2]);
      } else {
        differ += replay(lanes, argv[2]);
      }
    }
    return differ == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
