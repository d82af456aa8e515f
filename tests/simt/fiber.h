// A stack of one's own to run on, for each CUDA thread.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT_USED
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

constexpr size_t kStackBytes = 64 << 10;

#ifndef SIMT_UCONTEXT_USED
// Keep the registers that a function must preserve on this stack, and take up those of another.
extern "C" void simt_switch(void** keep, void* take);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#endif

class Fiber {
 public:
  // The CPU thread's own stack, until `start` gives another.
  Fiber() = default;
  ~Fiber() {
    if (memory_) munmap(memory_, kStackBytes + page());
  }
  Fiber(const Fiber&) = delete;

  // The next switch to this fiber begins `entry`, which must never return.
  void start(void (*entry)()) {
    if (!memory_) {
      void* memory = mmap(nullptr, kStackBytes + page(), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      memory_ = static_cast<char*>(memory);
      mprotect(memory_, page(), PROT_NONE);  // too deep a stack is a fault, not a wrong result
      bottom_ = memory_ + page();
      size_ = kStackBytes;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom_, size_);  // frames that never returned
#endif
#ifdef SIMT_UCONTEXT_USED
    getcontext(&context_);
    context_.uc_stack.ss_sp = memory_ + page();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    void** top = reinterpret_cast<void**>(memory_ + page() + kStackBytes);
    *--top = nullptr;  // where `entry` would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    top_ = top;
#endif
  }

  void switch_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
    void* frames = nullptr;
    __sanitizer_start_switch_fiber(&frames, other.bottom_, other.size_);
#endif
#ifdef SIMT_UCONTEXT_USED
    swapcontext(&context_, &other.context_);
#else
    simt_switch(&top_, other.top_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  }

  bool holds(const void* address) const {
    const char* p = static_cast<const char*>(address);
    return p >= memory_ && p < memory_ + page() + kStackBytes;
  }

  // First thing on a new stack: `before` is whom the switch came from.
  static void arrived(Fiber& before) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &before.bottom_, &before.size_);
#endif
  }

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

  char* memory_ = nullptr;  // a page that faults, then the stack
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#ifdef SIMT_UCONTEXT_USED
  ucontext_t context_;
#else
  void* top_ = nullptr;
#endif
};

}  // namespace simt
