// Threads that keep several reads of a disk in flight: one read at a time leaves it two thirds
// idle.
#pragma once
#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace longctx::host {

class ReadPool {
 public:
  explicit ReadPool(int num_threads);
  ~ReadPool();
  ReadPool(const ReadPool&) = delete;
  ReadPool& operator=(const ReadPool&) = delete;

  // Calls work(0), .., work(count - 1), each once, in any order and on any thread, this one
  // included. `work` must not throw. Calls from several threads take turns.
  void run(int64_t count, const std::function<void(int64_t)>& work);

 private:
  void serve();
  void take_items();

  const int num_threads_;
  pid_t owner_ = 0;  // threads do not survive a fork: a child works alone
  std::vector<std::thread> threads_;
  std::mutex turn_;  // held through run()
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  const std::function<void(int64_t)>* work_ = nullptr;
  int64_t next_ = 0, count_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

}  // namespace longctx::host
