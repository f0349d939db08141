// Views of the operators' tensors and the thread pool. Shapes, types and devices are checked by the launchers in
// misa_vllm/kernels/cpu.py; what only the values can tell (page ids, requests, heads) is checked here.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace misa {

using torch::stable::Tensor;

template <class T>
struct View1 {
  T* data;
  int64_t stride, size;
  explicit View1(const Tensor& t) : data((T*)t.mutable_data_ptr()), stride(t.stride(0)), size(t.size(0)) {}
  T& operator[](int64_t i) const { return data[i * stride]; }
};

// The last dimension is contiguous unless `column` says otherwise.
template <class T>
struct View2 {
  T* data;
  int64_t row, column, rows, columns;
  explicit View2(const Tensor& t)
      : data((T*)t.mutable_data_ptr()), row(t.stride(0)), column(t.stride(1)), rows(t.size(0)), columns(t.size(1)) {}
  T* operator[](int64_t i) const { return data + i * row; }
  T& at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

template <class T>
struct View3 {
  T* data;
  int64_t stride0, stride1, size0, size1, size2;
  explicit View3(const Tensor& t)
      : data((T*)t.mutable_data_ptr()),
        stride0(t.stride(0)),
        stride1(t.stride(1)),
        size0(t.size(0)),
        size1(t.size(1)),
        size2(t.size(2)) {}
  T* at(int64_t i, int64_t j) const { return data + i * stride0 + j * stride1; }
};

inline void require(bool condition, const char* name, int64_t value, const char* rule) {
  if (!condition) throw std::runtime_error(std::string(name) + " " + std::to_string(value) + " " + rule);
}

// misa_vllm.rows.QueryRows
struct Rows {
  View2<const int32_t> block_table;
  View1<const int32_t> request, visible;

  Rows(const Tensor& block_table, const Tensor& request, const Tensor& visible)
      : block_table(block_table), request(request), visible(visible) {}

  // The page ids of the first `tokens` tokens of a request, checked.
  std::vector<int64_t> pages(int64_t request, int64_t tokens, int64_t num_pages) const {
    require(request >= 0 && request < block_table.rows, "request", request, "is not a row of block_table");
    const int64_t count = (tokens + kPageTokens - 1) / kPageTokens;
    require(count <= block_table.columns, "visible", tokens, "is more than the tokens block_table addresses");
    std::vector<int64_t> ids(count);
    for (int64_t i = 0; i < count; ++i) {
      ids[i] = block_table.at(request, i);
      require(ids[i] >= 0 && ids[i] < num_pages, "block_table entry", ids[i], "is not a page of the cache");
    }
    return ids;
  }
};

// Uninitialised memory on a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : memory_((T*)::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64))) {}
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Runs body(item, scratch) for every item on torch's thread pool; threads take items as they become free, each with
// scratch made by make_scratch(). What an item computes must not depend on the thread.
template <class MakeScratch, class Body>
void parallel_items(int64_t items, const MakeScratch& make_scratch, const Body& body) {
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;  // exceptions must not cross the thread pool's C interface
  std::mutex failure_lock;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    (void)begin, (void)end;
    try {
      auto scratch = make_scratch();
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(item, scratch);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_lock);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

template <class Body>
void parallel_items(int64_t items, const Body& body) {
  parallel_items(items, [] { return 0; }, [&](int64_t item, int) { body(item); });
}

}  // namespace misa
