// Frames under many threads: a page that is held neither moves nor changes, and nothing is filled
// twice.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "host/frame_table.h"
#include "host/read_pool.h"

namespace longctx::host {
namespace {

TEST(FrameTable, HeldPagesStay) {
  constexpr int64_t kFrames = 24, kLanes = 2, kPages = 40;
  constexpr int kThreads = 4, kSteps = 2000,
                kHeld = 5;  // kThreads * kHeld < kFrames: no thread starves
  FrameTable table(kFrames, kLanes);
  std::vector<int64_t> contents(kFrames, -1);  // what a frame holds; plain, so that races are seen
  std::atomic<int> failures{0};
  const auto work = [&](int seed) {
    std::mt19937 rng(seed);
    const auto pick = [&rng](int64_t n) { return static_cast<int64_t>(rng() % n); };
    std::vector<int32_t> frames;
    std::vector<char> loads;
    for (int step = 0; step < kSteps; ++step) {
      std::vector<PageId> pages;
      for (int i = 0; i < kHeld; ++i) pages.push_back({pick(kLanes), pick(kPages)});
      table.acquire(pages, &frames, &loads);
      std::vector<int32_t> filled;
      for (int i = 0; i < kHeld; ++i) {
        if (loads[i] == 0) continue;
        contents[frames[i]] = pages[i].lane * kPages + pages[i].page;
        filled.push_back(frames[i]);
      }
      if (step % 50 == 7) {
        // As after a read that failed: whoever waits for the page finds out and asks again.
        for (int i = 0; i < kHeld; ++i) {
          if (loads[i] != 0) contents[frames[i]] = -1;
        }
        std::vector<int32_t> others;
        for (int i = 0; i < kHeld; ++i) {
          if (loads[i] == 0) others.push_back(frames[i]);
        }
        table.abandon(filled);
        table.release(others);
        continue;
      }
      table.loaded(filled);
      if (table.wait_loaded(pages, frames)) {
        for (int i = 0; i < kHeld; ++i) {
          if (contents[frames[i]] != pages[i].lane * kPages + pages[i].page) ++failures;
        }
      }
      table.release(frames);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  EXPECT_LE(table.num_used(), kFrames);
  // Nothing is held any more: every page in a frame may leave.
  EXPECT_EQ(static_cast<int64_t>(table.eviction_order().size()), table.num_used());
}

TEST(FrameTable, TooManyPagesChangeNothing) {
  FrameTable table(4, 1);
  std::vector<int32_t> frames;
  std::vector<char> loads;
  table.acquire({{0, 0}, {0, 1}, {0, 2}}, &frames, &loads);
  table.loaded(frames);
  table.release(frames);
  const auto pages = [&table] {
    std::vector<int64_t> order;
    for (const PageId& id : table.eviction_order()) order.push_back(id.page);
    return order;
  };
  const std::vector<int64_t> before = pages();
  EXPECT_THROW(table.acquire({{0, 2}, {0, 7}, {0, 8}, {0, 9}, {0, 10}}, &frames, &loads),
               NoFrameError);
  EXPECT_THROW(table.acquire({{0, 2}, {1, 0}}, &frames, &loads), std::invalid_argument);
  EXPECT_EQ(pages(), before);
  table.acquire({{0, 7}, {0, 7}, {0, 2}}, &frames, &loads);
  EXPECT_EQ(frames[0], frames[1]);
  EXPECT_EQ((std::vector<int>(loads.begin(), loads.end())), (std::vector<int>{1, 0, 0}));
}

TEST(ReadPool, CallsEachItemOnce) {
  ReadPool pool(4);
  for (int64_t count : {0, 1, 3, 1000}) {
    std::vector<std::atomic<int>> calls(count);
    std::thread other([&pool] { pool.run(100, [](int64_t) {}); });
    pool.run(count, [&calls](int64_t i) { ++calls[i]; });
    other.join();
    for (const std::atomic<int>& call : calls) EXPECT_EQ(call, 1);
  }
}

}  // namespace
}  // namespace longctx::host
