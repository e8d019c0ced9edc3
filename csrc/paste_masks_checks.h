// Argument checks of `paste_masks`.

#pragma once

#include "tensor_checks.h"

namespace tensormask {

inline void check_paste(
    const Tensor& values, const Tensor& layout, const Tensor& boxes, int64_t largest,
    int64_t height, int64_t width) {
  const ScalarType type = values.scalar_type();
  require((type == ScalarType::Float || type == ScalarType::Double) && values.dim() == 1 &&
              values.is_contiguous(),
          "values must be contiguous, float32 or float64, of shape (n,), got ", dtype_name(values),
          " of shape ", text(values.sizes()));
  require(layout.scalar_type() == ScalarType::Long && layout.dim() == 2 && layout.size(1) == 3 &&
              layout.is_contiguous() && device_name(layout) == device_name(values),
          "layout must be contiguous, int64, of shape (K, 3), on ", device_name(values), ", got ",
          dtype_name(layout), " of shape ", text(layout.sizes()), " on ", device_name(layout));
  require(boxes.scalar_type() == type && has_shape(boxes, {layout.size(0), 4}) &&
              boxes.is_contiguous() && device_name(boxes) == device_name(values),
          "boxes must be contiguous, ", dtype_name(values), ", of shape (", layout.size(0),
          ", 4), on ", device_name(values), ", got ", dtype_name(boxes), " of shape ",
          text(boxes.sizes()), " on ", device_name(boxes));
  require(largest >= 0, "the largest width must not be negative, got ", largest);
  constexpr int64_t limit = 1 << 30;
  require(height >= 0 && width >= 0 && height < limit && width < limit,
          "the size of the frames must not be negative, got ", height, ", ", width);
}

}  // namespace tensormask
