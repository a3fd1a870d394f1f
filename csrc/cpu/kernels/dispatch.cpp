// SPDX-License-Identifier: MIT
// Which of the compiled kernels this machine can run, and which of them serve.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(FLASHVID_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashvid {

extern const Kernels kKernelsPlain;
#if defined(FLASHVID_X86)
extern const Kernels kKernelsAvx2, kKernelsAvx512, kKernelsAvx512Bf16, kKernelsAmx;
#endif

namespace {

#if defined(FLASHVID_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  if (!bf16 || !tile) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // the kernel grants the tile registers on request
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> all = [] {
    std::vector<const Kernels*> found{&kKernelsPlain};
#if defined(FLASHVID_X86)
    if (has_avx2()) found.push_back(&kKernelsAvx2);
    if (has_avx512()) found.push_back(&kKernelsAvx512);
    if (has_avx512_bf16()) found.push_back(&kKernelsAvx512Bf16);
    if (has_amx()) found.push_back(&kKernelsAmx);
#endif
    return found;
  }();
  return all;
}

const Kernels* named(const std::string& name) {
  if (name.empty()) return available().back();
  std::string names;
  for (const Kernels* candidate : available()) {
    if (name == candidate->name) return candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::invalid_argument("FLASHVID_CPU_ISA must be one that this machine runs (" + names + "), got '" + name +
                              "'");
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_relaxed);
  if (current == nullptr) {
    const char* wanted = std::getenv("FLASHVID_CPU_ISA");
    current = named(wanted == nullptr ? "" : wanted);
    chosen.store(current, std::memory_order_relaxed);
  }
  return *current;
}

void use_kernels(const char* name) { chosen.store(named(name), std::memory_order_relaxed); }

int num_kernels() { return static_cast<int>(available().size()); }

const Kernels& kernels_at(int i) { return *available().at(static_cast<size_t>(i)); }

}  // namespace flashvid
