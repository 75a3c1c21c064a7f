// Runs the cases of a case file: `program CASES RESULTS`.
//
// A program is one kernel file, every kernel of it registered by name (harness.rs writes those
// lines). A case is a kernel, a launch and its arguments; it runs once for each of its orders, on
// fresh buffers, and must give the same bytes every time. harness.rs documents the file format.
#pragma once
#include "device.h"

#include <csignal>
#include <map>
#include <string>
#include <tuple>

namespace runner {

using machine::fail;

// Reading from a corrupt case file is a mistake of the harness, never of a kernel.
struct CaseFile {
  FILE *file;

  bool at_end() {
    const int next = getc(file);
    return next == EOF || ungetc(next, file) == EOF;
  }
  void read(void *into, size_t bytes) {
    if (fread(into, 1, bytes, file) != bytes) fail("the case file ends early");
  }
  template <class T> T next() {
    T value;
    read(&value, sizeof value);
    return value;
  }
  std::vector<char> next_bytes() {
    std::vector<char> bytes(next<uint64_t>());
    read(bytes.data(), bytes.size());
    return bytes;
  }
  dim3 next_dim3() {
    const uint32_t x = next<uint32_t>(), y = next<uint32_t>(), z = next<uint32_t>();
    return {x, y, z};
  }
};

enum class Kind : uint32_t { value, input, output, in_out, null };
constexpr const char *kind_names[] = {"a value", "an input", "an output", "an in_out buffer", "a null pointer"};

// A kernel argument. A buffer is an allocation of its own and ends exactly where its bytes do, so
// AddressSanitizer sees an overrun of a single byte. `offset` moves its start away from the 16-byte
// alignment of the allocation, as a view into a larger tensor does.
//
// One that is `behind` is no parameter: another argument holds its address, at one of its `pointers`.
struct Argument {
  struct Pointer {
    uint64_t at, to;
  };

  Kind kind;
  bool behind;
  uint64_t offset;
  std::vector<char> bytes;
  std::vector<Pointer> pointers;
  char *allocation = nullptr;

  static constexpr int canary = 0xc5;

  void read(CaseFile &cases) {
    kind = cases.next<Kind>();
    behind = cases.next<uint32_t>();
    offset = cases.next<uint64_t>();
    bytes = cases.next_bytes();
    pointers.resize(cases.next<uint64_t>());
    for (Pointer &pointer : pointers) pointer = cases.next<Pointer>();
  }
  bool is_written() const { return kind == Kind::output || kind == Kind::in_out; }
  char *start() const { return allocation + offset; }
  void allocate() {
    allocation = static_cast<char *>(malloc(offset + bytes.size()));
    memset(allocation, canary, offset);
    std::copy(bytes.begin(), bytes.end(), start());
  }
  // Writes the addresses; and, so that runs can be compared, what stood in their place.
  void point(const std::vector<Argument> &arguments) {
    for (const Pointer &pointer : pointers) {
      const uint64_t address = reinterpret_cast<uint64_t>(arguments.at(pointer.to).start());
      memcpy(start() + pointer.at, &address, sizeof address);
    }
  }
  void unpoint() {
    for (const Pointer &pointer : pointers) memcpy(start() + pointer.at, bytes.data() + pointer.at, sizeof(uint64_t));
  }
  void release(size_t position) {
    for (uint64_t i = 0; i < offset; ++i)
      if (static_cast<unsigned char>(allocation[i]) != canary) fail("argument %zu: the kernel wrote %zu bytes before its start", position, size_t(offset - i));
    free(allocation);
  }

  // This argument as parameter `position` of a kernel, of type T.
  template <class T> T as(size_t position) const {
    if constexpr (std::is_pointer_v<T>) {
      using Element = std::remove_pointer_t<T>;
      if (kind == Kind::null) return nullptr;
      if (kind == Kind::value || is_written() == std::is_const_v<Element>)
        fail("argument %zu is %s, but the kernel takes a pointer to %s", position, kind_names[size_t(kind)],
             std::is_const_v<Element> ? "const" : "what it writes");
      if (bytes.size() % sizeof(Element) != 0)
        fail("argument %zu has %zu bytes: no whole number of elements of %zu", position, bytes.size(), sizeof(Element));
      return reinterpret_cast<T>(start());
    } else {
      static_assert(std::is_trivially_copyable_v<T>, "a launch copies its arguments byte by byte");
      if (kind != Kind::value) fail("argument %zu is %s, but the kernel takes a value", position, kind_names[size_t(kind)]);
      if (bytes.size() != sizeof(T)) fail("argument %zu has %zu bytes, but the kernel takes %zu", position, bytes.size(), sizeof(T));
      T value;
      memcpy(&value, bytes.data(), sizeof value);
      return value;
    }
  }
};

using Arguments = std::vector<Argument>;
using Kernel = std::function<std::function<void()>(const Arguments &)>; // binds arguments to a call
inline std::map<std::string, Kernel> kernels;

// Reads the parameter types off the kernel's own signature.
struct Registration {
  template <class... T> Registration(const char *name, void (*kernel)(T...)) {
    kernels[name] = [kernel](const Arguments &arguments) {
      if (arguments.size() != sizeof...(T)) fail("the case has %zu arguments, but the kernel takes %zu", arguments.size(), sizeof...(T));
      return bind(kernel, arguments, std::index_sequence_for<T...>{});
    };
  }
  template <class... T, size_t... position>
  static std::function<void()> bind(void (*kernel)(T...), const Arguments &arguments, std::index_sequence<position...>) {
    return [kernel, bound = std::tuple<T...>{arguments[position].template as<T>(position)...}] { std::apply(kernel, bound); };
  }
};

constexpr const char *order_names[] = {"forward", "reverse", "shuffled"};

inline void run_case(CaseFile &cases, FILE *results) {
  const std::vector<char> name_bytes = cases.next_bytes();
  const std::string name(name_bytes.begin(), name_bytes.end());
  machine::kernel_name = name.c_str();
  const auto found = kernels.find(name);
  if (found == kernels.end()) fail("there is no such kernel in this file");
  const dim3 grid = cases.next_dim3(), block = cases.next_dim3();
  const size_t shared_bytes = cases.next<uint32_t>();
  std::vector<machine::Order> orders(cases.next<uint32_t>());
  for (machine::Order &order : orders) order = cases.next<machine::Order>();
  Arguments arguments(cases.next<uint32_t>());
  for (Argument &argument : arguments) argument.read(cases);

  std::vector<std::vector<char>> first;
  for (const machine::Order &order : orders) {
    for (Argument &argument : arguments) argument.allocate();
    for (Argument &argument : arguments) argument.point(arguments);
    Arguments parameters;
    std::copy_if(arguments.begin(), arguments.end(), std::back_inserter(parameters), [](const Argument &argument) { return !argument.behind; });
    machine::run_grid(grid, block, shared_bytes, order, found->second(parameters));
    for (Argument &argument : arguments) argument.unpoint();
    for (size_t i = 0; i < arguments.size(); ++i) {
      Argument &argument = arguments[i];
      const char *begin = argument.start(), *end = begin + argument.bytes.size();
      if (&order == &orders.front()) {
        first.emplace_back(begin, end);
      } else if (const auto [a, b] = std::mismatch(begin, end, first[i].begin()); a != end) {
        fail("the result depends on the order of the threads: argument %zu differs at byte %zu between orders %s and %s (seed %u); a barrier is missing", i,
             size_t(a - begin), order_names[orders.front().kind], order_names[order.kind], order.seed);
      }
      argument.release(i);
    }
  }
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].is_written() && !first[i].empty()) fwrite(first[i].data(), 1, first[i].size(), results);
  putc('.', results);
  fflush(results); // the harness counts the finished cases of a run that fails
}

constexpr unsigned case_seconds = 60;

inline int run(const char *cases_path, const char *results_path) {
  CaseFile cases{fopen(cases_path, "rb")};
  FILE *results = fopen(results_path, "wb");
  if (!cases.file || !results) {
    perror("kernels-on-host");
    return 1;
  }
  // Where a sanitizer stops a kernel it names the source line; this adds the thread.
  __sanitizer_set_death_callback(machine::print_position);
  signal(SIGALRM, [](int) { fail("still running after %u s: an endless loop?", case_seconds); });
  while (!cases.at_end()) {
    alarm(case_seconds);
    run_case(cases, results);
  }
  fclose(results);
  return 0;
}

} // namespace runner

// What the process has allocated at exit is no kernel's leak.
extern "C" const char *__asan_default_options() { return "detect_leaks=0"; }

int main(int argc, char **argv) {
  if (argc == 3) return runner::run(argv[1], argv[2]);
  fprintf(stderr, "usage: %s CASES RESULTS\n", argv[0]);
  return 2;
}
