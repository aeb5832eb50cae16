// HostLease and StreamLease (torch.h); ops that ask and switch the instruction set.
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

#include "torch.h"

// Weak: torch without CUDA has no such function, and its address is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fastft::binding {
namespace {

void* map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  // The words are PyTorch's, since accelerate's search for a batch size that fits looks for them.
  if (data == MAP_FAILED)
    throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: fastft needs " + std::to_string(bytes) +
                             " bytes of scratch, out of memory");
  advise_huge_pages(data, bytes, true);
  return data;
}

// Idle blocks of the process. A request takes the smallest block that holds it; if none does, it replaces the largest idle one, so that there are never
// more blocks than were once in use together. Nothing is destroyed at exit: a thread may still compute.
struct Pool {
  std::mutex mutex;
  std::vector<std::pair<size_t, void*>> idle;
};
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

HostLease::HostLease() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  host_.threads = int(threads);
  host_.parallel_for = [](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
    struct Call {
      void (*body)(void*, int64_t, int64_t);
      void* context;
    } call{body, context};
    torch_parallel_for(
        0, tasks, 1,
        [](int64_t begin, int64_t end, void* data) {
          const Call& c = *static_cast<Call*>(data);
          c.body(c.context, begin, end);
        },
        &call);
  };
  host_.scratch_owner = this;
  host_.scratch = &HostLease::acquire;
  host_.in_small_pages = &in_small_pages;
}

HostLease::~HostLease() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  for (int i = 0; i < count_; ++i) pool().idle.emplace_back(blocks_[i].bytes, blocks_[i].data);
}

void* HostLease::acquire(void* owner, size_t bytes) {
  auto& lease = *static_cast<HostLease*>(owner);
  if (lease.count_ == kMaxBlocks) throw std::logic_error("fastft: a kernel asked for more than 16 blocks of scratch");
  bytes = (bytes + kHugePage) / kHugePage * kHugePage;
  Block found{nullptr, 0};
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    auto& idle = pool().idle;
    auto best = idle.end(), largest = idle.end();
    for (auto it = idle.begin(); it != idle.end(); ++it) {
      if (it->first >= bytes && (best == idle.end() || it->first < best->first)) best = it;
      if (largest == idle.end() || it->first > largest->first) largest = it;
    }
    const bool fits = best != idle.end();
    if (!fits) best = largest;
    if (best != idle.end()) {
      found = {best->second, best->first};
      idle.erase(best);
    }
    if (!fits && found.data) {
      munmap(found.data, found.bytes);
      found = {nullptr, 0};
    }
  }
  if (!found.data) found = {map(bytes), bytes};
  lease.blocks_[lease.count_++] = found;
  return found.data;
}

namespace {

int32_t gpu_of(const Tensor& tensor) {
  if (!tensor.is_cuda())
    throw std::runtime_error("fastft: an op's tensors are on different devices; call it through fastft.functional");
  return tensor.get_device_index();
}

}  // namespace

StreamLease::StreamLease(const Tensor& on) : guard_(gpu_of(on)) {
  if (&aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("fastft: this torch has no CUDA");
  if (aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream_) != 0)
    throw std::runtime_error("fastft: cannot get the current CUDA stream");
  device_of_op = on.get_device_index();
}

namespace {

std::string isa() { return cpu::isa(); }
std::string isas() { return cpu::isas(); }
void set_isa(std::string name) {
  if (!cpu::set_isa(name.c_str()))
    throw std::runtime_error("fastft: instruction set '" + name + "' is not one of: " + cpu::isas());
}
std::string bf16_products() { return cpu::bf16_products(); }
void set_bf16_products(std::string how) {
  if (!cpu::set_bf16_products(how.c_str()))
    throw std::runtime_error("fastft: products of bf16 are made by 'dot' or 'widen', not by '" + how + "'");
}
bool has_cuda() {
#ifdef FASTFT_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastft, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("bf16() -> str");
  m.def("set_bf16(str how) -> ()");
  m.def("has_cuda() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastft, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("bf16", TORCH_BOX(&bf16_products));
  m.impl("set_bf16", TORCH_BOX(&set_bf16_products));
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}

}  // namespace fastft::binding
