// The CUDA kernels. They use no atomics: each value of a result is written once, by one thread.
//
// A *location number* is a location plus `shift`: window * lambda + mask row, never negative (see
// swap_align2nat.h). The output (v, y) with v = q * lambda + r has the number (y + q) * lambda + r.
// It reads the location of this number, the next location, and the channels around q. So a block
// takes one number along H and a range of numbers along W, and iterates over the channels q, whose
// rows of memory are then in the L1 cache.
//
// The two axis pairs are processed one after the other, as on the CPU: the first pass sums at most
// four contiguous rows of memory into shared memory, the second pass reads shared memory along W.
// Shared memory is skewed by one in 32, so that steps of lambda do not conflict in one bank.
//
// These files use no header of CUDA or PyTorch: tests/layers/cuda_on_cpu.cpp runs them on the CPU.

#pragma once

#include "swap_align2nat_cuda_dense.h"
#include "swap_align2nat_cuda_windows.h"
#include "swap_align2nat_cuda_windows_backward.h"
