// The stepwise path: for each step a product by torch's cuBLAS and a kernel; with a projection, twice.
#include "host.h"

namespace seqkernels {

namespace {

// A weight [rows, columns] of all directions, one behind the other.
Tensor all_directions(const CallContext& context, const Layer& p, const void* const WeightsOf<const void*>::* which,
                      int64_t rows, int64_t columns) {
  if (p.directions == 1) return context.view(p.weights[0].*which, {1, rows, columns});
  Tensor both = context.allocate({2, rows, columns});
  for (int d = 0; d < 2; d++) {
    Tensor one = context.view(context.at(both.mutable_data_ptr(), d * rows * columns), {rows, columns});
    copy(one, context.view(p.weights[d].*which, {rows, columns}));
  }
  return both;
}

Tensor transposed(const CallContext& context, const Layer& p, const Tensor& array, int64_t rows, int64_t columns) {
  return context.view(array.const_data_ptr(), {p.directions, columns, rows}, {rows * columns, 1, columns});
}

// The first rows of each of the D matrices of an array [D, B, width]. A step mostly has as many as the one before, and
// then the same view.
class FirstRows {
 public:
  FirstRows(const CallContext& context, const Layer& p, const Tensor& array, int64_t width)
      : context_(context), p_(p), data_(array.const_data_ptr()), width_(width) {}

  const Tensor& operator()(int64_t rows) {
    if (!view_ || rows != rows_)
      view_ = context_.view(data_, {p_.directions, rows, width_}, {p_.sequences * width_, width_, 1});
    rows_ = rows;
    return *view_;
  }

 private:
  const CallContext& context_;
  const Layer& p_;
  const void* data_;
  int64_t width_, rows_ = 0;
  Optional view_;
};

}  // namespace

void stepwise_forward(const CallContext& context, const Layer& p, const StepOffsets& steps, const ForwardArgs& sweep,
                      Tensor& h, Tensor& c) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = all_directions(context, p, &WeightsOf<const void*>::w_hh, GH, P);
  const Tensor w_hh_t = transposed(context, p, w_hh, GH, P);
  Tensor gates_h = context.allocate({D, B, GH}), unprojected = h, projected = h, w_hr = h, w_hr_t = h;
  if (p.has_projection) {
    unprojected = context.allocate({D, B, H}), projected = context.allocate({D, B, P});
    w_hr = all_directions(context, p, &WeightsOf<const void*>::w_hr, P, H);
    w_hr_t = transposed(context, p, w_hr, P, H);
  }
  FirstRows rows_of_gates(context, p, gates_h, GH), rows_of_h(context, p, h, P);
  FirstRows rows_of_unprojected(context, p, unprojected, H), rows_of_projected(context, p, projected, P);
  for (int64_t k = 0; k < p.steps; k++) {
    const int64_t running = steps.running(k);
    multiply_each(rows_of_gates(running), rows_of_h(running), w_hh_t);
    check_launch(step_forward(
        {sweep, k, running, gates_h.const_data_ptr(), unprojected.mutable_data_ptr(), pointer(c), p.has_projection},
        context.stream()));
    if (!p.has_projection) continue;
    multiply_each(rows_of_projected(running), rows_of_unprojected(running), w_hr_t);
    check_launch(
        step_project({sweep, k, running, projected.const_data_ptr(), h.mutable_data_ptr(), sweep.y}, context.stream()));
  }
}

void stepwise_backward(const CallContext& context, const Layer& p, const StepOffsets& steps, const BackwardArgs& sweep,
                       const SweepGradients& grads, Tensor& grad_h, Tensor& grad_c) {
  const int64_t D = p.directions, B = p.sequences, H = p.hidden, P = p.projected, GH = gates_of(p.cell) * H;
  const Tensor w_hh = all_directions(context, p, &WeightsOf<const void*>::w_hh, GH, P);
  Tensor grad_step = context.allocate({D, B, GH}), unprojected = grad_h, projected = grad_h, w_hr = grad_h;
  BackwardArgs before_projection = sweep;
  if (p.has_projection) {
    before_projection.grad_y = nullptr;
    unprojected = context.allocate({D, B, H}), projected = context.allocate({D, B, P});
    w_hr = all_directions(context, p, &WeightsOf<const void*>::w_hr, P, H);
  }
  FirstRows rows_of_gates(context, p, grad_step, GH), rows_of_grad_h(context, p, grad_h, P);
  FirstRows rows_of_projected(context, p, projected, P), rows_of_unprojected(context, p, unprojected, H);
  Tensor all_projected = grads.projected;
  for (int64_t k = p.steps; k-- > 0;) {
    const int64_t running = steps.running(k);
    if (p.has_projection) {
      check_launch(step_project_backward({sweep, k, running, sweep.grad_y, grad_h.mutable_data_ptr(),
                                          projected.mutable_data_ptr(), pointer(all_projected)},
                                         context.stream()));
      multiply_each(rows_of_unprojected(running), rows_of_projected(running), w_hr);
    }
    check_launch(step_backward({before_projection, k, running, unprojected.mutable_data_ptr(), pointer(grad_c),
                                grad_step.mutable_data_ptr(), p.has_projection},
                               context.stream()));
    multiply_each(rows_of_grad_h(running), rows_of_gates(running), w_hh, true);
  }
}

}  // namespace seqkernels
