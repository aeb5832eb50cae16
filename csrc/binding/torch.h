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

// The pointer of a dense tensor there, of exactly this dtype and number of elements. An empty tensor's may be null.
template <class T>
T* pointer(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape,
           int32_t device = device_of_op) {
  using Stored = std::remove_const_t<T>;
  int64_t numel = 1;
  for (int64_t size : shape) numel *= size;
  if (tensor.scalar_type() != DtypeOf<Stored>::value) refuse(name, "has the wrong dtype");
  if (tensor.numel() != numel) refuse(name, "has the wrong size");
  need_on(device, tensor, name);
  if (!tensor.is_contiguous()) refuse(name, "is not contiguous");
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  return tensor ? pointer<T>(*tensor, name, shape) : nullptr;
}

// A matrix whose rows may lie further apart, on the CPU, than their elements take: like those of `model`.
struct Matrix {
  int64_t count, cols, stride;
  Matrix(int64_t count, int64_t cols, const Tensor& model)
      : count(count),
        cols(cols),
        stride(model.is_cpu() && model.dim() == 2 && !model.is_contiguous() ? model.stride(0) : cols) {
    if (stride < cols) refuse("a matrix", "has rows that overlap");
  }
};
template <class T>
T* pointer(const Tensor& tensor, const char* name, const Matrix& rows) {
  if (rows.stride == rows.cols) return pointer<T>(tensor, name, {rows.count, rows.cols});
  if (tensor.scalar_type() != DtypeOf<std::remove_const_t<T>>::value) refuse(name, "has the wrong dtype");
  if (tensor.dim() != 2 || tensor.size(0) != rows.count || tensor.size(1) != rows.cols)
    refuse(name, "has the wrong size");
  need_on(device_of_op, tensor, name);
  if (tensor.stride(0) != rows.stride || (tensor.stride(1) != 1 && rows.cols > 1)) refuse(name, "has other strides");
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}
template <class T>
T* pointer(const std::optional<Tensor>& tensor, const char* name, const Matrix& rows) {
  return tensor ? pointer<T>(*tensor, name, rows) : nullptr;
}

// For what a kernel on the CPU writes whole: huge pages where the memory is new, since a page fault costs more than the 4 KB it brings.
void advise_huge_pages(void* data, size_t bytes);

template <class T>
T* fresh(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  T* const data = pointer<T>(tensor, name, shape);
  if (tensor.is_cpu()) advise_huge_pages(data, sizeof(T) * size_t(tensor.numel()));
  return data;
}
template <class T>
T* fresh(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  return tensor ? fresh<T>(*tensor, name, shape) : nullptr;
}
template <class T>
T* fresh(const Tensor& tensor, const char* name, const Matrix& rows) {
  T* const data = pointer<T>(tensor, name, rows);
  if (tensor.is_cpu() && rows.count > 0)
    advise_huge_pages(data, sizeof(T) * size_t((rows.count - 1) * rows.stride + rows.cols));
  return data;
}
template <class T>
T* fresh(const std::optional<Tensor>& tensor, const char* name, const Matrix& rows) {
  return tensor ? fresh<T>(*tensor, name, rows) : nullptr;
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
