// longctx_lanes --replay DIR [--after NAME]: runs every case, or those behind one, on the inputs of
// its file, compares the outputs.
// longctx_lanes --record DIR: writes the files.
//
// A file: a comment with the words that the case runs, then a line per thread: inputs | outputs, in
// hexadecimal words.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
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

using Words = std::vector<uint32_t>;

#ifdef LONGCTX_SIMT

void run(const Case& lanes, const Words& in, Words& out) {
  // Aligned as the GPU's memory is.
  const auto aligned = [](const Words& words) {
    const size_t bytes = words.size() * sizeof(uint32_t);
    auto* data = static_cast<uint32_t*>(aligned_alloc(256, (bytes + 256) / 256 * 256));
    std::copy(words.begin(), words.end(), data);
    return std::unique_ptr<uint32_t, decltype(&free)>(data, &free);
  };
  const auto in_copy = aligned(in), out_copy = aligned(out);
  lanes.run(in_copy.get(), out_copy.get());
  std::copy(out_copy.get(), out_copy.get() + out.size(), out.begin());
}

#else

void run(const Case& lanes, const Words& in, Words& out) {
  const size_t bytes_in = in.size() * sizeof(uint32_t), bytes_out = out.size() * sizeof(uint32_t);
  uint32_t *device_in = nullptr, *device_out = nullptr;
  cuda::check(lanes.name, cudaMalloc(&device_in, bytes_in + sizeof(uint32_t)));
  cuda::check(lanes.name, cudaMalloc(&device_out, bytes_out + sizeof(uint32_t)));
  cuda::check(lanes.name, cudaMemcpy(device_in, in.data(), bytes_in, cudaMemcpyHostToDevice));
  cuda::check(lanes.name, cudaMemset(device_out, 0, bytes_out));
  lanes.run(device_in, device_out);
  cuda::check(lanes.name, cudaMemcpy(out.data(), device_out, bytes_out, cudaMemcpyDeviceToHost));
  cuda::check(lanes.name, cudaFree(device_in));
  cuda::check(lanes.name, cudaFree(device_out));
}

#endif

std::string path_of(const Case& lanes, const std::string& folder) {
  return folder + "/" + lanes.name + ".txt";
}

void record(const Case& lanes, const std::string& folder) {
  Words in(lanes.threads * lanes.words_in), out(lanes.threads * lanes.words_out);
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
  Words in(lanes.threads * lanes.words_in), out(lanes.threads * lanes.words_out);
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
  const std::string mode = argc >= 3 ? argv[1] : "";
  const bool resumes = argc == 5 && mode == "--replay" && std::string(argv[3]) == "--after";
  if ((mode != "--replay" && mode != "--record") || (argc != 3 && !resumes)) {
    std::fprintf(stderr, "usage: %s --replay DIR [--after NAME] | --record DIR\n", argv[0]);
    return 2;
  }
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a case that hangs has been announced
  bool skip = resumes;
  int differ = 0;
  try {
    for (const Case& lanes : all_cases()) {
      if (skip) {
        skip = lanes.name != std::string(argv[4]);
        continue;
      }
      if (mode == "--record") {
        record(lanes, argv[2]);
        continue;
      }
      std::printf("case %s\n", lanes.name);
      differ += replay(lanes, argv[2]);
    }
  } catch (const std::exception& error) {  // after an error of the GPU nothing more runs on it
    std::fprintf(stderr, "%s\n", error.what());
    return 3;
  }
  return differ == 0 ? 0 : 1;
}
