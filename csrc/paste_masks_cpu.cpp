// The schema of `paste_masks`, and the operator on the CPU. It defines what the CUDA kernel computes;
// tensormask/layers/masks.py pastes on the CPU region by region.

#include "paste_masks.h"
#include "paste_masks_checks.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tensormask {
namespace {

// Pastes a mask into a frame of zeros.
template <typename A>
void paste_mask(
    const A* mask, const paste::Axis<A>& along_y, const paste::Axis<A>& along_x, int64_t width,
    bool* frame) {
  A weight_y, weight_x;
  int v, u;
  for (int y = along_y.first; y < along_y.last; ++y) {
    along_y.locate(y, &v, &weight_y);
    const auto at = [&](int column) {
      return paste::between_rows(mask, along_y.side, along_x.side, v, weight_y, column);
    };
    for (int x = along_x.first; x < along_x.last; ++x) {
      along_x.locate(x, &u, &weight_x);
      const A low = at(u);
      frame[y * width + x] = low + weight_x * (at(u + 1) - low) >= A(0.5);
    }
  }
}

Tensor paste_masks(
    const Tensor& values, const Tensor& layout, const Tensor& boxes, int64_t largest,
    int64_t height, int64_t width) {
  check_paste(values, layout, boxes, largest, height, width);
  const int64_t count = layout.size(0);
  Tensor out = torch::stable::new_empty(values, Shape{count, height, width}, ScalarType::Bool);
  if (out.numel() == 0) return out;
  bool* const frames = static_cast<bool*>(out.mutable_data_ptr());
  const int64_t* const rows = layout.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < count; ++k) {
    const int64_t* const row = rows + 3 * k;  // offset, V, U
    require(row[0] >= 0 && row[1] >= 0 && row[2] >= 0 && row[2] <= largest &&
                row[0] + row[1] * row[2] <= values.size(0),
            "mask ", k, " of ", row[1], "x", row[2], " at ", row[0], " is outside of ",
            values.size(0), " values, or wider than ", largest);
  }
  const auto paste = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    const A* const masks = static_cast<const A*>(values.const_data_ptr());
    const A* const corners = static_cast<const A*>(boxes.const_data_ptr());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      std::memset(frames + begin * height * width, 0, (end - begin) * height * width);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t* const row = rows + 3 * k;
        const A* const box = corners + 4 * k;
        paste_mask(masks + row[0],
                   paste::Axis<A>::of(box[1], box[3], static_cast<int>(row[1]), height),
                   paste::Axis<A>::of(box[0], box[2], static_cast<int>(row[2]), width), width,
                   frames + k * height * width);
      }
    });
  };
  if (values.scalar_type() == ScalarType::Float) paste(static_cast<float*>(nullptr));
  else paste(static_cast<double*>(nullptr));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tensormask, m) {
  m.def(
      "paste_masks(Tensor values, Tensor layout, Tensor boxes, int largest, SymInt height, "
      "SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(tensormask, CPU, m) { m.impl("paste_masks", TORCH_BOX(&paste_masks)); }

}  // namespace tensormask
