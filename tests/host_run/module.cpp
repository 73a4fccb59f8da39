// The Python module of a host run: loading it registers the CUDA operators, to run on the CPU; its functions are
// run.h's.
#include <pybind11/pybind11.h>

#include "run.h"

PYBIND11_MODULE(host_run, m) {
  using namespace seqkernels::host_run;
  using namespace pybind11::literals;
  m.def("seed", &seed, "Draw the order of blocks and threads from here on.");
  m.def("skip_barrier", &skip_barrier, "Plant a fault: pass the n-th barrier of a launch without waiting; -1: none.");
  m.def("counts", [] {
    const Counts c = counts();
    return pybind11::dict("launches"_a = c.launches, "blocks"_a = c.blocks, "barriers"_a = c.barriers,
                          "switches"_a = c.switches, "shared_bytes"_a = c.shared_bytes);
  });
}
