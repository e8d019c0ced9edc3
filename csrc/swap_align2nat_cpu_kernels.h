// The CPU kernels, written once and compiled for several instruction sets: swap_align2nat_cpu.cpp
// includes this file in one namespace for each of them, which is why it and its parts have no
// include guard and include nothing else.
//
// Every kernel goes through the two axis pairs one after the other. The first pass combines at
// most four rows of memory, which are contiguous, into a buffer that stays in the cache; the
// second pass works in that buffer, where places are sorted by their remainder modulo lambda
// ("phases"), so that the steps of lambda places become steps of one.

#include "swap_align2nat_cpu_rows.h"

#include "swap_align2nat_cpu_dense.h"

#include "swap_align2nat_cpu_windows.h"
