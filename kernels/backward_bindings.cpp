// The backward functions of the Python module jrt_kernels: addresses, strides and sizes in, work queued on a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace jrt {
namespace {

using View = std::array<int64_t, 4>;  // address, strides of batch, token and head in elements

template <typename T>
T* at(int64_t value) {
    return reinterpret_cast<T*>(value);
}

TensorView view(const View& x) { return {at<const void>(x[0]), x[1], x[2], x[3]}; }

void check(const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("jrt_kernels: ") + error);
}

using Inputs = std::array<View, 4>;   // q (address 0: k and v are a prefix), k, v, do (0: absent)
using Pair = std::array<int64_t, 2>;  // addresses of S and z, or of w and c; of the mask, and its batch stride

BackwardArguments arguments(const Inputs& inputs, const Pair& mask, const Pair& weights, const std::array<int, 4>& sizes,
                            const std::array<int, 2>& pieces, int64_t stream) {
    BackwardArguments a{};
    a.q = view(inputs[0]), a.k = view(inputs[1]), a.v = view(inputs[2]), a.dout = view(inputs[3]);
    a.mask = at<const uint8_t>(mask[0]);
    a.mask_batch_stride = static_cast<int>(mask[1]);
    a.w = at<float>(weights[0]), a.c = at<float>(weights[1]);
    a.batch = sizes[0], a.tokens = sizes[1], a.heads = sizes[2], a.value_dim = sizes[3];
    a.pieces = pieces[0], a.piece_tokens = pieces[1];
    a.stream = at<void>(stream);
    return a;
}

void queries(const Inputs& inputs, const Pair& mask, const Pair& weights, const std::array<int, 4>& sizes,
             const std::array<int, 2>& pieces, int64_t stream, const Pair& state, int64_t o, int64_t dq, bool normalize) {
    BackwardArguments a = arguments(inputs, mask, weights, sizes, pieces, stream);
    a.S = at<const float>(state[0]), a.z = at<const float>(state[1]);
    a.o = at<const void>(o);
    a.dx = at<void>(dq);
    a.normalize = normalize;
    check(backward_queries(a));
}

void keys(const Inputs& inputs, const Pair& mask, const Pair& weights, const std::array<int, 4>& sizes,
          const std::array<int, 2>& pieces, int64_t stream, const Pair& state, int64_t dk, int64_t dv, const Pair& initial_state) {
    BackwardArguments a = arguments(inputs, mask, weights, sizes, pieces, stream);
    a.S = at<const float>(state[0]), a.z = at<const float>(state[1]);
    a.dx = at<void>(dk);
    a.dv = at<void>(dv);
    a.out_S = at<float>(initial_state[0]), a.out_z = at<float>(initial_state[1]);
    check(backward_keys(a));
}

void sums(const Inputs& inputs, const Pair& mask, const Pair& weights, const std::array<int, 4>& sizes,
          const std::array<int, 2>& pieces, int64_t stream, const Pair& added, bool of_queries) {
    BackwardArguments a = arguments(inputs, mask, weights, sizes, pieces, stream);
    a.out_S = at<float>(added[0]), a.out_z = at<float>(added[1]);
    check(backward_sums(a, of_queries));
}

}  // namespace

void bind_backward(py::module_& m) {
    m.def("backward_queries", &queries, py::arg("inputs"), py::arg("mask"), py::arg("weights"), py::arg("sizes"),
          py::arg("pieces"), py::arg("stream"), py::arg("state"), py::arg("o"), py::arg("dq"), py::arg("normalize"),
          "Views of q, k, v and do are (address, batch, token, head stride); mask (address, batch stride); weights (w, c), "
          "written; sizes (B, T, H, D); pieces (number, tokens of one); state (S, z) before each piece. Address 0: absent. The "
          "caller makes the device current.");
    m.def("backward_keys", &keys, py::arg("inputs"), py::arg("mask"), py::arg("weights"), py::arg("sizes"), py::arg("pieces"),
          py::arg("stream"), py::arg("state"), py::arg("dk"), py::arg("dv"), py::arg("initial_state"),
          "As backward_queries; weights are read; state: the gradient of (S, z) after each piece; initial_state: where its "
          "gradient goes. q and do absent: k and v are a prefix, and there is no initial state.");
    m.def("backward_sums", &sums, py::arg("inputs"), py::arg("mask"), py::arg("weights"), py::arg("sizes"), py::arg("pieces"),
          py::arg("stream"), py::arg("added"), py::arg("of_queries"),
          "What each piece adds to (S, z), of k and v; or to its gradient, of q and do.");
}

}  // namespace jrt
