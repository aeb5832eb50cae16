// Tensor -> pointer, size, stream; dtypes -> template arguments. Guards memory safety only: what a user can get wrong is checked in Python, with names
// and values, before an op is called. Every op writes into tensors that Python allocated, so that a failed allocation is PyTorch's own error.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "kernels.h"

namespace fastft::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct DtypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct DtypeOf<bf16> {
  static constexpr ScalarType value = ScalarType::BFloat16;
};
template <>
struct DtypeOf<f16> {
  static constexpr ScalarType value = ScalarType::Half;
};
template <>
struct DtypeOf<int64_t> {
  static constexpr ScalarType value = ScalarType::Long;
};
template <>
struct DtypeOf<int32_t> {
  static constexpr ScalarType value = ScalarType::Int;
};
template <>
struct DtypeOf<uint8_t> {
  static constexpr ScalarType value = ScalarType::Byte;
};

[[noreturn]] inline void refuse(const char* name, const char* why) {
  throw std::runtime_error(std::string("fastft: tensor '") + name + "' " + why +
                           "; call the op through fastft.functional");
}

// Where the op of this thread runs: a GPU's index while it has its stream (StreamLease).
constexpr int32_t kCpu = -1;
inline thread_local int32_t device_of_op = kCpu;

inline void need_on(int32_t device, const Tensor& tensor, const char* name) {
  const bool there = device == kCpu ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == device;
  if (!there) refuse(name, "is on another device");
}

// The pointer of a tensor there, of exactly this dtype. An empty tensor's may be null.
template <class T>
T* data_of(const Tensor& tensor, const char* name, int32_t device = device_of_op) {
  if (tensor.scalar_type() != DtypeOf<std::remove_const_t<T>>::value) refuse(name, "has the wrong dtype");
  need_on(device, tensor, name);
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// What a tensor must be: dense, of exactly so many elements; or a matrix whose rows lie further apart than those take.
struct Shape {
  int64_t numel = 1, cols = 0, stride = 0;  // stride: 0 where it is dense

  Shape(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) numel *= size;
  }
  // A matrix whose rows lie as those of `model`, on the CPU.
  static Shape rows_like(const Tensor& model, int64_t rows, int64_t cols) {
    Shape shape{rows, cols};
    if (model.is_cpu() && model.dim() == 2 && !model.is_contiguous() && model.stride(0) > cols)
      shape.cols = cols, shape.stride = model.stride(0);
    return shape;
  }
  void need(const Tensor& tensor, const char* name) const {
    if (tensor.numel() != numel) refuse(name, "has the wrong size");
    if (stride == 0 && !tensor.is_contiguous()) refuse(name, "is not contiguous");
    if (stride == 0) return;
    if (tensor.dim() != 2 || tensor.size(1) != cols) refuse(name, "has the wrong size");
    if (tensor.stride(0) != stride || (tensor.stride(1) != 1 && cols > 1)) refuse(name, "has other strides");
  }
  int64_t extent() const { return stride == 0 ? numel : (numel / cols - 1) * stride + cols; }
};

template <class T>
T* pointer(const Tensor& tensor, const char* name, const Shape& shape, int32_t device = device_of_op) {
  T* const data = data_of<T>(tensor, name, device);
  shape.need(tensor, name);
  return data;
}
template <class T>
T* pointer(const std::optional<Tensor>& tensor, const char* name, const Shape& shape) {
  return tensor ? pointer<T>(*tensor, name, shape) : nullptr;
}

constexpr size_t kHugePage = size_t(2) << 20;
// Asks for pages of that size, wholly inside, where the system may give some and memory has not been written to yet: a page fault costs more than the 4 KB it
// brings. What `is_new`, of nobody else's before, is known to have them from now on.
void advise_huge_pages(void* data, size_t bytes, bool is_new);
size_t in_small_pages(const void* data, size_t bytes);  // Host's

template <class T>
T* fresh(const Tensor& tensor, const char* name, const Shape& shape) {
  T* const data = pointer<T>(tensor, name, shape);
  if (tensor.is_cpu()) advise_huge_pages(data, sizeof(T) * size_t(shape.extent()), false);
  return data;
}
template <class T>
T* fresh(const std::optional<Tensor>& tensor, const char* name, const Shape& shape) {
  return tensor ? fresh<T>(*tensor, name, shape) : nullptr;
}

// Two types as a value: with_dtypes calls body(Types<T, W>{}) for the dtypes of activations and parameters.
template <class A, class B>
struct Types {
  using T = A;
  using W = B;
};

template <bool kCuda, class Body>
void with_dtypes(ScalarType activation, ScalarType parameter, const Body& body) {
#define FASTFT_X(suffix, T, W) \
  if (activation == DtypeOf<T>::value && parameter == DtypeOf<W>::value) return body(Types<T, W>{});
  if constexpr (kCuda) {
    FASTFT_CUDA_DTYPES(FASTFT_X)
  } else {
    FASTFT_CPU_DTYPES(FASTFT_X)
  }
#undef FASTFT_X
  throw std::runtime_error("fastft: no kernel for these dtypes; call the op through fastft.functional");
}

// What a CPU kernel runs on: torch's thread pool, and scratch memory that outlives the call in a pool of the process (no page faults, huge pages).
class HostLease {
 public:
  HostLease();
  ~HostLease();
  HostLease(const HostLease&) = delete;
  HostLease& operator=(const HostLease&) = delete;
  operator const Host&() const { return host_; }

 private:
  static constexpr int kMaxBlocks = 16;
  struct Block {
    void* data;
    size_t bytes;
  };
  static void* acquire(void* lease, size_t bytes);
  Host host_;
  Block blocks_[kMaxBlocks];
  int count_ = 0;
};

// What a CUDA kernel runs on: the current stream of the tensor's device, which is the current device meanwhile, and the
// only one whose pointers can be taken.
class StreamLease {
 public:
  explicit StreamLease(const Tensor& on);
  ~StreamLease() { device_of_op = kCpu; }
  StreamLease(const StreamLease&) = delete;
  StreamLease& operator=(const StreamLease&) = delete;
  operator Stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

}  // namespace fastft::binding
