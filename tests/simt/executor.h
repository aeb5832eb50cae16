// Between the parts of the executor: executor.cpp runs the threads, race.cpp watches what they do to shared memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

struct Range {
  const char* begin = nullptr;
  size_t bytes = 0;
  const char* end() const { return begin + bytes; }
  bool holds(const void* address) const { return size_t(static_cast<const char*>(address) - begin) < bytes; }
};

bool running_a_kernel();
size_t running_thread();  // its number within the block
std::string name_of_thread(size_t);
[[noreturn]] void fail(const std::string& what);  // an error of the running thread

// What kernels compiled with -fsanitize=thread tell; without that, there is nothing to watch.
namespace race {

bool is_watching();
void begin_launch(Range statics, Range dynamics, size_t threads);
void end_launch();
void begin_block();                             // nothing is written yet
void barrier();                                 // of the whole block
void lanes_meet(size_t first, unsigned lanes);  // __syncwarp; `first` is the thread that is lane 0
// Of the running thread:
void atomic(const void* address, size_t bytes, const void* pc);
void copy_starts(const void* shared, size_t bytes, const void* pc);
void copy_arrives(const void* shared, size_t bytes, const void* pc);

}  // namespace race
}  // namespace simt
