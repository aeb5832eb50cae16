// Runs CUDA kernels on the CPU (cuda_runtime.h): one block after the other, each thread a fiber that gives way only
// where it waits, at a barrier or in a warp operation. Errors that name block, thread and line: a barrier that not all
// threads of the block reach at the same place; a warp operation whose lanes never meet; the value of an exited lane.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

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

struct Fiber {
  ucontext_t start;
  bool started = false;
  jmp_buf place;  // where it goes on
  uint3 index;
  State state;
  Site site;       // of the wait
  unsigned mask;   // of the warp operation it waits in
  uint64_t value;  // given to it
  Lanes received;  // got from it
};

// swapcontext would do for this, too, but makes a system call for the signal mask each time.
__attribute__((noinline)) void leave(jmp_buf from, jmp_buf to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

class Block;
__thread Block* current = nullptr;

class Block {
 public:
  Block(dim3 size, void (*body)(void*), void* context)
      : body_(body), context_(context), fibers_(size.x * size.y * size.z) {
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

  // One block of the grid; blockIdx says which.
  void run() {
    for (Fiber& fiber : fibers_) fiber.state = State::kReady;
    while (take_turns()) release();
  }

  Lanes wait(State state, Site site, unsigned mask, uint64_t value) {
    Fiber& self = fibers_[running_];
    self.state = state;
    self.site = site;
    self.mask = mask;
    self.value = value;
    leave(self.place, scheduler_);
    return self.received;
  }

  [[noreturn]] void fail(const char* what, Site site) const {
    throw std::runtime_error(describe(running_) + what + at(site));
  }

 private:
  // A fiber's life: the kernel's body, once for each block.
  static void live() {
    Block& block = *current;
    Fiber& self = block.fibers_[block.running_];
    for (;;) {
      try {
        block.body_(block.context_);
      } catch (...) {  // cannot cross to another stack: handed to the scheduler
        block.error_ = std::current_exception();
      }
      self.state = State::kExited;
      leave(self.place, block.scheduler_);
    }
  }

  void resume(size_t i) {
    Fiber& fiber = fibers_[i];
    running_ = i;
    threadIdx = fiber.index;
    if (fiber.started) return leave(scheduler_, fiber.place);
    fiber.started = true;
    if (_setjmp(scheduler_) == 0) setcontext(&fiber.start);
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
    const size_t first = i / kWarp * kWarp, lanes = std::min<size_t>(kWarp, fibers_.size() - first);
    if (!(self.mask >> (i - first) & 1)) stuck(i, "is not in the mask of its warp operation");
    Lanes result{{}, 0, 0};
    for (size_t lane = 0; lane < lanes; ++lane) {
      const Fiber& other = fibers_[first + lane];
      if (!(self.mask >> lane & 1) || other.state == State::kExited) continue;
      if (other.state != State::kInWarp || !same(other.site, self.site) || other.mask != self.mask) return false;
      result.values[lane] = other.value;
      result.present |= 1u << lane;
    }
    for (size_t lane = 0; lane < lanes; ++lane) {
      if (!(result.present >> lane & 1)) continue;
      Fiber& other = fibers_[first + lane];
      other.received = result;
      other.received.own = int(lane);
      other.state = State::kReady;
    }
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
  static std::string at(Site site) { return std::string(", ") + site.file + ":" + std::to_string(site.line); }
  static std::string text(uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ") ";
  }
  std::string describe(size_t i) const { return "block " + text(blockIdx) + "thread " + text(fibers_[i].index); }

  void (*body_)(void*);
  void* context_;
  std::vector<Fiber> fibers_;
  std::vector<size_t> order_;
  std::mt19937_64 random_{order_seed};
  jmp_buf scheduler_;
  size_t running_ = 0;
  std::exception_ptr error_;
};

// Every byte 0xff is NaN in all floating-point types and out of range as an index. The thread-local storage of this
// module holds the __shared__ variables of all kernels and the variables above, which are set after this.
void poison_shared_memory() {
  const auto poison = [](dl_phdr_info* module, size_t, void* inside) {
    char* const begin = static_cast<char*>(module->dlpi_tls_data);  // the calling thread's
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& segment = module->dlpi_phdr[i];
      if (segment.p_type != PT_TLS || inside < begin || inside >= begin + segment.p_memsz) continue;
      std::memset(begin, 0xff, segment.p_memsz);
      return 1;
    }
    return 0;
  };
  if (!dl_iterate_phdr(poison, &current)) throw std::logic_error("the module's thread-local storage was not found");
}

}  // namespace

void barrier(Site site) { current->wait(State::kAtBarrier, site, 0, 0); }
Lanes exchange(unsigned mask, uint64_t value, Site site) { return current->wait(State::kInWarp, site, mask, value); }
void fail(const char* what, Site site) { current->fail(what, site); }
void set_order(uint64_t seed) { order_seed = seed; }

void run(dim3 grid, dim3 size, void (*body)(void*), void* context) {
  std::exception_ptr error;
  // A thread of its own: its thread-local storage is nothing but shared memory.
  std::thread([&] {
    try {
      Block block(size, body, context);
      for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
          for (unsigned x = 0; x < grid.x; ++x) {
            poison_shared_memory();
            current = &block;
            blockIdx = {x, y, z};
            blockDim = {size.x, size.y, size.z};
            gridDim = {grid.x, grid.y, grid.z};
            block.run();
          }
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
