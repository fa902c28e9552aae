// A fiber: a stack and the place where it stopped. The switch is a dozen instructions of x86-64
// assembly; the sanitizers are told about it. They are reached through weak symbols, so that one
// object file serves every build: it must itself be built without -fsanitize=thread.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size)
    __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size)
    __attribute__((weak));
void __asan_unpoison_memory_region(void const volatile* address, size_t size) __attribute__((weak));
void* __asan_region_is_poisoned(void* begin, size_t size) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_set_fiber_name(void* fiber, const char* name) __attribute__((weak));
void __tsan_acquire(void* address) __attribute__((weak));
void __tsan_release(void* address) __attribute__((weak));
void __tsan_ignore_thread_begin() __attribute__((weak));
void __tsan_ignore_thread_end() __attribute__((weak));
}

namespace simt {

// ThreadSanitizer sees a fiber as a thread of its own, if it is given a context. Nothing orders two
// of them but release() and acquire() of the same address. Without that sanitizer these do nothing.
namespace tsan {
inline bool active() { return __tsan_create_fiber != nullptr; }
inline void release(void* address) {
  if (active()) __tsan_release(address);
}
inline void acquire(void* address) {
  if (active()) __tsan_acquire(address);
}
// Accesses in between are not looked at.
inline void ignore_begin() {
  if (active()) __tsan_ignore_thread_begin();
}
inline void ignore_end() {
  if (active()) __tsan_ignore_thread_end();
}

void* current();
void switch_to(void* thread);  // accesses are that thread's from now on; orders nothing; null: none

// One of the sanitizer's threads; it starts after everything that its maker has done. Making one
// takes half a millisecond. Without a name: none, and accesses are those of whoever runs it.
class Context {
 public:
  explicit Context(const char* name);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  void* thread() const { return thread_; }

 private:
  void* thread_ = nullptr;
};

// Acts as another thread for a while.
class Visit {
 public:
  explicit Visit(void* thread) : home_(current()) { switch_to(thread); }
  ~Visit() { switch_to(home_); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  void* home_;
};
}  // namespace tsan

class Fiber {
 public:
  // entry() runs at the first resume() and ends with finish(). A fiber may be dropped where it
  // stands: its frames are not unwound.
  Fiber(const char* name, void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();                // runs the fiber until it calls suspend() or finish()
  void suspend();               // by the fiber: back to the caller of resume()
  [[noreturn]] void finish();   // the same, for good
  void begin();                 // first call of entry()
  void release(void* address);  // tsan::release() of all that the fiber has done

 private:
  void leave(void** fake_stack);

  tsan::Context context_;
  char* stack_;  // the lowest page is a guard
  bool finished_ = false;
  void* stopped_at_;            // stack pointer while the fiber does not run
  void* fake_stack_ = nullptr;  // AddressSanitizer's frames of this fiber
  void* resumer_ = nullptr;     // stack pointer of the caller of resume()
  void* resumer_context_ = nullptr;
  const void* resumer_bottom_ = nullptr;
  size_t resumer_size_ = 0;
};

}  // namespace simt
