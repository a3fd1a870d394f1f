// SPDX-License-Identifier: MIT
// What Python sees: pointers as integers, shapes and strides. kernels/ops/native.py checks them first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "ops.h"

namespace py = pybind11;
using namespace flashvid;

#if defined(FLASHVID_CUDA)
void bind_cuda(py::module_& module);
#endif

namespace {

using Pointer = std::uintptr_t;

template <class Type>
Type* at(Pointer pointer) {
  return reinterpret_cast<Type*>(pointer);
}

Dtype dtype_of(int code) { return static_cast<Dtype>(code); }

Video video_at(Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels) {
  return {at<const void>(features), dtype_of(dtype), num_frames, n, channels};
}

// Groups wait on the Python side for tensors of their size.
class Trees {
 public:
  Trees(Pointer root, Pointer member, int64_t num_tokens)
      : groups_(group_members(at<const int64_t>(root), at<const uint8_t>(member), num_tokens)) {}

  int64_t size() const { return groups_.size(); }

  void write(Pointer features, int dtype, int64_t num_tokens, int64_t channels, Pointer index, Pointer mean,
             Pointer size, int threads) const {
    std::copy(groups_.root.begin(), groups_.root.end(), at<int64_t>(index));
    for (int64_t i = 0; i < groups_.size(); ++i) {
      at<int64_t>(size)[i] = groups_.first[static_cast<size_t>(i) + 1] - groups_.first[static_cast<size_t>(i)];
    }
    mean_of_groups(video_at(features, dtype, 1, num_tokens, channels), groups_, at<float>(mean), threads);
  }

 private:
  Groups groups_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The native ops; flashvid_vllm.ops.native is their interface.";
  const auto release = py::call_guard<py::gil_scoped_release>();

  module.def("isa", [] { return std::string(kernels().name); }, "The instruction set that serves.");
  module.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < num_kernels(); ++i) names.emplace_back(kernels_at(i).name);
    return names;
  }, "Those that this machine runs, from plainest to best.");
  module.def("use_isa", [](const std::string& name) { use_kernels(name.c_str()); }, "Use this one; '' for the best.");

  module.def("segment_frames", [](Pointer frames, int64_t num_frames, int64_t channels, float threshold,
                                  int64_t min_segments, Pointer segment_id) {
    segment_frames(at<const float>(frames), num_frames, channels, threshold, min_segments, at<int64_t>(segment_id));
  }, release);
  module.def("event_relevance", [](Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels,
                                   Pointer segment_id, Pointer relevance, int threads) {
    event_relevance(video_at(features, dtype, num_frames, n, channels), at<const int64_t>(segment_id),
                    at<float>(relevance), threads);
  }, release);
  module.def("select_tokens", [](Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels,
                                 Pointer weight, int64_t k, Pointer index, int threads) {
    select_tokens(video_at(features, dtype, num_frames, n, channels), at<const float>(weight), k, at<int64_t>(index),
                  threads);
  }, release);
  module.def("match_tokens", [](Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels,
                                Pointer candidate, Pointer segment_id, float threshold, bool by_position,
                                Pointer similarity, Pointer parent, int threads) {
    match_tokens(video_at(features, dtype, num_frames, n, channels), at<const uint8_t>(candidate),
                 at<const int64_t>(segment_id), threshold, by_position, at<float>(similarity), at<int64_t>(parent),
                 threads);
  }, release);
  module.def("tree_roots", [](Pointer parent, int64_t num_frames, int64_t n, Pointer root) {
    tree_roots(at<const int64_t>(parent), num_frames, n, at<int64_t>(root));
  }, release);
  module.def("cluster_tokens", [](Pointer x, int dtype, int64_t n, int64_t channels, int64_t num_clusters, int64_t k,
                                  Pointer centers, Pointer assignment, int threads) {
    cluster_tokens(at<const void>(x), dtype_of(dtype), n, channels, num_clusters, k, at<int64_t>(centers),
                   at<int64_t>(assignment), threads);
  }, release);
  module.def("explain_tokens", [](Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels,
                                  int64_t tokens, double still, Pointer source, int threads) {
    explain_tokens(video_at(features, dtype, num_frames, n, channels), tokens, still, at<int64_t>(source), threads);
  }, release);
  module.def("choose_rows", [](Pointer levels, int64_t places, int64_t channels, const std::vector<int64_t>& ends,
                               const std::vector<int64_t>& least, const std::vector<int64_t>& most, int64_t longest,
                               int64_t num_rows, int64_t unexplained, int64_t farthest, Pointer position, int threads) {
    choose_rows(at<const uint8_t>(levels), places, channels, {ends, least, most, longest}, num_rows, unexplained,
                farthest, at<int64_t>(position), threads);
  }, release);
  using Strides = std::vector<int64_t>;
  module.def("received_attention", [](Pointer query, const Strides& query_strides, Pointer key,
                                      const Strides& key_strides, int dtype, int64_t num_frames, int64_t heads,
                                      int64_t n, int64_t d, Pointer received, int threads) {
    const Heads q{at<const void>(query), query_strides.at(0), query_strides.at(1), query_strides.at(2)};
    const Heads k{at<const void>(key), key_strides.at(0), key_strides.at(1), key_strides.at(2)};
    received_attention(q, k, dtype_of(dtype), num_frames, heads, n, d, at<float>(received), threads);
  }, release);
  module.def("compress", [](Pointer features, int dtype, int64_t num_frames, int64_t n, int64_t channels,
                            Pointer attention, int64_t selected_per_frame, int64_t merged, float merge_threshold,
                            float segment_threshold, int64_t min_segments, bool attention_alone, bool weigh_by_event,
                            bool match_by_position, int64_t neighbours, Pointer tokens, Pointer source_index,
                            Pointer size, Pointer assignment, int threads) {
    const Settings settings{selected_per_frame, merged,         merge_threshold,   segment_threshold, min_segments,
                            attention_alone,    weigh_by_event, match_by_position, neighbours};
    compress(video_at(features, dtype, num_frames, n, channels), at<const float>(attention), settings,
             at<void>(tokens), at<int64_t>(source_index), at<int64_t>(size), at<int64_t>(assignment), threads);
  }, release);

  py::class_<Trees>(module, "Trees")
      .def(py::init<Pointer, Pointer, int64_t>(), release)
      .def("__len__", &Trees::size)
      .def("write", &Trees::write, release);

#if defined(FLASHVID_CUDA)
  bind_cuda(module);
#endif
}
