// A small call without torch's dispatcher, whose handling of arguments costs more than the call.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "view.h"

struct PyMethodDef;

namespace fused_rnn {

// Weights packed by an earlier call: what their blocks do not tell before they are trusted.
struct FrozenSizes {
  int64_t H;
  int64_t proj;  // 0 for none
};

// A new tensor of up to three dimensions.
using Make = std::function<View(const int64_t* sizes, size_t dim, ScalarType type)>;

// `inference`, or with `frozen` the op of that name. Makes output, h_n unless it is a step, and c_n
// where the cell has c, in that order. Throws what the op throws, and where only the op can do it.
void infer(const std::string& cell, const View& input, const MaybeView& h0, const MaybeView& c0,
           Views weights, const FrozenSizes* frozen, int64_t num_layers, bool bidirectional,
           bool batch_first, const Make& make);

// The functions of fused_rnn._C that do so.
PyMethodDef* direct_methods();

}  // namespace fused_rnn
