// Runs the CUDA kernels of swap_align2nat on the CPU, thread by thread, where no GPU is at hand:
// what they compute is checked, not how fast. Compiled and called by tests/layers/test_cuda_on_cpu.py.

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

struct Dimensions {
  unsigned int x;
};
static thread_local Dimensions threadIdx, blockIdx;
static Dimensions blockDim{64};
static std::vector<unsigned char> memory_of_block;
static std::barrier<>* barrier_of_block;

#define TENSORMASK_KERNEL static
#define TENSORMASK_DEVICE static inline

namespace tensormask::cuda {
using std::max;
using std::min;

template <typename A>
A* shared_memory() {
  return reinterpret_cast<A*>(memory_of_block.data());
}
static void synchronize() { barrier_of_block->arrive_and_wait(); }
}  // namespace tensormask::cuda

#include "../../csrc/swap_align2nat_cuda_kernels.h"

using namespace tensormask;

// All blocks, one after the other; shared memory begins as rubbish in each.
template <typename F>
static void launch(int64_t blocks, int64_t bytes, const F& kernel) {
  std::barrier barrier(blockDim.x);
  barrier_of_block = &barrier;
  memory_of_block.resize(bytes);
  std::vector<std::thread> threads;
  for (unsigned int t = 0; t < blockDim.x; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t block = 0; block < blocks; ++block) {
        if (t == 0) std::memset(memory_of_block.data(), 0xff, memory_of_block.size());
        barrier.arrive_and_wait();
        threadIdx.x = t;
        blockIdx.x = static_cast<unsigned int>(block);
        kernel();
        barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
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
    int64_t count, T* out) {
  const Geometry g = Geometry::of(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]);
  std::vector<int64_t> head(g.num_images * g.out_height * g.out_width, -1), next(count);
  launch((count + blockDim.x - 1) / blockDim.x, 0,
         [&] { cuda::link_windows(g, windows, count, head.data(), next.data()); });
  launch(g.num_images * g.side * g.side * g.height, 0, [&] {
    cuda::windows_backward<T>(g, view(grad, strides), head.data(), next.data(), out);
  });
}

// `sizes` are N, side, H, W and lambda; `strides` those of x or grad, in elements.
#define EXPORT(NAME, T)                                                                          \
  extern "C" void forward_##NAME(const int64_t* sizes, const int64_t* strides, const T* x, T* out, \
                                 double pad, bool directly) {                                    \
    forward<T>(sizes, strides, x, out, pad, directly);                                           \
  }                                                                                              \
  extern "C" void backward_##NAME(const int64_t* sizes, const int64_t* strides, const T* grad,   \
                                  T* out, bool directly) {                                       \
    backward<T>(sizes, strides, grad, out, directly);                                            \
  }                                                                                              \
  extern "C" void forward_at_##NAME(const int64_t* sizes, const int64_t* strides, const T* x,    \
                                    const int64_t* windows, int64_t count, T* out, double pad) { \
    forward_at<T>(sizes, strides, x, windows, count, out, pad);                                  \
  }                                                                                              \
  extern "C" void backward_at_##NAME(const int64_t* sizes, const int64_t* strides, const T* grad, \
                                     const int64_t* windows, int64_t count, T* out) {            \
    backward_at<T>(sizes, strides, grad, windows, count, out);                                   \
  }

EXPORT(float32, float)
EXPORT(float64, double)
