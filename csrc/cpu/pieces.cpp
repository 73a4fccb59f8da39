// Which piece of its sequence each row is of, where a mask cuts sequences (seqkernels/resets.py).
#include <algorithm>
#include <numeric>
#include <tuple>

#include "../names.h"
#include "memory.h"

namespace {

using namespace seqkernels;

template <class T>
Tensor tensor_of(const std::vector<T>& values) {
  Tensor tensor = allocate(sizeof(T) == 1 ? ScalarType::Bool : ScalarType::Long, {static_cast<int64_t>(values.size())});
  if (!values.empty()) memcpy(tensor.mutable_data_ptr(), values.data(), values.size() * sizeof(T));
  return tensor;
}

// marks [N] of rows and batch_sizes [T], or marks [T, B] -> pieces in the shape of marks; of each piece its sequence
// [C] and whether its first row is marked [C]; and the last piece of each sequence [B].
std::tuple<Tensor, Tensor, Tensor, Tensor> number_pieces(Tensor marks, Optional batch_sizes, int64_t sequences) {
  check(marks.scalar_type() == ScalarType::Bool && marks.dim() == (batch_sizes ? 1 : 2),
        "marks is [rows] with batch_sizes, else [steps, sequences], bool");
  check(!batch_sizes || (batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1),
        "batch_sizes is [steps], int64");
  const Tensor of_rows = torch::stable::contiguous(marks);
  const auto* marked = static_cast<const bool*>(of_rows.const_data_ptr());
  const int64_t rows = of_rows.numel();
  std::vector<int64_t> sizes;
  if (batch_sizes) {
    const Tensor of_steps = torch::stable::contiguous(*batch_sizes);
    const auto* data = static_cast<const int64_t*>(of_steps.const_data_ptr());
    sizes.assign(data, data + of_steps.numel());
  } else {
    sizes.assign(marks.size(0), marks.size(1));
  }
  Tensor pieces = allocate(ScalarType::Long, Shape(marks.sizes().begin(), marks.sizes().end()));
  auto* piece = rows ? static_cast<int64_t*>(pieces.mutable_data_ptr()) : nullptr;
  std::vector<int64_t> sequence_of(sequences), last(sequences);
  std::vector<char> anew(sequences);
  // Each sequence has a first piece, if it has rows or not.
  std::iota(sequence_of.begin(), sequence_of.end(), 0);
  std::iota(last.begin(), last.end(), 0);
  int64_t row = 0;
  for (size_t t = 0; t < sizes.size(); t++) {
    check(sizes[t] <= sequences && row + sizes[t] <= rows, "batch_sizes do not fit the rows");
    for (int64_t b = 0; b < sizes[t]; b++, row++) {
      const bool mark = marked[row];
      if (t == 0) {
        anew[b] = mark;
      } else if (mark) {
        last[b] = static_cast<int64_t>(anew.size());
        sequence_of.push_back(b);
        anew.push_back(true);
      }
      piece[row] = last[b];
    }
  }
  std::fill(piece + row, piece + rows, -1);
  return {pieces, tensor_of(sequence_of), tensor_of(anew), tensor_of(last)};
}

}  // namespace

SEQKERNELS_FRAGMENT(m) {
  m.def(
      "number_pieces(Tensor marks, Tensor? batch_sizes, int sequences) "
      "-> (Tensor pieces, Tensor sequence_of, Tensor anew, Tensor last)");
}

SEQKERNELS_IMPL(CPU, m) { m.impl("number_pieces", TORCH_BOX(&number_pieces)); }
