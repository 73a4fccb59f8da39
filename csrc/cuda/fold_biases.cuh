// The biases of the input projection, which are folded by a launch of their own or by that which packs weights.
#pragma once
#include "device.cuh"
//
#include "kernels.h"

namespace seqkernels::device {

// Element i of the biases of the direction that is the second index of the CTA.
template <class T>
DEVICE void fold_bias(const FoldBiases& p, int64_t i) {
  const int d = block_y();
  acc_t<T> bias = to_acc(Global<const T>(static_cast<const T*>(p.b_ih[d]), p.size).load(i));
  if (i < p.folded) bias += to_acc(Global<const T>(static_cast<const T*>(p.b_hh[d]), p.size).load(i));
  Global<T>(static_cast<T*>(p.result) + d * p.size, p.size).store(i, from_acc<T>(bias));
}

}  // namespace seqkernels::device
