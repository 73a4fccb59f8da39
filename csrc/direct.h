// The operators of cpu/ops.cpp called by Python past torch's dispatcher, which costs more than a small layer computes.
// seqkernels/direct.py says when.
#pragma once
#include "python_api.h"

namespace seqkernels::direct {

// Functions of METH_FASTCALL. All but connect return None where they cannot run the call, and then it has run nothing:
// the operator does, or says why not. They raise what a signal raised.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* layer(PyObject*, PyObject* const* arguments, Py_ssize_t count);

constexpr const char* kConnect =
    "connect(handle_of, tensors_of, is_neg, Tensor, Parameter): torch's functions that make a handle of a tensor, and "
    "tensors of handles, what says that a tensor is to be negated, and the classes of plain tensors.";
constexpr const char* kForward =
    "forward(ensemble, cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces, batch_first): the "
    "operator's results; batch_first: None, or x is a padded batch [T, B, I], and y one [T, B, H] ([B, T, H]). Of "
    "states [B, H] (a cell): y, c_n and saved.";
constexpr const char* kBackward =
    "backward(ensemble, cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, "
    "wants_weights, launch, layers, pieces, batch_first): the operator's results, those of the weights last, one after "
    "the other; batch_first, and states [B, H], as of forward.";
constexpr const char* kLayer =
    "layer(cell, x, states, weights, layers, directions, hidden, projected, batch_first, launch): y, h_n, c_n of a "
    "padded batch [T, B, I] ([B, T, I]) or a step [B, I], without gradients; no states: zeros. batch_first None: h, c "
    "of a cell, whose states are [B, H].";

}  // namespace seqkernels::direct
