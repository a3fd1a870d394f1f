// SPDX-License-Identifier: MIT
// The part of the module that exists where nvcc was found. It touches no driver until an op is called.
#include <pybind11/pybind11.h>

#include "forest_cuda.h"

namespace py = pybind11;
using namespace flashvid;

void bind_cuda(py::module_& module) {
  using Pointer = std::uintptr_t;
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("tree_roots_cuda", [](Pointer parent, int64_t num_frames, int64_t n, Pointer root, Pointer stream) {
    tree_roots_cuda(reinterpret_cast<const int64_t*>(parent), num_frames, n, reinterpret_cast<int64_t*>(root),
                    reinterpret_cast<void*>(stream));
  }, release);
  module.def("mean_of_groups_cuda", [](Pointer rows, int dtype, int64_t channels, int64_t groups, Pointer first,
                                       Pointer member, Pointer mean, Pointer stream) {
    mean_of_groups_cuda(reinterpret_cast<const void*>(rows), static_cast<Dtype>(dtype), channels, groups,
                        reinterpret_cast<const int64_t*>(first), reinterpret_cast<const int64_t*>(member),
                        reinterpret_cast<float*>(mean), reinterpret_cast<void*>(stream));
  }, release);
}
