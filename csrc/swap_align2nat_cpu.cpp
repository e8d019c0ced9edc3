// swap_align2nat on the CPU: operators that check arguments, allocate results and call kernels.

#include "cpu_isa.h"
#include "swap_align2nat_checks.h"
#include "swap_align2nat_cpu.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

namespace tensormask {

void run_threads(int64_t parts, void (*work)(void* context), void* context) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(
      0, parts < threads ? parts : threads, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) work(context);
      });
}

namespace {

void forward_out(const Tensor& x, int64_t lambda_val, double pad_val, Tensor out) {
  const Geometry g = check_input(x, lambda_val);
  check_out(x, out, output_shape(g));
  if (out.numel() == 0) return;
  dispatch<Half, BFloat16>(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(dense_forward, g, view<T>(x), static_cast<T*>(out.mutable_data_ptr()), pad_val);
  });
}

Tensor forward(const Tensor& x, int64_t lambda_val, double pad_val) {
  Tensor out = torch::stable::new_empty(x, output_shape(check_input(x, lambda_val)));
  forward_out(x, lambda_val, pad_val, out);
  return out;
}

void backward_out(
    const Tensor& grad, int64_t lambda_val, int64_t height, int64_t width, Tensor out) {
  const Geometry g = check_grad(grad, lambda_val, height, width);
  check_out(grad, out, input_shape(g));
  if (out.numel() == 0) return;
  dispatch<Half, BFloat16>(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(dense_backward, g, view<T>(grad), static_cast<T*>(out.mutable_data_ptr()));
  });
}

Tensor backward(const Tensor& grad, int64_t lambda_val, int64_t height, int64_t width) {
  const Geometry g = check_grad(grad, lambda_val, height, width);
  Tensor out = torch::stable::new_empty(grad, input_shape(g));
  backward_out(grad, lambda_val, height, width, out);
  return out;
}

Tensor forward_at(const Tensor& x, const Tensor& windows, int64_t lambda_val, double pad_val) {
  const Geometry g = check_input(x, lambda_val);
  const Tensor rows = check_windows(x, windows);
  check_inside(g, rows);
  Tensor out = torch::stable::new_empty(x, masks_shape(g, rows));
  if (out.numel() == 0) return out;
  dispatch<Half, BFloat16>(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    CALL(windows_forward, g, view<T>(x), rows.const_data_ptr<int64_t>(), rows.size(0),
         static_cast<T*>(out.mutable_data_ptr()), pad_val);
  });
  return out;
}

Tensor backward_at(
    const Tensor& grad, const Tensor& windows, int64_t lambda_val, int64_t num_images,
    int64_t height, int64_t width) {
  const Geometry g = check_grad_at(grad, lambda_val, num_images, height, width);
  const Tensor rows = check_windows(grad, windows);
  check_inside(g, rows);
  Tensor out = torch::stable::new_empty(grad, input_shape(g));
  if (out.numel() == 0) return out;

  // Sort windows by image, stably.
  const int64_t* window = rows.const_data_ptr<int64_t>();
  const int64_t count = rows.size(0);
  std::vector<int64_t> starts(num_images + 1, 0), order(count);
  for (int64_t k = 0; k < count; ++k) ++starts[window[k * 3] + 1];
  for (int64_t n = 0; n < num_images; ++n) starts[n + 1] += starts[n];
  std::vector<int64_t> ends(starts.begin(), starts.end() - 1);
  for (int64_t k = 0; k < count; ++k) order[ends[window[k * 3]]++] = k;

  dispatch<Half, BFloat16>(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const View<const T> masks{static_cast<const T*>(grad.const_data_ptr()), grad.stride(0), 0,
                              grad.stride(1), grad.stride(2)};
    CALL(windows_backward, g, masks, window, order.data(), starts.data(),
         static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tensormask, CPU, m) {
  m.impl("swap_align2nat", TORCH_BOX(&forward));
  m.impl("swap_align2nat.out", TORCH_BOX(&forward_out));
  m.impl("swap_align2nat_backward", TORCH_BOX(&backward));
  m.impl("swap_align2nat_backward.out", TORCH_BOX(&backward_out));
  m.impl("swap_align2nat_at", TORCH_BOX(&forward_at));
  m.impl("swap_align2nat_at_backward", TORCH_BOX(&backward_at));
}

}  // namespace tensormask
