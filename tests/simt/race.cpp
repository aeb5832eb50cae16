// Finds races in shared memory: two threads touch a byte of it, one of them writes, and neither a barrier nor a
// __syncwarp comes between. Also reads of what no thread of the block has written or cp.async has not delivered, and
// accesses at addresses that are not aligned as their type asks. Found whatever the order of threads, since it is what
// happened before that counts, not when.
//
// Kernels are compiled with -fsanitize=thread and linked without its library: the calls that the compiler puts before
// each access of memory come here (Serebryany et al. 2011, Dynamic race detection with LLVM compiler, RV). Each word of
// shared memory keeps its last write and two reads; more need not be kept, because two that are not ordered among each
// other lie in different warps, or else a third thread is ordered after neither or after both. Time is counted in
// barriers, and between them, in a warp, by vector clocks (Flanagan and Freund 2009, FastTrack, PLDI).
#pragma GCC optimize("O2")  // kernels themselves are compiled for little
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"

namespace simt::race {
namespace {

constexpr size_t kWarp = 32;

// kUnderWay: the write of a cp.async that has not been waited for; kArrives: its end.
enum Kind : uint8_t { kPlain, kAtomic, kUnderWay, kArrives };

struct Access {
  uint32_t epoch = 0;  // barriers and blocks before it; 0: there was none
  uint32_t clock = 0;  // the thread's count of __syncwarps since then
  int32_t place = 0;   // in the code, relative to `anchor`
  uint16_t thread = 0;
  Kind kind = kPlain;
};

struct Past {  // of a word of shared memory, or of a byte
  Access write, reads[2];
};

struct Warp {
  uint32_t epoch = 0;                // of the clocks: older ones count as unset
  uint32_t seen[kWarp][kWarp] = {};  // [i][j]: what lane i knows of lane j's clock
};

void anchor() {}
int32_t place_of(const void* pc) { return int32_t(static_cast<const char*>(pc) - reinterpret_cast<char*>(&anchor)); }

// Words are looked at whole until a part of one is touched; from then on, until the block ends, its bytes are.
struct Region {
  Range memory;
  std::vector<Past> words, bytes;
  std::vector<uint32_t> split;  // epoch

  void set(Range range) {
    memory = range;
    if (bytes.size() >= range.bytes) return;
    split.resize(range.bytes / 4 + 1);
    words.resize(split.size());
    bytes.resize(4 * split.size());
  }
};

bool watching = false;  // whether any kernel was compiled for it
Region statics, dynamics;
std::vector<Warp> warps;
uint32_t epoch = 0, first_of_block = 0;

uint32_t clock_of(size_t thread) {
  const Warp& warp = warps[thread / kWarp];
  return warp.epoch == epoch ? warp.seen[thread % kWarp][thread % kWarp] : 1;
}

bool before(const Access& earlier, size_t thread) {
  if (earlier.epoch != epoch || earlier.thread == thread) return true;
  if (earlier.thread / kWarp != thread / kWarp) return false;
  const Warp& warp = warps[thread / kWarp];
  return warp.epoch == epoch && warp.seen[thread % kWarp][earlier.thread % kWarp] >= earlier.clock;
}

// "csrc/cuda/x.cu:12", of the innermost function that is not one of those that stand in for CUDA's.
std::string source_of(int32_t place) {
  Dl_info module;
  const uintptr_t address = reinterpret_cast<uintptr_t>(&anchor) + place - 1;  // within the call
  if (!dladdr(reinterpret_cast<void*>(address), &module)) return "?";
  char command[4096], line[4096];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx", module.dli_fname,
                size_t(address - reinterpret_cast<uintptr_t>(module.dli_fbase)));
  std::string found = "?";
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), &pclose);
  while (pipe && std::fgets(line, sizeof line, pipe.get())) {
    found = line;
    found.resize(std::min(found.find_first_of(" \n"), found.size()));
    if (found.find("simt/cuda_runtime.h") == std::string::npos && found.find("simt/mma_sm80.cuh") == std::string::npos)
      break;
  }
  return found;
}

struct Look {  // of the running thread at memory
  Access now;
  bool writes;

  [[noreturn]] void report(const std::string& what) const {
    fail((writes ? "writes " : "reads ") + what + ", " + source_of(now.place));
  }
  [[noreturn]] void report(const std::string& what, const Access& other) const {
    report(what + " thread " + name_of_thread(other.thread) + "at " + source_of(other.place));
  }
  void check(const Access& other, const char* does) const {
    if (!before(other, now.thread) && !(other.kind == kAtomic && now.kind == kAtomic))
      report(std::string("shared memory that, with no barrier between, is ") + does + " by", other);
  }
};

void keep_read(Access (&reads)[2], const Access& now) {
  for (Access& read : reads)
    if (before(read, now.thread)) {  // whoever comes after this one comes after that one
      read = now;
      return;
    }
  if (reads[0].thread / kWarp == reads[1].thread / kWarp) reads[1] = now;
}

void touch(Past& past, const Look& look) {
  if (past.write.epoch < first_of_block) {
    if (!look.writes) look.report("shared memory that no thread of the block has written");
  } else if (past.write.kind == kUnderWay && look.now.kind != kArrives) {
    look.report("shared memory to which a cp.async is under way, of", past.write);
  } else {
    look.check(past.write, "written");
  }
  if (!look.writes) return keep_read(past.reads, look.now);
  for (const Access& read : past.reads) look.check(read, "read");
  past.write = look.now;
}

__attribute__((noinline)) void touch_shared(Region& region, const void* address, size_t bytes, bool writes, Kind kind,
                                            const void* pc) {
  const size_t thread = running_thread(), begin = static_cast<const char*>(address) - region.memory.begin;
  const Look look{{epoch, clock_of(thread), place_of(pc), uint16_t(thread), kind}, writes};
  if (begin + bytes > region.memory.bytes) look.report("beyond the end of shared memory");
  for (size_t at = begin; at < begin + bytes;) {
    const size_t word = at / 4;
    if (region.split[word] < first_of_block) {
      if (at % 4 == 0 && at + 4 <= begin + bytes) {
        touch(region.words[word], look);
        at += 4;
        continue;
      }
      std::fill_n(&region.bytes[4 * word], 4, region.words[word]);
      region.split[word] = epoch;
    }
    touch(region.bytes[at++], look);
  }
}

Range near;  // from the first to the last byte of shared memory: most accesses are elsewhere

inline void touch(const void* address, size_t bytes, bool writes, Kind kind, const void* pc) {
  if (!near.holds(address)) return;
  for (Region* region : {&statics, &dynamics})
    if (region->memory.holds(address)) touch_shared(*region, address, bytes, writes, kind, pc);
}

__attribute__((noinline)) void misaligned(size_t bytes, bool writes, const void* pc) {
  if (running_a_kernel())
    fail(std::string(writes ? "writes " : "reads ") + std::to_string(bytes) +
         " bytes at an address that is no multiple of that, " + source_of(place_of(pc)));
}

template <size_t kBytes>
inline void touch_aligned(const void* address, bool writes, const void* pc) {
  if (reinterpret_cast<uintptr_t>(address) % kBytes) misaligned(kBytes, writes, pc);
  touch(address, kBytes, writes, kPlain, pc);
}

}  // namespace

void begin_launch(Range of_statics, Range of_dynamics, size_t threads) {
  if (!watching) return;
  statics.set(of_statics);
  dynamics.set(of_dynamics);
  near = of_statics;
  if (of_dynamics.bytes) {
    near.begin = std::min(of_statics.begin, of_dynamics.begin);
    near.bytes = std::max(of_statics.end(), of_dynamics.end()) - near.begin;
  }
  warps.resize(std::max(warps.size(), (threads + kWarp - 1) / kWarp));
}
void end_launch() { near = {}; }
bool is_watching() { return watching; }
void begin_block() { first_of_block = ++epoch; }
void barrier() { ++epoch; }

void lanes_meet(size_t first, unsigned lanes) {
  if (!watching) return;
  Warp& warp = warps[first / kWarp];
  if (warp.epoch != epoch) {
    warp.epoch = epoch;
    std::memset(warp.seen, 0, sizeof warp.seen);
    for (size_t i = 0; i < kWarp; ++i) warp.seen[i][i] = 1;
  }
  uint32_t all[kWarp] = {};
  for (size_t i = 0; i < kWarp; ++i)
    for (size_t j = 0; j < kWarp; ++j)
      if (lanes >> i & 1) all[j] = std::max(all[j], warp.seen[i][j]);
  for (size_t i = 0; i < kWarp; ++i)
    if (lanes >> i & 1) {
      std::memcpy(warp.seen[i], all, sizeof all);
      ++warp.seen[i][i];
    }
}

void atomic(const void* address, size_t bytes, const void* pc) {
  touch(address, bytes, false, kAtomic, pc);
  touch(address, bytes, true, kAtomic, pc);
}
void copy_starts(const void* shared, size_t bytes, const void* pc) { touch(shared, bytes, true, kUnderWay, pc); }
void copy_arrives(const void* shared, size_t bytes, const void* pc) { touch(shared, bytes, true, kArrives, pc); }

}  // namespace simt::race

// ---- what the compiler calls

extern "C" {
using namespace simt::race;

void __tsan_init() { watching = true; }

#define SIMT_ACCESSES(bytes)                                                                                    \
  void __tsan_read##bytes(void* at) { touch_aligned<bytes>(at, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { touch_aligned<bytes>(at, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { touch(at, bytes, false, kPlain, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { touch(at, bytes, true, kPlain, __builtin_return_address(0)); }
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
#undef SIMT_ACCESSES

void __tsan_read_range(void* at, size_t bytes) { touch(at, bytes, false, kPlain, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { touch(at, bytes, true, kPlain, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
}
