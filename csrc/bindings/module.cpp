// fused_rnn._C: what is not a tensor op. Build facts, choices and why, and the cell floor for
// tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/pressure.h"
#include "../cpu/strategy.h"
#include "../cuda/persistent.h"
#include "direct.h"
#include "memory.h"

namespace py = pybind11;

namespace fused_rnn {
namespace {

template <class A>
using Array = py::array_t<A, py::array::c_style>;

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

const cpu::Kernels& kernels_in(DType type) {
  const cpu::Kernels* kernels = cpu::chosen_isa()[type];
  if (!kernels)
    throw py::value_error(std::string("built without kernels for ") + cpu::name_of(type));
  return *kernels;
}

const cpu::AnyCell& cell_named(const std::string& name, DType type = DType::kFloat32) {
  kernels_in(type);
  const cpu::AnyCell* cell = cpu::find_cell(name.c_str(), type);
  if (!cell) throw py::key_error("there is no cell '" + name + "'");
  return *cell;
}

template <class A>
constexpr bool kFloat = std::is_same_v<A, float>;
template <class A>
constexpr DType kType = kFloat<A> ? DType::kFloat32 : DType::kFloat64;

template <class A>
const cpu::CellFunctions<A>& functions(const cpu::AnyCell& cell) {
  return static_cast<const cpu::CellRows<A>&>(cell).functions;
}

// Checks that an argument is [count, n] and gives its data; n is taken from the first one.
template <class A>
const A* rows(const Array<A>& array, const char* name, int count, py::ssize_t& n) {
  if (array.ndim() == 2 && n < 0) n = array.shape(1);
  if (array.ndim() != 2 || array.shape(0) != count || array.shape(1) != n)
    throw py::value_error(std::string(name) + " must have shape [" + std::to_string(count) +
                          ", n]");
  return array.data();
}

template <class A>
py::tuple cell_forward(const std::string& name, Array<A> x, Array<A> h, Array<A> w, Array<A> m,
                       Array<A> prev) {
  const cpu::AnyCell& cell = cell_named(name, kType<A>);
  const CellInfo& info = cell.info;
  py::ssize_t n = -1;
  const A* px = rows(x, "x", info.gates, n);
  const A* ph = rows(h, "h", info.gates, n);
  const A* pw = rows(w, "w", info.diagonals, n);
  const A* pm = rows(m, "m", info.candidate, n);
  const A* pprev = rows(prev, "prev", info.states, n);
  Array<A> state({py::ssize_t(info.states), n}), saved({py::ssize_t(info.saved), n});
  functions<A>(cell).forward(n, px, ph, pw, pm, pprev, state.mutable_data(), saved.mutable_data());
  return py::make_tuple(state, saved);
}

template <class A>
py::tuple cell_backward(const std::string& name, Array<A> saved, Array<A> w, Array<A> m,
                        Array<A> prev, Array<A> state, Array<A> d_state) {
  const cpu::AnyCell& cell = cell_named(name, kType<A>);
  const CellInfo& info = cell.info;
  py::ssize_t n = -1;
  const A* pprev = rows(prev, "prev", info.states, n);
  const A* psaved = rows(saved, "saved", info.saved, n);
  const A* pw = rows(w, "w", info.diagonals, n);
  const A* pm = rows(m, "m", info.candidate, n);
  const A* pstate = rows(state, "state", info.states, n);
  const A* pd_state = rows(d_state, "d_state", info.states, n);
  Array<A> dx({py::ssize_t(info.gates), n}), dh({py::ssize_t(info.gates), n}),
      d_prev({py::ssize_t(info.states), n}), dw({py::ssize_t(info.diagonals), n});
  functions<A>(cell).backward(n, psaved, pw, pm, pprev, pstate, pd_state, dx.mutable_data(),
                              dh.mutable_data(), d_prev.mutable_data(), dw.mutable_data());
  return py::make_tuple(dx, dh, d_prev, dw);
}

template <class A>
Array<A> math(const std::string& name, Array<A> x) {
  const auto& of = static_cast<const cpu::CellTableOf<A>&>(*kernels_in(kType<A>).cells);
  Array<A> y(x.size());
  if (name == "sigmoid") return of.sigmoid(x.size(), x.data(), y.mutable_data()), y;
  if (name == "tanh") return of.tanh(x.size(), x.data(), y.mutable_data()), y;
  throw py::key_error("there is no function '" + name + "'");
}

// Calls per second of Isa::multiply, of threads that each work on operands of their own at the same
// time: the best of many short windows, for the roof is what the machine can do undisturbed.
double multiplications_per_second(int threads, int64_t rows, int64_t K, int64_t columns) {
  constexpr size_t kWindows = 250;
  constexpr std::chrono::milliseconds kWindow(2);
  if (threads < 1)
    throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  std::vector<std::array<double, kWindows>> rates(static_cast<size_t>(threads));
  std::atomic<int> waiting{threads};
  const auto work = [&](std::array<double, kWindows>& mine) {
    using Clock = std::chrono::steady_clock;
    const std::unique_ptr<void, void (*)(void*)> block(
        take_block(size_t(rows * K + K * columns + rows * columns) * sizeof(float),
                   Use::kWorkspace),
        &give_block);
    float* a = static_cast<float*>(block.get());
    std::fill_n(a, rows * K + K * columns, 0.5f);
    float* w = a + rows * K;
    const auto call = [&](int64_t step) {
      kernels_in(DType::kFloat32).multiply(step, rows, K, columns, a, w, w + K * columns);
    };
    call(0);
    --waiting;
    while (waiting > 0) std::this_thread::yield();
    const auto begin = Clock::now();
    for (size_t window = 0; window < kWindows; ++window) {
      const auto start = Clock::now(), end = begin + int(window + 1) * kWindow;
      if (start >= end) continue;  // it had no core
      double seconds = 0.0;
      int64_t calls = 0;
      do {
        call(++calls);
        seconds = std::chrono::duration<double>(Clock::now() - start).count();
      } while (Clock::now() < end);
      mine[window] = double(calls) / seconds;
    }
  };
  std::vector<std::thread> team;
  for (auto& mine : rates) team.emplace_back(work, std::ref(mine));
  for (std::thread& thread : team) thread.join();
  double best = 0.0;
  for (size_t window = 0; window < kWindows; ++window) {
    double together = 0.0;
    for (const auto& mine : rates) together += mine[window];
    best = std::max(best, together);
  }
  return best;
}

// GFLOP/s of the register tile where both operands stay in L2.
double tile_rate(int threads) {
  const int64_t rows = 48, K = 256, columns = 64;
  return 2e-9 * double(rows * K * columns) * multiplications_per_second(threads, rows, K, columns);
}

// GB/s of a product with one row whose weights have this many bytes, shared among the threads.
double stream_rate(int64_t bytes, int threads) {
  const int64_t K = 256;
  const int64_t each = bytes / std::max(threads, 1) / int64_t(sizeof(float));
  const int64_t columns = std::max<int64_t>(64, each / K / 64 * 64);
  return 1e-9 * double(sizeof(float) * K * columns) *
         multiplications_per_second(threads, 1, K, columns);
}

DType dtype_named(const std::string& dtype) {
  for (const DType type : kTypes)
    if (dtype == cpu::name_of(type)) return type;
  throw py::value_error("there are no kernels for " + dtype);
}

// How long what `pack` makes of one layer and direction is.
size_t packed_bytes(const std::string& name, int64_t I, int64_t H, int64_t R, bool projected,
                    const std::string& dtype) {
  const cpu::Packing& packing = kernels_in(dtype_named(dtype)).packing;
  return packing.bytes(cell_named(name).info, {I, H, R, projected});
}

py::dict strategy(const std::string& name, int64_t T, int64_t B, int64_t I, int64_t H, int64_t proj,
                  int64_t layers, int64_t directions, int64_t rows, int threads, bool backward,
                  bool busy, int64_t l2, int64_t weight_bytes) {
  if (std::min({T, B, I, H, layers, directions, int64_t(threads)}) < 1)
    throw py::value_error("T, B, I, H, layers, directions and threads must be at least 1");
  Stack stack;
  Weights weights;
  if (proj) weights.hr = &weights;  // only asked whether it is there
  stack.steps.T = T;
  stack.steps.B = B;
  stack.steps.N = rows ? rows : T * B;
  stack.I = I;
  stack.H = H;
  stack.R = proj ? proj : H;
  stack.layers = layers;
  stack.dirs = directions;
  stack.weights = &weights;
  stack.weight_bytes = weight_bytes;
  cpu::Machine machine = cpu::this_machine(threads);
  machine.busy = busy;
  if (l2) machine.l2 = l2;
  const cpu::Plan plan =
      (backward ? cpu::plan_backward : cpu::plan_forward)(stack, cell_named(name).info, machine);
  py::dict against;
  for (int i = 0; i < cpu::kSplits; ++i)
    if (plan.against[i]) against[cpu::kSplitNames[i]] = plan.against[i];
  py::dict result;
  result["split"] = cpu::kSplitNames[int(plan.split)];
  result["threads"] = plan.threads;
  result["blocks"] = plan.blocks;
  result["pack_ih"] = cpu::kPackNames[int(plan.pack_ih)];
  result["pack_hh"] = cpu::kPackNames[int(plan.pack_hh)];
  result["fetch_weights"] = plan.fetch_weights;
  result["chunk_steps"] = plan.chunk_steps;
  result["possible"] = plan.possible;
  result["reason"] = plan.reason;
  result["against"] = against;
  return result;
}

// Whether a scan on a GPU with so many SMs and so much shared memory for a block can be persistent.
py::dict schedule(const std::string& name, int64_t B, int64_t H, const std::string& dtype, int sms,
                  int64_t shared_per_block, bool backward, bool projected, bool ragged,
                  bool controlled) {
  if (std::min({B, H, int64_t(sms), shared_per_block}) < 1)
    throw py::value_error("B, H, sms and shared_per_block must be at least 1");
  const CellInfo& cell = cell_named(name).info;
  Weights weights;
  const int64_t some = 0;
  uint8_t mask = 0;
  dev::DeviceInfo device;
  device.sms = sms;
  device.shared_per_block = size_t(shared_per_block);
  device.cooperative = true;
  const auto plan_of = [&](auto problem) {
    if (projected) weights.hr = &weights;  // only asked whether they are there
    if (ragged) problem.steps.batch_sizes = &some;
    if (controlled) problem.reset.data = &mask;
    problem.steps.B = B;
    problem.H = problem.R = H;
    problem.weights = &weights;
    return cuda::plan_persistent(cell, dtype_named(dtype), problem, device);
  };
  const cuda::PersistentPlan plan =
      backward ? plan_of(BackwardProblem()) : plan_of(ForwardProblem());
  py::dict result;
  result["possible"] = plan.against == nullptr;
  result["against"] = plan.against ? plan.against : "";
  result["chosen"] = plan.chosen();
  result["microseconds"] = plan.microseconds;
  result["units"] = plan.units;
  result["blocks"] = plan.blocks;
  result["groups"] = plan.groups;
  result["rows"] = plan.rows;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

std::optional<std::string> schedule_named_by(int index) {
  return index < 0 ? std::nullopt : std::optional<std::string>(cuda::kScheduleNames[index]);
}

// Forces a schedule on CUDA, or nothing (None); what was forced before.
std::optional<std::string> force_schedule(const std::optional<std::string>& name) {
  const auto* const names = cuda::kScheduleNames;
  const auto* const found = std::find(names, names + cuda::kSchedules, name.value_or(""));
  if (name && found == names + cuda::kSchedules)
    throw py::value_error("schedule must be stepwise, persistent or None, got '" + *name + "'");
  return schedule_named_by(cuda::forced_schedule.exchange(name ? int(found - names) : -1));
}

// Forces a split, or nothing (None); what was forced before.
std::optional<std::string> force_split(const std::optional<std::string>& name) {
  std::optional<std::string> before;
  if (const cpu::Split* forced = cpu::this_machine(1).forced)
    before = cpu::kSplitNames[int(*forced)];
  if (!name) {
    cpu::force_split(nullptr);
    return before;
  }
  for (int i = 0; i < cpu::kSplits; ++i)
    if (*name == cpu::kSplitNames[i]) {
      const cpu::Split split = cpu::Split(i);
      cpu::force_split(&split);
      return before;
    }
  throw py::value_error("split must be none, rows, units, layers or None, got '" + *name + "'");
}

}  // namespace
}  // namespace fused_rnn

PYBIND11_MODULE(_C, m) {
  using namespace fused_rnn;
  m.def("cells", [] {
    std::map<std::string, std::map<std::string, int>> cells;
    const cpu::CellTable& table = *kernels_in(DType::kFloat32).cells;
    for (int i = 0; i < table.count; ++i) {
      const CellInfo& info = table.all[i]->info;
      cells[info.name] = {{"gates", info.gates},
                          {"states", info.states},
                          {"saved", info.saved},
                          {"diagonals", info.diagonals},
                          {"recurrent", info.recurrent},
                          {"norm_gates", info.norm_gates},
                          {"normed_operand", info.normed_operand},
                          {"candidate", info.candidate}};
    }
    return cells;
  });
  m.def("isa", [] { return cpu::chosen_isa().name; });
  m.def("compiled_isas", cpu::compiled_isas);
  m.def("build_info", [] {
    std::string dtypes;
    for (const DType type : kTypes)
      if (cpu::chosen_isa()[type])
        dtypes += (dtypes.empty() ? "" : " ") + std::string(cpu::name_of(type));
    return std::map<std::string, std::string>{{"compiler", __VERSION__},
                                              {"dtypes", dtypes},
                                              {"torch", FUSED_RNN_TORCH_VERSION},
                                              {"cxx_flags", FUSED_RNN_CXX_FLAGS}};
  });
  // Architectures that there are kernels for, or why there are none.
  m.def("cuda", [] { return py::make_tuple(FUSED_RNN_CUDA_ARCHITECTURES, FUSED_RNN_CUDA_OFF); });
  m.def("cell_forward", &cell_forward<float>, py::arg("cell"), py::arg("x").noconvert(),
        py::arg("h").noconvert(), py::arg("w").noconvert(), py::arg("m").noconvert(),
        py::arg("prev").noconvert());
  m.def("cell_forward", &cell_forward<double>, py::arg("cell"), py::arg("x").noconvert(),
        py::arg("h").noconvert(), py::arg("w").noconvert(), py::arg("m").noconvert(),
        py::arg("prev").noconvert());
  m.def("cell_backward", &cell_backward<float>, py::arg("cell"), py::arg("saved").noconvert(),
        py::arg("w").noconvert(), py::arg("m").noconvert(), py::arg("prev").noconvert(),
        py::arg("state").noconvert(), py::arg("d_state").noconvert());
  m.def("cell_backward", &cell_backward<double>, py::arg("cell"), py::arg("saved").noconvert(),
        py::arg("w").noconvert(), py::arg("m").noconvert(), py::arg("prev").noconvert(),
        py::arg("state").noconvert(), py::arg("d_state").noconvert());
  m.def("math", &math<float>, py::arg("name"), py::arg("x").noconvert());
  m.def("math", &math<double>, py::arg("name"), py::arg("x").noconvert());
  m.def("tile_rate", &tile_rate, py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def("stream_rate", &stream_rate, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
  m.def("packed_bytes", &packed_bytes, py::arg("cell"), py::arg("I"), py::arg("H"), py::arg("R"),
        py::kw_only(), py::arg("projected"), py::arg("dtype"));
  m.def("cached_bytes", &cached_bytes);
  m.def("empty_cache", &empty_cache);
  m.def("poison_new_memory", &poison_new_memory, py::arg("on"));
  m.def("strategy", &strategy, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"),
        py::arg("H"), py::kw_only(), py::arg("proj") = 0, py::arg("layers") = 1,
        py::arg("directions") = 1, py::arg("rows") = 0, py::arg("threads") = 1,
        py::arg("backward") = false, py::arg("busy") = false, py::arg("l2") = 0,
        py::arg("weight_bytes") = 4);
  m.def("busy", [] { return cpu::pressure().high(cpu::now_ns()); });
  py::class_<cpu::Pressure>(m, "Pressure")
      .def(py::init<>())
      .def("high", &cpu::Pressure::high, py::arg("now"))
      .def("report", &cpu::Pressure::report, py::arg("now"), py::arg("total"), py::arg("lost"));
  m.def("force_split", &force_split, py::arg("split"));
  m.def("schedule", &schedule, py::arg("cell"), py::arg("B"), py::arg("H"), py::arg("dtype"),
        py::kw_only(), py::arg("sms"), py::arg("shared_per_block"), py::arg("backward") = false,
        py::arg("projected") = false, py::arg("ragged") = false, py::arg("controlled") = false);
  m.def("force_schedule", &force_schedule, py::arg("schedule"));
  m.def("forced_schedule", [] { return schedule_named_by(cuda::forced_schedule); });
  if (PyModule_AddFunctions(m.ptr(), direct_methods()) != 0) throw py::error_already_set();
}
