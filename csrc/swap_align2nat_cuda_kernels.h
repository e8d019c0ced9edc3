// The CUDA kernels: no atomics, each value of a result is written once, by one thread.
//
// A *place number* is a place plus `shift`: window * lambda + mask row, never negative (see
// swap_align2nat.h). In these numbers the operation is local: output (v, y) with v = q * lambda + r
// belongs to the number (y + q) * lambda + r, and reads its place, the next place, and the channels
// around q. So a block takes one number along H and a range of them along W, and goes through the
// channels q, whose rows of memory it then finds in the L1 cache.
//
// The two axis pairs follow each other, as on the CPU: a first pass sums at most four rows of
// memory, read side by side, into shared memory; a second pass reads that along W. Shared memory is
// skewed by one in 32, so that steps of lambda do not meet in one bank.
//
// Only what the language gives is used here, no header of CUDA or PyTorch: tests/cuda_on_cpu.cpp
// runs these kernels on the CPU.

#pragma once

#include "swap_align2nat_cuda_dense.h"
#include "swap_align2nat_cuda_windows.h"
