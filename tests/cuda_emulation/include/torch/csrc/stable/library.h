// Registration of operators, for the emulator: they are called by name with boxed arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <type_traits>
#include <utility>

namespace emulator {

/// Laid out as tests/cuda_emulation/__init__.py fills it.
struct Value {
  int32_t kind;  // 0 none, 1 integer, 2 tensor
  int64_t integer;
  torch::stable::TensorData tensor;
};

using Boxed = int64_t (*)(const Value* arguments);

struct Library {
  void def(const char* schema);
  void impl(const char* name, Boxed operation);
};

struct Registration {
  explicit Registration(void (*fill)(Library&)) {
    Library library;
    fill(library);
  }
};

template <typename T>
T unbox(const Value& value) {
  if constexpr (std::is_same_v<T, torch::stable::Tensor>) {
    return torch::stable::Tensor(value.tensor);
  } else if constexpr (std::is_same_v<T, std::optional<torch::stable::Tensor>>) {
    return value.kind == 0 ? std::nullopt : std::optional<torch::stable::Tensor>(torch::stable::Tensor(value.tensor));
  } else {
    return static_cast<T>(value.integer);
  }
}

template <auto kFunction>
struct Box;
template <typename Result, typename... Parameters, Result (*kFunction)(Parameters...)>
struct Box<kFunction> {
  template <size_t... kIndex>
  static int64_t call_with(const Value* arguments, std::index_sequence<kIndex...>) {
    if constexpr (std::is_void_v<Result>) {
      kFunction(unbox<Parameters>(arguments[kIndex])...);
      return 0;
    } else {
      return kFunction(unbox<Parameters>(arguments[kIndex])...);
    }
  }
  static int64_t call(const Value* arguments) { return call_with(arguments, std::index_sequence_for<Parameters...>{}); }
};

}  // namespace emulator

#define MISA_EMULATED_JOIN_(a, b) a##b
#define MISA_EMULATED_JOIN(a, b) MISA_EMULATED_JOIN_(a, b)
#define MISA_EMULATED_LIBRARY(library, function) MISA_EMULATED_LIBRARY_(library, function)
#define MISA_EMULATED_LIBRARY_(library, function)         \
  static void function(emulator::Library& library);       \
  static const emulator::Registration function##_registered(function); \
  static void function(emulator::Library& library)
#define STABLE_TORCH_LIBRARY_FRAGMENT(name, library) \
  MISA_EMULATED_LIBRARY(library, MISA_EMULATED_JOIN(emulated_fragment_, __LINE__))
#define STABLE_TORCH_LIBRARY_IMPL(name, key, library) \
  MISA_EMULATED_LIBRARY(library, MISA_EMULATED_JOIN(emulated_impl_, __LINE__))
#define TORCH_BOX(function) (&emulator::Box<function>::call)
