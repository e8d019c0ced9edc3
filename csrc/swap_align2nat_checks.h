// Argument checks with the messages of tensormask/layers/_checks.py, shapes of results, and the
// dispatch from tensors to kernels.

#pragma once

#include "swap_align2nat.h"
#include "tensor_checks.h"

#include <cstdint>

namespace tensormask {

constexpr const char* DTYPES = "float64, float32, float16 or bfloat16";

inline bool is_supported(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
      type == ScalarType::BFloat16;
}

inline int64_t square_root(int64_t value) {
  int64_t root = 0;
  while ((root + 1) * (root + 1) <= value) ++root;
  return root;
}

inline void check_lambda(int64_t lambda_val) {
  require(lambda_val >= 1, "lambda_val must be an integer >= 1, got ", lambda_val);
}

inline Geometry check_input(const Tensor& x, int64_t lambda_val) {
  require(x.dim() == 4 && is_supported(x),
          "x must be a floating tensor (N, V*U, H, W), ", DTYPES, ", got ",
          dtype_name(x), " of shape ", text(x.sizes()));
  check_lambda(lambda_val);
  const int64_t side = square_root(x.size(1));
  require(side > 0 && side * side == x.size(1),
          "the channels of x must be a square V*U with V == U, got ", x.size(1));
  return Geometry::of(x.size(0), side, x.size(2), x.size(3), lambda_val);
}

inline Shape input_shape(const Geometry& g) {
  return {g.num_images, g.side * g.side, g.height, g.width};
}

inline Shape output_shape(const Geometry& g) {
  return {g.num_images, g.out_side * g.out_side, g.out_height, g.out_width};
}

inline Shape masks_shape(const Geometry& g, const Tensor& windows) {
  return {windows.size(0), g.out_side, g.out_side};
}

inline Geometry check_grad(
    const Tensor& grad, int64_t lambda_val, int64_t height, int64_t width) {
  check_lambda(lambda_val);
  require(grad.dim() == 4 && is_supported(grad),
          "grad must be a floating tensor (N, lambda*V * lambda*U, H', W'), ", DTYPES, ", got ",
          dtype_name(grad), " of shape ", text(grad.sizes()));
  const int64_t side = square_root(grad.size(1)) / lambda_val;
  const Geometry g = Geometry::of(grad.size(0), side, height, width, lambda_val);
  require(side > 0 && height >= 0 && width >= 0 && has_shape(grad, output_shape(g)),
          "grad of shape ", text(grad.sizes()), " does not fit lambda_val ", lambda_val,
          " and an input of height ", height, " and width ", width);
  return g;
}

inline Geometry check_grad_at(
    const Tensor& grad, int64_t lambda_val, int64_t num_images, int64_t height, int64_t width) {
  check_lambda(lambda_val);
  require(grad.dim() == 3 && is_supported(grad),
          "grad must be a floating tensor (K, lambda*V, lambda*U), ", DTYPES, ", got ",
          dtype_name(grad), " of shape ", text(grad.sizes()));
  const int64_t side = grad.size(1) / lambda_val;
  require(side > 0 && side * lambda_val == grad.size(1) && grad.size(1) == grad.size(2) &&
              num_images >= 0 && height >= 0 && width >= 0,
          "grad of shape ", text(grad.sizes()), " does not fit lambda_val ", lambda_val,
          " and an input of height ", height, " and width ", width);
  return Geometry::of(num_images, side, height, width, lambda_val);
}

// Returns the windows, contiguous.
inline Tensor check_windows(const Tensor& x, const Tensor& windows) {
  require(windows.dim() == 2 && windows.size(1) == 3 && windows.scalar_type() == ScalarType::Long,
          "windows must be int64 of shape (K, 3), rows (n, y, x), got ", dtype_name(windows),
          " of shape ", text(windows.sizes()));
  require(device_name(windows) == device_name(x), "windows are on ", device_name(windows),
          ", x is on ", device_name(x));
  return windows.is_contiguous() ? windows : torch::stable::contiguous(windows);
}

// Requires that windows in host memory are on the grid.
inline void check_inside(const Geometry& g, const Tensor& windows) {
  const int64_t* window = windows.const_data_ptr<int64_t>();
  const int64_t limits[3] = {g.num_images, g.out_height, g.out_width};
  for (int64_t k = 0; k < windows.size(0); ++k, window += 3) {
    bool inside = true;
    for (int i = 0; i < 3; ++i) inside &= window[i] >= 0 && window[i] < limits[i];
    require(inside, "window (n, y, x) = [", window[0], ", ", window[1], ", ", window[2],
            "] is outside of the grid [", limits[0], ", ", limits[1], ", ", limits[2], "]");
  }
}

inline void check_out(const Tensor& x, const Tensor& out, const Shape& shape) {
  require(out.scalar_type() == x.scalar_type() && has_shape(out, shape) && out.is_contiguous() &&
              device_name(out) == device_name(x),
          "out must be a contiguous ", dtype_name(x), " tensor of shape ", text(shape), " on ",
          device_name(x), ", got ", dtype_name(out), " of shape ", text(out.sizes()), " on ",
          device_name(out));
}

// Calls f with a null pointer of the tensor's element type. Each device has its own 16-bit types.
template <typename Half, typename BFloat16, typename F>
void dispatch(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::Half: return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "no kernel for this dtype");  // not reached after `check_input`
  }
}

template <typename T>
View<const T> view(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1),
          tensor.stride(2), tensor.stride(3)};
}

}  // namespace tensormask
