#include "read_pool.h"

#include <unistd.h>

namespace longctx::host {

ReadPool::ReadPool(int num_threads) : num_threads_(num_threads) {}

ReadPool::~ReadPool() {
  if (owner_ != 0 && owner_ != getpid()) {
    // A forked child has the objects but not the threads: joining them would wait for ever.
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ReadPool::run(int64_t count, const std::function<void(int64_t)>& work) {
  if (count <= 1 || num_threads_ <= 1 || (owner_ != 0 && owner_ != getpid())) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  std::unique_lock<std::mutex> lock(mutex_);
  if (threads_.empty()) {
    owner_ = getpid();
    for (int i = 1; i < num_threads_; ++i) threads_.emplace_back([this] { serve(); });
  }
  work_ = &work;
  next_ = 0;
  count_ = count;
  lock.unlock();
  wake_.notify_all();
  take_items();
  lock.lock();
  idle_.wait(lock, [this] { return busy_ == 0; });
  work_ = nullptr;
  count_ = 0;
}

void ReadPool::take_items() {
  std::unique_lock<std::mutex> lock(mutex_);
  ++busy_;
  while (next_ < count_) {
    const int64_t item = next_++;
    const auto* work = work_;
    lock.unlock();
    (*work)(item);
    lock.lock();
  }
  if (--busy_ == 0) idle_.notify_all();
}

void ReadPool::serve() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || next_ < count_; });
      if (stop_) return;
    }
    take_items();
  }
}

}  // namespace longctx::host
