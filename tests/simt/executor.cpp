// Runs CUDA kernels on the CPU (cuda_runtime.h): one block after the other, each thread a fiber that gives way only
// where it waits, at a barrier or in a warp operation. Errors that name block, thread and line: a barrier that not all
// threads of the block reach at the same place; a warp operation whose lanes never meet; the value of an exited lane.
#pragma GCC optimize("O2")  // kernels themselves are compiled for little
#include "executor.h"

#include <dlfcn.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

// AddressSanitizer's, where it is in the process.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** stack, size_t* bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const void*, size_t);
}

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;  // far above the frames of any kernel
constexpr int kWarp = 32;
uint64_t order_seed = 0;
size_t last_blocks = 0;

enum class State { kReady, kAtBarrier, kInWarp, kExited };

// Kept from launch to launch: one at a time runs, and fresh memory costs a page fault per thread.
char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

// A copy of cp.async: it arrives when its thread waits for its group.
struct Copy {
  void* shared;
  char data[16];
};
using Group = std::vector<Copy>;

struct Context {       // of a fiber, or of the scheduler
  void* registers[5];  // __builtin_setjmp's, which neither makes system calls nor is looked at by sanitizers
  const void* stack = nullptr;
  size_t bytes = 0;
};

struct Fiber {
  ucontext_t start;
  bool started = false;
  Context place;  // where it goes on
  uint3 index;
  State state;
  Site site;  // of the wait
  struct {    // the warp operation it waits in
    unsigned mask;
    bool whole;  // no lane may have exited
    void* data;
    void (*operation)(const Lanes&);  // null: __syncwarp
  } warp;
  std::deque<Group> copies;  // under way; the last group is not committed
};

// Apart from the other half, as GCC wants it.
[[noreturn]] __attribute__((noinline)) void jump(Context& to) { __builtin_longjmp(to.registers, 1); }

// `go` takes the thread to another context, from which it comes back here.
template <class Go>
__attribute__((noinline)) void leave(Context& from, Context& to, const Go& go) {
  void* fake_stack = nullptr;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.bytes);
  if (__builtin_setjmp(from.registers) == 0) go();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
void leave(Context& from, Context& to) {
  leave(from, to, [&] { jump(to); });
}

class Block;
Block* current = nullptr;

class Block {
 public:
  Block(dim3 size, size_t shared, void (*body)(void*), void* context)
      : shared_bytes(shared),
        shared(new char[shared]),
        body_(body),
        context_(context),
        fibers_(size.x * size.y * size.z) {
    for (size_t i = 0; i < fibers_.size(); ++i) {
      order_.push_back(i);
      Fiber& fiber = fibers_[i];
      fiber.index = {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
      getcontext(&fiber.start);
      fiber.place.stack = fiber.start.uc_stack.ss_sp = stack_of(i);
      fiber.place.bytes = fiber.start.uc_stack.ss_size = kStackBytes;
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.place.stack, kStackBytes);
      makecontext(&fiber.start, &Block::live, 0);
    }
  }

  const size_t shared_bytes;
  const std::unique_ptr<char[]> shared;  // dynamic; of this size exactly, so that ASan sees what lies beyond

  // One block of the grid; blockIdx says which.
  void run() {
    for (Fiber& fiber : fibers_) {
      fiber.state = State::kReady;
      fiber.copies.assign(1, {});
    }
    while (take_turns()) release();
  }

  size_t running() const { return running_; }
  Fiber& self() { return fibers_[running_]; }

  void wait(State state, Site site) {
    self().state = state;
    self().site = site;
    leave(self().place, scheduler_);
  }

  // Never goes on: nothing is thrown across kernels, whose frames need no cleaning up.
  [[noreturn]] void fail(const std::string& what) {
    error_ = std::make_exception_ptr(std::runtime_error(describe(running_) + what));
    leave(self().place, scheduler_);
    std::terminate();
  }

  static std::string at(Site site) { return std::string(", ") + site.file + ":" + std::to_string(site.line); }
  std::string name(size_t i) const { return text(fibers_[i].index); }

 private:
  // A fiber's life: the kernel's body, once for each block.
  static void live() {
    Context& scheduler = current->scheduler_;
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.bytes);
    for (;;) {
      current->body_(current->context_);
      current->wait(State::kExited, {});
    }
  }

  void resume(size_t i) {
    Fiber& fiber = fibers_[i];
    running_ = i;
    threadIdx = fiber.index;
    if (fiber.started) return leave(scheduler_, fiber.place);
    fiber.started = true;
    leave(scheduler_, fiber.place, [&] { setcontext(&fiber.start); });
  }

  // Every fiber that can runs until it waits or exits. False when all have exited.
  bool take_turns() {
    if (order_seed) std::shuffle(order_.begin(), order_.end(), random_);
    bool any = false;
    for (size_t i : order_) {
      if (fibers_[i].state == State::kReady) {
        resume(i);
        if (error_) std::rethrow_exception(error_);
      }
      any |= fibers_[i].state != State::kExited;
    }
    return any;
  }

  void release() {
    bool released = false;
    for (size_t i = 0; i < fibers_.size(); ++i)
      if (fibers_[i].state == State::kInWarp) released |= release_lanes(i);
    if (!released) release_barrier();
  }

  // Completes the warp operation that fiber i waits in, if all lanes of its mask have come.
  bool release_lanes(size_t i) {
    const Fiber& self = fibers_[i];
    const size_t first = i / kWarp * kWarp, count = std::min<size_t>(kWarp, fibers_.size() - first);
    if (!(self.warp.mask >> (i - first) & 1)) stuck(i, "is not in the mask of its warp operation");
    Lanes lanes{};
    for (size_t lane = 0; lane < count; ++lane) {
      const Fiber& other = fibers_[first + lane];
      if (!(self.warp.mask >> lane & 1) || other.state == State::kExited) continue;
      if (other.state != State::kInWarp || !same(other.site, self.site) || other.warp.mask != self.warp.mask)
        return false;
      lanes.data[lane] = other.warp.data;
    }
    if (self.warp.whole && !std::all_of(lanes.data, lanes.data + kWarp, [](void* data) { return data; }))
      stuck(i, "takes all 32 lanes of a warp into an operation, of which some are not there");
    unsigned present = 0;
    for (size_t lane = 0; lane < count; ++lane) {
      if (!lanes.data[lane]) continue;
      fibers_[first + lane].state = State::kReady;
      present |= 1u << lane;
    }
    if (self.warp.operation)
      self.warp.operation(lanes);
    else
      race::lanes_meet(first, present);
    return true;
  }

  // Nothing moves any more: then all must stand at one and the same barrier.
  void release_barrier() {
    const Fiber& first = fibers_[0];
    for (size_t i = 0; i < fibers_.size(); ++i) {
      const Fiber& fiber = fibers_[i];
      if (fiber.state == State::kInWarp) stuck(i, "waits for lanes of its warp that do not come");
      if (fiber.state == State::kAtBarrier && (first.state != State::kAtBarrier || !same(fiber.site, first.site)))
        stuck(i, "is at a barrier that thread (0, 0, 0) is not at");
      if (fiber.state == State::kExited && first.state == State::kAtBarrier)
        throw std::runtime_error(describe(i) + "has exited, while others wait at a barrier" + at(first.site));
    }
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    race::barrier();
  }

  [[noreturn]] void stuck(size_t i, const char* what) const {
    throw std::runtime_error(describe(i) + what + at(fibers_[i].site));
  }

  static bool same(Site a, Site b) {
    return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
  }
  static std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ") ";
  }
  std::string describe(size_t i) const { return "block " + text(blockIdx) + "thread " + name(i); }

  void (*body_)(void*);
  void* context_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> order_;
  std::mt19937_64 random_{order_seed};
  Context scheduler_;
  size_t running_ = 0;
  std::exception_ptr error_;
};

// ---- shared memory

// The calling thread's thread-local storage of this module: the __shared__ variables of all kernels, or none if ASan
// watches them.
Range thread_local_storage() {
  static thread_local char inside;
  Range found;
  const auto look = [](dl_phdr_info* module, size_t, void* result) {
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      const Range range{static_cast<char*>(module->dlpi_tls_data), segment.p_memsz};
      if (segment.p_type != PT_TLS || !range.holds(&inside)) continue;
      *static_cast<Range*>(result) = range;
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(look, &found)) throw std::logic_error("the module's thread-local storage was not found");
  return found;
}

// The __shared__ variables of kernels that ASan watches. A function, since it is told of them before all constructors.
std::vector<Range>& watched_by_asan() {
  static std::vector<Range> ranges;
  return ranges;
}
Range statics;

// Every byte 0xff is NaN in all floating-point types and out of range as an index.
void poison(Range memory) { std::memset(const_cast<char*>(memory.begin), 0xff, memory.bytes); }
void poison_shared_memory(Range dynamics) {
  poison(statics);
  poison(dynamics);
  std::for_each(watched_by_asan().begin(), watched_by_asan().end(), poison);
}

std::unordered_map<const void*, std::vector<int64_t>> launched;

}  // namespace

void barrier(Site site) { current->wait(State::kAtBarrier, site); }

void sync_lanes(unsigned mask, Site site) {
  int nothing = 0;
  warp_operation(mask, &nothing, nullptr, site);
}
void warp_operation(unsigned mask, void* data, void (*operation)(const Lanes&), Site site) {
  current->self().warp = {mask, false, data, operation};
  current->wait(State::kInWarp, site);
}
void whole_warp_operation(void* data, void (*operation)(const Lanes&), Site site) {
  current->self().warp = {0xffffffffu, true, data, operation};
  current->wait(State::kInWarp, site);
}

void fail(const char* what, Site site) { current->fail(what + Block::at(site)); }
void set_order(uint64_t seed) { order_seed = seed; }
void set_last_blocks(size_t count) { last_blocks = count; }

bool running_a_kernel() { return current; }
size_t running_thread() { return current->running(); }
std::string name_of_thread(size_t thread) { return current->name(thread); }
void fail(const std::string& what) { current->fail(what); }

bool is_shared(const void* address) {
  const auto holds = [=](const Range& range) { return range.holds(address); };
  return holds(statics) || holds({current->shared.get(), current->shared_bytes}) ||
         std::any_of(watched_by_asan().begin(), watched_by_asan().end(), holds);
}
unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(current->shared.get()); }

size_t& dynamic_limit(const void* kernel) {
  static std::unordered_map<const void*, size_t> limits;
  return limits.try_emplace(kernel, 48 << 10).first->second;
}

void copy_later(void* shared, const void* bytes16) {
  Copy& copy = current->self().copies.back().emplace_back();
  copy.shared = shared;
  std::memcpy(copy.data, bytes16, sizeof copy.data);
  race::copy_starts(shared, sizeof copy.data, __builtin_return_address(0));
}
void commit_copies() { current->self().copies.emplace_back(); }
void wait_for_copies(size_t groups_left) {
  for (auto& copies = current->self().copies; copies.size() - 1 > groups_left; copies.pop_front())
    for (const Copy& copy : copies.front()) {
      std::memcpy(copy.shared, copy.data, sizeof copy.data);
      race::copy_arrives(copy.shared, sizeof copy.data, __builtin_return_address(0));
    }
}

void atomic_access(const void* address, size_t bytes, const void* place) { race::atomic(address, bytes, place); }
const std::unordered_map<const void*, std::vector<int64_t>>& launches() { return launched; }

void run(const void* kernel, dim3 grid, dim3 size, size_t shared, void (*body)(void*), void* context) {
  std::exception_ptr error;
  // A thread of its own: its thread-local storage is nothing but shared memory.
  std::thread([&] {
    try {
      Block block(size, shared, body, context);
      const Range dynamics{block.shared.get(), shared};
      statics = thread_local_storage();
      race::begin_launch(statics, dynamics, size_t(size.x) * size.y * size.z);
      blockDim = {size.x, size.y, size.z};
      gridDim = {grid.x, grid.y, grid.z};
      current = &block;
      std::vector<size_t> order(size_t(grid.x) * grid.y * grid.z);
      std::iota(order.begin(), order.end(), 0);
      if (last_blocks && last_blocks < order.size()) order.erase(order.begin(), order.end() - last_blocks);
      if (order_seed) std::shuffle(order.begin(), order.end(), std::mt19937_64(order_seed));
      for (size_t i : order) {
        blockIdx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
        if (race::is_watching())
          race::begin_block();
        else
          poison_shared_memory(dynamics);
        block.run();
      }
    } catch (...) {
      error = std::current_exception();
    }
    current = nullptr;
    race::end_launch();
  }).join();
  if (error) std::rethrow_exception(error);
  auto& counts = launched[kernel];
  counts.resize(std::max<size_t>(counts.size(), order_seed + 1));
  ++counts[order_seed];
}

}  // namespace simt

// ---- what AddressSanitizer is told of the variables of kernels that are compiled for it

extern "C" {
struct AsanGlobal {
  const char* begin;
  size_t bytes, bytes_with_redzone;
  const char *name, *file;
  size_t dynamic;
  const void* location;
  size_t indicator;
};

__attribute__((visibility("hidden"))) void __asan_register_globals(AsanGlobal* globals, size_t count) {
  using Register = void(AsanGlobal*, size_t);
  reinterpret_cast<Register*>(dlsym(RTLD_DEFAULT, "__asan_register_globals"))(globals, count);  // ASan's own
  // Names of constants of the compiler's begin with *.
  for (size_t i = 0; i < count; ++i)
    if (globals[i].name[0] != '*') simt::watched_by_asan().push_back({globals[i].begin, globals[i].bytes});
}
}
