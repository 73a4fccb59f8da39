#include "direct.h"

#include <array>

#include "check.h"
#include "cpu/memory.h"
#include "cpu/ops.h"

namespace seqkernels::direct {

namespace {

// What Python has connected. Between its tensors and handles of torch's C interface go the functions that torch has for
// the code that its own compiler generates, as no header of the stable ABI knows Python.
PyObject *handle_of = nullptr, *tensors_of = nullptr, *is_neg = nullptr, *plain_types[2] = {};

// A reference that is given back.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) { check(object, "an error of Python"); }
  Owned(const Owned&) = delete;
  ~Owned() { Py_DECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// While others may run Python.
class WithoutPython {
 public:
  WithoutPython() : state_(PyEval_SaveThread()) {}
  WithoutPython(const WithoutPython&) = delete;
  ~WithoutPython() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// ---- arguments

template <size_t kCount>
std::array<PyObject*, kCount> expect(PyObject* const* arguments, Py_ssize_t count) {
  check(count == kCount, "takes ", kCount, " arguments");
  std::array<PyObject*, kCount> all;
  std::copy_n(arguments, kCount, all.begin());
  return all;
}

// Only of tensors that the dispatcher would hand to our operator as they are.
Tensor tensor_of(PyObject* object) {
  check(object, "no object");
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  check(type == plain_types[0] || type == plain_types[1], "no plain tensor");
  const Owned negated(PyObject_CallFunctionObjArgs(is_neg, object, nullptr));
  check(negated.get() != Py_True, "the tensor is to be negated");
  const Owned handle(PyObject_CallFunctionObjArgs(handle_of, object, nullptr));
  const Tensor tensor(static_cast<AtenTensorHandle>(PyCapsule_GetPointer(handle.get(), nullptr)));
  int32_t layout = -1;  // Tensor::layout() is newer than the oldest torch
  check_call(aoti_torch_get_layout(tensor.get(), &layout));
  check(tensor.is_cpu() && layout == aoti_torch_layout_strided(), "no strided tensor on the CPU");
  return tensor;
}

Optional optional_of(PyObject* object) { return object == Py_None ? Optional() : Optional(tensor_of(object)); }

Tensors list_of(PyObject* list) {
  Tensors tensors;
  const Py_ssize_t count = PyList_Size(list);
  check(count > 0, "no list of weights");
  for (Py_ssize_t i = 0; i < count; i++) tensors.push_back(tensor_of(PyList_GetItem(list, i)));
  return tensors;
}

Cell cell_of(PyObject* name) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(name, &size);
  check(text, "no string");
  return seqkernels::cell_of({text, static_cast<size_t>(size)});
}

int64_t number_of(PyObject* object) {
  const long long number = PyLong_AsLongLong(object);
  check(number != -1 || !PyErr_Occurred(), "no number");
  return number;
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  check(truth >= 0, "no truth");
  return truth;
}

Launch launch_of(PyObject* tuple) {
  Launch launch(PyTuple_Size(tuple));
  for (size_t i = 0; i < launch.size(); i++) launch[i] = number_of(PyTuple_GetItem(tuple, i));
  return launch;
}

// The same elements, from the first one on, by other sizes.
Tensor reinterpreted(const Tensor& tensor, const Shape& sizes, const Shape& strides) {
  AtenTensorHandle handle = nullptr;
  check_call(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                            strides.data(), 0, &handle));
  return Tensor(handle);
}

// The states of a cell, [B, H], are those of one layer, [1, B, H], and back.
bool of_cell(const Tensor& state) { return state.dim() == 2; }
Tensor to_layer(const Tensor& state) {
  if (!of_cell(state)) return state;
  return reinterpreted(state, {1, state.size(0), state.size(1)}, {0, state.stride(0), state.stride(1)});
}
Tensor from_layer(const Tensor& state) {
  return reinterpreted(state, {state.size(1), state.size(2)}, {state.stride(1), state.stride(2)});
}
Optional to_layer(const Optional& state) { return state ? Optional(to_layer(*state)) : Optional(); }

// What both operators take first.
struct Stack {
  bool of_cell;  // whose states have no dimension of layers
  bool ensemble;
  Cell cell;
  Tensor x;
  Tensors weights;
  Tensor h_0;
  Optional c_0, batch_sizes;
  int64_t layers;

  StackArguments arguments() const {
    return {.cell = cell,
            .x = x,
            .weights = weights,
            .h_0 = h_0,
            .c_0 = c_0,
            .batch_sizes = batch_sizes,
            .layers = layers,
            .ensemble = ensemble};
  }
};

Stack stack_of(PyObject* ensemble, PyObject* cell, PyObject* x, PyObject* weights, PyObject* h_0, PyObject* c_0,
               PyObject* batch_sizes, PyObject* layers) {
  const Tensor given_h_0 = tensor_of(h_0);
  return {.of_cell = of_cell(given_h_0),
          .ensemble = is_true(ensemble),
          .cell = cell_of(cell),
          .x = tensor_of(x),
          .weights = list_of(weights),
          .h_0 = to_layer(given_h_0),
          .c_0 = to_layer(optional_of(c_0)),
          .batch_sizes = optional_of(batch_sizes),
          .layers = number_of(layers)};
}

// ---- results

// A list of tensors.
PyObject* list_from(const Tensors& results) {
  const Owned handles(PyList_New(0));
  for (const Tensor& tensor : results) {
    AtenTensorHandle handle = nullptr;
    check_call(aoti_torch_new_tensor_handle(tensor.get(), &handle));
    const Owned capsule(PyCapsule_New(handle, nullptr, nullptr));
    check(!PyList_Append(handles.get(), capsule.get()), "no memory");
  }
  return PyObject_CallFunctionObjArgs(tensors_of, handles.get(), nullptr);
}

template <class Call>
PyObject* unless_refused(const Call& call) {
  try {
    return call();
  } catch (const std::exception&) {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return nullptr;  // Ctrl-C, in a mode's Python
    PyErr_Clear();
    Py_RETURN_NONE;
  }
}

// ---- a padded batch

// A padded batch [steps, sequences, features], with batch_first [sequences, steps, features], or one step of it without
// that dimension, as rows and back.
class Batch {
 public:
  Batch(const Tensor& x, bool batch_first) : one_step_(x.dim() == 2) {
    check((x.dim() == 3 || one_step_) && x.numel(), "x is [steps, sequences, features]");
    sequences_ = x.size(one_step_ || batch_first ? 0 : 1);
    steps_ = one_step_ ? 1 : x.size(batch_first ? 1 : 0);
  }

  int64_t sequences() const { return sequences_; }

  Tensor to_rows(const Tensor& x, bool batch_first) const {
    const int64_t features = x.size(x.dim() - 1);
    check(static_cast<int64_t>(x.numel()) == steps_ * sequences_ * features, "of another size than x");
    const Tensor ordered = in_order(x, batch_first) ? x : copied(x, batch_first);
    return reinterpreted(ordered, {steps_ * sequences_, features}, {features, 1});
  }

  Tensor from_rows(const Tensor& y, bool batch_first) const {
    return one_step_ ? y : reinterpreted(y, sizes(y.size(1), batch_first), strides(y.size(1), batch_first));
  }

 private:
  // Those of rows of n features.
  Shape sizes(int64_t n, bool batch_first) const {
    if (one_step_) return {sequences_, n};
    return batch_first ? Shape{sequences_, steps_, n} : Shape{steps_, sequences_, n};
  }
  Shape strides(int64_t n, bool batch_first) const {
    if (one_step_) return {n, 1};
    return batch_first ? Shape{n, sequences_ * n, 1} : Shape{sequences_ * n, n, 1};
  }

  Tensor copied(const Tensor& x, bool batch_first) const {
    check_storage(x, "x");
    return torch::stable::contiguous(batch_first && !one_step_ ? torch::stable::transpose(x, 0, 1) : x);
  }

  bool in_order(const Tensor& x, bool batch_first) const {
    const int64_t features = x.size(x.dim() - 1);
    const Shape shape = sizes(features, batch_first), wanted = strides(features, batch_first);
    for (size_t i = 0; i < shape.size(); i++)
      if (shape[i] > 1 && x.stride(i) != wanted[i]) return false;
    return true;
  }

  const bool one_step_;
  int64_t steps_, sequences_;
};

std::optional<bool> unless_none(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(is_true(object));
}

// The batch that x is where `batch_first` says how its outputs lie: x becomes its rows.
std::optional<Batch> take_batch(Tensor& x, std::optional<bool> batch_first) {
  if (!batch_first) return {};
  const Batch batch(x, false);
  x = batch.to_rows(x, false);
  return batch;
}

// One of the states of a call, which may have none.
Tensor state_of(PyObject* states, Py_ssize_t which, ScalarType type, const Shape& shape) {
  if (!PyTuple_Size(states)) {
    Tensor zeros = allocate(type, shape);
    if (zeros.numel()) memset(zeros.mutable_data_ptr(), 0, zeros.numel() * zeros.element_size());
    return zeros;
  }
  const Tensor state = tensor_of(PyTuple_GetItem(states, which));
  const auto sizes = state.sizes();
  check(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "a state of another shape");
  return state;
}

}  // namespace

PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  PyObject** const places[] = {&handle_of, &tensors_of, &is_neg, &plain_types[0], &plain_types[1]};
  if (count != 5) return PyErr_Format(PyExc_TypeError, "connect takes five arguments");
  for (Py_ssize_t i = 0; i < count; i++) {
    Py_INCREF(arguments[i]);
    *places[i] = arguments[i];
  }
  Py_RETURN_NONE;
}

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return unless_refused([&] {
    const auto [ensemble, cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces, batch_first] =
        expect<12>(arguments, count);
    Stack stack = stack_of(ensemble, cell, x, weights, h_0, c_0, batch_sizes, layers);
    const std::optional<bool> first = unless_none(batch_first);
    const std::optional<Batch> batch = take_batch(stack.x, first);
    const Optional given_pieces = optional_of(pieces);
    const Launch given_launch = launch_of(launch);
    const bool saves = is_true(save);
    const auto [y, h_n, c_n, saved] = [&] {
      const WithoutPython released;
      return seqkernels::forward(stack.arguments(), saves, given_launch, given_pieces);
    }();
    if (stack.of_cell) return list_from({y, from_layer(*c_n), *saved});
    return list_from({batch ? batch->from_rows(y, *first) : y, h_n, *c_n, *saved});
  });
}

PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return unless_refused([&] {
    const auto [ensemble, cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x,
                wants_weights, launch, layers, pieces, batch_first] = expect<18>(arguments, count);
    Stack stack = stack_of(ensemble, cell, x, weights, h_0, c_0, batch_sizes, layers);
    Optional of_y = optional_of(grad_y);
    const Optional of_h_n = optional_of(grad_h_n), of_c_n = to_layer(optional_of(grad_c_n));
    Tensor own_y = tensor_of(y);
    const Tensor own_saved = tensor_of(saved);
    const std::optional<bool> first = unless_none(batch_first);
    std::optional<Batch> batch;
    const Optional given_pieces = optional_of(pieces);
    const Launch given_launch = launch_of(launch);
    const bool of_x = is_true(wants_x), of_weights = is_true(wants_weights);
    auto [grad_x, grad_weights, grad_h_0, grad_c_0] = [&] {
      const WithoutPython released;
      if (first) {  // what is copied may be large
        batch.emplace(stack.x, false);
        stack.x = batch->to_rows(stack.x, false), own_y = batch->to_rows(own_y, *first);
        if (of_y) of_y = batch->to_rows(*of_y, *first);
      }
      return seqkernels::backward(
          stack.arguments(), {.grad_y = of_y, .grad_h_n = of_h_n, .grad_c_n = of_c_n, .y = own_y, .saved = own_saved},
          of_x, of_weights, given_launch, given_pieces);
    }();
    if (batch && of_x) grad_x = batch->from_rows(grad_x, false);
    if (stack.of_cell) grad_h_0 = from_layer(grad_h_0), grad_c_0 = from_layer(grad_c_0);
    grad_weights.insert(grad_weights.begin(), {grad_x, grad_h_0, grad_c_0});
    return list_from(grad_weights);
  });
}

PyObject* layer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return unless_refused([&] {
    const auto [cell, x, states, weights, layers, directions, hidden, projected, batch_first, launch] =
        expect<10>(arguments, count);
    const Cell given_cell = cell_of(cell);
    const Tensor given_x = tensor_of(x);
    const std::optional<bool> first = unless_none(batch_first);
    const Batch batch(given_x, first.value_or(false));
    const ScalarType type = given_x.scalar_type();
    const int64_t all = number_of(layers) * number_of(directions), H = number_of(hidden), P = number_of(projected);
    const bool has_c = states_of(given_cell) == 2;
    const auto state = [&](Py_ssize_t which, int64_t features) {
      return to_layer(state_of(states, which, type,
                               first ? Shape{all, batch.sequences(), features} : Shape{batch.sequences(), features}));
    };
    const Stack stack{.of_cell = !first,
                      .ensemble = false,
                      .cell = given_cell,
                      .x = batch.to_rows(given_x, first.value_or(false)),
                      .weights = list_of(weights),
                      .h_0 = state(0, P ? P : H),
                      .c_0 = has_c ? Optional(state(1, H)) : Optional(),
                      .batch_sizes = {},
                      .layers = number_of(layers)};
    const Launch given_launch = launch_of(launch);
    const auto [y, h_n, c_n, _] = [&] {
      const WithoutPython released;
      return seqkernels::forward(stack.arguments(), false, given_launch, {}, {}, false);
    }();
    if (stack.of_cell) return has_c ? list_from({y, from_layer(*c_n)}) : list_from({y});
    const Tensor output = batch.from_rows(y, *first);
    return has_c ? list_from({output, h_n, *c_n}) : list_from({output, h_n});
  });
}

}  // namespace seqkernels::direct
