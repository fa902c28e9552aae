#include "copies.h"

#include <algorithm>
#include <cstring>

#include "simt.h"

namespace simt {

void CopyQueue::issue(void* shared, const void* global, int bytes) {
  const int64_t slot = issued_++ % kSlots;
  tsan::release(&issued_order_[slot]);
  {
    const tsan::Visit visit(maker_);
    copies_.push_back({shared, global, bytes, groups_, slot});
  }
  // A bad address is reported best while its line is on the stack.
  const bool bad = __asan_region_is_poisoned && bytes > 0 &&
                   __asan_region_is_poisoned(const_cast<void*>(global), static_cast<size_t>(bytes));
  if (mode.landing == Landing::kEarly || bad) land(size());
}

void CopyQueue::land(size_t copies) {
  const tsan::Visit visit(copier_.thread());
  for (; copies > 0; --copies) {
    const Copy& copy = copies_[landed_++];
    tsan::acquire(&issued_order_[copy.slot]);
    if (copy.bytes > 0) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    std::memset(static_cast<char*>(copy.shared) + copy.bytes, 0,
                static_cast<size_t>(16 - copy.bytes));
    tsan::release(&landed_order_[copy.slot]);
  }
}

void CopyQueue::wait(int pending) {
  const auto due = std::find_if(copies_.begin(), copies_.end(), [&](const Copy& copy) {
    return pending >= 0 && copy.group >= groups_ - pending;
  });
  const auto num_due = static_cast<size_t>(due - copies_.begin());
  if (num_due > landed_) land(num_due - landed_);
  for (auto copy = copies_.begin(); copy != due; ++copy) tsan::acquire(&landed_order_[copy->slot]);
  const tsan::Visit visit(maker_);
  copies_.erase(copies_.begin(), due);
  landed_ -= num_due;
}

}  // namespace simt
