// Dynamic work distribution over a thread pool that is lent to the kernels (torch's own inside the
// op library, any other in benchmarks), so that kernels need no torch header.
#pragma once
#include <atomic>
#include <cstdint>

namespace longctx::cpu {

// Calls body(begin, end, context) on sub-ranges of [0, n) that together cover it once.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
struct ThreadPool {
  int64_t (*num_threads)();
  void (*run)(int64_t n, RangeBody body, void* context);
};

void set_thread_pool(ThreadPool pool);
const ThreadPool& thread_pool();

// Runs work(item) for every item in [0, num_items), handed out one by one in ascending order: put
// the heavy items first. An item must own what it writes, then the result does not depend on which
// thread ran it. `per_thread()` makes an object that lives while one thread drains items.
template <class PerThread, class Work>
void for_each_item(int64_t num_items, const PerThread& per_thread, const Work& work) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t num_items;
    const PerThread* per_thread;
    const Work* work;
  } context{{0}, num_items, &per_thread, &work};
  if (num_items <= 0) return;
  const auto body = [](int64_t, int64_t, void* opaque) {
    auto& c = *static_cast<Context*>(opaque);
    auto state = (*c.per_thread)();
    for (int64_t item; (item = c.next.fetch_add(1, std::memory_order_relaxed)) < c.num_items;) {
      (*c.work)(item, state);
    }
  };
  const int64_t threads = thread_pool().num_threads();
  thread_pool().run(threads < num_items ? threads : num_items, body, &context);
}

}  // namespace longctx::cpu
