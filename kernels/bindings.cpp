// The Python module jrt_kernels: addresses, sizes and strides in, work queued on a stream. No framework's headers.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace jrt {
void bind_backward(py::module_& m);        // backward_bindings.cpp
void bind_selective_scan(py::module_& m);  // selective_scan_bindings.cpp
}

namespace {

using View = std::array<int64_t, 4>;  // address, strides of batch, token and head in elements

jrt::TensorView view(const View& x) { return {reinterpret_cast<const void*>(x[0]), x[1], x[2], x[3]}; }

template <typename T>
T* address(int64_t value) {
    return reinterpret_cast<T*>(value);
}

jrt::ElementType element_type(const std::string& name) {
    if (name == "bfloat16") return jrt::ElementType::kBFloat16;
    if (name == "float16") return jrt::ElementType::kFloat16;
    throw py::value_error("dtype " + name + ": expected bfloat16 or float16");
}

void check(const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("jrt_kernels: ") + error);
}

// Makes `device` current for the scope of one call.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        cudaGetDevice(&before_);
        if (before_ != device) cudaSetDevice(device);
        changed_ = before_ != device;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }

  private:
    int before_ = 0;
    bool changed_ = false;
};

void prefill(const View& q, const View& k, const View& v, const View& o, const std::array<int64_t, 2>& mask,
             const std::array<int64_t, 2>& initial_state, const std::array<int64_t, 2>& state, int64_t workspace,
             const std::array<int, 4>& sizes, int pieces, const std::string& dtype, bool normalize, int device,
             int64_t stream) {
    jrt::PrefillArguments a{};
    a.q = view(q), a.k = view(k), a.v = view(v), a.o = view(o);
    a.mask = address<const uint8_t>(mask[0]);
    a.mask_batch_stride = static_cast<int>(mask[1]);
    a.initial_S = address<const float>(initial_state[0]), a.initial_z = address<const float>(initial_state[1]);
    a.S = address<float>(state[0]), a.z = address<float>(state[1]);
    a.workspace = address<float>(workspace);
    a.batch = sizes[0], a.tokens = sizes[1], a.heads = sizes[2], a.value_dim = sizes[3];
    a.pieces = pieces;
    a.type = element_type(dtype);
    a.normalize = normalize;
    a.stream = address<void>(stream);
    const OnDevice scope(device);
    check(jrt::prefill(a));
}

void decode_step(const View& q, const View& k, const View& v, const View& o, const std::array<int64_t, 2>& mask,
                 const std::array<int64_t, 2>& old_state, const std::array<int64_t, 2>& state,
                 const std::array<int, 3>& sizes, const std::string& dtype, bool normalize, int device, int64_t stream) {
    jrt::DecodeArguments a{};
    a.q = view(q), a.k = view(k), a.v = view(v), a.o = view(o);
    a.mask = address<const uint8_t>(mask[0]);
    a.mask_batch_stride = static_cast<int>(mask[1]);
    a.old_S = address<const float>(old_state[0]), a.old_z = address<const float>(old_state[1]);
    a.S = address<float>(state[0]), a.z = address<float>(state[1]);
    a.batch = sizes[0], a.heads = sizes[1], a.value_dim = sizes[2];
    a.type = element_type(dtype);
    a.normalize = normalize;
    a.stream = address<void>(stream);
    const OnDevice scope(device);
    check(jrt::decode_step(a));
}

int prefill_pieces(int batch, int tokens, int heads, int value_dim, bool only_state, int multiprocessors) {
    if (std::min({batch, tokens, heads, value_dim, multiprocessors}) < 1) throw py::value_error("sizes must be at least 1");
    return jrt::prefill_pieces(batch, tokens, heads, value_dim, only_state, multiprocessors);
}

}  // namespace

PYBIND11_MODULE(jrt_kernels, m) {
    m.doc() = "Hopper kernels for linear attention with the Taylor feature map; called through jrt.ops (backend 'cuda').";
    m.attr("interface") = 6;  // jrt.ops.cuda refuses a build that speaks another one
    m.def("prefill", &prefill, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("mask"),
          py::arg("initial_state"), py::arg("state"), py::arg("workspace"), py::arg("sizes"), py::arg("pieces"),
          py::arg("dtype"), py::arg("normalize"), py::arg("device"), py::arg("stream"),
          "Views are (address, batch, token, head stride); mask (address, batch stride), its tokens side by side; sizes (B, T, H, D). "
          "Address 0: absent. q absent: only the state.");
    m.def("decode_step", &decode_step, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("o"), py::arg("mask"),
          py::arg("old_state"), py::arg("state"), py::arg("sizes"), py::arg("dtype"), py::arg("normalize"), py::arg("device"), py::arg("stream"),
          "sizes (B, H, D); the old state and the new one may be the same memory.");
    m.def("prefill_pieces", &prefill_pieces, py::arg("batch"), py::arg("tokens"), py::arg("heads"), py::arg("value_dim"),
          py::arg("only_state"), py::arg("multiprocessors"));
    m.def("prefill_workspace", &jrt::prefill_workspace, py::arg("batch"), py::arg("heads"), py::arg("value_dim"),
          py::arg("pieces"), "Floats.");
    jrt::bind_backward(m);
    jrt::bind_selective_scan(m);
}
