// SPDX-License-Identifier: MIT
// The trees of TSTM on a GPU: the loops of forest.h, one thread per token or per few channels.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "forest.h"
#include "forest_cuda.h"

namespace flashvid {

namespace {

constexpr int kThreads = 256;

__global__ void link_tokens(const int64_t* parent, int64_t n, int64_t num_tokens, int64_t* link) {
  const int64_t token = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (token < num_tokens) link[token] = link_of(parent, n, token);
}

// All at once: what the others shorten may be seen or not, and the root is the same. Each writes its own
// answer last, as a link to the root is as good as any.
__global__ void follow_links(int64_t num_tokens, int64_t* link) {
  const int64_t token = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (token < num_tokens) link[token] = find_root(link, token);
}

template <class Element, int Channels>
__global__ void mean_of_members(const Element* rows, int64_t channels, const int64_t* first, const int64_t* member,
                                float* mean) {
  const int64_t group = blockIdx.x;
  const int64_t channel = (blockIdx.y * int64_t{kThreads} + threadIdx.x) * Channels;
  if (channel >= channels) return;
  const int64_t* members = member + first[group];
  const int64_t count = first[group + 1] - first[group];
  float* out = mean + group * channels + channel;
  if (channel + Channels <= channels) {
    mean_of_rows<Channels>(rows + channel, channels, members, count, out);
  } else {
    for (int64_t c = 0; channel + c < channels; ++c) {
      mean_of_rows<1>(rows + channel + c, channels, members, count, out + c);
    }
  }
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

unsigned blocks(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

template <class Element>
void launch_means(const void* rows, int64_t channels, int64_t groups, const int64_t* first, const int64_t* member,
                  float* mean, cudaStream_t stream) {
  constexpr int kChannels = 4;  // neighbouring channels of a thread: independent sums hide the latency of loads
  const dim3 grid(static_cast<unsigned>(groups), blocks((channels + kChannels - 1) / kChannels));
  mean_of_members<Element, kChannels>
      <<<grid, kThreads, 0, stream>>>(static_cast<const Element*>(rows), channels, first, member, mean);
}

}  // namespace

void tree_roots_cuda(const int64_t* parent, int64_t num_frames, int64_t n, int64_t* root, void* stream) {
  const int64_t num_tokens = num_frames * n;
  const auto on = static_cast<cudaStream_t>(stream);
  link_tokens<<<blocks(num_tokens), kThreads, 0, on>>>(parent, n, num_tokens, root);
  follow_links<<<blocks(num_tokens), kThreads, 0, on>>>(num_tokens, root);
  check_launch();
}

void mean_of_groups_cuda(const void* rows, Dtype dtype, int64_t channels, int64_t groups, const int64_t* first,
                         const int64_t* member, float* mean, void* stream) {
  if (groups == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::kBfloat16) {
    launch_means<Bfloat>(rows, channels, groups, first, member, mean, on);
  } else if (dtype == Dtype::kFloat16) {
    launch_means<Half>(rows, channels, groups, first, member, mean, on);
  } else {
    launch_means<float>(rows, channels, groups, first, member, mean, on);
  }
  check_launch();
}

}  // namespace flashvid
