// The part of torch's stable interface that the operators use, for the emulator.
#pragma once

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace torch::headeronly {

enum class ScalarType : int32_t { Byte = 0, Int = 3, Long = 4, Float = 6, Float8_e4m3fn = 24 };

}  // namespace torch::headeronly

namespace torch::stable {

/// Laid out as tests/cuda_emulation/__init__.py fills it.
struct TensorData {
  void* data;
  int64_t dim, sizes[4], strides[4];
  int32_t type, item_bytes;
};

class Tensor {
 public:
  explicit Tensor(const TensorData& data) : data_(data) {}
  void* data_ptr() const { return data_.data; }
  int64_t dim() const { return data_.dim; }
  int64_t size(int64_t i) const { return data_.sizes[i]; }
  int64_t stride(int64_t i) const { return data_.strides[i]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < data_.dim; ++i) count *= data_.sizes[i];
    return count;
  }
  bool is_cuda() const { return true; }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int64_t i = data_.dim - 1; i >= 0; --i) {
      if (data_.sizes[i] > 1 && data_.strides[i] != stride) return false;
      stride *= data_.sizes[i];
    }
    return true;
  }
  headeronly::ScalarType scalar_type() const { return static_cast<headeronly::ScalarType>(data_.type); }
  int get_device_index() const { return 0; }

 private:
  TensorData data_;
};

}  // namespace torch::stable

template <typename... Parts>
std::string misa_emulated_message(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return message.str();
}
#define STD_TORCH_CHECK(condition, ...) \
  do {                                  \
    if (!(condition)) throw std::runtime_error(misa_emulated_message(__VA_ARGS__)); \
  } while (false)
