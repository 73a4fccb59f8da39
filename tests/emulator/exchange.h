// Small kernels in which blocks that run at the same time exchange numbers, as the recurrent ones do, for tests of the
// emulator itself. In each step number i of a block becomes the mean of all blocks' numbers i, plus the block's rank.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace seqkernels::emulator {

// The error, or an empty text, and the last numbers of all blocks, of which a block has 64; they begin as 0, 1, 2, ...

// By pushes to the peers of a cluster. Right are two buffers, and a wait for the last step's pushes.
std::pair<std::string, std::vector<float>> exchange_by_pushes(int blocks, int cluster, int steps, int buffers,
                                                              bool waits);

// By vectors with tags in global memory, between all blocks. Right are two buffers. With several launches one takes the
// numbers of the one before; right is then memory that is cleared in between.
std::pair<std::string, std::vector<float>> exchange_by_tags(int blocks, int steps, int buffers, int launches,
                                                            bool clears);

}  // namespace seqkernels::emulator
