// The execution model: a grid of blocks, a block of threads, barriers, warps, shared memory.
//
// Blocks run one after another, the threads of a block as fibers, each until it has to wait. So
// memory is consistent and a run repeats exactly, but the order of the threads is ours to choose:
// a kernel that lacks a barrier computes something else in another order, and that is what the
// tests look for. The order is as unfair as can be: of the threads that could run it is always the
// first in line that does, so a warp gets ahead of the others as far as barriers let it.
//
// Nothing here is kinder than the hardware:
//
//   - every block finds shared memory full of NaN;
//   - threads that have returned no longer count at `__syncthreads`, and the others must all wait
//     at the same one;
//   - a warp collective completes when every lane of its mask has reached it; to name a lane that
//     does not exist, has returned or waits elsewhere is an error, and so is to read a lane outside
//     the mask;
//   - what an asynchronous copy writes is poison from its start to the wait of the thread that started
//     it, so nobody may still read what was there before, nor read the new too early;
//   - what would hang a GPU ends here, with the place where each thread waits.
//
// One kindness remains: a warp collective orders the memory accesses around it. A `__syncwarp` that
// stands right beside a shuffle can be missing without being noticed.
#pragma once
#include "fiber.h"

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace machine {

// All ones: a NaN in every float format, -1 in every integer one.
constexpr int poison = 0xff;
constexpr unsigned max_block_threads = 1024;

// ---- Threads ------------------------------------------------------------------------------------

// A place in a kernel where threads wait for one another.
struct Site {
  const char *call = nullptr;
  const char *file = nullptr;
  int line = 0;
  bool operator==(const Site &other) const {
    const auto same = [](const char *a, const char *b) { return a == b || !strcmp(a, b); };
    return line == other.line && same(call, other.call) && same(file, other.file);
  }
};

enum class State { ready, at_barrier, at_collective, returned };

struct Thread {
  fiber::Fiber fiber;
  uint3 index;
  State state;
  Site site;
  // Of the collective this thread takes part in: what it gives, and what it gets.
  unsigned mask, source;
  uint64_t offered, received;
  unsigned ballot;
  // Asynchronous copies under way, oldest first, and how many groups of them the thread has closed.
  struct Copy {
    void *to;
    char bytes[16];
    unsigned group;
  };
  std::vector<Copy> copies;
  unsigned groups;
};

// The order of the threads of a block, and of the blocks of a grid. When shuffled it is another one
// for every block, and again for what follows each barrier.
struct Order {
  enum Kind : uint32_t { forward, reverse, shuffled } kind = forward;
  uint32_t seed = 0;

  std::vector<unsigned> line_up(unsigned count, std::mt19937 &random) const {
    std::vector<unsigned> line(count);
    for (unsigned i = 0; i < count; ++i) line[i] = kind == reverse ? count - 1 - i : i;
    if (kind == shuffled) std::shuffle(line.begin(), line.end(), random);
    return line;
  }
};

inline Thread threads[max_block_threads];
inline Thread *current;     // null while the scheduler runs
inline unsigned block_size; // threads in a block
inline fiber::Fiber scheduler;
inline std::function<void()> kernel_body;
inline const char *kernel_name = "";
inline uint32_t waiting_lanes[max_block_threads / warpSize]; // of each warp, those at a collective
inline uint32_t running_lanes[max_block_threads / warpSize]; // and those that have not returned

// The threads of the block in their order, the place of each, and which places are ready to run.
inline std::vector<unsigned> line;
inline unsigned place_of[max_block_threads];
inline uint64_t ready_places[max_block_threads / 64];

inline void make_ready(Thread &thread) {
  const unsigned place = place_of[&thread - threads];
  thread.state = State::ready;
  ready_places[place / 64] |= uint64_t{1} << place % 64;
}

inline Thread *take_first_ready() {
  for (unsigned word = 0; word * 64 < block_size; ++word)
    if (uint64_t &places = ready_places[word]) {
      const unsigned place = word * 64 + __builtin_ctzll(places);
      places &= places - 1;
      return &threads[line[place]];
    }
  return nullptr;
}

// Only while nobody is ready.
inline void set_line(std::vector<unsigned> threads_in_order) {
  line = std::move(threads_in_order);
  for (unsigned place = 0; place < line.size(); ++place) place_of[line[place]] = place;
}

inline unsigned thread_id() { return static_cast<unsigned>(current - threads); }
inline unsigned lane_id() { return thread_id() % warpSize; }

inline void print_position() {
  fprintf(stderr, "kernels-on-host: in %s, block (%u, %u, %u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
  if (current) fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
  fputc('\n', stderr);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("kernels-on-host: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  print_position();
  _exit(1);
}

// One line for each run of neighbouring threads that are in the same place.
inline void print_threads(unsigned begin, unsigned end) {
  const auto alike = [](const Thread &a, const Thread &b) {
    if (a.state != b.state) return false;
    if (a.state == State::at_collective && a.mask != b.mask) return false;
    return a.state == State::ready || a.state == State::returned || a.site == b.site;
  };
  for (unsigned first = begin, next; first < end; first = next) {
    for (next = first + 1; next < end && alike(threads[first], threads[next]);) ++next;
    const Thread &t = threads[first];
    fprintf(stderr, "  threads %u..%u ", first, next - 1);
    switch (t.state) {
    case State::ready: fputs("run\n", stderr); break;
    case State::returned: fputs("have returned\n", stderr); break;
    case State::at_barrier: fprintf(stderr, "wait in %s, %s:%d\n", t.site.call, t.site.file, t.site.line); break;
    case State::at_collective:
      fprintf(stderr, "wait in %s with mask %08x, %s:%d\n", t.site.call, t.mask, t.site.file, t.site.line);
    }
  }
}

inline void thread_main() {
  fiber::entered(scheduler);
  for (;;) {
    kernel_body();
    current->state = State::returned;
    running_lanes[thread_id() / warpSize] &= ~(1u << lane_id());
    fiber::switch_to(current->fiber, scheduler);
  }
}

inline void resume(Thread &thread) {
  current = &thread;
  threadIdx = thread.index;
  if (!thread.fiber.stack) fiber::create(thread.fiber, thread_main);
  fiber::switch_to(scheduler, thread.fiber);
  current = nullptr;
}

// ---- Warps --------------------------------------------------------------------------------------

// What a warp does together, on what its lanes have offered.
using Work = void (*)(Thread *warp);

inline void complete(Thread *warp, unsigned mask, Work work) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (!(warp[lane].site == current->site && warp[lane].mask == mask)) {
      print_threads(thread_id() - lane_id(), std::min(block_size, thread_id() - lane_id() + warpSize));
      fail("divergent warp: lanes that one mask names wait in different collectives");
    }
    ballot |= static_cast<unsigned>(warp[lane].offered != 0) << lane;
  }
  if (work) work(warp);
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    warp[lane].received = warp[warp[lane].source].offered;
    warp[lane].ballot = ballot;
    // The last one to come runs on.
    if (&warp[lane] == current)
      current->state = State::ready;
    else
      make_ready(warp[lane]);
  }
}

// Every warp collective: each lane of `mask` offers a value and receives that of lane `source`,
// together with the ballot of the values that are not zero. `work` is done when the last has come.
inline const Thread &meet(Site site, unsigned mask, uint64_t offered, unsigned source, Work work = nullptr) {
  const unsigned lane = lane_id(), first = thread_id() - lane;
  if (!(mask >> lane & 1)) fail("%s at %s:%d: lane %u is not in its own mask %08x", site.call, site.file, site.line, lane, mask);
  if (!(mask >> source & 1)) fail("%s at %s:%d reads lane %u, which is not in the mask %08x", site.call, site.file, site.line, source, mask);
  if (const unsigned inactive = mask & ~running_lanes[first / warpSize]) {
    const unsigned other = __builtin_ctz(inactive);
    fail("%s at %s:%d: inactive lane %u is in the mask %08x; it %s", site.call, site.file, site.line, other, mask,
         first + other >= block_size ? "does not exist" : "has returned");
  }

  Thread &self = *current;
  self.state = State::at_collective;
  self.site = site;
  self.mask = mask;
  self.offered = offered;
  self.source = source;
  uint32_t &waiting = waiting_lanes[first / warpSize];
  waiting |= 1u << lane;
  if ((waiting & mask) == mask) {
    waiting &= ~mask;
    complete(&threads[first], mask, work);
  } else {
    fiber::switch_to(self.fiber, scheduler);
  }
  return self;
}

template <class T> T shuffle(Site site, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const Thread &self = meet(site, mask, bits, source);
  memcpy(&value, &self.received, sizeof value);
  return value;
}

// ---- Shared memory ------------------------------------------------------------------------------

struct Range {
  void *begin;
  size_t bytes;
};
inline std::vector<Range> shared_variables;
inline std::unique_ptr<char[]> dynamic_shared_memory;
inline size_t dynamic_shared_bytes;

// The build writes one of these behind every static `__shared__` variable. The first thread to
// pass finds the variable poisoned; from then on every block does.
struct SharedVariable {
  template <class T> explicit SharedVariable(T &variable) {
    shared_variables.push_back({&variable, sizeof variable});
    memset(static_cast<void *>(&variable), poison, sizeof variable);
  }
};

// And this stands for `extern __shared__ T name[]`: a buffer of exactly the size of the launch, so
// that AddressSanitizer sees every access beyond it.
template <class T> T *dynamic_shared() { return reinterpret_cast<T *>(dynamic_shared_memory.get()); }

inline void poison_shared_memory() {
  for (const Range &variable : shared_variables) memset(variable.begin, poison, variable.bytes);
  memset(dynamic_shared_memory.get(), poison, dynamic_shared_bytes);
}

inline bool is_shared(const void *address, size_t bytes) {
  const auto lies_in = [=](const void *begin, size_t size) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(begin);
    return offset < size && bytes <= size - offset;
  };
  for (const Range &variable : shared_variables)
    if (lies_in(variable.begin, variable.bytes)) return true;
  return lies_in(dynamic_shared_memory.get(), dynamic_shared_bytes);
}

// ---- Blocks and grids ---------------------------------------------------------------------------

inline void barrier(Site site) {
  current->state = State::at_barrier;
  current->site = site;
  fiber::switch_to(current->fiber, scheduler);
}

// True if every thread that still runs waits at the barrier, and there is such a thread.
inline bool all_at_barrier() {
  const Thread *first = nullptr;
  for (unsigned i = 0; i < block_size; ++i) {
    if (threads[i].state == State::returned) continue;
    if (threads[i].state != State::at_barrier) {
      print_threads(0, block_size);
      fail("divergent barrier: these threads would wait for ever");
    }
    if (!first) first = &threads[i];
    if (!(threads[i].site == first->site)) {
      print_threads(0, block_size);
      fail("divergent barrier: threads of one block wait at different ones");
    }
  }
  return first != nullptr;
}

inline void run_block(const Order &order, std::mt19937 &random) {
  poison_shared_memory();
  set_line(order.line_up(block_size, random));
  memset(running_lanes, 0, sizeof running_lanes);
  for (unsigned i = 0; i < block_size; ++i) {
    running_lanes[i / warpSize] |= 1u << i % warpSize;
    threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    threads[i].copies.clear();
    threads[i].groups = 0;
    make_ready(threads[i]);
  }
  for (;;) {
    while (Thread *thread = take_first_ready()) resume(*thread);
    if (!all_at_barrier()) return;
    set_line(order.line_up(block_size, random));
    for (unsigned i = 0; i < block_size; ++i)
      if (threads[i].state == State::at_barrier) make_ready(threads[i]);
  }
}

inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const Order &order, std::function<void()> body) {
  gridDim = grid;
  blockDim = block;
  block_size = block.x * block.y * block.z;
  if (block_size == 0 || block_size > max_block_threads || block.z > 64) fail("no GPU launches blocks of (%u, %u, %u)", block.x, block.y, block.z);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("no GPU launches a grid of (%u, %u, %u)", grid.x, grid.y, grid.z);
  if (shared_bytes > 227 << 10) fail("no GPU has %zu bytes of shared memory for a block", shared_bytes);
  kernel_body = std::move(body);
  dynamic_shared_bytes = shared_bytes;
  dynamic_shared_memory.reset(new char[shared_bytes]);

  std::mt19937 random(order.seed);
  for (unsigned i : order.line_up(grid.x * grid.y * grid.z, random)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(order, random);
  }
}

} // namespace machine

// ---- As CUDA spells it --------------------------------------------------------------------------

// Each call notes where it stands in the kernel: the default arguments are those of its caller.
#define KERNELS_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(KERNELS_ON_CPU_SITE) { machine::barrier({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffff, KERNELS_ON_CPU_SITE) {
  machine::meet({"__syncwarp", file, line}, mask, 0, machine::lane_id());
}
inline unsigned __ballot_sync(unsigned mask, int predicate, KERNELS_ON_CPU_SITE) {
  return machine::meet({"__ballot_sync", file, line}, mask, predicate != 0, machine::lane_id()).ballot;
}
inline int __any_sync(unsigned mask, int predicate, KERNELS_ON_CPU_SITE) {
  return machine::meet({"__any_sync", file, line}, mask, predicate != 0, machine::lane_id()).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, KERNELS_ON_CPU_SITE) {
  return machine::meet({"__all_sync", file, line}, mask, predicate != 0, machine::lane_id()).ballot == mask;
}

// A shuffle stays inside segments of `width` lanes. A lane whose source lies outside gets its own
// value back, except that `__shfl_xor_sync` may reach into an earlier segment.
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, KERNELS_ON_CPU_SITE) {
  const unsigned segment = machine::lane_id() & ~(width - 1u);
  return machine::shuffle({"__shfl_sync", file, line}, mask, value, segment + (source & (width - 1u)));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KERNELS_ON_CPU_SITE) {
  const unsigned lane = machine::lane_id(), in_segment = lane & (width - 1u);
  return machine::shuffle({"__shfl_up_sync", file, line}, mask, value, delta <= in_segment ? lane - delta : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KERNELS_ON_CPU_SITE) {
  const unsigned lane = machine::lane_id(), in_segment = lane & (width - 1u);
  return machine::shuffle({"__shfl_down_sync", file, line}, mask, value, in_segment + delta < static_cast<unsigned>(width) ? lane + delta : lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, KERNELS_ON_CPU_SITE) {
  const unsigned lane = machine::lane_id(), source = lane ^ static_cast<unsigned>(lanes), segment_end = (lane | (width - 1u)) + 1;
  return machine::shuffle({"__shfl_xor_sync", file, line}, mask, value, source < segment_end ? source : lane);
}
