// The CUDA kernel that pastes masks. Like those of swap_align2nat, it runs on the CPU in
// tests/layers/cuda_on_cpu.cpp.

#pragma once

#include "cuda_block.h"
#include "paste_masks.h"

#include <cstdint>

namespace tensormask {
namespace cuda {

constexpr int PASTE_THREADS = 128;
constexpr int PASTE_ROWS = 16;  // of a frame, per block
constexpr int PASTE_ZEROS = 3;  // around a row of a mask: one before, two behind

// How many rows of frames a block takes: their interpolated mask rows are in shared memory. 0 if
// masks of this width do not fit.
template <typename A>
int rows_of_paste(int64_t largest) {
  const int64_t fit = MAX_SHARED_BYTES / ((largest + PASTE_ZEROS) * int64_t(sizeof(A)));
  return fit < PASTE_ROWS ? static_cast<int>(fit) : PASTE_ROWS;
}

// A block for some rows of a frame, each written by one warp, 16 bytes at a time. Block
// number = frame * bands + band of rows.
template <typename A>
TENSORMASK_KERNEL void paste_masks(
    const A* values, const int64_t* layout, const A* boxes, int rows, int height, int width,
    unsigned char* out) {
  using Pixels = Vector<unsigned char>;
  constexpr int SIZE = Pixels::SIZE, LANES = 32;
  // For each row of the frame, a row between two of the mask's, with zeros around it.
  A* const between = shared_memory<A>();
  const int bands = (height + rows - 1) / rows;
  const int64_t k = blockIdx.x / bands;
  const int begin = static_cast<int>(blockIdx.x - k * bands) * rows, end = min(begin + rows, height);
  const A* const mask = values + layout[k * 3];
  const A* const box = boxes + k * 4;
  const auto along_y =
      paste::Axis<A>::of(box[1], box[3], static_cast<int>(layout[k * 3 + 1]), height);
  const auto along_x =
      paste::Axis<A>::of(box[0], box[2], static_cast<int>(layout[k * 3 + 2]), width);
  const int first = max(begin, along_y.first), pitch = along_x.side + PASTE_ZEROS;
  const int used = along_x.first < along_x.last ? min(end, along_y.last) - first : 0;
  for (int t = threadIdx.x; t < used * pitch; t += blockDim.x) {
    const int row = t / pitch, u = t - row * pitch - 1;
    int v;
    A weight;
    along_y.locate(first + row, &v, &weight);
    between[t] = paste::between_rows(mask, along_y.side, along_x.side, v, weight, u);
  }
  synchronize();
  const int lane = threadIdx.x % LANES;
  for (int y = begin + threadIdx.x / LANES; y < end; y += blockDim.x / LANES) {
    const bool inside = y >= first && y < first + used;
    const int left = inside ? along_x.first : width, right = inside ? along_x.last : 0;
    const A* const line = between + (y - first) * pitch + 1;
    const auto pixel = [&](int x) {
      int u;
      A weight;
      along_x.locate(x, &u, &weight);
      return line[u] + weight * (line[u + 1] - line[u]) >= A(0.5);
    };
    unsigned char* const target = out + (k * height + y) * width;
    const int head = min(width, static_cast<int>(-reinterpret_cast<uintptr_t>(target) % SIZE));
    const int tail = head + (width - head) / SIZE * SIZE;  // vectors in between
    if (lane < head) target[lane] = inside && pixel(lane);
    for (int x = head + lane * SIZE; x < tail; x += LANES * SIZE) {
      Pixels pixels = {};
      if (x < right && x + SIZE > left) {
#pragma unroll
        for (int i = 0; i < SIZE; ++i) pixels.value[i] = pixel(x + i);
      }
      *reinterpret_cast<Pixels*>(target + x) = pixels;
    }
    if (tail + lane < width) target[tail + lane] = inside && pixel(tail + lane);
  }
}

}  // namespace cuda
}  // namespace tensormask
