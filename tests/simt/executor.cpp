// Runs CUDA kernels on the CPU (cuda_runtime.h): one block after the other, each thread a fiber that gives way only
// where it waits, at a barrier or in a warp operation. Errors that name block, thread and line: a barrier that not all
// threads of the block reach at the same place; a warp operation whose lanes never meet; the value of an exited lane.
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

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;  // far above the frames of any kernel
constexpr int kWarp = 32;
uint64_t order_seed = 0;

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

using Context = void* [5];  // of __builtin_setjmp, which neither makes system calls nor is looked at by sanitizers

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
    void (*operation)(const Lanes&);
  } warp;
  std::deque<Group> copies;  // under way; the last group is not committed
};

// Apart from the other half, as GCC wants it.
[[noreturn]] __attribute__((noinline)) void jump(Context& to) { __builtin_longjmp(to, 1); }

__attribute__((noinline)) void leave(Context& from, Context& to) {
  if (__builtin_setjmp(from) == 0) jump(to);
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
      fiber.start.uc_stack.ss_sp = stack_of(i);
      fiber.start.uc_stack.ss_size = kStackBytes;
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

 private:
  // A fiber's life: the kernel's body, once for each block.
  static void live() {
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
    start(fiber);
  }

  __attribute__((noinline)) void start(Fiber& fiber) {
    if (__builtin_setjmp(scheduler_) == 0) setcontext(&fiber.start);
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
    self.warp.operation(lanes);
    for (size_t lane = 0; lane < count; ++lane)
      if (lanes.data[lane]) fibers_[first + lane].state = State::kReady;
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
  }

  [[noreturn]] void stuck(size_t i, const char* what) const {
    throw std::runtime_error(describe(i) + what + at(fibers_[i].site));
  }

  static bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
  static std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ") ";
  }
  std::string describe(size_t i) const { return "block " + text(blockIdx) + "thread " + text(fibers_[i].index); }

  void (*body_)(void*);
  void* context_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> order_;
  std::mt19937_64 random_{order_seed};
  Context scheduler_;
  size_t running_ = 0;
  std::exception_ptr error_;
};

struct Range {
  char* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* address) const { return size_t(static_cast<const char*>(address) - begin) < bytes; }
};

// The calling thread's thread-local storage of this module: the __shared__ variables of all kernels.
Range static_shared() {
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

Range statics;

// Every byte 0xff is NaN in all floating-point types and out of range as an index.
void poison_shared_memory(const Block& block) {
  std::memset(statics.begin, 0xff, statics.bytes);
  std::memset(block.shared.get(), 0xff, block.shared_bytes);
}

}  // namespace

void barrier(Site site) { current->wait(State::kAtBarrier, site); }

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

bool is_shared(const void* address) {
  return statics.holds(address) || Range{current->shared.get(), current->shared_bytes}.holds(address);
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
}
void commit_copies() { current->self().copies.emplace_back(); }
void wait_for_copies(size_t groups_left) {
  for (auto& copies = current->self().copies; copies.size() - 1 > groups_left; copies.pop_front())
    for (const Copy& copy : copies.front()) std::memcpy(copy.shared, copy.data, sizeof copy.data);
}

void run(dim3 grid, dim3 size, size_t shared, void (*body)(void*), void* context) {
  std::exception_ptr error;
  // A thread of its own: its thread-local storage is nothing but shared memory.
  std::thread([&] {
    try {
      Block block(size, shared, body, context);
      statics = static_shared();
      current = &block;
      blockDim = {size.x, size.y, size.z};
      gridDim = {grid.x, grid.y, grid.z};
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = {x, y, z};
            poison_shared_memory(block);
            block.run();
          }
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
