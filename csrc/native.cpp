// seqkern._native: what is not an op. Importing it registers the ops' CPU implementations.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <string>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

template <class A>
using Array = py::array_t<A, py::array::c_style>;

py::dict build_info() {
    py::dict info;
    info["compiler"] = "" __VERSION__;
    return info;
}

int function_named(const std::string& name) {
    const char* names[] = {"exp", "sigmoid", "tanh", "exp2"};
    for (int i = 0; i < 4; ++i)
        if (name == names[i]) return i;
    throw py::value_error("function is '" + name + "', expected exp, sigmoid, tanh or exp2");
}

template <class A>
Array<A> vmath(const std::string& name, const Array<A>& x) {
    if (x.ndim() != 1) throw py::value_error("x has " + std::to_string(x.ndim()) + " dimensions, expected 1");
    const int function = function_named(name);
    Array<A> y(x.shape(0));
    seqkern::kernels().vmath(function, sizeof(A) == 8, x.data(), y.mutable_data(), x.shape(0));
    return y;
}

template <class A>
Array<A> gemm(const Array<A>& a, const Array<A>& b) {
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(0))
        throw py::value_error("a and b must be matrices with as many columns in a as rows in b");
    Array<A> c({a.shape(0), b.shape(1)});
    if (!seqkern::kernels().gemm(sizeof(A) == 8, a.shape(0), b.shape(1), a.shape(1), a.data(), b.data(),
                                 c.mutable_data()))
        throw std::bad_alloc();
    return c;
}

template <class S>
Array<float> gemm_bf16(const Array<float>& a, const Array<S>& b, bool transposed) {
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(transposed))
        throw py::value_error("a and b must be matrices that agree in the size that is summed over");
    Array<float> c({a.shape(0), b.shape(!transposed)});
    if (!seqkern::kernels().gemm_bf16(sizeof(S) == 2, transposed, a.shape(0), b.shape(!transposed),
                                      a.shape(1), a.data(), b.data(), c.mutable_data()))
        throw std::bad_alloc();
    return c;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The compiled kernels of seqkern: the ISA in use, and probes for tests and benchmarks.";
    m.def("isa", [] { return seqkern::kernels().name; }, "The ISA in use.");
    m.def("isas", &seqkern::isas, "What this machine can run, the best last.");
    m.def("cpu_vendor", &seqkern::cpu_vendor, "amd, intel, or empty for another.");
    m.def("force_isa", &seqkern::force_isa, py::arg("name").none(true),
          "Uses this ISA from now on; None: the best. ValueError if it is not among isas().");
    m.def("force_order", &seqkern::force_order, py::arg("in_order").none(true),
          "Whether few queries read keys and values in the order of addresses; None: as the processor does "
          "best.");
    m.def("num_threads", &seqkern::max_threads, "How many threads a large call from this thread uses.");
    m.def("build_info", &build_info, "Compiler, flags and the version of torch's ABI.");
    m.def("vmath", &vmath<float>, py::arg("name"), py::arg("x").noconvert(),
          "exp, sigmoid, tanh or, up to 0, exp2 of a vector.");
    m.def("vmath", &vmath<double>, py::arg("name"), py::arg("x").noconvert());
    m.def("gemm", &gemm<float>, py::arg("a").noconvert(), py::arg("b").noconvert(), "a @ b, on this thread.");
    m.def("gemm", &gemm<double>, py::arg("a").noconvert(), py::arg("b").noconvert());
    m.def("gemm_bf16", &gemm_bf16<float>, py::arg("a").noconvert(), py::arg("b").noconvert(),
          py::arg("transposed") = false,
          "a @ b, or with transposed a @ b.T, of factors rounded to bfloat16, on this thread. b may be "
          "uint16: the "
          "bits of bfloat16.");
    m.def("gemm_bf16", &gemm_bf16<unsigned short>, py::arg("a").noconvert(), py::arg("b").noconvert(),
          py::arg("transposed") = false);
    m.def("fma_peak", &seqkern::fma_peak, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
          "GFLOP/s of float32 multiply-adds on all threads.");
    m.def("read_bandwidth", &seqkern::read_bandwidth, py::arg("bytes"), py::arg("seconds"),
          py::call_guard<py::gil_scoped_release>(),
          "GB/s that all threads read, each its own share of the bytes.");
}
