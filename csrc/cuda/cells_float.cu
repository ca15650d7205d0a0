// The kernels of every cell that are computed in float.
#include "cell_kernels.cuh"

namespace fused_rnn::cuda {

template <>
const CellLaunches<float>* find_launches<float>(const char* cell) {
  return find_among<float>(Cells{}, cell);
}

}  // namespace fused_rnn::cuda
