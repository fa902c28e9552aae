#include "fiber.h"

#include <sys/mman.h>

#include <new>
#include <vector>

#ifndef __x86_64__
#error "host SIMT switches stacks by x86-64 assembly"
#endif

// Saves what a call must preserve and the stack pointer, then continues on the other stack.
asm(R"(
.text
.type longctx_simt_switch, @function
longctx_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size longctx_simt_switch, .-longctx_simt_switch
)");
extern "C" void longctx_simt_switch(void** save, void* load);

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = 256 * 1024;  // sanitizers inflate frames

// Stacks are used again, unless ThreadSanitizer has seen the accesses of the former owner.
std::vector<char*>& free_stacks() {
  static auto* stacks = new std::vector<char*>();
  return *stacks;
}

char* take_stack() {
  if (!free_stacks().empty()) {
    char* stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

void give_stack(char* stack, bool seen_by_tsan, bool unwound) {
  if (seen_by_tsan) {
    munmap(stack, kStackBytes);
    return;
  }
  // Frames that were dropped have left their red zones.
  if (!unwound && __asan_unpoison_memory_region) {
    __asan_unpoison_memory_region(stack + kPage, kStackBytes - kPage);
  }
  free_stacks().push_back(stack);
}

}  // namespace

namespace tsan {
Context::Context(const char* name) {
  if (!active() || name == nullptr) return;
  thread_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(thread_, name);
}
Context::~Context() {
  if (thread_ != nullptr) __tsan_destroy_fiber(thread_);
}
void* current() { return active() ? __tsan_get_current_fiber() : nullptr; }
void switch_to(void* thread) {
  constexpr unsigned kNoSync = 1;
  if (thread != nullptr) __tsan_switch_to_fiber(thread, kNoSync);
}
}  // namespace tsan

Fiber::Fiber(const char* name, void (*entry)()) : context_(name), stack_(take_stack()) {
  // What longctx_simt_switch pops: six registers and the address it returns to; above it a null
  // return address ends every backtrace and gives entry() the alignment of a called function.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  stopped_at_ = top;
}

Fiber::~Fiber() { give_stack(stack_, context_.thread() != nullptr, finished_); }

void Fiber::resume() {
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fake_stack, stack_ + kPage, kStackBytes - kPage);
  }
  resumer_context_ = tsan::current();
  tsan::switch_to(context_.thread());
  longctx_simt_switch(&resumer_, stopped_at_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
}

void Fiber::begin() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &resumer_bottom_, &resumer_size_);
  }
}

void Fiber::release(void* address) {
  const tsan::Visit visit(context_.thread());
  tsan::release(address);
}

void Fiber::leave(void** fake_stack) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fake_stack, resumer_bottom_, resumer_size_);
  }
  tsan::switch_to(resumer_context_);
  longctx_simt_switch(&stopped_at_, resumer_);
}

void Fiber::suspend() {
  leave(&fake_stack_);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fake_stack_, &resumer_bottom_, &resumer_size_);
  }
}

void Fiber::finish() {
  finished_ = true;
  leave(nullptr);
  __builtin_unreachable();
}

}  // namespace simt
