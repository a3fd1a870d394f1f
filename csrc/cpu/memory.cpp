// SPDX-License-Identifier: MIT
#include "memory.h"

#include <mutex>
#include <new>
#include <vector>

namespace flashvid {

namespace {

constexpr std::align_val_t kAlignment{64};
#if defined(FLASHVID_SANITIZE)
constexpr size_t kSmallest = ~size_t{0};  // nothing is kept, so that AddressSanitizer knows every bound
#else
constexpr size_t kSmallest = size_t{1} << 16;  // what malloc serves without the operating system
#endif
constexpr size_t kMostKept = size_t{1} << 26;  // 64 MiB: two threads at 32 x 196 x 3584 need 25

struct Block {
  void* memory;
  size_t bytes;
};

std::mutex mutex;
// Never destroyed: a thread may outlive the statics.
std::vector<Block>& kept() {
  static auto* blocks = new std::vector<Block>();
  return *blocks;
}
size_t bytes_kept = 0;

// Sizes are rounded up to an eighth of their power of two, so that a little larger a video finds its memory again.
size_t rounded(size_t bytes) {
  if (bytes < kSmallest) return bytes;
  size_t step = 64;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

}  // namespace

void* take_memory(size_t bytes) {
  bytes = rounded(bytes);
  if (bytes >= kSmallest) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (Block& block : kept()) {
      if (block.bytes != bytes) continue;
      void* const memory = block.memory;
      block = kept().back();
      kept().pop_back();
      bytes_kept -= bytes;
      return memory;
    }
  }
  return ::operator new(bytes, kAlignment);
}

void return_memory(void* memory, size_t bytes) noexcept {
  bytes = rounded(bytes);
  if (bytes >= kSmallest && bytes <= kMostKept) {
    const std::lock_guard<std::mutex> lock(mutex);
    try {
      kept().push_back({memory, bytes});
      bytes_kept += bytes;
      while (bytes_kept > kMostKept) {  // the longest unused first
        bytes_kept -= kept().front().bytes;
        ::operator delete(kept().front().memory, kAlignment);
        kept().erase(kept().begin());
      }
      return;
    } catch (const std::bad_alloc&) {
      // no room to note it: give it back
    }
  }
  ::operator delete(memory, kAlignment);
}

}  // namespace flashvid
