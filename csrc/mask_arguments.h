// The masks of one layer with options (seqkernels/masked_ops.py), as operators take them.
#pragma once
#include "check.h"

#define SEQKERNELS_MASKS "Tensor? recurrent, Tensor? candidate, Tensor? zoneout_h, Tensor? zoneout_c, "

namespace seqkernels {

struct MaskArguments {
  Optional recurrent, candidate, zoneout_h, zoneout_c;

  bool any() const { return recurrent || candidate || zoneout_h || zoneout_c; }

  void check_for(const Layer& p, const Tensor& x) const {
    const int64_t D = p.directions, N = x.size(0);
    check_mask(recurrent, "recurrent", {D, p.sequences, p.projected}, x);
    check_mask(candidate, "candidate", {D, p.sequences, p.hidden}, x);
    check_mask(zoneout_h, "zoneout_h", {N, D, p.projected}, x);
    check_mask(zoneout_c, "zoneout_c", {N, D, p.hidden}, x);
    check(!candidate || saved_blocks_of(p.cell), "candidate goes with gated cells only");
    check(!zoneout_c || states_of(p.cell) == 2, "zoneout_c goes with an LSTM only");
  }

  void set(Layer& p) const {
    if (zoneout_h && !saved_blocks_of(p.cell)) p.saved_blocks = 1;
    p.recurrent = pointer(recurrent);
    p.candidate = pointer(candidate);
    p.zoneout_h = pointer(zoneout_h);
    p.zoneout_c = pointer(zoneout_c);
  }

  static const void* pointer(const Optional& mask) { return mask && mask->numel() ? mask->const_data_ptr() : nullptr; }

 private:
  static void check_mask(const Optional& mask, const char* name, const Shape& shape, const Tensor& x) {
    if (!mask) return;
    const auto sizes = mask->sizes();
    check(Shape(sizes.begin(), sizes.end()) == shape, name, " has another shape than ", text_of(shape.data(), 3));
    check(mask->is_contiguous() && mask->device() == x.device(), name, " is contiguous, and where x is");
    const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    check(mask->scalar_type() == type, name, " has not the type of computation");
    check_storage(*mask, name);
  }
};

}  // namespace seqkernels
