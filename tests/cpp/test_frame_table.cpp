// Frames under many threads: a page that is held neither moves nor changes, and nothing is filled
// twice.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
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

// Lanes that share pages at random, part at random and read all the time: whoever holds a page
// finds in its frame what its lane has there, and no page has two frames.
TEST(FrameTable, SharedPagesHaveOneFrame) {
  constexpr int64_t kFrames = 12, kLanes = 4, kPages = 9;
  FrameTable table(kFrames, kLanes);
  std::mt19937 rng(0);
  const auto pick = [&rng](int64_t n) { return static_cast<int64_t>(rng() % n); };
  std::vector<std::vector<int64_t>> lanes(kLanes);  // what each page of a lane is
  std::vector<int64_t> contents(kFrames, -1);
  int64_t fresh = 0;
  for (int step = 0; step < 3000; ++step) {
    const int64_t lane = pick(kLanes), source = pick(kLanes);
    std::vector<int64_t>& own = lanes[lane];
    if (step % 3 == 0 && lane != source) {
      const int64_t count = pick(static_cast<int64_t>(lanes[source].size()) + 1);
      int64_t common = 0;
      while (common < std::min<int64_t>(count, own.size()) &&
             own[common] == lanes[source][common]) {
        ++common;
      }
      table.drop(lane, count);
      EXPECT_EQ(table.share(lane, source, count), common);
      own.assign(lanes[source].begin(), lanes[source].begin() + count);
    }
    while (static_cast<int64_t>(own.size()) < kPages && pick(3) != 0) own.push_back(fresh++);
    std::vector<PageId> pages;
    for (int64_t other = 0; other < kLanes; ++other) {
      if (!lanes[other].empty()) {
        pages.push_back({other, pick(static_cast<int64_t>(lanes[other].size()))});
      }
    }
    for (const PageId& id : pages) table.set_pinned(id.lane, id.page, id.page + 1, pick(4) == 0);
    std::vector<int32_t> frames;
    std::vector<char> loads;
    try {
      table.acquire(pages, &frames, &loads);
    } catch (const NoFrameError&) {  // all are pinned
      for (int64_t other = 0; other < kLanes; ++other) table.set_pinned(other, 0, kPages, false);
      continue;
    }
    std::vector<int32_t> filled;
    for (size_t i = 0; i < pages.size(); ++i) {
      if (loads[i] == 0) continue;
      contents[frames[i]] = lanes[pages[i].lane][pages[i].page];
      filled.push_back(frames[i]);
    }
    table.loaded(filled);
    EXPECT_TRUE(table.wait_loaded(pages, frames));
    std::map<int64_t, int32_t> where;
    for (size_t i = 0; i < pages.size(); ++i) {
      const int64_t page = lanes[pages[i].lane][pages[i].page];
      EXPECT_EQ(contents[frames[i]], page);
      EXPECT_EQ(where.emplace(page, frames[i]).first->second, frames[i]);
    }
    table.release(frames);
    EXPECT_LE(table.num_used(), kFrames);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) table.drop(lane, 0);
  EXPECT_EQ(table.num_used(), 0);
  EXPECT_EQ(table.num_available(), kFrames);
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
