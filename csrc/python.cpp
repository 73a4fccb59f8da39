// The Python module seqkernels._C. Importing it registers the operators of cpu/ops.cpp.
#include <chrono>
#include <numeric>

#include "arguments.h"
#include "cpu/isa.h"
#include "cpu/kept_weights.h"
#include "cpu/memory.h"
#include "cuda/plan.h"
#include "direct.h"
#include "names.h"
#include "python_api.h"

using namespace seqkernels;

// ---- the CPU kernels

static PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kernels_name()); }

static PyObject* force_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string wanted = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  if (!force_kernels(wanted.c_str()))
    return PyErr_Format(PyExc_ValueError, "'%s' does not run here; built: %s", wanted.c_str(), built_kernels());
  Py_RETURN_NONE;
}

static PyObject* fill_memory(PyObject*, PyObject* with_nan) {
  const int wanted = PyObject_IsTrue(with_nan);
  if (wanted < 0) return nullptr;
  fill_with_nan = wanted;
  Py_RETURN_NONE;
}

static PyObject* release_memory(PyObject*, PyObject*) {
  WorkingMemory::release_kept();
  Py_RETURN_NONE;
}

static PyObject* kept_weights(PyObject*, PyObject* slot) {
  FromSlot from(PyLong_AsLongLong(slot));
  if (PyErr_Occurred()) return nullptr;
  const KeptWeights none, &weights = from.weights() ? *from.weights() : none;
  return Py_BuildValue("(LL)", static_cast<long long>(weights.bytes()), static_cast<long long>(weights.packed()));
}

static PyObject* release_weights(PyObject*, PyObject* slot) {
  FromSlot::release(PyLong_AsLongLong(slot));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

static PyObject* peak_gflops(PyObject*, PyObject*) {
  const int64_t threads = torch::stable::get_num_threads();
  double best = 0;
  for (int run = 0; run < 10; run++) {
    std::vector<double> operations(threads);
    const auto start = std::chrono::steady_clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) operations[i] = kernels().multiply_and_add(1000000);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, std::accumulate(operations.begin(), operations.end(), 0.0) / seconds.count() / 1e9);
  }
  return PyFloat_FromDouble(best);
}

static PyObject* build_info(PyObject*, PyObject*) {
#if defined(__clang__)
  return PyUnicode_FromFormat("built for %s by Clang %s", built_kernels(), __clang_version__);
#else
  return PyUnicode_FromFormat("built for %s by GCC %s", built_kernels(), __VERSION__);
#endif
}

// ---- what fits on a GPU

namespace {

// What the dictionary of a candidate says.
PyObject* dictionary_of(const Candidate& candidate) {
  const Plan& plan = candidate.plan;
  PyObject* found = Py_BuildValue("{s:s,s:s}", "path", name_of(plan.path), "reason", candidate.reason.c_str());
  const std::pair<const char*, int64_t> sizes[] = {
      {"tile", plan.tile},
      {"units", plan.units},
      {"blocks", candidate.blocks},
      {"cluster", candidate.cluster},
      {"width", candidate.width},
      {"threads", candidate.threads},
      {"at_once", candidate.at_once},
      {"registers", candidate.registers},
      {"shared_weights", candidate.shared_weights},
      {"l2", candidate.l2},
      {"shared_memory", candidate.shared_memory},
  };
  for (const auto& [name, size] : sizes) {
    PyObject* number = PyLong_FromLongLong(size);
    PyDict_SetItemString(found, name, number);
    Py_DECREF(number);
  }
  return found;
}

// The number of clusters at once for each size of a cluster; beyond the tuple there are none.
bool read_clusters(PyObject* counts, Gpu& gpu) {
  const Py_ssize_t size = PyTuple_Size(counts);
  for (Py_ssize_t i = 0; i < size && i < kMaxCluster; i++)
    gpu.clusters[i] = static_cast<int>(PyLong_AsLong(PyTuple_GetItem(counts, i)));
  return !PyErr_Occurred();
}

}  // namespace

static PyObject* cuda_candidates(PyObject*, PyObject* none, PyObject* arguments) {
  static const char* names[] = {"cell",       "hidden",    "projected", "dtype",         "tf32",
                                "directions", "sequences", "target",    "shared_memory", "multiprocessors",
                                "clusters",   "backward",  "masked",    "layer_norm",    nullptr};
  const char *cell = nullptr, *dtype = nullptr;
  PyObject* clusters = nullptr;
  LayerFacts layer{};
  Gpu gpu{};
  int projected = 0, tf32 = 0, backward = 0, masked = 0, layer_norm = 0;
  long long hidden = 0, sequences = 0;
  if (!PyArg_ParseTupleAndKeywords(none, arguments, "$sLpspiLiiiOppp", const_cast<char**>(names), &cell, &hidden,
                                   &projected, &dtype, &tf32, &layer.directions, &sequences, &gpu.target,
                                   &gpu.shared_memory, &gpu.multiprocessors, &clusters, &backward, &masked,
                                   &layer_norm) ||
      !read_clusters(clusters, gpu))
    return nullptr;
  const auto* scalar = std::find_if(std::begin(kScalars), std::end(kScalars),
                                    [&](Scalar one) { return std::string(name_of(one)) == dtype; });
  if (scalar == std::end(kScalars)) return PyErr_Format(PyExc_ValueError, "no CUDA kernel for %s", dtype);
  try {
    layer.cell = cell_of(cell);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_ValueError, "%s", error.what());
  }
  layer.scalar = *scalar;
  layer.tf32 = tf32, layer.has_projection = projected, layer.masked = masked, layer.layer_norm = layer_norm;
  layer.hidden = hidden, layer.sequences = sequences;
  PyObject* found = PyList_New(0);
  for (const Candidate& candidate : candidates(layer, gpu, backward)) {
    PyObject* one = dictionary_of(candidate);
    PyList_Append(found, one);
    Py_DECREF(one);
  }
  return found;
}

static PyCFunction of_many(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use."},
    {"force_isa", force_isa, METH_O, "Use another instruction set (for tests). ValueError if it does not run here."},
    {"fill_memory", fill_memory, METH_O, "Fill outputs and working memory with NaN beforehand (for tests)."},
    {"release_memory", release_memory, METH_NOARGS, "Give the working memory kept for the next call back."},
    {"kept_weights", kept_weights, METH_O,
     "Of the packed weights in a slot (csrc/cpu/kept_weights.h) the bytes, and how often panels were packed; (0, 0) "
     "while a call has them."},
    {"release_weights", release_weights, METH_O, "Give those back."},
    {"peak_gflops", peak_gflops, METH_NOARGS,
     "Float multiplications and additions a second at best, by torch's threads."},
    {"build_info", build_info, METH_NOARGS, "What was built, and by which compiler."},
    {"cuda_candidates", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cuda_candidates)),
     METH_VARARGS | METH_KEYWORDS,
     "cuda_candidates(*, cell, hidden, projected, dtype, tf32, directions, sequences, target, shared_memory, "
     "multiprocessors, clusters, backward, masked, layer_norm): all ways to run a pass on a GPU, and what speaks "
     "against them (csrc/cuda/plan.h)."},
    {"connect", of_many(direct::connect), METH_FASTCALL, direct::kConnect},
    {"forward", of_many(direct::forward), METH_FASTCALL, direct::kForward},
    {"backward", of_many(direct::backward), METH_FASTCALL, direct::kBackward},
    {"layer", of_many(direct::layer), METH_FASTCALL, direct::kLayer},
    {nullptr, nullptr, 0, nullptr},
};

#define SEQKERNELS_INIT_OF(module) PyInit_##module
#define SEQKERNELS_INIT(module) SEQKERNELS_INIT_OF(module)

PyMODINIT_FUNC SEQKERNELS_INIT(SEQKERNELS_MODULE)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C",
                               "CPU kernels, and what fits on a GPU.",
                               -1,
                               methods,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  PyObject* created = PyModule_Create(&module);
  PyObject* paths = PyTuple_New(kPaths);
  for (int i = 0; i < kPaths; i++) PyTuple_SetItem(paths, i, PyUnicode_FromString(name_of(static_cast<Path>(i))));
  PyModule_AddObject(created, "CUDA_PATHS", paths);  // by their numbers
  PyModule_AddIntConstant(created, "CUDA_STREAMS", kMaxStreams);
  PyModule_AddIntConstant(created, "SLOTS", FromSlot::kSlots);
  return created;
}
