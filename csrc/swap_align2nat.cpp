// Schemas of the operators, no kernels. Autograd, fake kernels and the public functions are in
// tensormask/layers/swap_align2nat.py, because the stable ABI has no C++ autograd.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(tensormask, m) {
  m.def("swap_align2nat(Tensor x, int lambda_val, float pad_val) -> Tensor");
  m.def("swap_align2nat.out(Tensor x, int lambda_val, float pad_val, *, Tensor(a!) out) -> ()");
  m.def(
      "swap_align2nat_backward(Tensor grad, int lambda_val, SymInt height, SymInt width) -> Tensor");
  m.def(
      "swap_align2nat_backward.out(Tensor grad, int lambda_val, SymInt height, SymInt width, *, "
      "Tensor(a!) out) -> ()");
  m.def("swap_align2nat_at(Tensor x, Tensor windows, int lambda_val, float pad_val) -> Tensor");
  m.def(
      "swap_align2nat_at_backward(Tensor grad, Tensor windows, int lambda_val, "
      "SymInt num_images, SymInt height, SymInt width) -> Tensor");
}
