// SPDX-License-Identifier: MIT
// Loops over independent items: their results do not depend on which thread does which.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "memory.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace flashvid {

// Calls work(item, thread) for every item; thread < threads. Work may not throw.
template <class Work>
void parallel_for(int64_t items, int threads, Work work) {
#if defined(_OPENMP)
  const int team = static_cast<int>(std::min<int64_t>(threads, items));
  if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) work(item, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t item = 0; item < items; ++item) work(item, 0);
}

// One workspace per thread that may take part, made before the loop: allocation may throw.
template <class Workspace, class... Arguments>
std::vector<Workspace> workspaces(int64_t items, int threads, const Arguments&... arguments) {
  std::vector<Workspace> all;
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(threads, items));
  all.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) all.emplace_back(arguments...);
  return all;
}

// Memory for numbers that need not be set first, 64-byte aligned.
template <class Number>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : bytes_(static_cast<size_t>(std::max<int64_t>(1, size)) * sizeof(Number)),
        data_(static_cast<Number*>(take_memory(bytes_))) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (data_ != nullptr) return_memory(data_, bytes_);
  }

  Number* data() { return data_; }
  const Number* data() const { return data_; }
  Number& operator[](int64_t i) { return data_[i]; }
  const Number& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  Number* data_;
};

}  // namespace flashvid
