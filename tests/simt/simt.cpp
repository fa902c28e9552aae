#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "copies.h"
#include "fiber.h"

namespace simt {

Mode mode;
Thread running;
int64_t num_launches = 0;

namespace {

constexpr int kNumBarriers = 16;

// Orders the memory of those who arrive before that of those who have left. Two addresses, because
// the first may arrive for the next time before the last has left.
class Rendezvous {
 public:
  // To be acquired by the arrived before they go on.
  void* arrive() {
    tsan::release(&order_[phase_ % 2]);
    return &order_[phase_ % 2];
  }
  void complete() { ++phase_; }

 private:
  uint64_t phase_ = 0;
  uint64_t order_[2] = {};
};

struct Barrier {
  const char* name = nullptr;
  int threads = 0;  // that it waits for
  int arrived = 0;
  Where where = {};  // of the first that arrived
  Rendezvous rendezvous;
};

// One collective at a time; its operands are kept while the next one gathers.
struct Warp {
  uint32_t ready = ~0u;  // lanes that can run
  const char* name = nullptr;
  int arrived = 0;
  Where where = {};
  size_t bytes = 0;
  int buffer = 0;  // that gathers now
  alignas(16) char operands[2][kWarpSize * kMaxOperandBytes];
  Rendezvous rendezvous;
};

struct CudaThread {
  CudaThread(const char* name, void (*entry)(), tsan::Context& copier)
      : fiber(name, entry), copies(copier) {}
  Fiber fiber;
  CopyQueue copies;
  const char* waits_in = nullptr;  // name of a barrier or collective
  Where where = {};
  int barrier = -1;
  const void* key = nullptr;  // of wait_for_wake
  void* order = nullptr;      // what the collective's memory order hangs on, or null
  const char* results = nullptr;
  bool returned = false;
};

std::string thread_name(const Thread& first, int index) {
  return "block " + std::to_string(first.block_x) + "," + std::to_string(first.block_y) +
         " thread " + std::to_string(index);
}

std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

// Ends the running thread and with it the launch.
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

class Block {
 public:
  // `checked`: ThreadSanitizer looks at it.
  Block(const Thread& first, int64_t shared_bytes, bool checked, const std::function<void()>& body,
        void* grid_order);
  ~Block() { std::free(shared_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run();  // throws std::runtime_error

  // By the running thread:
  CudaThread& self() { return *threads_[running.index]; }
  void sync(const char* name, int id, int count, Where where);
  void* join_warp(const char* name, const void* operand, size_t bytes, bool orders_memory,
                  Where where);
  void leave_warp();
  void take_result(void* result, size_t bytes);
  void check_shared(const char* name, const void* shared, int bytes, Where where);
  void preempt();
  void wait_for_wake(const char* name, const void* key, Where where);
  void wake(const void* key);
  void in_background(std::function<void()> work);
  bool lands_at_issue();
  char* shared_memory() const { return shared_; }
  std::unique_ptr<BlockExtension>& extension() { return extension_; }
  bool checked() const { return copiers_.front()->thread() != nullptr; }
  void thread_main();

 private:
  void wait(const char* name, Where where);
  int choose();
  void land_some_copies();
  void land_background_work();
  std::string deadlock_report() const;
  uint64_t random(uint64_t bound);
  Warp& warp_of(int thread) { return warps_[thread / kWarpSize]; }
  void make_ready(int thread) { warp_of(thread).ready |= 1u << (thread % kWarpSize); }
  void make_waiting(int thread) { warp_of(thread).ready &= ~(1u << (thread % kWarpSize)); }

  const std::function<void()>& body_;
  Thread first_;
  int64_t shared_bytes_;
  char* shared_ = nullptr;
  void* grid_order_;
  uint64_t random_state_;
  int live_;
  int last_ = -1;      // thread that ran last
  int64_t burst_ = 0;  // steps that the warp keeps running, under kRandom
  std::string failure_;
  Barrier barriers_[kNumBarriers];
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<tsan::Context>> copiers_;  // one a warp
  std::vector<std::unique_ptr<CudaThread>> threads_;
  std::unique_ptr<BlockExtension> extension_;
  std::deque<std::function<void()>> background_;
};

Block* block = nullptr;  // that runs now

Block::Block(const Thread& first, int64_t shared_bytes, bool checked,
             const std::function<void()>& body, void* grid_order)
    : body_(body),
      first_(first),
      shared_bytes_(shared_bytes),
      grid_order_(grid_order),
      random_state_(mode.seed * 1000003 + first.block_x + first.block_y * 65537),
      live_(first.num_threads),
      warps_(first.num_threads / kWarpSize) {
  // Not rounded up: AddressSanitizer sees the first byte behind it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, static_cast<size_t>(shared_bytes)) != 0) throw std::bad_alloc();
  shared_ = static_cast<char*>(memory);
  std::memset(shared_, 0xff, static_cast<size_t>(shared_bytes));
  first_.shared_memory = shared_;
  const auto entry = [] { block->thread_main(); };
  for (int i = 0; i < first.num_threads; ++i) {
    const std::string name = checked ? thread_name(first, i) : "";
    const std::string copies = name + "-: copies";
    if (i % kWarpSize == 0) {
      copiers_.push_back(std::make_unique<tsan::Context>(checked ? copies.c_str() : nullptr));
    }
    threads_.push_back(
        std::make_unique<CudaThread>(checked ? name.c_str() : nullptr, entry, *copiers_.back()));
  }
}

uint64_t Block::random(uint64_t bound) {  // splitmix64
  uint64_t z = random_state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) % bound;
}

void Block::run() {
  block = this;
  while (live_ > 0 && failure_.empty()) {
    const int next = choose();
    if (next < 0 && !background_.empty()) {
      land_background_work();
      continue;
    }
    last_ = next;
    if (last_ < 0) {
      failure_ = deadlock_report();
      break;
    }
    running = first_;
    running.index = last_;
    threads_[last_]->fiber.resume();
    if (mode.landing == Landing::kRandom) {
      land_some_copies();
      if (!background_.empty() && random(16) == 0) land_background_work();
    }
  }
  if (failure_.empty() && !background_.empty()) failure_ = "ended with copies under way";
  if (failure_.empty() && extension_ != nullptr) failure_ = extension_->unfinished();
  block = nullptr;
  if (failure_.empty()) return;
  for (const auto& thread : threads_) thread->fiber.release(grid_order_);
  tsan::acquire(grid_order_);
  throw std::runtime_error(failure_);
}

void Block::thread_main() {
  CudaThread& thread = self();
  thread.fiber.begin();
  try {
    body_();
    thread.copies.wait(-1);
  } catch (const std::exception& error) {
    failure_ = "thread " + std::to_string(running.index) + ": " + error.what();
  }
  tsan::release(grid_order_);
  thread.returned = true;
  make_waiting(running.index);
  --live_;
  thread.fiber.finish();
}

// Who runs next; -1 if nobody can.
int Block::choose() {
  const int num_warps = static_cast<int>(warps_.size());
  const auto lowest = [](uint32_t lanes) { return __builtin_ctz(lanes); };
  const auto highest = [](uint32_t lanes) { return 31 - __builtin_clz(lanes); };
  const int last_warp = last_ < 0 ? num_warps - 1 : last_ / kWarpSize;
  switch (mode.schedule) {
    case Schedule::kRoundRobin: {
      const uint32_t later_lanes = last_ < 0 ? 0 : ~0u << (last_ % kWarpSize) << 1;
      for (int step = 0; step <= num_warps; ++step) {
        const int warp = (last_warp + step) % num_warps;
        const uint32_t lanes = warps_[warp].ready & (step == 0 ? later_lanes : ~0u);
        if (lanes) return warp * kWarpSize + lowest(lanes);
      }
      return -1;
    }
    case Schedule::kWarpRunAhead: {
      for (int step = 0; step < num_warps; ++step) {
        const int warp = (last_warp + num_warps - step) % num_warps;
        if (warps_[warp].ready) return warp * kWarpSize + highest(warps_[warp].ready);
      }
      return -1;
    }
    case Schedule::kRandom: {
      int warp = last_warp;
      if (--burst_ <= 0 || !warps_[warp].ready) {
        burst_ = int64_t{1} << random(11);
        warp = static_cast<int>(random(num_warps));
        for (int step = 0; step < num_warps && !warps_[warp].ready; ++step) {
          warp = (warp + 1) % num_warps;
        }
      }
      uint32_t lanes = warps_[warp].ready;
      if (!lanes) return -1;
      for (uint64_t skip = random(__builtin_popcount(lanes)); skip > 0; --skip) lanes &= lanes - 1;
      return warp * kWarpSize + lowest(lanes);
    }
  }
  return -1;
}

// The oldest copies of a few threads, now and then.
void Block::land_some_copies() {
  if (random(8) != 0) return;
  CopyQueue& copies = threads_[random(threads_.size())]->copies;
  copies.land(random(copies.size() + 1));
}

void Block::land_background_work() {
  const std::function<void()> work = std::move(background_.front());
  background_.pop_front();
  work();
}

void Block::in_background(std::function<void()> work) {
  background_.push_back(std::move(work));
  while (mode.landing == Landing::kEarly && !background_.empty()) land_background_work();
}

bool Block::lands_at_issue() {
  return mode.landing == Landing::kEarly || (mode.landing == Landing::kRandom && random(2) == 0);
}

void Block::preempt() {
  if (mode.schedule != Schedule::kWarpRunAhead) self().fiber.suspend();
}

void Block::wait_for_wake(const char* name, const void* key, Where where) {
  self().key = key;
  wait(name, where);
}

void Block::wake(const void* key) {
  for (int i = 0; i < first_.num_threads; ++i) {
    if (threads_[i]->key != key) continue;
    threads_[i]->key = nullptr;
    make_ready(i);
  }
}

void Block::wait(const char* name, Where where) {
  CudaThread& thread = self();
  thread.waits_in = name;
  thread.where = where;
  make_waiting(running.index);
  thread.fiber.suspend();
  thread.waits_in = nullptr;
}

void Block::sync(const char* name, int id, int count, Where where) {
  if (id < 0 || id >= kNumBarriers) fail(std::string(name) + ": no barrier " + std::to_string(id));
  if (count <= 0 || count % kWarpSize != 0 || count > running.num_threads) {
    fail(std::string(name) + " of " + std::to_string(count) + " threads at " + text(where));
  }
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.threads = count;
    barrier.where = where;
  } else if (barrier.threads != count || barrier.where.line != where.line ||
             std::strcmp(barrier.where.file, where.file) != 0) {
    fail("divergent barrier " + std::to_string(id) + ": " + std::to_string(count) + " threads at " +
         text(where) + ", others wait for " + std::to_string(barrier.threads) + " at " +
         text(barrier.where));
  }
  void* const order = barrier.rendezvous.arrive();
  if (++barrier.arrived < barrier.threads) {
    self().barrier = id;
    wait(name, where);
  } else {
    barrier.arrived = 0;
    barrier.rendezvous.complete();
    for (int i = 0; i < running.num_threads; ++i) {
      if (threads_[i]->barrier != id) continue;
      threads_[i]->barrier = -1;
      make_ready(i);
    }
  }
  tsan::acquire(order);
}

void* Block::join_warp(const char* name, const void* operand, size_t bytes, bool orders_memory,
                       Where where) {
  CudaThread& thread = self();
  Warp& warp = warp_of(running.index);
  if (warp.arrived == 0) {
    warp.name = name;
    warp.where = where;
    warp.bytes = bytes;
  } else if (std::strcmp(warp.name, name) != 0 || warp.bytes != bytes ||
             warp.where.line != where.line || std::strcmp(warp.where.file, where.file) != 0) {
    fail("warp diverged: " + std::string(name) + " at " + text(where) + ", other lanes in " +
         warp.name + " at " + text(warp.where));
  }
  char* const lanes = warp.operands[warp.buffer];
  char* const own = lanes + running.index % kWarpSize * bytes;
  tsan::ignore_begin();
  std::memcpy(own, operand, bytes);
  tsan::ignore_end();
  thread.results = own;
  thread.order = orders_memory ? warp.rendezvous.arrive() : nullptr;
  if (++warp.arrived < kWarpSize) {
    wait(name, where);
    return nullptr;
  }
  tsan::ignore_begin();
  return lanes;
}

void Block::leave_warp() {
  tsan::ignore_end();
  Warp& warp = warp_of(running.index);
  warp.arrived = 0;
  warp.buffer ^= 1;
  warp.rendezvous.complete();
  warp.ready = ~0u;
}

void Block::take_result(void* result, size_t bytes) {
  const CudaThread& thread = self();
  tsan::ignore_begin();
  std::memcpy(result, thread.results, bytes);
  tsan::ignore_end();
  if (thread.order != nullptr) tsan::acquire(thread.order);
}

void Block::check_shared(const char* name, const void* shared, int bytes, Where where) {
  const auto offset = static_cast<const char*>(shared) - shared_;
  if (offset < 0 || offset + bytes > shared_bytes_ || offset % bytes != 0) {
    fail(std::string(name) + " at " + text(where) + ": shared memory offset " +
         std::to_string(offset) + " of " + std::to_string(shared_bytes_) + ", must be inside and " +
         std::to_string(bytes) + "-byte aligned");
  }
}

std::string Block::deadlock_report() const {
  // waiting place -> its threads, as ranges
  std::map<std::string, std::vector<std::pair<int, int>>> places;
  for (int i = 0; i < first_.num_threads; ++i) {
    const CudaThread& thread = *threads_[i];
    const std::string place =
        thread.returned ? "have returned"
                        : "wait in " + std::string(thread.waits_in) + " at " + text(thread.where);
    auto& ranges = places[place];
    if (!ranges.empty() && ranges.back().second == i - 1) {
      ranges.back().second = i;
    } else {
      ranges.emplace_back(i, i);
    }
  }
  std::ostringstream report;
  report << "deadlock:";
  const char* separator = " threads ";
  for (const auto& [place, ranges] : places) {
    for (const auto& [begin, end] : ranges) {
      report << separator << begin;
      if (end > begin) report << "-" << end;
      separator = ", ";
    }
    report << " " << place;
    separator = "; threads ";
  }
  return report.str();
}

}  // namespace

void run_grid(const char* op, unsigned grid_x, unsigned grid_y, int num_threads,
              int64_t shared_bytes, const std::function<void()>& body) {
  static std::mutex one_grid_at_a_time;
  const std::lock_guard<std::mutex> guard(one_grid_at_a_time);
  ++num_launches;
  const auto fail = [&](const std::string& message) {
    throw std::runtime_error("longctx::" + std::string(op) + ": host SIMT: " + message);
  };
  // What a CUDA launch would refuse.
  if (grid_x == 0 || grid_x > 0x7fffffffu || grid_y == 0 || grid_y > 65535u) {
    fail("grid of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) + " blocks");
  }
  if (num_threads <= 0 || num_threads > 1024 || num_threads % kWarpSize != 0) {
    fail("block of " + std::to_string(num_threads) + " threads");
  }
  if (shared_bytes < 0 || shared_bytes > (mode.hopper ? kHopperSharedBytes : kMaxSharedBytes)) {
    fail(std::to_string(shared_bytes) + " bytes of shared memory");
  }

  // Blocks are not ordered with each other: none may depend on another.
  std::vector<int64_t> order(static_cast<size_t>(grid_x) * grid_y);
  std::iota(order.begin(), order.end(), int64_t{0});
  if (mode.schedule == Schedule::kWarpRunAhead) std::reverse(order.begin(), order.end());
  uint64_t seed = mode.seed;
  if (mode.schedule == Schedule::kRandom) {
    for (size_t i = order.size(); i > 1; --i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(seed >> 33) % i]);
    }
  }

  const auto grid_order = std::make_unique<uint64_t>(0);
  // ThreadSanitizer looks at a few blocks alone. It would take memory that two of them get in turn
  // for a race between them, and overlook a race with a thread that is gone: they stay to the end.
  constexpr size_t kCheckedBlocks = 3;
  std::vector<std::unique_ptr<Block>> checked;
  for (size_t i = 0; i < order.size(); ++i) {
    Thread first;
    first.num_threads = num_threads;
    first.block_x = order[i] % grid_x;
    first.block_y = order[i] / grid_x;
    const bool check = tsan::active() && checked.size() * order.size() <= i * kCheckedBlocks;
    auto next = std::make_unique<Block>(first, shared_bytes, check, body, grid_order.get());
    if (!check) tsan::ignore_begin();
    try {
      next->run();
    } catch (const std::runtime_error& error) {
      if (!check) tsan::ignore_end();
      fail("block (" + std::to_string(first.block_x) + ", " + std::to_string(first.block_y) +
           "): " + error.what());
    }
    if (!check) tsan::ignore_end();
    if (check) checked.push_back(std::move(next));
  }
  tsan::acquire(grid_order.get());
}

void sync_block(const char* name, int id, int threads, Where where) {
  block->sync(name, id, threads, where);
}
void* join_warp(const char* name, const void* operand, size_t bytes, bool orders_memory,
                Where where) {
  return block->join_warp(name, operand, bytes, orders_memory, where);
}
void leave_warp() { block->leave_warp(); }
void take_result(void* result, size_t bytes) { block->take_result(result, bytes); }
void check_shared(const char* name, const void* shared, int bytes, Where where) {
  block->check_shared(name, shared, bytes, where);
}
void issue_copy(void* shared, const void* global, int bytes, Where where) {
  block->check_shared("copy_async_16", shared, 16, where);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes < 0 || bytes > 16) {
    fail("copy_async_16 at " + text(where) + ": " + std::to_string(bytes) +
         " bytes from a global address with remainder " +
         std::to_string(reinterpret_cast<uintptr_t>(global) % 16) + " modulo 16");
  }
  block->self().copies.issue(shared, global, bytes);
}
int64_t shared_offset(const void* shared) {
  return static_cast<const char*>(shared) - block->shared_memory();
}
char* shared_at(int64_t offset) { return block->shared_memory() + offset; }
void preempt() { block->preempt(); }
void wait_for_wake(const char* name, const void* key, Where where) {
  block->wait_for_wake(name, key, where);
}
void wake(const void* key) { block->wake(key); }
void in_background(std::function<void()> work) { block->in_background(std::move(work)); }
bool lands_at_issue() { return block->lands_at_issue(); }
bool seen_by_tsan() { return block->checked(); }
std::unique_ptr<BlockExtension>& block_extension() { return block->extension(); }
void commit_copies() { block->self().copies.commit(); }
void wait_copies(int pending) { block->self().copies.wait(pending); }

}  // namespace simt
