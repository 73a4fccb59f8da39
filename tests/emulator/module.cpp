// The Python module of an emulator: loading it registers the CUDA operators, to run on the CPU; its functions are
// run.h's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "exchange.h"
#include "run.h"

PYBIND11_MODULE(emulator, m) {
  using namespace seqkernels::emulator;
  using namespace pybind11::literals;
  m.def("seed", &seed, "Draw the order of blocks and threads from here on.");
  m.def(
      "sizes_on_gpu", [](bool are) { sizes_on_gpu = are; }, "are"_a,
      "Whether batch_sizes are taken for ones on a GPU, into which the host does not look.");
  pybind11::enum_<Fault>(m, "Fault")
      .value("none", Fault::none)
      .value("barrier", Fault::barrier)
      .value("warp_barrier", Fault::warp_barrier)
      .value("cluster_barrier", Fault::cluster_barrier)
      .value("wait", Fault::wait)
      .value("parity", Fault::parity)
      .value("more_bytes", Fault::more_bytes)
      .value("fewer_bytes", Fault::fewer_bytes)
      .value("push", Fault::push)
      .value("tag", Fault::tag)
      .value("tear", Fault::tear)
      .value("stale", Fault::stale)
      .value("stream", Fault::stream)
      .value("launch", Fault::launch);
  m.def(
      "multiprocessors", [](int count) { multiprocessors = count; }, "count"_a,
      "How many blocks run at the same time, 132 to begin with.");
  m.def(
      "shared_memory", [](int bytes) { shared_memory = bytes; }, "bytes"_a,
      "How many bytes of it a block may have, 232448 to begin with.");
  m.def("plant", &plant, "fault"_a, "n"_a = 0, "Let the n-th event of each thread go wrong, in every launch.");
  m.def("exchange_by_pushes", &exchange_by_pushes, "blocks"_a, "cluster"_a, "steps"_a, "buffers"_a = 2,
        "waits"_a = true, "The error, or none, and the result of the kernel of exchange.h.");
  m.def("exchange_by_tags", &exchange_by_tags, "blocks"_a, "steps"_a, "buffers"_a = 2, "launches"_a = 1,
        "clears"_a = true);
  m.def("counts", [] {
    const Counts& c = counted;
    return pybind11::dict("launches"_a = c.launches, "blocks"_a = c.blocks, "barriers"_a = c.barriers,
                          "switches"_a = c.switches, "pushes"_a = c.pushes, "waits"_a = c.waits,
                          "shared_bytes"_a = c.shared_bytes, "operations"_a = c.operations,
                          "allocations"_a = c.allocations);
  });
}
