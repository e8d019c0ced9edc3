// The CPU kernels, written once and compiled for several instruction sets: a file for each of them
// includes this one within a namespace of its own, where instructions beyond the baseline are
// allowed. So it and its parts include nothing that would be compiled for those instructions and
// then used everywhere.
//
// Every kernel goes through the two axis pairs one after the other. The first pass combines at
// most four rows of memory, which are contiguous, into a buffer that stays in the cache; the
// second pass works in that buffer, where places are sorted by their remainder modulo lambda
// ("phases"), so that the steps of lambda places become steps of one.

#include "swap_align2nat_cpu_rows.h"

#include "swap_align2nat_cpu_dense.h"

#include "swap_align2nat_cpu_windows.h"
