// fused_rnn._C.infer and infer_frozen: a layer or cell from Python without the dispatcher.
//
// Of what the dispatcher does for an op such a call needs nothing as long as its tensors are plain
// memory on the CPU, nothing is to be recorded, and no mode or transform is active. That is asked
// here, and where it is not so, or anything else is unusual or wrong, the answer is None: then the
// caller takes the way through the op, which knows all cases and all messages.
#define PY_SSIZE_T_CLEAN
#include "direct.h"

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <exception>
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

 private:
  std::vector<PyObject*> objects_;
};

struct DataType {
  ScalarType type;
  DLDataType dtype;
};
constexpr DataType kTypes[] = {{ScalarType::Float, {kFloat, 32, 1}},
                               {ScalarType::Double, {kFloat, 64, 1}},
                               {ScalarType::BFloat16, {kBfloat, 16, 1}},
                               {ScalarType::Half, {kFloat, 16, 1}},
                               {ScalarType::Byte, {1, 8, 1}}};

bool is_true(PyObject* answer) {  // steals it; an error is a yes
  const int truth = answer ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

// No mode, transform or profiler wants to see the call.
bool nobody_looks() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_side.probes); ++i)
    if (is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(torch_side.probes, i)))) return false;
  return true;
}

// The memory of a tensor, if that is all there is to it.
MaybeView read(PyObject* object, bool recording, Owned& owned) {
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch_side.tensor && type != torch_side.parameter) return {};
  if (recording && is_true(PyObject_GetAttr(object, torch_side.requires_grad))) return {};
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
    const View view(static_cast<char*>(found.data) + found.byte_offset, scalar, size_t(found.ndim),
                    found.shape, found.strides);
    if (!found.data && view.numel() != 0) return {};  // zeros that are nowhere
    owned.add(object);
    return view;
  }
  return {};
}

// A tensor to be, and its data behind it.
struct alignas(64) Block {
  DLManagedTensorVersioned managed;
  int64_t sizes[3];
  int64_t strides[3];
};

void delete_block(DLManagedTensorVersioned* managed) {
  std::free(managed->manager_ctx);
}

class Blocks {
 public:
  ~Blocks() {
    for (size_t i = taken_; i < count_; ++i) std::free(blocks_[i]);
  }
  View make(const int64_t* sizes, size_t dim, ScalarType scalar) {
    size_t numel = 1;
    for (size_t i = 0; i < dim; ++i) numel *= size_t(sizes[i]);
    const DataType* type = kTypes;
    while (type->type != scalar) ++type;
    const size_t bytes = numel * type->dtype.bits / 8;
    void* memory = std::aligned_alloc(alignof(Block), (sizeof(Block) + bytes + alignof(Block) - 1) /
                                                          alignof(Block) * alignof(Block));
    if (!memory) throw std::bad_alloc();
    Block* block = blocks_[count_++] = new (memory) Block{};
    int64_t stride = 1;
    for (size_t i = dim; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) {
      block->sizes[i] = sizes[i];
      block->strides[i] = stride;
    }
    block->managed.version = {kMajor, 0};
    block->managed.manager_ctx = memory;
    block->managed.deleter = &delete_block;
    block->managed.dl_tensor = {block + 1,      {kCPU, 0}, int32_t(dim), type->dtype, block->sizes,
                                block->strides, 0};
    new_memory(block + 1, bytes);
    return View(block + 1, scalar, dim, block->sizes, block->strides);
  }
  size_t count() const { return count_; }
  // The next one as torch's; null where Python has an error.
  PyObject* take() {
    void* object = nullptr;
    if (torch_side.api->managed_tensor_to_py_object_no_sync(&blocks_[taken_]->managed, &object) !=
        0)
      return nullptr;
    ++taken_;
    return static_cast<PyObject*>(object);
  }

 private:
  Block* blocks_[3];
  size_t count_ = 0;
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

// weights: called with where to read them to, says whether all are plain.
template <class ReadWeights>
PyObject* call(PyObject* const* args, Py_ssize_t options, const FrozenSizes* frozen,
               ReadWeights read_weights) {
  PyObject *const cell = args[0], *const input = args[1], *const hx = args[2];
  const bool recording = aoti_torch_grad_mode_is_enabled();
  Owned owned(8);
  Views weights;
  MaybeView h0, c0;
  if (!read_weights(weights, recording, owned)) Py_RETURN_NONE;
  const MaybeView x = read(input, recording, owned);
  if (!x || x->dim() != PyLong_AsLongLong(args[3])) Py_RETURN_NONE;
  if (PyTuple_CheckExact(hx)) {
    if (PyTuple_GET_SIZE(hx) != 2) Py_RETURN_NONE;
    h0 = read(PyTuple_GET_ITEM(hx, 0), recording, owned);
    c0 = read(PyTuple_GET_ITEM(hx, 1), recording, owned);
    if (!h0 || !c0) Py_RETURN_NONE;
  } else if (hx != Py_None) {
    h0 = read(hx, recording, owned);
    if (!h0) Py_RETURN_NONE;
  }
  if (!nobody_looks()) Py_RETURN_NONE;
  const char* name = PyUnicode_AsUTF8(cell);
  const int64_t num_layers = PyLong_AsLongLong(args[options]);
  const int bidirectional = PyObject_IsTrue(args[options + 1]);
  const int batch_first = PyObject_IsTrue(args[options + 2]);
  if (!name || PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  Blocks blocks;
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  try {
    infer(name, *x, h0, c0, std::move(weights), frozen, num_layers, bidirectional, batch_first,
          [&](const int64_t* sizes, size_t dim, ScalarType type) {
            return blocks.make(sizes, dim, type);
          });
    done = true;
  } catch (const std::exception&) {
    // The op will say it again.
  }
  Py_END_ALLOW_THREADS;
  if (!done) Py_RETURN_NONE;
  return results(blocks, x->dim() == 2);
}

PyObject* wrong_count(const char* name, Py_ssize_t expected, Py_ssize_t got) {
  return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", name, expected, got);
}

// infer(cell, input, hx, dim, parameters, names, num_layers, bidirectional, batch_first), where
// dim is the one that input must have.
PyObject* infer_live(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) return wrong_count("infer", 9, count);
  if (!torch_side.api) Py_RETURN_NONE;
  PyObject *const parameters = args[4], *const names = args[5];
  if (!PyDict_CheckExact(parameters) || !(PyList_CheckExact(names) || PyTuple_CheckExact(names)))
    Py_RETURN_NONE;
  return call(args, 6, nullptr, [&](Views& weights, bool recording, Owned& owned) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(names);
    weights.reserve(size_t(size));
    for (Py_ssize_t i = 0; i < size; ++i) {
      // A parametrization, pruning or a replica has it elsewhere.
      PyObject* weight = PyDict_GetItem(parameters, PySequence_Fast_GET_ITEM(names, i));
      if (!weight) return false;
      const MaybeView view = read(weight, recording, owned);
      if (!view) return false;
      weights.push_back(*view);
    }
    return true;
  });
}

// infer_frozen(cell, input, hx, dim, packed, hidden_size, proj_size, num_layers, bidirectional,
//              batch_first)
PyObject* infer_frozen(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) return wrong_count("infer_frozen", 10, count);
  if (!torch_side.api) Py_RETURN_NONE;
  PyObject* const packed = args[4];
  if (!PyList_CheckExact(packed)) Py_RETURN_NONE;
  const FrozenSizes sizes{PyLong_AsLongLong(args[5]), PyLong_AsLongLong(args[6])};
  if (PyErr_Occurred()) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  return call(args, 7, &sizes, [&](Views& weights, bool recording, Owned& owned) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(packed); ++i) {
      const MaybeView view = read(PyList_GET_ITEM(packed, i), recording, owned);
      if (!view) return false;
      weights.push_back(*view);
    }
    return true;
  });
}

// allow_direct(Tensor, Parameter, capsule, is_neg, probes): whether infer and infer_frozen can
// answer. The capsule is Tensor.__dlpack_c_exchange_api__, or None where torch has none.
PyObject* allow_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) return wrong_count("allow_direct", 5, count);
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
  static PyMethodDef methods[] = {method("infer", &infer_live),
                                  method("infer_frozen", &infer_frozen),
                                  method("allow_direct", &allow_direct),
                                  {nullptr, nullptr, 0, nullptr}};
  return methods;
}

}  // namespace fused_rnn
