// torch.ops.fused_rnn: check, allocate, unwrap, call.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <list>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/pressure.h"
#include "../cpu/strategy.h"
#include "../cpu/team.h"
#include "cuda.h"
#include "direct.h"
#include "memory.h"
#include "stable.h"
#include "view.h"

namespace fused_rnn {
namespace {

using torch::headeronly::DeviceType;
using MaybeTensor = std::optional<Tensor>;

// A tensor shape of up to three dimensions, without memory of its own: small calls make many.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) sizes_[dim_++] = size;
  }
  const int64_t* data() const { return sizes_; }
  size_t size() const { return dim_; }
  int64_t operator[](size_t i) const { return sizes_[i]; }
  int64_t numel() const {
    int64_t product = 1;
    for (size_t i = 0; i < dim_; ++i) product *= sizes_[i];
    return product;
  }
  Shape contiguous_strides() const {
    Shape strides = *this;
    int64_t stride = 1;
    for (size_t i = dim_; i-- > 0; stride *= std::max<int64_t>(sizes_[i], 1))
      strides.sizes_[i] = stride;
    return strides;
  }

 private:
  int64_t sizes_[3] = {};
  size_t dim_ = 0;
};

// No stream of the standard library: where a compiler links that library statically, ours and
// torch's share what they must not, and a number in a message ends the process.
std::string text(const std::string& words) {
  return words;
}
std::string text(int64_t number) {
  return std::to_string(number);
}
std::string text(size_t number) {
  return std::to_string(number);
}
std::string text(double number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", number);
  return digits;
}
template <class Sizes>
  requires requires(const Sizes& sizes) { sizes.size(); }
std::string text(const Sizes& sizes) {
  std::string out = "[";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + text(sizes[i]);
  return out + "]";
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string message = "fused_rnn: ";
  ((message += text(parts)), ...);
  throw std::runtime_error(message);
}

template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail("input must be float32, float64, bfloat16 or float16, got ", name_of(type));
  }
}

size_t size_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Where a call has its tensors.
struct Device {
  explicit Device(const View& tensor) : cpu(tensor.is_cpu()) {
    if (cpu) return;
    index = tensor.get_device_index();
    check(kHasCuda && tensor.is_cuda(), "there are no kernels for the device of the input");
  }
  static Device host() { return {}; }

  // Whether the kernels of csrc/cuda serve it.
  bool is_cuda() const { return kEmulates || !cpu; }
  bool holds(const View& tensor) const {
    return cpu ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == index;
  }
  std::string name() const { return cpu ? "the CPU" : "cuda:" + std::to_string(index); }

  bool cpu = true;
  int32_t index = 0;

 private:
  Device() = default;
};

void check_device(const View& tensor, const char* name, const Device& device) {
  if (!device.holds(tensor)) fail(name, " must be on ", device.name(), " like the input");
}

Tensor empty_on(const Device& device, const Shape& shape, ScalarType type) {
  // By the C entry: torch::stable::new_empty goes through a boxed call of the dispatcher, which
  // costs a small call more than its arithmetic.
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.data(), shape.contiguous_strides().data(), dtype,
      device.cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), device.index,
      &handle));
  Tensor tensor(handle);
  if (device.cpu) new_memory(tensor.data_ptr(), size_t(shape.numel()) * tensor.element_size());
  return tensor;
}

// Passes a tensor argument on when it is what the op expects.
const View& checked(const View& tensor, const char* name, const char* symbols,
                    const Shape& expected, ScalarType type, const Device& device) {
  check_device(tensor, name, device);
  const ScalarType got = tensor.scalar_type();
  check(got == type, name, " must have the input's dtype ", name_of(type), ", got ", name_of(got));
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected[i];
  if (!same) fail(name, " must have shape ", symbols, " = ", text(expected), ", got ", text(sizes));
  return tensor;
}

constexpr size_t kWorthKeeping = size_t(1) << 20;

// The arguments that all ops have in common, in their order.
struct Question {
  const std::string& cell;
  View input;
  MaybeView batch_sizes;
  MaybeView h0;
  MaybeView c0;
  Views weights;
  int64_t layers;
  bool bidirectional;
  bool batch_first;
};
// Those of the overload `controlled`, behind them.
struct Controls {
  MaybeView lengths;
  MaybeView reset;
  bool reset_to_initial;
  MaybeView zoneout_mask;
  double zoneout_h;
  double zoneout_c;
  MaybeView h_mask;
  MaybeView candidate_mask;
  bool all_c;
};
const MaybeTensor kNone;
const Controls kNoControls{{}, {}, false, {}, 0.0, 0.0, {}, {}, false};

// A call that has been understood: sizes, and every tensor argument checked.
class Call {
 public:
  Call(const Question& q, const Controls& controls, const FrozenSizes* frozen = nullptr)
      : type(q.input.scalar_type()),
        dtype(dtype_of(type)),
        kernels(cpu::chosen_isa()[dtype]),
        cell(cpu::find_cell(q.cell.c_str(), dtype)),
        device(q.input),
        batch_first_(q.batch_first && !q.batch_sizes) {
    check(kernels, "fused_rnn was built without kernels for ", name_of(type),
          ": see FUSED_RNN_TYPES in its setup.py");
    check(cell, "there is no cell '", q.cell, "'");
    check(q.layers >= 1, "num_layers must be at least 1, got ", q.layers);
    stack.layers = q.layers;
    stack.weight_bytes = int64_t(size_of(type));
    stack.dirs = q.bidirectional ? 2 : 1;
    read_steps(q.input, q.batch_sizes);
    if (controls.lengths) read_lengths(*controls.lengths, q.batch_sizes);
    frozen ? read_frozen(q.weights, *frozen) : read_weights(q.weights);

    stack.input = sequence(with_contiguous_features(q.input));
    if (controls.reset) read_reset(q.input, *controls.reset, controls.reset_to_initial);
    read_regularisers(controls);
    if (q.h0)
      stack.h0 = checked_contiguous(
          *q.h0, "h0", step_ ? "[B, H]" : "[num_layers * directions, B, R]", h_shape(), type);
    check(!q.c0 || has_c(), "c0 was given, but cell '", q.cell, "' has no c");
    if (q.c0)
      stack.c0 = checked_contiguous(
          *q.c0, "c0", step_ ? "[B, H]" : "[num_layers * directions, B, H]", c_shape(), type);
    all_c_ = controls.all_c;
    check(!all_c_ || (has_c() && stack.layers == 1 && !step_),
          "all_c needs a cell with c, one layer and a sequence");
  }

  bool has_c() const { return cell->info.states > 1; }
  bool is_padded() const { return !lengths_.empty() && !stack.input.packed; }
  // One step of one layer, [B, I]: its states have no leading dimension, and its output is h_n.
  bool is_step() const { return step_; }
  Shape h_shape() const { return state_shape(stack.R); }
  Shape c_shape() const { return state_shape(stack.H); }
  // c of every step is wanted.
  bool all_c() const { return all_c_; }
  Shape all_c_shape() const { return sequence_shape(stack.dirs * stack.H); }
  Shape output_shape() const {
    const int64_t features = stack.dirs * stack.R;
    return sequence_shape(features);
  }
  Shape input_shape() const { return sequence_shape(stack.I); }
  Shape saved_shape() const {
    return {stack.layers * stack.dirs, rows_, saved_slots(stack, cell->info) * pad_units(stack.H)};
  }
  ScalarType saved_type() const { return type == ScalarType::Double ? type : ScalarType::Float; }

  Tensor empty(const Shape& shape) const { return empty_on(device, shape, type); }
  // The same where a training step asks for it every time: large ones live in memory of our own.
  Tensor empty_kept(const Shape& shape, ScalarType of) const {
    if (!device.cpu || (!worth_keeping(shape, of) && of == type))
      return empty_on(device, shape, of);
    const size_t bytes = size_t(shape.numel()) * size_of(of);
    const Shape strides = shape.contiguous_strides();
    return torch::stable::from_blob(take_block(bytes, Use::kTensor), {shape.data(), shape.size()},
                                    {strides.data(), strides.size()}, DeviceType::CPU, of,
                                    &give_block);
  }
  // The state of a batch without steps, which is what it was: `to` becomes `from`, or zeros.
  void keep_state(const void* from, const View& to) const {
    const size_t bytes = size_t(to.numel()) * size_of(type);
    if (bytes == 0) return;
    if (!device.cpu) return copy_on_cuda(from, to.data_ptr(), bytes, device.index);
    from ? std::memcpy(to.data_ptr(), from, bytes) : std::memset(to.data_ptr(), 0, bytes);
  }
  // Whether memory of our own is worth more than torch's: smaller tensors are as cheap from there.
  static bool worth_keeping(const Shape& shape, ScalarType of) {
    return size_t(shape.numel()) * size_of(of) >= kWorthKeeping;
  }
  Tensor nothing() const { return empty({0}); }

  Sequence sequence(const View& tensor) const {
    if (packed_ || step_) return {tensor.data_ptr(), 0, tensor.stride(0), packed_};
    return {tensor.data_ptr(), tensor.stride(batch_first_ ? 1 : 0),
            tensor.stride(batch_first_ ? 0 : 1), false};
  }
  // Zeros where a padded tensor [T, B, features] has no steps.
  void clear_padding(const View& tensor) const {
    if (!is_padded()) return;
    if (!device.cpu) return tensor.zero();
    const Sequence rows = sequence(tensor);
    const size_t size = size_of(type);
    const size_t bytes = size * size_t(tensor.size(2));
    for (int64_t b = 0; b < stack.steps.B; ++b)
      for (int64_t t = lengths_[size_t(b)]; t < padded_T_; ++t)
        std::memset(static_cast<char*>(rows.data) + size_t(rows.at(stack.steps, t, b)) * size, 0,
                    bytes);
  }
  // The data of an argument as it has to be, of a copy where it is not contiguous.
  const void* checked_contiguous(const View& tensor, const char* name, const char* symbols,
                                 const Shape& expected, ScalarType of) {
    return contiguous(checked(tensor, name, symbols, expected, of, device)).data_ptr();
  }
  // A [T, B, F] argument as kernels read it: any strides, but contiguous features.
  View with_contiguous_features(const View& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : copy(tensor);
  }
  const std::vector<Shape>& weight_shapes() const { return weight_shapes_; }

  template <class Planner>
  cpu::Plan plan(Planner planner) const {
    cpu::Machine machine = cpu::this_machine(int(torch::stable::get_num_threads()));
    if (stack.frozen()) machine.unit_step = kernels->packing.panel_step(cell->info);
    const cpu::Plan plan = planner(stack, cell->info, machine);
    if (!plan.possible) {
      const int split = int(*machine.forced);
      fail("the split '", cpu::kSplitNames[split], "' is forced, but ", plan.against[split]);
    }
    return plan;
  }

  void run(const ForwardProblem& problem) {
    if (device.is_cuda()) return run_on_cuda(cell->info.name, dtype, problem, device.index);
    run_on_cpu(kernels->forward, problem, plan(cpu::plan_forward));
  }
  void run(const BackwardProblem& problem) {
    if (device.is_cuda()) return run_on_cuda(cell->info.name, dtype, problem, device.index);
    run_on_cpu(kernels->backward, problem, plan(cpu::plan_backward));
  }

  const ScalarType type;
  const DType dtype;
  const cpu::Kernels* kernels;
  const cpu::AnyCell* cell;
  const Device device;
  Stack stack;

 private:
  template <class Problem, class Kernel>
  void run_on_cpu(Kernel kernel, const Problem& problem, const cpu::Plan& plan) {
    Runtime runtime;
    runtime.threads = plan.threads;
    runtime.host = this;
    runtime.allocate = [](void* host, size_t bytes) {
      return static_cast<Call*>(host)
          ->blocks_.emplace_back(take_block(bytes, Use::kWorkspace), &give_block)
          .get();
    };
    runtime.parallel = [](int count, void (*body)(int, int, void*), void* argument) {
      // What the calling thread loses to waiting, inside and at the end, tells of a busy machine.
      const int64_t start = cpu::now_ns(), slept = cpu::slept_ns();
      const std::thread::id caller = std::this_thread::get_id();
      int64_t done = start;
      torch::stable::parallel_for(0, count, 1, [=, &done](int64_t begin, int64_t end) {
        body(int(begin), int(end), argument);
        if (std::this_thread::get_id() == caller) done = cpu::now_ns();
      });
      const int64_t end = cpu::now_ns();
      cpu::pressure().report(end, end - start, end - done + cpu::slept_ns() - slept);
    };
    kernel(*cell, problem, plan, runtime);
  }

  View copy(const View& tensor) { return copies_.emplace_back(tensor.contiguous()); }
  View contiguous(const View& tensor) { return tensor.is_contiguous() ? tensor : copy(tensor); }

  Shape sequence_shape(int64_t features) const {
    if (packed_ || step_) return {rows_, features};
    if (batch_first_) return {stack.steps.B, padded_T_, features};
    return {padded_T_, stack.steps.B, features};
  }
  Shape state_shape(int64_t features) const {
    if (step_) return {stack.steps.B, features};
    return {stack.layers * stack.dirs, stack.steps.B, features};
  }

  void read_steps(const View& input, const MaybeView& batch_sizes) {
    packed_ = batch_sizes.has_value();
    find_steps(input, batch_sizes);
    rows_ = stack.steps.N;
    padded_T_ = stack.steps.T;
  }

  void find_steps(const View& input, const MaybeView& batch_sizes) {
    Steps& steps = stack.steps;
    const int64_t dim = input.dim();
    if (!batch_sizes && dim == 2) {
      check(stack.layers == 1 && stack.dirs == 1,
            "a step ([B, I] input) has one layer and one direction");
      step_ = true;
      steps.T = 1;
      steps.B = steps.N = input.size(0);
      stack.I = input.size(1);
      return;
    }
    if (!batch_sizes) {
      check(dim == 3, "input must have 3 dimensions ", batch_first_ ? "[B, T, I]" : "[T, B, I]",
            ", got ", dim);
      steps.T = input.size(batch_first_ ? 1 : 0);
      steps.B = input.size(batch_first_ ? 0 : 1);
      steps.N = steps.T * steps.B;
      stack.I = input.size(2);
      check(steps.T > 0, "Expected sequence length to be larger than 0 in RNN");
      return;
    }
    check(dim == 2, "packed input must have 2 dimensions [N, I], got ", dim);
    check(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long &&
              batch_sizes->dim() == 1,
          "batch_sizes must be a one-dimensional int64 tensor on the CPU");
    steps.T = batch_sizes->numel();
    check(steps.T > 0, "Expected sequence length to be larger than 0 in RNN");
    const int64_t* values = static_cast<const int64_t*>(contiguous(*batch_sizes).data_ptr());
    stack.I = input.size(1);
    steps.N = input.size(0);
    steps.B = values[0];
    offsets_.reserve(size_t(steps.T));
    int64_t rows = 0;
    for (int64_t t = 0; t < steps.T; ++t) {
      check(values[t] > 0 && (t == 0 || values[t] <= values[t - 1]),
            "batch_sizes must be positive and must not increase, got ", values[t], " at step ", t);
      check(values[t] <= steps.N - rows, "batch_sizes add up to more than the ", steps.N,
            " rows of the packed input");
      offsets_.push_back(rows);
      rows += values[t];
    }
    check(rows == steps.N, "batch_sizes add up to ", rows, ", but the packed input has ", steps.N,
          " rows");
    lengths_.resize(size_t(steps.B));
    int64_t b = 0;
    for (int64_t t = steps.T; t > 0; --t)
      for (; b < values[t - 1]; ++b) lengths_[size_t(b)] = t;
    steps.batch_sizes = values;
    steps.offsets = offsets_.data();
    steps.lengths = lengths_.data();
  }

  // Sequences of the padded batch in the order of their lengths, longest first.
  void read_lengths(const View& lengths, const MaybeView& batch_sizes) {
    Steps& steps = stack.steps;
    check(!batch_sizes && !step_, "lengths belong to a padded input of 3 dimensions");
    check(lengths.is_cpu() && lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 &&
              lengths.size(0) == steps.B,
          "lengths must be an int64 tensor on the CPU of shape [B] = [", steps.B, "], got ",
          name_of(lengths.scalar_type()), " ", text(lengths.sizes()));
    const int64_t* values = static_cast<const int64_t*>(contiguous(lengths).data_ptr());
    for (int64_t b = 0; b < steps.B; ++b)
      check(values[b] >= 0 && values[b] <= steps.T, "lengths must be between 0 and T = ", steps.T,
            ", got ", values[b], " for sequence ", b);
    order_.resize(size_t(steps.B));
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return values[a] > values[b]; });
    lengths_.resize(size_t(steps.B));
    for (size_t b = 0; b < lengths_.size(); ++b) lengths_[b] = values[order_[b]];
    steps.T = steps.B ? lengths_[0] : 0;
    steps.N = 0;
    int64_t rows = steps.B;
    for (int64_t t = 0; t < steps.T; ++t) {
      while (lengths_[size_t(rows - 1)] <= t) --rows;
      batch_sizes_.push_back(rows);
      offsets_.push_back(steps.N);
      steps.N += rows;
    }
    steps.batch_sizes = batch_sizes_.data();
    steps.offsets = offsets_.data();
    steps.lengths = lengths_.data();
    if (!std::is_sorted(order_.begin(), order_.end())) steps.order = order_.data();
  }

  void read_reset(const View& input, const View& reset, bool to_initial) {
    check(!step_, "a step has no reset: pass it the state that it is to start from");
    const bool same = packed_ ? reset.dim() == 1 && reset.size(0) == rows_
                              : reset.dim() == 2 && reset.size(0) == input.size(0) &&
                                    reset.size(1) == input.size(1);
    check_device(reset, "reset", device);
    check(reset.scalar_type() == ScalarType::Bool && same,
          "reset must be a bool tensor with the shape of the input without features, ",
          packed_        ? "[N]"
          : batch_first_ ? "[B, T]"
                         : "[T, B]",
          ", got ", name_of(reset.scalar_type()), " ", text(reset.sizes()));
    stack.reset = sequence(reset);
    stack.reset_to_initial = to_initial;
  }

  void read_regularisers(const Controls& controls) {
    const double shares[] = {controls.zoneout_h, controls.zoneout_c};
    for (const double share : shares)
      check(share >= 0.0 && share <= 1.0, "zoneout must be between 0 and 1, got ", share);
    std::copy(shares, shares + 2, stack.zoneout);
    if (controls.zoneout_mask) {
      const int64_t features = stack.R + (has_c() ? stack.H : 0);
      const Shape rows{stack.layers * stack.dirs, rows_, features};
      const void* mask =
          checked_contiguous(*controls.zoneout_mask, "zoneout_mask",
                             "[num_layers * directions, N, R (+ H for c)]", rows, ScalarType::Bool);
      stack.zoneout_mask = {const_cast<void*>(mask), stack.steps.B * features, features, packed_};
      stack.zoneout_plane = rows_ * features;
    }
    if (controls.h_mask) {
      check(cell->info.recurrent, "cell '", cell->info.name,
            "' has no W_hh that h_mask could hide units of h from");
      stack.h_mask = checked_contiguous(*controls.h_mask, "h_mask",
                                        "[num_layers * directions, B, R]", h_shape(), type);
    }
    if (controls.candidate_mask) {
      check(cell->info.candidate, "cell '", cell->info.name,
            "' has no candidate that candidate_mask could change");
      stack.candidate_mask = checked_contiguous(*controls.candidate_mask, "candidate_mask",
                                                "[num_layers * directions, B, H]", c_shape(), type);
    }
  }

  void read_weights(const Views& weights) {
    const CellInfo& info = cell->info;
    const size_t planes = size_t(stack.layers * stack.dirs);
    // Weights of units to themselves: with weight_hh a tensor more, else in its place.
    const size_t more = info.recurrent && info.unit_weights() ? 1 : 0;
    const char* const more_name = info.norm_gates ? "norm" : "weight_ch";
    const size_t each = weights.size() / planes - more;
    check(weights.size() % planes == 0 && each >= 2 && each <= 5,
          "weights must hold weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]",
          more ? ", " : "", more ? more_name : "", " for each of ", planes,
          " layers and directions, got ", weights.size(), " tensors");
    const bool bias = each >= 4;
    const bool projected = each % 2 == 1;
    check(!projected || has_c(), "only an LSTM has a projection (weight_hr)");
    const int64_t gates = info.gates;
    const int64_t hh_dim = info.recurrent ? 2 : 1;
    check(weights[1].dim() == hh_dim, "weight_hh must have ", hh_dim, " dimension",
          hh_dim > 1 ? "s" : "", ", got ", weights[1].dim());
    stack.H = weights[1].size(0) / gates;
    stack.R = info.recurrent ? weights[1].size(1) : stack.H;
    check(stack.H > 0 && stack.R > 0 && stack.I > 0,
          "input_size and hidden_size must be greater than zero");
    if (stack.R != stack.H && !projected)
      fail("weight_hh must have shape [G*H, H], got ", text(weights[1].sizes()));
    check(stack.R <= stack.H, "proj_size must not be larger than hidden_size, got ", stack.R,
          " and ", stack.H);

    const int64_t rows = gates * stack.H;
    weights_.resize(planes);
    weight_shapes_.reserve(weights.size());
    for (size_t plane = 0; plane < planes; ++plane) {
      const int64_t in = stack.input_size(int64_t(plane) / stack.dirs);
      size_t next = plane * (each + more);
      const auto take = [&](const char* name, const char* symbols, const Shape& shape) {
        weight_shapes_.push_back(shape);
        return checked_contiguous(weights[next++], name, symbols, shape, type);
      };
      Weights& w = weights_[plane];
      w.ih = take("weight_ih", "[G*H, I]", {rows, in});
      if (info.recurrent)
        w.hh = take("weight_hh", "[G*H, R]", {rows, stack.R});
      else
        w.diag = take("weight_hh", "[H]", {stack.H});
      if (bias) {
        w.bias_ih = take("bias_ih", "[G*H]", {rows});
        w.bias_hh = take("bias_hh", "[G*H]", {rows});
      }
      if (projected) w.hr = take("weight_hr", "[R, H]", {stack.R, stack.H});
      if (more) w.diag = take(more_name, "[P*H]", {info.unit_weights() * stack.H});
    }
    stack.weights = weights_.data();
  }

  // Blocks that `pack` has made: nothing is read from one that is not what this call needs.
  void read_frozen(const Views& blocks, const FrozenSizes& sizes) {
    const size_t planes = size_t(stack.layers * stack.dirs);
    check(blocks.size() == planes, "packed must hold one tensor for each of ", planes,
          " layers and directions, got ", blocks.size());
    check(sizes.H > 0 && sizes.proj >= 0 && sizes.proj <= sizes.H && stack.I > 0,
          "input_size and hidden_size must be greater than zero, and proj_size not larger");
    stack.H = sizes.H;
    stack.R = sizes.proj ? sizes.proj : sizes.H;
    weights_.resize(planes);
    const cpu::Packing& packing = kernels->packing;
    for (size_t plane = 0; plane < planes; ++plane) {
      const WeightSizes expected{stack.input_size(int64_t(plane) / stack.dirs), stack.H, stack.R,
                                 sizes.proj > 0};
      const View& block = blocks[plane];
      check(block.is_cpu() && block.scalar_type() == ScalarType::Byte && block.dim() == 1 &&
                block.is_contiguous() && block.numel() >= int64_t(sizeof(cpu::PackedTag)),
            "packed[", plane, "] is not what fused_rnn::pack has made");
      const cpu::PackedTag tag = cpu::tag_for(cell->info, dtype, expected);
      if (std::memcmp(block.data_ptr(), &tag, sizeof(tag)) != 0)
        refuse(plane, *static_cast<const cpu::PackedTag*>(block.data_ptr()), tag);
      const size_t bytes = packing.bytes(cell->info, expected);
      check(size_t(block.numel()) == bytes, "packed[", plane, "] must have ", bytes, " bytes, got ",
            block.numel());
      weights_[plane].packed = block.data_ptr();
      if (expected.projected) weights_[plane].hr = block.data_ptr();
    }
    stack.weights = weights_.data();
  }

  // Says in which of its parts a tag is not the expected one.
  [[noreturn]] static void refuse(size_t plane, const cpu::PackedTag& got,
                                  const cpu::PackedTag& expected) {
    const auto words = [](const auto& field) {
      return std::string(field, strnlen(field, sizeof(field)));
    };
    const auto compare = [&](const char* what, const auto& is, const auto& must) {
      if (is != must)
        fail("packed[", plane, "] was packed for ", what, " ", is, ", but this call needs ", must,
             ": freeze the layer again, here and as it is used");
    };
    compare("layout", words(got.layout), words(expected.layout));
    compare("instruction set", words(got.isa), words(expected.isa));
    compare("cell", words(got.cell), words(expected.cell));
    compare("dtype", words(got.dtype), words(expected.dtype));
    compare("I =", got.I, expected.I);
    compare("H =", got.H, expected.H);
    compare("R =", got.R, expected.R);
    fail("packed[", plane, "] has another projection than this call needs");
  }

  const bool batch_first_;
  bool step_ = false;
  bool packed_ = false;
  bool all_c_ = false;
  int64_t rows_ = 0;      // of the input and of saved: N, and where lengths are given T*B
  int64_t padded_T_ = 0;  // of the input
  std::list<Tensor> copies_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
  std::vector<Weights> weights_;
  std::vector<Shape> weight_shapes_;
  std::vector<int64_t> batch_sizes_;
  std::vector<int64_t> offsets_;
  std::vector<int64_t> lengths_;
  std::vector<int64_t> order_;
};

// Where a forward call writes; h_n is missing for a step, c_n for a cell without c.
struct Places {
  View output;
  MaybeView h_n, c_n, all_c;
  void* saved = nullptr;
};

void run_forward(Call& call, const Places& to) {
  const Stack& stack = call.stack;
  call.clear_padding(to.output);
  if (to.all_c) call.clear_padding(*to.all_c);
  if (stack.steps.N == 0) {
    if (to.h_n) call.keep_state(stack.h0, *to.h_n);
    if (to.c_n) call.keep_state(stack.c0, *to.c_n);
    return;
  }
  ForwardProblem problem;
  static_cast<Stack&>(problem) = stack;
  problem.output = call.sequence(to.output);
  problem.h_n = to.h_n ? to.h_n->data_ptr() : nullptr;
  problem.c_n = to.c_n ? to.c_n->data_ptr() : nullptr;
  if (to.all_c) problem.all_c = call.sequence(*to.all_c);
  problem.saved = to.saved;
  call.run(problem);
}

struct Outputs {
  Tensor output, h_n, c_n;
  MaybeTensor saved, all_c;
};

Outputs run_forward(Call& call, bool save) {
  Outputs out{
      call.empty(call.output_shape()), call.is_step() ? call.nothing() : call.empty(call.h_shape()),
      call.has_c() ? call.empty(call.c_shape()) : call.nothing(), std::nullopt, std::nullopt};
  if (call.all_c()) out.all_c = call.empty(call.all_c_shape());
  if (save) out.saved = call.empty_kept(call.saved_shape(), call.saved_type());
  Places to{out.output, {}, {}, out.all_c, save ? out.saved->data_ptr() : nullptr};
  if (!call.is_step()) to.h_n = out.h_n;
  if (call.has_c()) to.c_n = out.c_n;
  run_forward(call, to);
  return out;
}

using Results = std::tuple<Tensor, Tensor, Tensor>;
using Saved = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

using AllResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using AllSaved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The weights of each layer and direction, ready for the tile.
std::vector<Tensor> pack(const std::string& cell, const std::vector<Tensor>& weights,
                         int64_t num_layers, bool bidirectional) {
  check(!weights.empty(), "weights must not be empty");
  // An empty batch of these weights' inputs: they are checked as any call would.
  check(weights[0].dim() == 2, "weight_ih must have shape [G*H, I], got ",
        text(weights[0].sizes()));
  const Tensor input =
      empty_on(Device::host(), {1, 0, weights[0].size(1)}, weights[0].scalar_type());
  const Call call({cell, input, kNone, kNone, kNone, weights, num_layers, bidirectional, false},
                  kNoControls);
  const CellInfo& info = call.cell->info;
  const cpu::Packing& packing = cpu::chosen_isa()[call.dtype]->packing;
  std::vector<Tensor> blocks;
  for (int64_t plane = 0; plane < call.stack.layers * call.stack.dirs; ++plane) {
    const WeightSizes sizes = call.stack.weight_sizes(plane / call.stack.dirs);
    const size_t bytes = packing.bytes(info, sizes);
    Tensor& block =
        blocks.emplace_back(empty_on(Device::host(), {int64_t(bytes)}, ScalarType::Byte));
    std::memset(block.data_ptr(), 0, bytes);
    const cpu::PackedTag tag = cpu::tag_for(info, call.dtype, sizes);
    std::memcpy(block.data_ptr(), &tag, sizeof(tag));
    packing.pack(info, sizes, call.stack.weights[plane], block.data_ptr());
  }
  return blocks;
}

// As `inference`, with what `pack` has made in the place of the weights.
Results frozen(const std::string& cell, const Tensor& input, const MaybeTensor& batch_sizes,
               const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& packed,
               int64_t hidden_size, int64_t proj_size, int64_t num_layers, bool bidirectional,
               bool batch_first) {
  const FrozenSizes sizes{hidden_size, proj_size};
  Call call({cell, input, batch_sizes, h0, c0, packed, num_layers, bidirectional, batch_first},
            kNoControls, &sizes);
  Outputs out = run_forward(call, false);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n)};
}
AllResults frozen_controlled(const std::string& cell, const Tensor& input,
                             const MaybeTensor& batch_sizes, const MaybeTensor& h0,
                             const MaybeTensor& c0, const std::vector<Tensor>& packed,
                             int64_t hidden_size, int64_t proj_size, int64_t num_layers,
                             bool bidirectional, bool batch_first, const MaybeTensor& lengths,
                             const MaybeTensor& reset, bool reset_to_initial,
                             const MaybeTensor& zoneout_mask, double zoneout_h, double zoneout_c,
                             const MaybeTensor& h_mask, const MaybeTensor& candidate_mask,
                             bool all_c) {
  const FrozenSizes sizes{hidden_size, proj_size};
  Call call({cell, input, batch_sizes, h0, c0, packed, num_layers, bidirectional, batch_first},
            {lengths, reset, reset_to_initial, zoneout_mask, zoneout_h, zoneout_c, h_mask,
             candidate_mask, all_c},
            &sizes);
  Outputs out = run_forward(call, false);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n),
          out.all_c ? *std::move(out.all_c) : call.nothing()};
}

struct Seeds {
  MaybeView output, h_n, c_n, all_c;
};

// make(shape): a new tensor of the call's dtype for a gradient that is needed. They are asked for
// in the order of the op's results.
template <class MakeGradient>
void run_backward(const Seeds& seeds, Call& call, const View& saved, const Needs& needs,
                  MakeGradient make) {
  const Stack& stack = call.stack;
  BackwardProblem problem;
  static_cast<Stack&>(problem) = stack;
  problem.saved =
      call.checked_contiguous(saved, "saved", "[num_layers * directions, N, slots * Hp]",
                              call.saved_shape(), call.saved_type());
  const auto seed = [&](const View& tensor, const char* name, const char* like,
                        const Shape& shape) {
    return call.sequence(
        call.with_contiguous_features(checked(tensor, name, like, shape, call.type, call.device)));
  };
  if (seeds.output)
    problem.d_output = seed(*seeds.output, "d_output", "that of the output", call.output_shape());
  if (seeds.h_n && !call.is_step())
    problem.d_h_n =
        call.checked_contiguous(*seeds.h_n, "d_h_n", "that of h_n", call.h_shape(), call.type);
  if (seeds.all_c)
    problem.d_all_c = seed(*seeds.all_c, "d_all_c", "that of all_c", call.all_c_shape());
  if (seeds.c_n && call.has_c())
    problem.d_c_n =
        call.checked_contiguous(*seeds.c_n, "d_c_n", "that of c_n", call.c_shape(), call.type);

  const bool empty = stack.steps.N == 0;  // has no steps to write its results
  if (needs.input) {
    const View d_input = make(call.input_shape());
    problem.d_input = call.sequence(d_input);
    empty ? call.keep_state(nullptr, d_input) : call.clear_padding(d_input);
  }
  if (needs.state) {
    const View d_h0 = make(call.h_shape());
    problem.d_h0 = d_h0.data_ptr();
    if (empty) call.keep_state(problem.d_h_n, d_h0);
  }
  if (needs.state && call.has_c()) {
    const View d_c0 = make(call.c_shape());
    problem.d_c0 = d_c0.data_ptr();
    if (empty) call.keep_state(problem.d_c_n, d_c0);
  }
  std::vector<WeightGrads> grads;
  if (needs.weights) {
    auto shape = call.weight_shapes().begin();
    const auto next = [&] {
      const View d_weight = make(*shape++);
      if (empty) call.keep_state(nullptr, d_weight);
      return d_weight.data_ptr();
    };
    for (int64_t plane = 0; plane < stack.layers * stack.dirs; ++plane) {
      const Weights& w = stack.weights[plane];
      WeightGrads& g = grads.emplace_back();
      g.ih = next();
      (w.hh ? g.hh : g.diag) = next();
      if (w.bias_ih) g.bias_ih = next();
      if (w.bias_hh) g.bias_hh = next();
      if (w.hr) g.hr = next();
      if (w.hh && w.diag) g.diag = next();
    }
    problem.d_weights = grads.data();
  }
  if (!empty) call.run(problem);
}

Gradients run_backward(const Seeds& seeds, const Question& question, const Tensor& saved,
                       const Needs& needs, const Controls& controls) {
  Call call(question, controls);
  std::vector<Tensor> made;
  made.reserve(3 + call.weight_shapes().size());  // views point into it
  run_backward(seeds, call, saved, needs, [&](const Shape& shape) -> View {
    return made.emplace_back(call.empty_kept(shape, call.type));
  });
  auto next = made.begin();
  const auto take = [&](bool needed) { return needed ? std::move(*next++) : call.nothing(); };
  Tensor d_input = take(needs.input);
  Tensor d_h0 = take(needs.state);
  Tensor d_c0 = take(needs.state && call.has_c());
  std::vector<Tensor> d_weights;
  d_weights.reserve(call.weight_shapes().size());
  for (size_t i = 0; i < call.weight_shapes().size(); ++i) d_weights.push_back(take(needs.weights));
  return {std::move(d_input), std::move(d_h0), std::move(d_c0), std::move(d_weights)};
}

// Each op without and with controls: the dispatcher handles every argument, used or not. By
// reference, because the boxed call holds them, and would copy a list with all its tensors.
Results inference(const std::string& cell, const Tensor& input, const MaybeTensor& batch_sizes,
                  const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                  int64_t num_layers, bool bidirectional, bool batch_first) {
  Call call({cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first},
            kNoControls);
  Outputs out = run_forward(call, false);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n)};
}
AllResults inference_controlled(const std::string& cell, const Tensor& input,
                                const MaybeTensor& batch_sizes, const MaybeTensor& h0,
                                const MaybeTensor& c0, const std::vector<Tensor>& weights,
                                int64_t num_layers, bool bidirectional, bool batch_first,
                                const MaybeTensor& lengths, const MaybeTensor& reset,
                                bool reset_to_initial, const MaybeTensor& zoneout_mask,
                                double zoneout_h, double zoneout_c, const MaybeTensor& h_mask,
                                const MaybeTensor& candidate_mask, bool all_c) {
  Call call({cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first},
            {lengths, reset, reset_to_initial, zoneout_mask, zoneout_h, zoneout_c, h_mask,
             candidate_mask, all_c});
  Outputs out = run_forward(call, false);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n),
          out.all_c ? *std::move(out.all_c) : call.nothing()};
}

Saved forward(const std::string& cell, const Tensor& input, const MaybeTensor& batch_sizes,
              const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
              int64_t num_layers, bool bidirectional, bool batch_first) {
  Call call({cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first},
            kNoControls);
  Outputs out = run_forward(call, true);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n), *std::move(out.saved)};
}
AllSaved forward_controlled(const std::string& cell, const Tensor& input,
                            const MaybeTensor& batch_sizes, const MaybeTensor& h0,
                            const MaybeTensor& c0, const std::vector<Tensor>& weights,
                            int64_t num_layers, bool bidirectional, bool batch_first,
                            const MaybeTensor& lengths, const MaybeTensor& reset,
                            bool reset_to_initial, const MaybeTensor& zoneout_mask,
                            double zoneout_h, double zoneout_c, const MaybeTensor& h_mask,
                            const MaybeTensor& candidate_mask, bool all_c) {
  Call call({cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first},
            {lengths, reset, reset_to_initial, zoneout_mask, zoneout_h, zoneout_c, h_mask,
             candidate_mask, all_c});
  Outputs out = run_forward(call, true);
  return {std::move(out.output), std::move(out.h_n), std::move(out.c_n),
          out.all_c ? *std::move(out.all_c) : call.nothing(), *std::move(out.saved)};
}

Gradients backward(const MaybeTensor& d_output, const MaybeTensor& d_h_n, const MaybeTensor& d_c_n,
                   const std::string& cell, const Tensor& input, const MaybeTensor& batch_sizes,
                   const MaybeTensor& h0, const MaybeTensor& c0, const std::vector<Tensor>& weights,
                   int64_t num_layers, bool bidirectional, bool batch_first, const Tensor& saved,
                   bool need_input, bool need_state, bool need_weights) {
  return run_backward(
      {d_output, d_h_n, d_c_n, {}},
      {cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first}, saved,
      {need_input, need_state, need_weights}, kNoControls);
}
Gradients backward_controlled(
    const MaybeTensor& d_output, const MaybeTensor& d_h_n, const MaybeTensor& d_c_n,
    const MaybeTensor& d_all_c, const std::string& cell, const Tensor& input,
    const MaybeTensor& batch_sizes, const MaybeTensor& h0, const MaybeTensor& c0,
    const std::vector<Tensor>& weights, int64_t num_layers, bool bidirectional, bool batch_first,
    const Tensor& saved, bool need_input, bool need_state, bool need_weights,
    const MaybeTensor& lengths, const MaybeTensor& reset, bool reset_to_initial,
    const MaybeTensor& zoneout_mask, double zoneout_h, double zoneout_c, const MaybeTensor& h_mask,
    const MaybeTensor& candidate_mask, bool all_c) {
  return run_backward(
      {d_output, d_h_n, d_c_n, d_all_c},
      {cell, input, batch_sizes, h0, c0, weights, num_layers, bidirectional, batch_first}, saved,
      {need_input, need_state, need_weights},
      {lengths, reset, reset_to_initial, zoneout_mask, zoneout_h, zoneout_c, h_mask, candidate_mask,
       all_c});
}

}  // namespace

namespace {

Call understood(PlainQuestion& q, const FrozenSizes* frozen) {
  return Call({q.cell,
               *q.input,
               {},
               q.h0,
               q.c0,
               std::move(q.weights),
               q.num_layers,
               q.bidirectional,
               q.batch_first},
              {q.lengths, q.reset, q.reset_to_initial, {}, 0.0, 0.0, {}, {}, false}, frozen);
}

}  // namespace

void infer(PlainQuestion question, const FrozenSizes* frozen, bool save, const Make& make) {
  Call call = understood(question, frozen);
  check(!question.h0 || call.has_c() == question.c0.has_value(), "h0 and c0 come together");
  const auto empty = [&](const Shape& shape) {
    return make(shape.data(), shape.size(), call.type, false);
  };
  Places to{empty(call.output_shape()), {}, {}, {}};
  if (!call.is_step())
    to.h_n = empty(call.h_shape());
  else if (save)
    empty({0});
  if (call.has_c()) to.c_n = empty(call.c_shape());
  if (save) {
    const Shape shape = call.saved_shape();
    const bool keep = call.worth_keeping(shape, call.saved_type());
    to.saved = make(shape.data(), shape.size(), call.saved_type(), keep).data_ptr();
  }
  run_forward(call, to);
}

void differentiate(const PlainSeeds& seeds, PlainQuestion question, const View& saved,
                   const Needs& needs, const Make& make) {
  Call call = understood(question, nullptr);
  run_backward({seeds.output, seeds.h_n, seeds.c_n, {}}, call, saved, needs,
               [&](const Shape& shape) {
                 const bool keep = call.worth_keeping(shape, call.type);
                 return make(shape.data(), shape.size(), call.type, keep);
               });
}

}  // namespace fused_rnn

// The emulator's library stands beside the real one in a process.
#ifdef FUSED_RNN_EMULATE
#define FUSED_RNN_LIBRARY fused_rnn_emu
#else
#define FUSED_RNN_LIBRARY fused_rnn
#endif

#define FUSED_RNN_QUESTION                                                                  \
  "str cell, Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] weights, " \
  "int num_layers, bool bidirectional, bool batch_first"
#define FUSED_RNN_CONTROLS                                                        \
  "Tensor? lengths, Tensor? reset, bool reset_to_initial, Tensor? zoneout_mask, " \
  "float zoneout_h, float zoneout_c, Tensor? h_mask, Tensor? candidate_mask, bool all_c"
#define FUSED_RNN_FROZEN                                                                   \
  "str cell, Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, Tensor[] packed, " \
  "int hidden_size, int proj_size, int num_layers, bool bidirectional, bool batch_first"
#define FUSED_RNN_SEEDS "Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n"
#define FUSED_RNN_NEEDS "Tensor saved, bool need_input, bool need_state, bool need_weights"
#define FUSED_RNN_RESULTS "Tensor output, Tensor h_n, Tensor c_n"
#define FUSED_RNN_GRADIENTS "Tensor d_input, Tensor d_h0, Tensor d_c0, Tensor[] d_weights"

STABLE_TORCH_LIBRARY(FUSED_RNN_LIBRARY, m) {
  m.def("inference(" FUSED_RNN_QUESTION ") -> (" FUSED_RNN_RESULTS ")");
  m.def("inference.controlled(" FUSED_RNN_QUESTION ", " FUSED_RNN_CONTROLS
        ") -> (" FUSED_RNN_RESULTS ", Tensor all_c)");
  m.def("pack(str cell, Tensor[] weights, int num_layers, bool bidirectional) -> Tensor[] packed");
  m.def("frozen(" FUSED_RNN_FROZEN ") -> (" FUSED_RNN_RESULTS ")");
  m.def("frozen.controlled(" FUSED_RNN_FROZEN ", " FUSED_RNN_CONTROLS ") -> (" FUSED_RNN_RESULTS
        ", Tensor all_c)");
  m.def("forward(" FUSED_RNN_QUESTION ") -> (" FUSED_RNN_RESULTS ", Tensor saved)");
  m.def("forward.controlled(" FUSED_RNN_QUESTION ", " FUSED_RNN_CONTROLS ") -> (" FUSED_RNN_RESULTS
        ", Tensor all_c, Tensor saved)");
  m.def("backward(" FUSED_RNN_SEEDS ", " FUSED_RNN_QUESTION ", " FUSED_RNN_NEEDS
        ") -> (" FUSED_RNN_GRADIENTS ")");
  m.def("backward.controlled(" FUSED_RNN_SEEDS ", Tensor? d_all_c, " FUSED_RNN_QUESTION
        ", " FUSED_RNN_NEEDS ", " FUSED_RNN_CONTROLS ") -> (" FUSED_RNN_GRADIENTS ")");
}

namespace {
template <class Library>
void register_scans(Library& m) {
  m.impl("inference", TORCH_BOX(&fused_rnn::inference));
  m.impl("inference.controlled", TORCH_BOX(&fused_rnn::inference_controlled));
  m.impl("forward", TORCH_BOX(&fused_rnn::forward));
  m.impl("forward.controlled", TORCH_BOX(&fused_rnn::forward_controlled));
  m.impl("backward", TORCH_BOX(&fused_rnn::backward));
  m.impl("backward.controlled", TORCH_BOX(&fused_rnn::backward_controlled));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FUSED_RNN_LIBRARY, CPU, m) {
  register_scans(m);
  m.impl("pack", TORCH_BOX(&fused_rnn::pack));
  m.impl("frozen", TORCH_BOX(&fused_rnn::frozen));
  m.impl("frozen.controlled", TORCH_BOX(&fused_rnn::frozen_controlled));
}

#ifdef FUSED_RNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(FUSED_RNN_LIBRARY, CUDA, m) {
  register_scans(m);
}
#endif
