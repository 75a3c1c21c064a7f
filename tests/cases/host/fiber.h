// Fibers: one stack for each thread of a block, and a switch between them that costs nanoseconds.
//
// A fiber is made once and reused by every block: its body is expected never to return. Each switch
// is announced to AddressSanitizer, which otherwise takes the new stack for a wild pointer.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) || defined(KERNELS_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace fiber {

// Room for kernels that keep a whole row in "registers", grown by AddressSanitizer's red zones.
// Pages that are never touched cost nothing.
constexpr size_t stack_bytes = 256 << 10;

struct Fiber {
#if defined(__x86_64__) && !defined(KERNELS_ON_CPU_UCONTEXT)
  void *stack_pointer;
#else
  ucontext_t context;
#endif
  const void *stack = nullptr; // lowest address
  size_t bytes = 0;
  void *fake_stack = nullptr; // AddressSanitizer's own
};

#if defined(__x86_64__) && !defined(KERNELS_ON_CPU_UCONTEXT)

// Saves what the System V ABI lets a callee not clobber, swaps stacks, restores. Unlike
// swapcontext it makes no system call, and so is some twenty times faster.
extern "C" void switch_stack(void **save, void *load) asm("switch_stack");
asm(R"(
.text
.p2align 4
switch_stack:
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
)");

inline void prepare(Fiber &fiber, char *stack, void (*entry)()) {
  // What the first switch_stack pops: six registers, the address it returns to, and the (absent)
  // return address of `entry`, which also gives `entry` the alignment that the ABI promises.
  void **top = reinterpret_cast<void **>(stack + stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}
inline void swap(Fiber &from, Fiber &to) { switch_stack(&from.stack_pointer, to.stack_pointer); }

#else

inline void prepare(Fiber &fiber, char *stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = stack_bytes;
  makecontext(&fiber.context, entry, 0);
}
inline void swap(Fiber &from, Fiber &to) { swapcontext(&from.context, &to.context); }

#endif

inline void create(Fiber &fiber, void (*entry)()) {
  // The lowest page stays inaccessible: running out of stack is a crash, not a corrupted neighbour.
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void *memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    perror("kernels-on-host: stack of a thread");
    _exit(1);
  }
  char *stack = static_cast<char *>(memory) + guard;
  fiber.stack = stack;
  fiber.bytes = stack_bytes;
  prepare(fiber, stack, entry);
}

inline void switch_to(Fiber &from, Fiber &to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
  swap(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

// The first thing a new fiber calls. `from`, the fiber that switched here, learns where its own
// stack lies: AddressSanitizer knows, and wants to be told when we switch back.
inline void entered(Fiber &from) { __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.bytes); }

} // namespace fiber
