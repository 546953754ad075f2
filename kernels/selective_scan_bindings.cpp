// The selective scan's functions of the Python module jrt_kernels: addresses, strides and sizes in, work queued on a stream.
#include "selective_scan.h"

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace jrt {
namespace {

using Inputs = std::array<int64_t, 9>;  // addresses of u, delta, bias, A, B, C, D, gate, plain (0: none)
using States = std::array<int64_t, 5>;  // addresses of start (0: zero), end, between (0: none kept), local, spans

template <typename T>
T* at(int64_t value) {
    return reinterpret_cast<T*>(value);
}

ScanType type_of(const std::string& name) {
    if (name == "float32") return ScanType::kFloat32;
    if (name == "bfloat16") return ScanType::kBFloat16;
    if (name == "float16") return ScanType::kFloat16;
    throw py::value_error("dtype " + name + ": expected float32, bfloat16 or float16");
}

int narrow(int64_t stride) {
    if (stride > INT32_MAX) throw py::value_error("more than 2^31 elements lie between two steps of B, C or the gate");
    return static_cast<int>(stride);
}

ScanArguments arguments(const Inputs& x, const std::array<int64_t, 5>& strides, const States& states,
                        const std::array<int, 4>& sizes, const std::string& dtype, int64_t stream) {
    ScanArguments a{};
    a.u = at<const void>(x[0]), a.delta = at<const void>(x[1]), a.bias = at<const float>(x[2]);
    a.A = at<const float>(x[3]), a.B = at<const void>(x[4]), a.C = at<const void>(x[5]), a.D = at<const float>(x[6]);
    a.B_batch = strides[0], a.B_step = narrow(strides[1]), a.C_batch = strides[2], a.C_step = narrow(strides[3]);
    a.gate = at<const void>(x[7]), a.plain = at<void>(x[8]), a.gate_step = narrow(strides[4]);
    a.start = at<const float>(states[0]), a.end = at<float>(states[1]), a.between = at<float>(states[2]);
    a.local = at<float>(states[3]), a.spans = at<float>(states[4]);
    a.batch = sizes[0], a.steps = sizes[1], a.channels = sizes[2], a.segments = sizes[3];
    a.type = type_of(dtype);
    a.stream = at<void>(stream);
    return a;
}

void check(const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("jrt_kernels: ") + error);
}

void forward(const Inputs& inputs, const std::array<int64_t, 5>& strides, const States& states,
             const std::array<int, 4>& sizes, const std::string& dtype, int64_t y, int64_t stream) {
    check(scan_forward(arguments(inputs, strides, states, sizes, dtype, stream), at<void>(y)));
}

void backward(const Inputs& inputs, const std::array<int64_t, 5>& strides, const States& states,
              const std::array<int, 4>& sizes, const std::string& dtype, const std::array<int64_t, 11>& gradients,
              int64_t stream) {
    ScanGradients g{};
    g.dy = at<const void>(gradients[0]), g.du = at<void>(gradients[1]), g.ddelta = at<void>(gradients[2]);
    g.dA = at<float>(gradients[3]), g.dD = at<float>(gradients[4]), g.dbias = at<float>(gradients[5]);
    g.dB = at<void>(gradients[6]), g.dC = at<void>(gradients[7]), g.dgate = at<void>(gradients[8]);
    g.of_segments = at<float>(gradients[9]), g.of_steps = at<float>(gradients[10]);
    check(scan_backward(arguments(inputs, strides, states, sizes, dtype, stream), g));
}

}  // namespace

void bind_selective_scan(py::module_& m) {
    m.def("scan_forward", &forward, py::arg("inputs"), py::arg("strides"), py::arg("states"), py::arg("sizes"),
          py::arg("dtype"), py::arg("y"), py::arg("stream"),
          "Inputs (u, delta, bias, A, B, C, D, gate, y before the gate), strides of batch and step of B and C and of "
          "the gate's step, states (start, end, between, local, spans), sizes (B, T, E, segments). The caller makes the "
          "device current.");
    m.def("scan_backward", &backward, py::arg("inputs"), py::arg("strides"), py::arg("states"), py::arg("sizes"),
          py::arg("dtype"), py::arg("gradients"), py::arg("stream"),
          "As scan_forward; gradients (dy, du, ddelta, dA, dD, dbias, dB, dC, dgate), then the "
          "workspaces for sums over segments and over slices.");
}

}  // namespace jrt
