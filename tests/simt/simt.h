// Host SIMT: runs CUDA kernels on the CPU. Every CUDA thread is a fiber of one OS thread; it runs
// until it waits in a barrier or a warp collective. The SIMT branches of csrc/device are written in
// these words.
#pragma once
#include <math.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>

namespace simt {

constexpr int kWarpSize = 32;
// Shared memory of a block, on consumer cards and on Hopper.
constexpr int64_t kMaxSharedBytes = 99 * 1024;
constexpr int64_t kHopperSharedBytes = 227 * 1024;

// In which order threads and blocks run, and when the asynchronous copies that nobody has waited
// for yet become visible. Read at every launch.
enum class Schedule {
  kRoundRobin,    // lanes and blocks in ascending order, one step each
  kWarpRunAhead,  // a warp runs until it has to wait; lanes, warps and blocks in descending order
  kRandom,        // bursts of random lengths of random warps
};
enum class Landing { kEarly, kLate, kRandom };  // at issue, in the wait, somewhere between
struct Mode {
  Schedule schedule = Schedule::kRoundRobin;
  Landing landing = Landing::kLate;
  uint64_t seed = 0;
  bool hopper = false;  // the device is of compute capability 9.0
};
extern Mode mode;

// The thread that runs now.
struct Thread {
  int index = 0;
  int num_threads = 0;
  int64_t block_x = 0;
  int64_t block_y = 0;
  char* shared_memory = nullptr;  // exactly as long as the launch asked for, filled with NaN
};
extern Thread running;

// Of this process, so far.
extern int64_t num_launches;

// Runs body() as every thread of the grid; threads are a multiple of 32. Throws std::runtime_error
// with one message where the kernel hangs, diverges or breaks another rule below.
void run_grid(const char* op, unsigned grid_x, unsigned grid_y, int num_threads,
              int64_t shared_bytes, const std::function<void()>& body);

// A line of a kernel, for messages: the default argument of what a kernel calls.
struct Where {
  const char* file;
  int line;
};
constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// Barrier `id` of `threads` threads. All must come from the same line.
void sync_block(const char* name, int id, int threads, Where where);

// A whole-warp collective: every lane passes its operand, and the last to come runs
// execute(operands), which turns the 32 operands into the 32 results. All must come from the same
// line. Orders memory between the lanes only if `orders_memory`.
constexpr size_t kMaxOperandBytes = 64;
void* join_warp(const char* name, const void* operand, size_t bytes, bool orders_memory,
                Where where);  // the operands of the warp in its last lane, else null
void leave_warp();             // by that last lane, after it has executed
void take_result(void* result, size_t bytes);

template <class Lane, class Execute>
Lane warp_op(const char* name, Lane lane, Execute execute, Where where,
             bool orders_memory = false) {
  static_assert(std::is_trivially_copyable_v<Lane> && sizeof(Lane) <= kMaxOperandBytes);
  if (void* lanes = join_warp(name, &lane, sizeof(Lane), orders_memory, where)) {
    execute(static_cast<Lane*>(lanes));
    leave_warp();
  }
  take_result(&lane, sizeof(Lane));
  return lane;
}

// Fails unless [shared, shared + bytes) lies inside the block's shared memory, aligned to `bytes`.
void check_shared(const char* name, const void* shared, int bytes, Where where);

// Asynchronous copies of the running thread, as cp.async.
void issue_copy(void* shared, const void* global, int bytes, Where where);
void commit_copies();
void wait_copies(int pending);

// ---- for units that run beside the threads (hopper.h) ----

int64_t shared_offset(const void* shared);
char* shared_at(int64_t offset);
// Where the 128-byte swizzle puts the byte at `offset`.
constexpr int64_t swizzled(int64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Lets the other threads run; the running one waits for nothing.
void preempt();
// Until some thread or background work calls wake(key).
void wait_for_wake(const char* name, const void* key, Where where);
void wake(const void* key);
// Work in order of issue: at once, when no thread can run without it, or somewhere between.
void in_background(std::function<void()> work);
// Of work that a thread waits for: whether it is done when it is issued.
bool lands_at_issue();

// Whether ThreadSanitizer looks at the running block.
bool seen_by_tsan();

// State that lives as long as the running block; one type of it.
struct BlockExtension {
  virtual ~BlockExtension() = default;
  virtual std::string unfinished() const = 0;  // when the block ends: a message, or nothing
};
std::unique_ptr<BlockExtension>& block_extension();
template <class T>
T& extension() {
  if (block_extension() == nullptr) block_extension() = std::make_unique<T>();
  return static_cast<T&>(*block_extension());
}

}  // namespace simt
