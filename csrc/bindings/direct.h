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

// What is asked: the arguments of the ops in their order, without what plain calls do not have.
struct PlainQuestion {
  std::string cell;
  MaybeView input;
  MaybeView h0;
  MaybeView c0;
  Views weights;
  int64_t num_layers;
  bool bidirectional;
  bool batch_first;
  MaybeView lengths;
  MaybeView reset;
  bool reset_to_initial;
};

// A new tensor of up to three dimensions; `keep` as for a training step, which asks for it again.
using Make = std::function<View(const int64_t* sizes, size_t dim, ScalarType type, bool keep)>;

// `inference`, or with `frozen` the op of that name. Makes output, h_n unless it is a step, and c_n
// where the cell has c, in that order. With `save` it is `forward`, of a step too with h_n as the
// op has it, and makes saved at the end. Throws what the op throws, and where only the op can do
// it.
void infer(PlainQuestion question, const FrozenSizes* frozen, bool save, const Make& make);

struct PlainSeeds {
  MaybeView output, h_n, c_n;
};
struct Needs {
  bool input;
  bool state;
  bool weights;
};

// `backward`. Makes d_input, d_h0, d_c0 and d_weights, in that order, as far as they are needed.
void differentiate(const PlainSeeds& seeds, PlainQuestion question, const View& saved,
                   const Needs& needs, const Make& make);

// The functions of fused_rnn._C that do so.
PyMethodDef* direct_methods();

}  // namespace fused_rnn
