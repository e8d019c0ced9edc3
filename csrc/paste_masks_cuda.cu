// `paste_masks` on CUDA: checks arguments, allocates the frames and launches the kernel. It does not
// wait for the device.

#include "cuda_launch.h"
#include "paste_masks_checks.h"

#include <cstdint>

#include "paste_masks_cuda_kernel.h"

namespace tensormask {
namespace {

template <typename A>
void launch(
    const Tensor& values, const Tensor& layout, const Tensor& boxes, int64_t largest,
    const Tensor& out) {
  const int rows = cuda::rows_of_paste<A>(largest);
  require(rows > 0, "masks are too wide: ", largest);
  const int height = static_cast<int>(out.size(1)), width = static_cast<int>(out.size(2));
  const int64_t bands = (height + rows - 1) / rows;
  cuda::paste_masks<A>
      <<<grid(out.size(0) * bands), cuda::PASTE_THREADS,
         rows * (largest + cuda::PASTE_ZEROS) * sizeof(A), stream_of(values)>>>(
          static_cast<const A*>(values.const_data_ptr()), layout.const_data_ptr<int64_t>(),
          static_cast<const A*>(boxes.const_data_ptr()), rows, height, width,
          static_cast<unsigned char*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor paste_masks(
    const Tensor& values, const Tensor& layout, const Tensor& boxes, int64_t largest,
    int64_t height, int64_t width) {
  check_paste(values, layout, boxes, largest, height, width);
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  Tensor out =
      torch::stable::new_empty(values, Shape{layout.size(0), height, width}, ScalarType::Bool);
  if (out.numel() == 0) return out;
  if (values.scalar_type() == ScalarType::Float) launch<float>(values, layout, boxes, largest, out);
  else launch<double>(values, layout, boxes, largest, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tensormask, CUDA, m) { m.impl("paste_masks", TORCH_BOX(&paste_masks)); }

}  // namespace tensormask
