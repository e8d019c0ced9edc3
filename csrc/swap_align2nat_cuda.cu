// swap_align2nat on CUDA: operators that check arguments, allocate results and launch kernels. They
// do not wait for the device.

#include "cuda_launch.h"
#include "swap_align2nat_checks.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "swap_align2nat_cuda_kernels.h"

namespace tensormask {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

void forward_out(const Tensor& x, int64_t lambda_val, double pad_val, Tensor out) {
  const Geometry g = check_input(x, lambda_val);
  check_out(x, out, output_shape(g));
  if (out.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  dispatch<Half, BFloat16>(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    const cuda::Cut cut = cuda::cut_forward<T>(g);
    if (cut.tile > 0) {
      cuda::dense_forward<T>
          <<<grid(cut.blocks(g.num_images)), cuda::THREADS, cuda::shared_bytes<T>(g, cut),
             stream_of(x)>>>(g, view<T>(x), target, pad_val, cut);
    } else {
      cuda::dense_forward_directly<T>
          <<<grid(g.num_images * g.out_side * g.out_height), cuda::THREADS, 0, stream_of(x)>>>(
              g, view<T>(x), target, pad_val);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  dispatch<Half, BFloat16>(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    const cuda::Cut cut = cuda::cut_backward<T>(g);
    if (cut.tile > 0) {
      cuda::dense_backward<T>
          <<<grid(cut.blocks(g.num_images)), cuda::THREADS, cuda::shared_bytes<T>(g, cut),
             stream_of(grad)>>>(g, view<T>(grad), target, cut);
    } else {
      cuda::dense_backward_directly<T>
          <<<grid(g.num_images * g.side * g.side * g.height), cuda::WINDOW_THREADS, 0,
             stream_of(grad)>>>(g, view<T>(grad), target);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor rows = check_windows(x, windows);
  Tensor out = torch::stable::new_empty(x, masks_shape(g, rows));
  if (out.numel() == 0) return out;
  dispatch<Half, BFloat16>(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cuda::windows_forward<T>
        <<<grid(rows.size(0) * g.out_side), cuda::WINDOW_THREADS, 0, stream_of(x)>>>(
            g, view<T>(x), rows.const_data_ptr<int64_t>(),
            static_cast<T*>(out.mutable_data_ptr()), pad_val);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

Tensor backward_at(
    const Tensor& grad, const Tensor& windows, int64_t lambda_val, int64_t num_images,
    int64_t height, int64_t width) {
  const Geometry g = check_grad_at(grad, lambda_val, num_images, height, width);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor rows = check_windows(grad, windows);
  Tensor out = torch::stable::new_empty(grad, input_shape(g));
  if (out.numel() == 0) return out;

  const int64_t count = rows.size(0), num_rows = num_images * g.out_height;
  require(count + num_rows < std::numeric_limits<int32_t>::max(), "too many windows: ", count);
  const Tensor sorted =
      torch::stable::new_empty(rows, Shape{num_rows + 1 + 2 * count}, ScalarType::Int);
  int* const starts = static_cast<int*>(sorted.mutable_data_ptr());
  int* const order = starts + num_rows + 1;
  int* const columns = order + count;
  const cudaStream_t stream = stream_of(grad);
  const int64_t num_threads = count > num_rows ? count : num_rows + 1;
  cuda::sort_windows<<<grid((num_threads + cuda::WINDOW_THREADS - 1) / cuda::WINDOW_THREADS),
                       cuda::WINDOW_THREADS, cuda::WINDOW_THREADS * sizeof(int), stream>>>(
      g, rows.const_data_ptr<int64_t>(), static_cast<int>(count), starts, order, columns);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  dispatch<Half, BFloat16>(grad, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = typename cuda::Accumulate<T>::type;
    const View<const T> masks{static_cast<const T*>(grad.const_data_ptr()), grad.stride(0), 0,
                              grad.stride(1), grad.stride(2)};
    const int64_t block_columns = cuda::columns_of_block<A>(g);
    const int64_t shared_bytes = g.side * block_columns * int64_t(sizeof(A));
    require(shared_bytes <= cuda::MAX_SHARED_BYTES, "masks are too large: V = ", g.side);
    const int64_t parts = (width + block_columns - 1) / block_columns;
    T* const target = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t n = 0; n < num_images; n += MAX_BLOCKS_YZ) {
      const dim3 blocks(grid(height), grid(g.side * parts, MAX_BLOCKS_YZ),
                        grid(std::min(num_images - n, MAX_BLOCKS_YZ)));
      cuda::windows_backward<T><<<blocks, cuda::WINDOW_THREADS, shared_bytes, stream>>>(
          g, masks, starts + n * g.out_height, order, columns, target + n * out.stride(0),
          static_cast<int>(block_columns));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tensormask, CUDA, m) {
  m.impl("swap_align2nat", TORCH_BOX(&forward));
  m.impl("swap_align2nat.out", TORCH_BOX(&forward_out));
  m.impl("swap_align2nat_backward", TORCH_BOX(&backward));
  m.impl("swap_align2nat_backward.out", TORCH_BOX(&backward_out));
  m.impl("swap_align2nat_at", TORCH_BOX(&forward_at));
  m.impl("swap_align2nat_at_backward", TORCH_BOX(&backward_at));
}

}  // namespace tensormask
