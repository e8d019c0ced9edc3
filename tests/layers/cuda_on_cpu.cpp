// Runs the CUDA kernels on the CPU, for machines without a GPU: tests what they
// compute, not their speed. Compiled and called by tests/layers/test_cuda_on_cpu.py.
//
// The threads of a block are coroutines: each runs until `synchronize` or its end, then the next
// one runs, in either order. If a kernel lacks a `synchronize`, a thread reads what another one has
// not written yet, in one of the orders.

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

struct Dimensions {
  unsigned int x, y, z;
};
constexpr unsigned int NUM_THREADS = 64;
constexpr size_t STACK_BYTES = 1 << 16;
constexpr size_t GUARD_BYTES = 256;  // behind the shared memory
static Dimensions threadIdx, blockIdx;
static const Dimensions blockDim{NUM_THREADS, 1, 1};
static std::vector<unsigned char> memory_of_block;
static ucontext_t scheduler, threads[NUM_THREADS];
static unsigned char stacks[NUM_THREADS][STACK_BYTES];
static void (*call_kernel)(const void*);
static const void* kernel_of_launch;
static unsigned int num_running;

extern "C" {
int last_thread_first = 0;
Dimensions first_block{0, 0, 0};  // of grids that have it; earlier ones do not run
int num_errors = 0;  // barriers that some threads miss, writes beyond shared memory
}

#define TENSORMASK_KERNEL static
#define TENSORMASK_DEVICE static inline

namespace tensormask::cuda {
using std::max;
using std::min;

template <typename A>
A* shared_memory() {
  return reinterpret_cast<A*>(memory_of_block.data());
}
static void synchronize() { swapcontext(&threads[threadIdx.x], &scheduler); }
}  // namespace tensormask::cuda

#include "../../csrc/paste_masks_cuda_kernel.h"
#include "../../csrc/swap_align2nat_cuda_kernels.h"

using namespace tensormask;

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {  // rounds to nearest, ties to even; no NaNs
    uint32_t all;
    std::memcpy(&all, &value, 4);
    bits = static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
  }
};

static void run_thread() {
  call_kernel(kernel_of_launch);
  --num_running;
}

static void start_block() {
  std::memset(memory_of_block.data(), 0xff, memory_of_block.size());  // NaN
  num_running = NUM_THREADS;
  for (unsigned int t = 0; t < NUM_THREADS; ++t) {
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = stacks[t];
    threads[t].uc_stack.ss_size = STACK_BYTES;
    threads[t].uc_link = &scheduler;
    makecontext(&threads[t], run_thread, 0);
  }
}

static void run_block() {
  start_block();
  while (num_running > 0) {
    for (unsigned int t = 0; t < NUM_THREADS; ++t) {
      threadIdx.x = last_thread_first ? NUM_THREADS - 1 - t : t;
      swapcontext(&scheduler, &threads[threadIdx.x]);
    }
    if (num_running > 0 && num_running < NUM_THREADS) {
      ++num_errors;
      return;
    }
  }
  for (auto byte = memory_of_block.end() - GUARD_BYTES; byte < memory_of_block.end(); ++byte)
    num_errors += *byte != 0xff;
}

// Runs all blocks, one after the other.
template <typename F>
static void launch(const Dimensions& grid, int64_t shared_bytes, const F& kernel) {
  call_kernel = [](const void* f) { (*static_cast<const F*>(f))(); };
  kernel_of_launch = &kernel;
  memory_of_block.resize(shared_bytes + GUARD_BYTES);
  const bool has_first =
      first_block.x < grid.x && first_block.y < grid.y && first_block.z < grid.z;
  const Dimensions first = has_first ? first_block : Dimensions{0, 0, 0};
  for (blockIdx.z = first.z; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = first.y; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = first.x; blockIdx.x < grid.x; ++blockIdx.x) run_block();
}

template <typename F>
static void launch(int64_t blocks, int64_t shared_bytes, const F& kernel) {
  launch(Dimensions{static_cast<unsigned int>(blocks), 1, 1}, shared_bytes, kernel);
}

template <typename T>
static View<const T> view(const T* data, const int64_t* strides) {
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

template <typename T>
static void forward(const int64_t* sizes, const int64_t* strides, const T* x, T* out, double pad, bool directly) {
  const Geometry g = Geometry::of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  const cuda::Cut cut = cuda::cut_forward<T>(g);
  if (directly) {
    launch(g.num_images * g.out_side * g.out_height, 0,
           [&] { cuda::dense_forward_directly<T>(g, view(x, strides), out, pad); });
  } else {
    launch(cut.blocks(g.num_images), cuda::shared_bytes<T>(g, cut),
           [&] { cuda::dense_forward<T>(g, view(x, strides), out, pad, cut); });
  }
}

template <typename T>
static void backward(const int64_t* sizes, const int64_t* strides, const T* grad, T* out, bool directly) {
  const Geometry g = Geometry::of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  const cuda::Cut cut = cuda::cut_backward<T>(g);
  if (directly) {
    launch(g.num_images * g.side * g.side * g.height, 0,
           [&] { cuda::dense_backward_directly<T>(g, view(grad, strides), out); });
  } else {
    launch(cut.blocks(g.num_images), cuda::shared_bytes<T>(g, cut),
           [&] { cuda::dense_backward<T>(g, view(grad, strides), out, cut); });
  }
}

template <typename T>
static void forward_at(
    const int64_t* sizes, const int64_t* strides, const T* x, const int64_t* windows, int64_t count,
    T* out, double pad) {
  const Geometry g = Geometry::of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  launch(count * g.out_side, 0,
         [&] { cuda::windows_forward<T>(g, view(x, strides), windows, out, pad); });
}

template <typename T>
static void backward_at(
    const int64_t* sizes, const int64_t* strides, const T* grad, const int64_t* windows,
    int64_t count, T* out, int64_t most) {
  const Geometry g = Geometry::of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  const int64_t num_rows = g.num_images * g.out_height;
  std::vector<int> starts(num_rows + 1, -1), order(count, -1), columns(count, -1);
  launch((std::max(count, num_rows + 1) + blockDim.x - 1) / blockDim.x, blockDim.x * sizeof(int),
         [&] {
           cuda::sort_windows(g, windows, static_cast<int>(count), starts.data(), order.data(),
                              columns.data());
         });
  using A = typename cuda::Accumulate<T>::type;
  const int64_t block_columns = most > 0 ? most : cuda::columns_of_block<A>(g);
  const int64_t parts = (g.width + block_columns - 1) / block_columns;
  const Dimensions grid{static_cast<unsigned int>(g.height), static_cast<unsigned int>(g.side * parts),
                        static_cast<unsigned int>(g.num_images)};
  launch(grid, g.side * block_columns * sizeof(A), [&] {
    cuda::windows_backward<T>(g, view(grad, strides), starts.data(), order.data(), columns.data(),
                              out, static_cast<int>(block_columns));
  });
}

// `rows` of a block; 0 for as many as the operator takes.
template <typename A>
static void paste_frames(
    const A* values, const int64_t* layout, const A* boxes, int64_t count, int64_t largest,
    int64_t rows, int64_t height, int64_t width, unsigned char* out) {
  if (rows == 0) rows = cuda::rows_of_paste<A>(largest);
  launch(count * ((height + rows - 1) / rows), rows * (largest + cuda::PASTE_ZEROS) * sizeof(A), [&] {
    cuda::paste_masks<A>(values, layout, boxes, static_cast<int>(rows), static_cast<int>(height),
                         static_cast<int>(width), out);
  });
}

auto* paste_float32 = paste_frames<float>;
auto* paste_float64 = paste_frames<double>;

// `sizes` are N, side, H, W and lambda; `strides` are those of x or grad, in elements.
#define EXPORT(NAME, T)                      \
  auto* forward_##NAME = forward<T>;         \
  auto* backward_##NAME = backward<T>;       \
  auto* forward_at_##NAME = forward_at<T>;   \
  auto* backward_at_##NAME = backward_at<T>;

EXPORT(float32, float)
EXPORT(float64, double)
auto* backward_at_bfloat16 = backward_at<BFloat16>;
