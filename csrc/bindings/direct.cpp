// fused_rnn._C.call, call_frozen and backward: a layer or cell from Python without the dispatcher.
//
// Of what the dispatcher does for an op such a call needs nothing as long as its tensors are plain
// memory on the CPU, and no mode or transform is active. That is asked here, and where it is not
// so, or anything else is unusual or wrong, the answer is None: then the caller takes the way
// through the op, which knows all cases and all messages. What is computed for autograd is given to
// a function in Python, which records it.
#define PY_SSIZE_T_CLEAN
#include "direct.h"

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <exception>
#include <iterator>
#include <new>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "memory.h"

namespace fused_rnn {
namespace {

using namespace dlpack;

// What torch's Python has told.
struct {
  const DLPackExchangeAPI* api = nullptr;  // null: every answer is None
  PyObject* tensor = nullptr;              // the two types that have no behaviour of their own
  PyObject* parameter = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* requires_grad = nullptr;  // a name
  PyObject* probes = nullptr;         // what must be false
  PyObject* forward_ad = nullptr;     // torch's module, and a name in it
  PyObject* current_level = nullptr;
  PyObject* record = nullptr;  // for autograd
} torch_side;

// References, for as long as a call runs without the GIL.
class Owned {
 public:
  explicit Owned(size_t count) { objects_.reserve(count); }
  Owned(const Owned&) = delete;
  ~Owned() {
    for (PyObject* object : objects_) Py_DECREF(object);
  }
  void add(PyObject* object) { objects_.push_back(Py_NewRef(object)); }
  // The first of them, a list.
  PyObject* first(size_t count) const {
    PyObject* list = PyList_New(Py_ssize_t(count));
    for (size_t i = 0; list && i < count; ++i)
      PyList_SET_ITEM(list, Py_ssize_t(i), Py_NewRef(objects_[i]));
    return list;
  }

 private:
  std::vector<PyObject*> objects_;
};

struct DataType {
  ScalarType type;
  DLDataType dtype;
};
constexpr DataType kTypes[] = {
    {ScalarType::Float, {kFloat, 32, 1}},     {ScalarType::Double, {kFloat, 64, 1}},
    {ScalarType::BFloat16, {kBfloat, 16, 1}}, {ScalarType::Half, {kFloat, 16, 1}},
    {ScalarType::Byte, {kUnsigned, 8, 1}},    {ScalarType::Bool, {kBool, 8, 1}},
    {ScalarType::Long, {kSigned, 64, 1}}};

bool is_true(PyObject* answer) {  // steals it; an error is a yes
  const int truth = answer ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

// No mode, transform or profiler wants to see the call.
bool nobody_looks() {
  PyObject* level = PyObject_GetAttr(torch_side.forward_ad, torch_side.current_level);
  const bool in_forward_mode = !level || PyLong_AsLong(level) >= 0 || PyErr_Occurred();
  Py_XDECREF(level);
  if (in_forward_mode) {
    PyErr_Clear();
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.probes); ++i)
    if (is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch_side.probes, i)))) return false;
  return true;
}

// Reads tensors that are plain memory on the CPU, and holds them.
class Reader {
 public:
  MaybeView read(PyObject* object) {
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch_side.tensor && type != torch_side.parameter) return {};
    if (!records_ && recording_)
      records_ = is_true(PyObject_GetAttr(object, torch_side.requires_grad));
    // Negation may be pending: a bit of the tensor of which DLPack does not tell.
    if (is_true(PyObject_CallOneArg(torch_side.is_neg, object))) return {};
    DLTensor found;
    if (torch_side.api->dltensor_from_py_object_no_sync(object, &found) != 0) {
      PyErr_Clear();
      return {};
    }
    if (found.device.device_type != kCPU || !found.strides) return {};
    for (const auto& [scalar, dtype] : kTypes) {
      if (found.dtype != dtype) continue;
      const View view(static_cast<char*>(found.data) + found.byte_offset, scalar,
                      size_t(found.ndim), found.shape, found.strides);
      if (!found.data && view.numel() != 0) return {};  // zeros that are nowhere
      owned_.add(object);
      return view;
    }
    return {};
  }
  // The same of what may be None; false where it is neither.
  bool read_if_given(PyObject* object, MaybeView& view) {
    if (object == Py_None) return true;
    view = read(object);
    return view.has_value();
  }
  // Gradients are enabled, and a tensor that has been read requires one.
  bool records() const { return records_; }
  const Owned& owned() const { return owned_; }

 private:
  const bool recording_ = aoti_torch_grad_mode_is_enabled();
  bool records_ = false;
  Owned owned_{12};
};

// A tensor to be, and its data behind it; in memory of `take_block` where it is kept.
struct alignas(64) Block {
  DLManagedTensorVersioned managed;
  int64_t sizes[3];
  int64_t strides[3];
};

void free_block(DLManagedTensorVersioned* managed) {
  std::free(managed->manager_ctx);
}
void keep_block(DLManagedTensorVersioned* managed) {
  give_block(managed->manager_ctx);
}

class Blocks {
 public:
  explicit Blocks(size_t count) { blocks_.reserve(count); }
  Blocks(const Blocks&) = delete;
  ~Blocks() {
    for (; taken_ < blocks_.size(); ++taken_) {
      DLManagedTensorVersioned& managed = blocks_[taken_]->managed;
      managed.deleter(&managed);
    }
  }
  View make(const int64_t* sizes, size_t dim, ScalarType scalar, bool keep) {
    size_t numel = 1;
    for (size_t i = 0; i < dim; ++i) numel *= size_t(sizes[i]);
    const DataType* type = kTypes;
    while (type->type != scalar) ++type;
    const size_t bytes = numel * type->dtype.bits / 8;
    const size_t whole =
        (sizeof(Block) + bytes + alignof(Block) - 1) / alignof(Block) * alignof(Block);
    void* memory =
        keep ? take_block(whole, Use::kTensor) : std::aligned_alloc(alignof(Block), whole);
    if (!memory) throw std::bad_alloc();
    Block* block = new (memory) Block{};
    block->managed.version = {kMajor, 0};
    block->managed.manager_ctx = memory;
    block->managed.deleter = keep ? &keep_block : &free_block;
    blocks_.push_back(block);
    int64_t stride = 1;
    for (size_t i = dim; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) {
      block->sizes[i] = sizes[i];
      block->strides[i] = stride;
    }
    block->managed.dl_tensor = {block + 1,      {kCPU, 0}, int32_t(dim), type->dtype, block->sizes,
                                block->strides, 0};
    new_memory(block + 1, bytes);
    return View(block + 1, scalar, dim, block->sizes, block->strides);
  }
  Make maker() {
    return [this](const int64_t* sizes, size_t dim, ScalarType scalar, bool keep) {
      return make(sizes, dim, scalar, keep);
    };
  }
  size_t count() const { return blocks_.size(); }
  // The next one as torch's; null where Python has an error.
  PyObject* take() {
    void* object = nullptr;
    DLManagedTensorVersioned* managed = &blocks_[taken_]->managed;
    if (torch_side.api->managed_tensor_to_py_object_no_sync(managed, &object) != 0) return nullptr;
    ++taken_;
    return static_cast<PyObject*>(object);
  }

 private:
  std::vector<Block*> blocks_;
  size_t taken_ = 0;
};

// A pair of what is stolen.
PyObject* pair(PyObject* first, PyObject* second) {
  PyObject* tuple = first && second ? PyTuple_New(2) : nullptr;
  if (!tuple) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
  }
  PyTuple_SET_ITEM(tuple, 0, first);
  PyTuple_SET_ITEM(tuple, 1, second);
  return tuple;
}

// (output, h_n), (output, (h_n, c_n)); of a step h or (h, c).
PyObject* results(Blocks& blocks, bool step) {
  PyObject* first = blocks.take();
  if (blocks.count() == 1 || !first) return first;
  PyObject* second = blocks.take();
  if (step || blocks.count() == 2) return pair(first, second);
  return pair(first, second ? pair(second, blocks.take()) : nullptr);
}

// All of them.
PyObject* all(Blocks& blocks) {
  PyObject* tuple = PyTuple_New(Py_ssize_t(blocks.count()));
  for (size_t i = 0; tuple && i < blocks.count(); ++i) {
    PyObject* object = blocks.take();
    if (!object) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, Py_ssize_t(i), object);
  }
  return tuple;
}

// Without the GIL; false where only the op can do it.
template <class Function>
bool compute(Function function) {
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    function();
    done = true;
  } catch (const std::exception&) {
    // The op will say it again.
  }
  Py_END_ALLOW_THREADS;
  return done;
}

// cell, num_layers, bidirectional, batch_first and reset_to_initial of a question.
bool read_options(PyObject* cell, PyObject* const* options, PyObject* reset_to_initial,
                  PlainQuestion& question) {
  const char* name = PyUnicode_AsUTF8(cell);
  question.num_layers = PyLong_AsLongLong(options[0]);
  question.bidirectional = PyObject_IsTrue(options[1]);
  question.batch_first = PyObject_IsTrue(options[2]);
  question.reset_to_initial = PyObject_IsTrue(reset_to_initial);
  if (!name || PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  question.cell = name;
  return true;
}

// cell, input, hx, dim, ...; options: the place of num_layers, bidirectional, batch_first, lengths,
// reset, reset_to_initial. read_weights: called with where to read them to, says whether all are
// plain.
template <class ReadWeights>
PyObject* call(PyObject* const* args, Py_ssize_t options, const FrozenSizes* frozen,
               ReadWeights read_weights) {
  PyObject *const cell = args[0], *const input = args[1], *const hx = args[2];
  PyObject *const lengths = args[options + 3], *const reset = args[options + 4];
  PyObject *h0 = Py_None, *c0 = Py_None;
  if (PyTuple_CheckExact(hx)) {
    if (PyTuple_GET_SIZE(hx) != 2) Py_RETURN_NONE;
    h0 = PyTuple_GET_ITEM(hx, 0);
    c0 = PyTuple_GET_ITEM(hx, 1);
    if (h0 == Py_None || c0 == Py_None) Py_RETURN_NONE;
  } else {
    h0 = hx;
  }
  Reader reader;
  PlainQuestion question{};
  if (!read_weights(reader, question.weights)) Py_RETURN_NONE;
  const size_t weights = question.weights.size();
  question.input = reader.read(input);
  if (!question.input || question.input->dim() != PyLong_AsLongLong(args[3])) Py_RETURN_NONE;
  if (!reader.read_if_given(h0, question.h0) || !reader.read_if_given(c0, question.c0) ||
      !reader.read_if_given(lengths, question.lengths) ||
      !reader.read_if_given(reset, question.reset))
    Py_RETURN_NONE;
  const bool records = reader.records();
  if ((records && frozen) || !nobody_looks()) Py_RETURN_NONE;
  if (!read_options(cell, args + options, args[options + 5], question)) Py_RETURN_NONE;
  const bool step = question.input->dim() == 2;
  Blocks blocks(4);
  if (!compute([&] { infer(std::move(question), frozen, records, blocks.maker()); }))
    Py_RETURN_NONE;
  if (!records) return results(blocks, step);
  PyObject* const computed = all(blocks);
  PyObject* const weights_list = computed ? reader.owned().first(weights) : nullptr;
  PyObject* recorded = nullptr;
  if (weights_list) {
    PyObject* const arguments[] = {computed,
                                   cell,
                                   input,
                                   h0,
                                   c0,
                                   weights_list,
                                   args[options],
                                   args[options + 1],
                                   args[options + 2],
                                   lengths,
                                   reset,
                                   args[options + 5]};
    recorded = PyObject_Vectorcall(torch_side.record, arguments, std::size(arguments), nullptr);
  }
  Py_XDECREF(weights_list);
  Py_XDECREF(computed);
  return recorded;
}

PyObject* wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got) {
  return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, expected, got);
}

// call(cell, input, hx, dim, parameters, names, num_layers, bidirectional, batch_first, lengths,
//      reset, reset_to_initial), where dim is the one that input must have.
PyObject* call_live(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 12) return wrong_count("call", 12, count);
  if (!torch_side.api) Py_RETURN_NONE;
  PyObject *const parameters = args[4], *const names = args[5];
  if (!PyDict_CheckExact(parameters) || !(PyList_CheckExact(names) || PyTuple_CheckExact(names)))
    Py_RETURN_NONE;
  return call(args, 6, nullptr, [&](Reader& reader, Views& weights) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(names);
    weights.reserve(size_t(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      // A parametrization, pruning or a replica has it elsewhere.
      PyObject* weight = PyDict_GetItem(parameters, PySequence_Fast_GET_ITEM(names, i));
      if (!weight) return false;
      const MaybeView view = reader.read(weight);
      if (!view) return false;
      weights.push_back(*view);
    }
    return true;
  });
}

bool read_all(PyObject* list, Reader& reader, Views& views) {
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
  views.reserve(size_t(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const MaybeView view = reader.read(PySequence_Fast_GET_ITEM(list, i));
    if (!view) return false;
    views.push_back(*view);
  }
  return true;
}

// call_frozen(cell, input, hx, dim, packed, hidden_size, proj_size, num_layers, bidirectional,
//             batch_first, lengths, reset, reset_to_initial)
PyObject* call_frozen(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 13) return wrong_count("call_frozen", 13, count);
  if (!torch_side.api) Py_RETURN_NONE;
  PyObject* const packed = args[4];
  if (!PyList_CheckExact(packed)) Py_RETURN_NONE;
  const FrozenSizes sizes{PyLong_AsLongLong(args[5]), PyLong_AsLongLong(args[6])};
  if (PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  return call(args, 7, &sizes,
              [&](Reader& reader, Views& weights) { return read_all(packed, reader, weights); });
}

// backward(needs, d_output, d_h_n, d_c_n, cell, input, h0, c0, weights, num_layers, bidirectional,
//          batch_first, lengths, reset, reset_to_initial, saved): the gradients, for input,
// batch_sizes (which has none), h0, c0 and the weights; None where none of a kind is needed.
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 16) return wrong_count("backward", 16, count);
  if (!torch_side.api) Py_RETURN_NONE;
  PyObject *const needs = args[0], *const list = args[8];
  if (!PyTuple_CheckExact(needs) || !(PyList_CheckExact(list) || PyTuple_CheckExact(list)) ||
      PyTuple_GET_SIZE(needs) != 4 + PySequence_Fast_GET_SIZE(list))
    Py_RETURN_NONE;
  const auto needed = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(needs, i) == Py_True; };
  Needs wanted{needed(0), needed(2) || needed(3), false};
  for (Py_ssize_t i = 4; i < PyTuple_GET_SIZE(needs); ++i) wanted.weights |= needed(i);
  Reader reader;
  PlainSeeds seeds;
  PlainQuestion question{};
  if (!reader.read_if_given(args[1], seeds.output) || !reader.read_if_given(args[2], seeds.h_n) ||
      !reader.read_if_given(args[3], seeds.c_n) || !reader.read_if_given(args[6], question.h0) ||
      !reader.read_if_given(args[7], question.c0) ||
      !reader.read_if_given(args[12], question.lengths) ||
      !reader.read_if_given(args[13], question.reset) || !read_all(list, reader, question.weights))
    Py_RETURN_NONE;
  question.input = reader.read(args[5]);
  const MaybeView saved = reader.read(args[15]);
  if (!question.input || !saved || !nobody_looks()) Py_RETURN_NONE;
  if (!read_options(args[4], args + 9, args[14], question)) Py_RETURN_NONE;
  Blocks blocks(size_t(PyTuple_GET_SIZE(needs)));
  if (!compute([&] { differentiate(seeds, std::move(question), *saved, wanted, blocks.maker()); }))
    Py_RETURN_NONE;

  const size_t others = size_t(wanted.input) + size_t(wanted.state) +
                        (wanted.weights ? size_t(PySequence_Fast_GET_SIZE(list)) : 0);
  const bool d_c0 = blocks.count() > others;
  PyObject* gradients = PyTuple_New(PyTuple_GET_SIZE(needs));
  for (Py_ssize_t i = 0; gradients && i < PyTuple_GET_SIZE(needs); ++i) {
    // Made all together, whichever of them is needed: of the states, and of the weights.
    const bool made = i == 0   ? wanted.input
                      : i == 1 ? false
                      : i == 2 ? wanted.state
                      : i == 3 ? d_c0
                               : wanted.weights;
    PyObject* gradient = made ? blocks.take() : Py_NewRef(Py_None);
    if (!gradient) Py_CLEAR(gradients);
    if (gradients) PyTuple_SET_ITEM(gradients, i, gradient);
  }
  return gradients;
}

// allow_direct(Tensor, Parameter, capsule, is_neg, probes, forward_ad, record): whether the others
// can answer. The capsule is Tensor.__dlpack_c_exchange_api__, or None where torch has none.
PyObject* allow_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 7) return wrong_count("allow_direct", 7, count);
  PyObject* const capsule = args[2];
  if (!PyCapsule_IsValid(capsule, "dlpack_exchange_api") || !PyTuple_CheckExact(args[4]))
    Py_RETURN_FALSE;
  const DLPackExchangeAPI* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (api && api->version.major != kMajor) api = api->prev_api;
  if (!api || !api->dltensor_from_py_object_no_sync) Py_RETURN_FALSE;
  torch_side.tensor = Py_NewRef(args[0]);  // for ever, as torch has them
  torch_side.parameter = Py_NewRef(args[1]);
  torch_side.is_neg = Py_NewRef(args[3]);
  torch_side.probes = Py_NewRef(args[4]);
  torch_side.forward_ad = Py_NewRef(args[5]);
  torch_side.current_level = PyUnicode_InternFromString("_current_level");
  torch_side.record = Py_NewRef(args[6]);
  torch_side.requires_grad = PyUnicode_InternFromString("requires_grad");
  torch_side.api = api;
  Py_RETURN_TRUE;
}

template <class Function>
PyMethodDef method(const char* name, Function function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, nullptr};
}

}  // namespace

PyMethodDef* direct_methods() {
  static PyMethodDef methods[] = {method("call", &call_live),
                                  method("call_frozen", &call_frozen),
                                  method("backward", &backward),
                                  method("allow_direct", &allow_direct),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace fused_rnn
