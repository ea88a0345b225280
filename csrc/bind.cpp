// Python bindings of the C ABI: pointers travel as integers, a status that is not TL_OK becomes a RuntimeError.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "tlfast.h"

namespace py = pybind11;

namespace {

template <class T>
using PyArgument = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T from_python(PyArgument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

// Binds a C function with all its arguments; it runs without the GIL.
template <class... Args>
void define(py::module_ &m, const char *name, int (*function)(Args...)) {
  m.def(
      name,
      [function](PyArgument<Args>... args) {
        if (function(from_python<Args>(args)...) != TL_OK) throw std::runtime_error(tl_last_error());
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of tlfast; see csrc/tlfast.h";
  m.def("cpu_isa", tl_cpu_isa);
  m.def("matrix_isa", tl_matrix_isa);
  m.def("cuda_architectures", tl_cuda_architectures);
  m.def("thread_pool", tl_thread_pool);
  m.attr("F32") = static_cast<int>(TL_F32);
  m.attr("F16") = static_cast<int>(TL_F16);
  m.attr("BF16") = static_cast<int>(TL_BF16);

  define(m, "rung_forward_cpu", tl_rung_forward_cpu);
  define(m, "rung_backward_cpu", tl_rung_backward_cpu);
  define(m, "attention_forward_cpu", tl_attention_forward_cpu);
  define(m, "attention_backward_cpu", tl_attention_backward_cpu);
  define(m, "add_norm_forward_cpu", tl_add_norm_forward_cpu);
  define(m, "add_norm_backward_cpu", tl_add_norm_backward_cpu);
  define(m, "dropout_add_forward_cpu", tl_dropout_add_forward_cpu);
  define(m, "dropout_add_backward_cpu", tl_dropout_add_backward_cpu);
  define(m, "norm_tap_cpu", tl_norm_tap_cpu);
  define(m, "quantise_rows_cpu", tl_quantise_rows_cpu);
  define(m, "side_step_cpu", tl_side_step_cpu);
  define(m, "side_block_forward_cpu", tl_side_block_forward_cpu);
  define(m, "side_block_backward_cpu", tl_side_block_backward_cpu);
  define(m, "linear_cpu", tl_linear_cpu);
  define(m, "linear_fp32_cpu", tl_linear_fp32_cpu);
  define(m, "packed_attention_cpu", tl_packed_attention_cpu);
  define(m, "packed_blocks_cpu", tl_packed_blocks_cpu);
  define(m, "contrastive_softmax_forward_cpu", tl_contrastive_softmax_forward_cpu);
  define(m, "contrastive_softmax_backward_cpu", tl_contrastive_softmax_backward_cpu);
  define(m, "contrastive_sigmoid_forward_cpu", tl_contrastive_sigmoid_forward_cpu);
  define(m, "contrastive_sigmoid_backward_cpu", tl_contrastive_sigmoid_backward_cpu);
  define(m, "hetero_aggregate_cpu", tl_hetero_aggregate_cpu);
  define(m, "product_fp32_cpu", tl_product_fp32_cpu);
  define(m, "sample_neighbours_cpu", tl_sample_neighbours_cpu);
  define(m, "sample_take_cpu", tl_sample_take_cpu);
  define(m, "transpose_rows_cpu", tl_transpose_rows_cpu);
#ifdef TLFAST_WITH_CUDA
  define(m, "rung_forward_cuda", tl_rung_forward_cuda);
  define(m, "rung_backward_cuda", tl_rung_backward_cuda);
  define(m, "hetero_aggregate_cuda", tl_hetero_aggregate_cuda);
#endif
}
