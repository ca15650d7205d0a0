#include "stepwise.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "../core/arena.h"
#include "persistent.h"
#include "row_kernels.cuh"

namespace fused_rnn::cuda {

int64_t chunk_bytes = int64_t(256) << 20;
int64_t fused_rows = kFusedRows;

namespace {

void check(const dev::Status& status) {
  if (!status.ok()) throw std::runtime_error("fused_rnn: " + status.message());
}

int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Asked for once: it takes a millisecond.
const dev::DeviceInfo& this_device() {
  thread_local int known = -1;
  thread_local dev::DeviceInfo info;
  int device = 0;
  check(dev::current_device(&device));
  if (device != known) {
    check(dev::device_info(device, &info));
    known = device;
  }
  return info;
}

// What forward and backward share: sizes, and where rows stand.
template <class Problem>
class Scan {
 protected:
  Scan(const CellInfo& info, DType type, const Problem& problem, const Device& device)
      : info_(info),
        p_(problem),
        steps_(problem.steps),
        device_(device),
        type_(type),
        size_(size_of(type)),
        sum_type_(type == DType::kFloat64 ? type : DType::kFloat32),
        G_(info_.gates),
        first_gates_(info_.two_products() ? info_.first_gates : G_),
        Hp_(pad_units(problem.H)),
        slots_(saved_slots(problem, info_)),
        widest_(problem.layers > 1 && problem.dirs * problem.R > problem.I
                    ? problem.dirs * problem.R
                    : problem.I) {
    const int64_t row_bytes = G_ * p_.H * size_of(sum_type_);
    const int64_t rows = chunk_bytes / row_bytes;
    chunk_steps_ = steps_.B < rows ? rows / steps_.B : 1;
    if (chunk_steps_ > steps_.T) chunk_steps_ = steps_.T;
    chunk_rows_ = chunk_steps_ * steps_.B;
    const int forced = forced_schedule;
    if (forced == int(Schedule::kStepwise)) return;
    plan_ = plan_persistent(info, type, problem, this_device());
    if (forced == int(Schedule::kPersistent) && plan_.against)
      throw std::runtime_error(std::string("fused_rnn: the schedule 'persistent' is forced, but ") +
                               plan_.against);
    persistent_ = forced < 0 ? plan_.chosen() : true;
  }

  // Steps one after another in time, whose gates are in memory together.
  struct Chunk {
    int64_t first;
    int64_t count;
    int64_t row;   // the first of all rows
    int64_t rows;  // and how many
    bool is_first, is_last;
  };

  // Calls body(chunk) in the order in which time is walked, from its start or its end.
  template <class Body>
  void for_chunks(bool from_start, Body body) const {
    for (int64_t done = 0; done < steps_.T; done += chunk_steps_) {
      const int64_t count = chunk_steps_ < steps_.T - done ? chunk_steps_ : steps_.T - done;
      const int64_t first = from_start ? done : steps_.T - done - count;
      const int64_t row = rows_before(first);
      body(Chunk{first, count, row, rows_before(first + count) - row, done == 0,
                 done + count == steps_.T});
    }
  }

  int64_t rows_before(int64_t t) const { return t < steps_.T ? steps_.offset(t) : steps_.N; }

  void lay_out_maps(Arena& arena) {
    order_ = arena.take<int64_t>(steps_.order ? steps_.B : 0);
    offsets_ = arena.take<int64_t>(steps_.offsets && !p_.input.packed ? steps_.T : 0);
  }
  void write_maps() const {
    write(steps_.order, order_, steps_.B);
    write(steps_.offsets, offsets_, steps_.T);
  }

  const char* at(const void* data, int64_t element) const {
    return data ? static_cast<const char*>(data) + element * size_ : nullptr;
  }
  char* at(void* data, int64_t element) const {
    return data ? static_cast<char*>(data) + element * size_ : nullptr;
  }

  // The rows of step t.
  Rows rows_of(const Sequence& sequence, int64_t t, int64_t element_size) const {
    if (!sequence.data) return {};
    const int64_t first =
        sequence.packed ? steps_.offset(t) * sequence.stride_b : t * sequence.stride_t;
    return {static_cast<char*>(sequence.data) + first * element_size, sequence.stride_b,
            sequence.packed ? nullptr : order_};
  }
  Rows rows_of(const Sequence& sequence, int64_t t) const { return rows_of(sequence, t, size_); }
  // The sequences' rows in a [L*D, B, features] tensor.
  Rows state_rows(const void* tensor, int64_t plane, int64_t features) const {
    if (!tensor) return {};
    return {const_cast<char*>(at(tensor, plane * steps_.B * features)), features, order_};
  }
  Initial initial(int64_t plane) const {
    return {state_rows(p_.h0, plane, p_.R), state_rows(p_.c0, plane, p_.H)};
  }
  Rows h_mask(int64_t plane) const { return state_rows(p_.h_mask, plane, p_.R); }
  Rows candidate_mask(int64_t plane) const { return state_rows(p_.candidate_mask, plane, p_.H); }

  RowMap map_of(const Sequence& sequence) const {
    return {steps_.T, steps_.B, offsets_, order_, sequence};
  }

  // Who begins, walking in direction d, with step t: who is then given an initial state. In the
  // second direction that is the last step before a reset.
  Begins begins(int64_t d, int64_t t) const {
    if (d == 1) ++t;
    if (!p_.reset.data || t < 0 || t >= steps_.T || (d == 1 && t == 0)) return {};
    return {rows_of(p_.reset, t, 1), steps_.rows(t)};
  }

  Zoneout zoneout(int64_t plane, int64_t t) const {
    Zoneout zoneout;
    zoneout.any = p_.zoned();
    zoneout.share[0] = p_.zoneout[0];
    zoneout.share[1] = p_.zoneout[1];
    zoneout.mask = rows_of(p_.zoneout_mask, t, 1);
    if (zoneout.mask.data)
      zoneout.mask.data = static_cast<uint8_t*>(zoneout.mask.data) + plane * p_.zoneout_plane;
    return zoneout;
  }

  bool has_c() const { return info_.states > 1; }

  // Where gates are normalised: their gains among the weights of the units, and the first slot of
  // the products before that.
  int64_t gain_of(bool of_h) const { return (info_.diagonals + (of_h ? G_ : 0)) * p_.H; }
  int64_t raw_slot(bool of_h) const { return slots_ - (of_h ? 1 : 2) * G_; }

  // Rows of a tensor of the caller as a factor: as they are, where they are a matrix.
  bool is_matrix(const Sequence& sequence, int64_t features, const Chunk& chunk,
                 Matrix* matrix) const {
    const bool one_step = chunk.count == 1 && (sequence.packed || !steps_.order);
    const bool one_row = steps_.B == 1 && !sequence.packed;
    const bool gapless =
        sequence.packed || (!steps_.offsets && sequence.stride_t == steps_.B * sequence.stride_b);
    if (!one_step && !one_row && !gapless) return false;
    int64_t ld = one_row && !one_step ? sequence.stride_t : sequence.stride_b;
    if (chunk.rows == 1) ld = features;
    const Rows rows = rows_of(sequence, chunk.first);
    *matrix = {rows.data, type_, chunk.rows, features, ld};
    return ld >= features;
  }
  // Whether there is a chunk whose rows are none.
  bool is_scattered(const Sequence& sequence, int64_t features) const {
    Matrix matrix;
    const int64_t rows = rows_before(chunk_steps_);
    return !is_matrix(sequence, features, {0, chunk_steps_, 0, rows, true, false}, &matrix);
  }
  // Or else copied to `staged`.
  Matrix input_rows(const Sequence& sequence, int64_t features, const Chunk& chunk,
                    void* staged) const {
    Matrix matrix;
    if (is_matrix(sequence, features, chunk, &matrix)) return matrix;
    const auto gather = [&](auto element) {
      using E = decltype(element);
      launch<gather_rows<E>>(chunk.rows, features, chunk.row, chunk.rows, features,
                             map_of(sequence), static_cast<E*>(staged));
    };
    size_ == 8 ? gather(uint64_t{}) : size_ == 4 ? gather(uint32_t{}) : gather(uint16_t{});
    return {staged, type_, chunk.rows, features, features};
  }

  Matrix matrix(const void* data, int64_t rows, int64_t cols) const {
    return {const_cast<void*>(data), type_, rows, cols, cols};
  }
  Matrix accumulated(void* data, int64_t rows, int64_t cols) const {
    return {data, sum_type_, rows, cols, cols};
  }
  void multiply(const Matrix& a, const Matrix& b, const Matrix& out) const {
    device_.multiply(device_.host, a, b, out);
  }

  void fill(void* data, int byte, int64_t bytes) const {
    check(dev::fill_bytes(data, byte, size_t(bytes), device_.stream));
  }

  // A kernel with a thread for each element of [rows, units].
  template <auto kKernel, class... Args>
  void launch(int64_t rows, int64_t units, const Args&... args) const {
    check(dev::launch<kKernel>(over(rows, units), device_.stream, args...));
  }

  const CellInfo& info_;
  const Problem& p_;
  const Steps& steps_;
  const Device& device_;
  const DType type_;
  const int64_t size_;    // of an element of S
  const DType sum_type_;  // A
  const int64_t G_;
  const int64_t first_gates_;  // those that W_hh h adds to
  const int64_t Hp_;
  const int64_t slots_;   // of saved
  const int64_t widest_;  // features that a layer takes
  int64_t chunk_steps_;
  int64_t chunk_rows_;          // of a chunk, at most
  int64_t* order_ = nullptr;    // [B] on the device, as in Steps; null where it is not needed
  int64_t* offsets_ = nullptr;  // [T], likewise
  bool persistent_ = false;
  PersistentPlan plan_;

 private:
  void write(const int64_t* from, int64_t* to, int64_t count) const {
    for (int64_t done = 0; to && done < count; done += Integers::kCount) {
      Integers part;
      const int64_t n = count - done < Integers::kCount ? count - done : int64_t(Integers::kCount);
      for (int64_t i = 0; i < n; ++i) part.value[i] = from[done + i];
      launch<write_integers<Integers>>(1, n, part, n, to + done);
    }
  }
};

template <class A>
class ForwardScan : Scan<ForwardProblem> {
 public:
  ForwardScan(const CellLaunches<A>& cell, DType type, const ForwardProblem& problem,
              const Device& device)
      : Scan(cell.info, type, problem, device), cell_(cell) {}

  void lay_out(Arena& arena) {
    lay_out_maps(arena);
    for (char*& h : h_) h = arena.take<char>(steps_.B * p_.R * size_);
    for (char*& masked : masked_)
      masked = arena.take<char>(p_.h_mask ? steps_.B * p_.R * size_ : 0);
    c_ = arena.take<A>(has_c() ? steps_.B * p_.H : 0);
    own_ = arena.take<char>(p_.projected() ? steps_.B * p_.H * size_ : 0);
    projected_ = arena.take<A>(p_.projected() ? steps_.B * p_.R : 0);
    operand_ = arena.take<char>(info_.two_products() ? steps_.B * p_.H * size_ : 0);
    normed_ = arena.take<A>(info_.normed_operand ? steps_.B * p_.H : 0);
    gates_h_ = arena.take<A>(info_.recurrent ? steps_.B * G_ * p_.H : 0);
    gates_x_ = arena.take<A>(chunk_rows_ * G_ * p_.H);
    staged_ = arena.take<char>(is_scattered(p_.input, p_.I) ? chunk_rows_ * p_.I * size_ : 0);
    between_ = arena.take<char>(betweens() * steps_.N * p_.dirs * p_.R * size_);
    exchange_ = arena.take<char>(persistent_ ? exchange_bytes(chunk_steps_) : 0);
  }

  void run() {
    write_maps();
    for (int64_t layer = 0; layer < p_.layers; ++layer)
      for (int64_t d = 0; d < p_.dirs; ++d) run_direction(layer, d);
  }

 private:
  struct Task {
    int64_t d;
    int64_t plane;  // layer and direction
    Weights weights;
    int64_t I;
    Sequence input;
    Sequence output;
    bool is_last_layer;
  };

  int64_t betweens() const { return p_.layers <= 2 ? p_.layers - 1 : 2; }
  Sequence between(int64_t layer) const {
    const int64_t features = p_.dirs * p_.R;
    return {at(between_, layer % betweens() * steps_.N * features), steps_.B * features, features,
            true};
  }

  void run_direction(int64_t layer, int64_t d) {
    const int64_t plane = layer * p_.dirs + d;
    const bool last = layer + 1 == p_.layers;
    const Task task{d,
                    plane,
                    p_.weights[plane],
                    p_.input_size(layer),
                    layer == 0 ? p_.input : between(layer - 1),
                    last ? p_.output : between(layer),
                    last};
    // Walking backwards nobody begins at the end of the batch.
    const Begins from_zero = p_.reset_to_initial || d == 1 ? Begins{} : begins(0, 0);
    launch<start_states<A>>(steps_.B, p_.H,
                            Start<A>{type_,
                                     steps_.B,
                                     p_.H,
                                     p_.R,
                                     initial(plane),
                                     from_zero,
                                     {h_[0], h_[1]},
                                     {masked_[0], masked_[1]},
                                     h_mask(plane),
                                     c_,
                                     steps_.rows(0),
                                     state_rows(p_.h_n, plane, p_.R),
                                     state_rows(p_.c_n, plane, p_.H)});
    int parity = 0;  // of the steps so far
    for_chunks(d == 0, [&](const Chunk& chunk) {
      const Matrix x = input_rows(task.input, task.I, chunk, staged_);
      multiply(x, matrix(task.weights.ih, G_ * p_.H, task.I).t(),
               accumulated(gates_x_, chunk.rows, G_ * p_.H));
      if (info_.norm_gates)
        check(cell_.normalise(normed_rows(task, false, gates_x_, chunk.row, chunk.rows),
                              device_.stream));
      if (persistent_) {
        all_steps(task, chunk, std::exchange(parity, 1 - parity));
        return;
      }
      for (int64_t i = 0; i < chunk.count; ++i)
        step(task, chunk, d == 0 ? chunk.first + i : chunk.first + chunk.count - 1 - i,
             std::exchange(parity, 1 - parity));
    });
  }

  A* saved_rows(int64_t plane, int64_t row) const {
    return p_.saved ? static_cast<A*>(p_.saved) + (plane * steps_.N + row) * slots_ * Hp_ : nullptr;
  }

  // Products of h or of x, those of the rows from `row` on.
  NormedRows<A> normed_rows(const Task& task, bool of_h, A* products, int64_t row,
                            int64_t rows) const {
    A* saved = saved_rows(task.plane, row);
    return {type_,
            rows,
            p_.H,
            products,
            at(task.weights.diag, gain_of(of_h)),
            of_h ? task.weights.bias_hh : task.weights.bias_ih,
            saved ? saved + raw_slot(of_h) * Hp_ : nullptr,
            slots_ * Hp_,
            Hp_};
  }

  ForwardStep<A> step_at(const Task& task, const Chunk& chunk, int64_t t, int parity) const {
    ForwardStep<A> s{};
    s.type = type_;
    s.rows = steps_.rows(t);
    s.H = p_.H;
    s.R = p_.R;
    s.gates_x = gates_x_ + (steps_.offset(t) - chunk.row) * G_ * p_.H;
    s.gates_h = gates_h_;
    s.bias_ih = task.weights.bias_ih;
    s.bias_hh = task.weights.bias_hh;
    s.diag = task.weights.diag;
    s.h = h_[parity];
    s.h_after = h_[1 - parity];
    s.masked_after = masked_[1 - parity];
    s.h_mask = h_mask(task.plane);
    s.candidate_mask = candidate_mask(task.plane);
    s.c = c_;
    s.own = own_;
    s.operand = operand_;
    s.y = rows_of(task.output, t);
    s.y.data = at(s.y.data, task.d * p_.R);
    s.all_c = rows_of(p_.all_c, t);
    s.all_c.data = at(s.all_c.data, task.d * p_.H);
    s.zoneout = zoneout(task.plane, t);
    s.saved = saved_rows(task.plane, steps_.offset(t));
    s.ld_saved = slots_ * Hp_;
    s.slot = Hp_;
    s.own_slot = info_.states + info_.saved;
    // Forwards a sequence ends with its own last step, backwards all end with step 0.
    if (task.d == 0)
      s.ends = t + 1 < steps_.T ? steps_.rows(t + 1) : 0;
    else
      s.ends = t > 0 ? s.rows : 0;
    s.h_n = state_rows(p_.h_n, task.plane, p_.R);
    s.c_n = state_rows(p_.c_n, task.plane, p_.H);
    s.next = begins(task.d, task.d == 0 ? t + 1 : t - 1);
    if (p_.reset_to_initial) s.initial = initial(task.plane);
    s.weight_hh = task.weights.hh;
    s.h_operand = masked_[parity] ? masked_[parity] : h_[parity];
    if (info_.norm_gates) s.normed_h = normed_rows(task, true, gates_h_, steps_.offset(t), s.rows);
    s.normed = normed_;
    return s;
  }

  // Of a launch of so many steps, what they hand on between them.
  int64_t exchange_bytes(int64_t count) const { return (count - 1) * steps_.B * p_.H * size_; }

  // Those of a chunk in one launch.
  void all_steps(const Task& task, const Chunk& chunk, int parity) const {
    const int64_t forwards = task.d == 0 ? 1 : -1;
    ForwardSteps<A> s{};
    s.first =
        step_at(task, chunk, task.d == 0 ? chunk.first : chunk.first + chunk.count - 1, parity);
    s.count = chunk.count;
    s.ends = chunk.is_last;
    s.gates_x = forwards * steps_.B * G_ * p_.H;
    s.y = forwards * (task.output.packed ? steps_.B * task.output.stride_b : task.output.stride_t);
    s.saved = forwards * steps_.B * slots_ * Hp_;
    s.exchange = exchange_;
    s.shares = plan_;
    fill(exchange_, 0xff, exchange_bytes(chunk.count));
    check(cell_.persistent_forward(s, device_.stream));
  }

  void step(const Task& task, const Chunk& chunk, int64_t t, int parity) const {
    const ForwardStep<A> s = step_at(task, chunk, t, parity);
    const Weights& w = task.weights;
    const int64_t H = p_.H, R = p_.R;
    const bool fused = cell_.fused_forward && s.rows <= fused_rows;
    if (info_.recurrent && !fused)
      multiply(matrix(s.h_operand, s.rows, R), matrix(w.hh, first_gates_ * H, R).t(),
               accumulated(gates_h_, s.rows, first_gates_ * H));
    if (info_.two_products()) {
      check(cell_.operand(s, device_.stream));
      const int64_t gates = G_ - first_gates_;
      multiply(matrix(operand_, s.rows, H),
               matrix(at(w.hh, first_gates_ * H * R), gates * H, R).t(),
               accumulated(gates_h_, s.rows, gates * H));
    }
    check((fused ? cell_.fused_forward : cell_.forward)(s, device_.stream));
    if (!p_.projected()) return;
    multiply(matrix(own_, s.rows, H), matrix(w.hr, R, H).t(), accumulated(projected_, s.rows, R));
    launch<projected_step<A>>(s.rows, R, s, static_cast<const A*>(projected_));
  }

  const CellLaunches<A>& cell_;
  char* h_[2];       // S [B, R]: read at one step, written at the next
  char* masked_[2];  // S [B, R]
  A* c_;             // [B, H]
  char* own_;        // S [B, H]: what a projection is applied to
  A* projected_;     // [B, R]
  char* operand_;    // S [B, H], of the second product
  A* normed_;        // [B, H]: the operand of a norm
  A* gates_h_;       // [B, G*H]
  A* gates_x_;       // [chunk rows, G*H]
  char* staged_;     // S [chunk rows, I]
  char* between_;    // S [betweens, N, D*R]: output of a layer, input of the next
  char* exchange_;   // S [chunk steps - 1, B, H]
};

template <class A>
class BackwardScan : Scan<BackwardProblem> {
 public:
  BackwardScan(const CellLaunches<A>& cell, DType type, const BackwardProblem& problem,
               const Device& device)
      : Scan(cell.info, type, problem, device), cell_(cell) {}

  void lay_out(Arena& arena) {
    lay_out_maps(arena);
    const int64_t B = steps_.B, H = p_.H, R = p_.R;
    const bool weights = p_.d_weights != nullptr;
    const bool adds_up = p_.reset.data && p_.reset_to_initial && p_.d_h0;
    direct_ = arena.take<A>(p_.projected() && !p_.zoned() ? 0 : B * R);
    product_ = arena.take<A>(info_.recurrent ? B * R : 0);
    dc_ = arena.take<A>(has_c() ? B * H : 0);
    d_h0_ = arena.take<A>(adds_up ? B * R : 0);
    d_c0_ = arena.take<A>(adds_up && has_c() ? B * H : 0);
    d_own_ = arena.take<A>(p_.projected() ? B * H : 0);
    d_operand_ = arena.take<A>(info_.normed_operand ? 3 * B * H : info_.two_products() ? B * H : 0);
    const int64_t gates = chunk_rows_ * G_ * H;
    d_gates_x_ = arena.take<char>(gates * size_);
    const bool same_products = info_.sums_gates && !info_.norm_gates;
    d_gates_h_ = same_products ? d_gates_x_ : arena.take<char>(gates * size_);
    d_normed_x_ = arena.take<A>(info_.norm_gates ? gates : 0);
    d_normed_h_ = info_.sums_gates ? d_normed_x_ : arena.take<A>(info_.norm_gates ? gates : 0);
    d_h_ = arena.take<char>(p_.projected() ? chunk_rows_ * R * size_ : 0);
    d_diag_ = arena.take<A>(weights ? chunk_rows_ * info_.unit_weights() * H : 0);
    h_before_ = arena.take<char>(weights && info_.recurrent ? chunk_rows_ * R * size_ : 0);
    operand_ = arena.take<char>(weights && info_.two_products() ? chunk_rows_ * H * size_ : 0);
    own_ = arena.take<char>(weights && p_.projected() ? chunk_rows_ * H * size_ : 0);
    // What a layer was given is read in place where it is a matrix of S.
    const int64_t staged = is_scattered(p_.input, p_.I) ? p_.I : 0;
    const int64_t below = p_.layers > 1 && !reads_saved() ? p_.dirs * R : 0;
    x_ = arena.take<char>(weights ? chunk_rows_ * (staged > below ? staged : below) * size_ : 0);
    const int64_t slabs = slabs_of(chunk_rows_);
    const int64_t columns = (G_ > info_.unit_weights() ? G_ : info_.unit_weights()) * H;
    for (A*& sums : slab_sums_) sums = arena.take<A>(weights ? slabs * columns : 0);
    d_bias_ih_ = arena.take<A>(weights ? G_ * H : 0);
    d_bias_hh_ = info_.sums_gates ? d_bias_ih_ : arena.take<A>(weights ? G_ * H : 0);
    d_diag_sum_ = arena.take<A>(weights ? info_.unit_weights() * H : 0);
    const bool several = weights && chunk_steps_ < steps_.T;
    d_ih_ = arena.take<A>(several ? G_ * H * widest_ : 0);
    d_hh_ = arena.take<A>(several && info_.recurrent ? G_ * H * R : 0);
    d_hr_ = arena.take<A>(several && p_.projected() ? R * H : 0);
    const int64_t most = widest_ > R ? widest_ : R;
    more_ = arena.take<A>(several ? G_ * H * most : 0);
    // The two directions add up in the gradient of their input.
    const bool scattered = p_.d_input.data && is_scattered(p_.d_input, p_.I);
    d_x_ = arena.take<A>(p_.dirs == 2 ? chunk_rows_ * widest_ : scattered ? chunk_rows_ * p_.I : 0);
    d_input_ = arena.take<A>(p_.dirs == 2 && p_.d_input.data ? steps_.N * p_.I : 0);
    between_ = arena.take<A>(betweens() * steps_.N * p_.dirs * R);
  }

  void run() {
    write_maps();
    for (int64_t layer = p_.layers - 1; layer >= 0; --layer)
      for (int64_t d = 0; d < p_.dirs; ++d) run_direction(layer, d);
  }

 private:
  struct Task {
    int64_t layer;
    int64_t d;
    int64_t plane;
    Weights weights;
    int64_t I;
  };

  static int64_t slabs_of(int64_t rows) { return (rows + kSlabRows - 1) / kSlabRows; }

  int64_t betweens() const { return p_.layers <= 2 ? p_.layers - 1 : 2; }
  // Gradient of a layer's output, [N, D*R] in A.
  Sequence between(int64_t layer) const {
    const int64_t features = p_.dirs * p_.R;
    return {between_ + layer % betweens() * steps_.N * features, steps_.B * features, features,
            true};
  }
  bool needs_input(int64_t layer) const { return layer > 0 || p_.d_input.data; }
  // Whether the output of the layer below is the matrix that is wanted where it was saved.
  bool reads_saved() const { return p_.dirs == 1 && type_ == sum_type_; }

  const A* saved_rows(int64_t plane, int64_t row) const {
    return static_cast<const A*>(p_.saved) + (plane * steps_.N + row) * slots_ * Hp_;
  }

  void run_direction(int64_t layer, int64_t d) {
    const int64_t plane = layer * p_.dirs + d;
    const Task task{layer, d, plane, p_.weights[plane], p_.input_size(layer)};
    if (d_h0_) fill(d_h0_, 0, steps_.B * p_.R * int64_t(sizeof(A)));
    if (d_c0_) fill(d_c0_, 0, steps_.B * p_.H * int64_t(sizeof(A)));
    for_chunks(d == 1, [&](const Chunk& chunk) {
      if (persistent_) all_steps(task, chunk);
      bool fused = false;
      for (int64_t i = 0; i < chunk.count && !persistent_; ++i) {
        const int64_t t = d == 0 ? chunk.first + chunk.count - 1 - i : chunk.first + i;
        const bool next_fused = i + 1 < chunk.count && fuses(t, d == 0 ? t - 1 : t + 1);
        step(task, chunk, t, fused, next_fused, chunk.is_last && i + 1 == chunk.count);
        fused = next_fused;
      }
      if (info_.norm_gates && (p_.d_weights || needs_input(layer)))
        check(cell_.normalise_backward(normed_rows(task, false, chunk, chunk.row, chunk.rows),
                                       device_.stream));
      if (p_.d_weights) weight_gradients(task, chunk);
      if (needs_input(layer)) input_gradient(task, chunk);
    });
    if (p_.d_h0) {
      FinishGradients<A> s{};
      s.incoming = incoming(task, d == 0 ? -1 : steps_.T);
      s.B = steps_.B;
      s.H = p_.H;
      s.R = p_.R;
      s.d_h0 = state_rows(p_.d_h0, plane, p_.R);
      s.d_c0 = state_rows(p_.d_c0, plane, p_.H);
      launch<finish_gradients<A>>(steps_.B, p_.H, s);
    }
    if (p_.d_weights) finish_weights(task);
  }

  // Whether the product behind step t is in the kernel of the next step of the chunk. All its rows
  // must be there: of a sequence that ends it leads to h0.
  bool fuses(int64_t t, int64_t next) const {
    return cell_.fused_backward && !p_.projected() && steps_.rows(next) <= fused_rows &&
           steps_.rows(t) <= steps_.rows(next);
  }

  // Bytes from one step's gradient of the output to the next.
  int64_t d_output_step(const Task& task) const {
    const bool last = task.layer + 1 == p_.layers;
    const Sequence& d = last ? p_.d_output : between(task.layer);
    return (d.packed ? steps_.B * d.stride_b : d.stride_t) * (last ? size_ : int64_t(sizeof(A)));
  }

  // What flows into step t; steps -1 and T are those behind the last one walked.
  Incoming<A> incoming(const Task& task, int64_t t) const {
    Incoming<A> in{};
    in.type = type_;
    const int64_t walked = task.d == 0 ? t + 1 : t - 1;  // the step walked before
    // Walking backwards in time more and more sequences are met, the other way all at once.
    if (task.d == 0)
      in.first = walked < steps_.T ? steps_.rows(walked) : 0;
    else
      in.first = walked < 0 ? 0 : steps_.rows(0);
    in.ended = walked >= 0 && walked < steps_.T ? begins(task.d, walked) : Begins{};
    in.d_h_n = state_rows(p_.d_h_n, task.plane, p_.R);
    in.d_c_n = state_rows(p_.d_c_n, task.plane, p_.H);
    if (t >= 0 && t < steps_.T) {
      const bool last = task.layer + 1 == p_.layers;
      in.d_output = last ? rows_of(p_.d_output, t) : rows_of(between(task.layer), t, sizeof(A));
      in.d_output_type = last ? type_ : sum_type_;
      const int64_t size = last ? size_ : int64_t(sizeof(A));
      if (in.d_output.data)
        in.d_output.data = static_cast<char*>(in.d_output.data) + task.d * p_.R * size;
      in.d_all_c = rows_of(p_.d_all_c, t);
      in.d_all_c.data = at(in.d_all_c.data, task.d * p_.H);
    }
    in.direct = direct_;
    in.product = product_;
    in.h_mask = h_mask(task.plane);
    in.dc = dc_;
    in.d_h0 = d_h0_;
    in.d_c0 = d_c0_;
    return in;
  }

  // The way back through the norms of h or x, of the rows from `row` on.
  NormedRowsBackward<A> normed_rows(const Task& task, bool of_h, const Chunk& chunk, int64_t row,
                                    int64_t rows) const {
    const int64_t gates = (row - chunk.row) * G_ * p_.H;
    const int64_t weights = (row - chunk.row) * info_.unit_weights() * p_.H;
    return {type_,
            rows,
            p_.H,
            saved_rows(task.plane, row) + raw_slot(of_h) * Hp_,
            slots_ * Hp_,
            Hp_,
            at(task.weights.diag, gain_of(of_h)),
            (of_h ? d_normed_h_ : d_normed_x_) + gates,
            at(of_h ? d_gates_h_ : d_gates_x_, gates),
            d_diag_ ? d_diag_ + weights + gain_of(of_h) : nullptr};
  }

  BackwardStep<A> step_at(const Task& task, const Chunk& chunk, int64_t t) const {
    const int64_t row = steps_.offset(t) - chunk.row, H = p_.H;
    BackwardStep<A> s{};
    s.type = type_;
    s.rows = steps_.rows(t);
    s.H = H;
    s.R = p_.R;
    s.saved = saved_rows(task.plane, steps_.offset(t));
    s.ld_saved = slots_ * Hp_;
    s.slot = Hp_;
    s.own_slot = p_.zoned() ? info_.states + info_.saved : 0;
    const int64_t before = task.d == 0 ? t - 1 : t + 1;
    if (before >= 0 && before < steps_.T) {
      s.before = saved_rows(task.plane, steps_.offset(before));
      s.before_rows = steps_.rows(before);
    }
    s.begins = begins(task.d, t);
    s.begins_initial = p_.reset_to_initial;
    s.initial = initial(task.plane);
    s.diag = task.weights.diag;
    s.zoneout = zoneout(task.plane, t);
    s.candidate_mask = candidate_mask(task.plane);
    s.incoming = incoming(task, t);
    s.d_own = d_own_;
    s.gates_type = type_;
    s.d_gates_x = at(d_gates_x_, row * G_ * H);
    s.d_gates_h = at(d_gates_h_, row * G_ * H);
    if (info_.norm_gates) {
      s.gates_type = sum_type_;
      s.d_gates_x = d_normed_x_ + row * G_ * H;
      s.d_gates_h = d_normed_h_ + row * G_ * H;
      s.normed_h = normed_rows(task, true, chunk, steps_.offset(t), s.rows);
    }
    s.d_operand = d_operand_;
    s.d_diag = d_diag_ ? d_diag_ + row * info_.unit_weights() * H : nullptr;
    s.h_before = at(h_before_, row * p_.R);
    s.operand = at(operand_, row * H);
    return s;
  }

  void step(const Task& task, const Chunk& chunk, int64_t t, bool fused, bool next_fused,
            bool is_last) const {
    BackwardStep<A> s = step_at(task, chunk, t);
    if (fused) {
      const int64_t walked = steps_.offset(task.d == 0 ? t + 1 : t - 1) - chunk.row;
      s.incoming.product = nullptr;
      s.weight_hh = task.weights.hh;
      s.d_walked = at(d_gates_h_, walked * G_ * p_.H);
    }
    const Weights& w = task.weights;
    const int64_t row = steps_.offset(t) - chunk.row, H = p_.H, R = p_.R;
    if (p_.projected()) {
      UnprojectStep<A> u{};
      u.incoming = s.incoming;
      u.zoneout = s.zoneout;
      u.rows = s.rows;
      u.H = H;
      u.R = R;
      u.d_h = at(d_h_, row * R);
      u.saved = s.saved + (info_.states + info_.saved) * Hp_;
      u.ld_saved = s.ld_saved;
      u.own = at(own_, row * H);
      launch<unproject_step<A>>(s.rows, H, u);
      multiply(matrix(u.d_h, s.rows, R), matrix(w.hr, R, H), accumulated(d_own_, s.rows, H));
    }
    check((fused ? cell_.fused_backward : cell_.backward)(s, device_.stream));
    char* const d_gates_h = at(d_gates_h_, row * G_ * H);
    if (info_.two_products()) {
      Matrix gates = matrix(at(d_gates_h, first_gates_ * H), s.rows, (G_ - first_gates_) * H);
      gates.ld = G_ * H;
      multiply(gates, matrix(at(w.hh, first_gates_ * H * R), gates.cols, R),
               accumulated(d_operand_, s.rows, R));
      check(cell_.operand_backward(s, device_.stream));
    }
    if (!next_fused) product_behind(task, d_gates_h, s.rows, is_last);
  }

  // What the gates of a step add to the gradient of the h before it.
  void product_behind(const Task& task, void* d_gates_h, int64_t rows, bool is_last) const {
    // Behind the last step lies h0, whose gradient may not be wanted.
    if (!info_.recurrent || (is_last && !p_.d_h0)) return;
    Matrix gates = matrix(d_gates_h, rows, first_gates_ * p_.H);
    gates.ld = G_ * p_.H;
    multiply(gates, matrix(task.weights.hh, gates.cols, p_.R), accumulated(product_, rows, p_.R));
  }

  // The steps of a chunk in one launch, and the product behind the last.
  void all_steps(const Task& task, const Chunk& chunk) const {
    const int64_t last = chunk.first + chunk.count - 1, backwards = task.d == 0 ? -1 : 1;
    const int64_t B = steps_.B, H = p_.H;
    BackwardSteps<A> s{};
    s.first = step_at(task, chunk, task.d == 0 ? last : chunk.first);
    s.first.weight_hh = task.weights.hh;
    s.count = chunk.count;
    s.ends = chunk.is_last;
    s.saved = backwards * B * slots_ * Hp_;
    s.gates = backwards * B * G_ * H;
    s.h_before = backwards * B * H;
    s.d_output = backwards * d_output_step(task);
    s.shares = plan_;
    fill(d_gates_h_, 0xff, chunk.rows * G_ * H * size_);
    check(cell_.persistent_backward(s, device_.stream));
    const int64_t end = task.d == 0 ? 0 : chunk.rows - B;
    product_behind(task, at(d_gates_h_, end * G_ * H), B, chunk.is_last);
  }

  // gradient (+)= left^T right, of all rows of a chunk. `sum` holds it between the chunks.
  void weight_gradient(const Chunk& chunk, const Matrix& left, const Matrix& right, void* gradient,
                       A* sum) const {
    const int64_t M = left.cols, N = right.cols;
    if (chunk.is_first) {
      multiply(left.t(), right, chunk.is_last ? matrix(gradient, M, N) : accumulated(sum, M, N));
      return;
    }
    multiply(left.t(), right, accumulated(more_, M, N));
    launch<add_up<A>>(1, M * N, type_, M * N, sum, static_cast<const A*>(more_),
                      chunk.is_last ? gradient : nullptr);
  }

  void weight_gradients(const Task& task, const Chunk& chunk) const {
    const WeightGrads& grads = p_.d_weights[task.plane];
    const int64_t H = p_.H, R = p_.R, rows = chunk.rows;
    weight_gradient(chunk, matrix(d_gates_x_, rows, G_ * H), input(task, chunk), grads.ih, d_ih_);
    if (info_.recurrent) {
      Matrix first = matrix(d_gates_h_, rows, first_gates_ * H);
      first.ld = G_ * H;
      weight_gradient(chunk, first, matrix(h_before_, rows, R), grads.hh, d_hh_);
    }
    if (info_.two_products()) {
      Matrix second = matrix(at(d_gates_h_, first_gates_ * H), rows, (G_ - first_gates_) * H);
      second.ld = G_ * H;
      const int64_t skip = first_gates_ * H * R;
      weight_gradient(chunk, second, matrix(operand_, rows, R), at(grads.hh, skip),
                      d_hh_ ? d_hh_ + skip : nullptr);
    }
    if (p_.projected())
      weight_gradient(chunk, matrix(d_h_, rows, R), matrix(own_, rows, H), grads.hr, d_hr_);
    const auto bias = [&](const char* d_gates, const A* d_normed, A* sum) {
      if (info_.norm_gates)
        column_sums(chunk, sum_type_, d_normed, G_ * H, sum);
      else
        column_sums(chunk, type_, d_gates, G_ * H, sum);
    };
    if (grads.bias_ih) {
      bias(d_gates_x_, d_normed_x_, d_bias_ih_);
      if (!info_.sums_gates) bias(d_gates_h_, d_normed_h_, d_bias_hh_);
    }
    if (grads.diag) column_sums(chunk, sum_type_, d_diag_, info_.unit_weights() * H, d_diag_sum_);
  }

  // out (+)= the sum of the rows of a chunk, slab by slab, and the slabs in the same way.
  void column_sums(const Chunk& chunk, DType type, const void* in, int64_t columns, A* out) const {
    int64_t rows = chunk.rows;
    for (int turn = 0;; turn = 1 - turn) {
      const int64_t slabs = slabs_of(rows);
      A* to = slabs == 1 ? out : slab_sums_[turn];
      launch<sum_rows<A>>(slabs, columns, type, in, rows, columns, slabs == 1 && !chunk.is_first,
                          to);
      if (slabs == 1) return;
      in = to;
      type = sum_type_;
      rows = slabs;
    }
  }

  void finish_weights(const Task& task) const {
    const WeightGrads& grads = p_.d_weights[task.plane];
    const auto round = [&](A* sum, int64_t count, void* gradient) {
      if (gradient)
        launch<add_up<A>>(1, count, type_, count, sum, static_cast<const A*>(nullptr), gradient);
    };
    round(d_bias_ih_, G_ * p_.H, grads.bias_ih);
    round(d_bias_hh_, G_ * p_.H, grads.bias_hh);
    round(d_diag_sum_, info_.unit_weights() * p_.H, grads.diag);
  }

  // What the layer was given, [chunk rows, I].
  Matrix input(const Task& task, const Chunk& chunk) const {
    if (task.layer == 0) return input_rows(p_.input, task.I, chunk, x_);
    const int64_t below = (task.layer - 1) * p_.dirs, ld = slots_ * Hp_;
    const A* saved = saved_rows(below, chunk.row);
    if (reads_saved()) return {const_cast<A*>(saved), type_, chunk.rows, task.I, ld};
    launch<gather_saved<A>>(chunk.rows, task.I, type_, chunk.rows, p_.dirs, p_.R, saved, ld,
                            steps_.N * ld, static_cast<void*>(x_));
    return matrix(x_, chunk.rows, task.I);
  }

  void input_gradient(const Task& task, const Chunk& chunk) const {
    const int64_t I = task.I;
    const Matrix gates = matrix(d_gates_x_, chunk.rows, G_ * p_.H);
    const Matrix w = matrix(task.weights.ih, G_ * p_.H, I);
    const bool is_second = task.d == 1, is_inner = task.layer > 0;
    // The sum of both directions, rounded once.
    A* sum = is_inner ? static_cast<A*>(between(task.layer - 1).data) : d_input_;
    sum = sum ? sum + chunk.row * I : nullptr;
    if (sum && !is_second) return multiply(gates, w, accumulated(sum, chunk.rows, I));
    Matrix d_input;
    if (!sum && is_matrix(p_.d_input, I, chunk, &d_input)) return multiply(gates, w, d_input);
    multiply(gates, w, accumulated(d_x_, chunk.rows, I));
    const Sequence to = is_inner ? between(task.layer - 1) : p_.d_input;
    launch<scatter_rows<A>>(chunk.rows, I, is_inner ? sum_type_ : type_, chunk.row, chunk.rows, I,
                            static_cast<const A*>(d_x_), static_cast<const A*>(sum), map_of(to));
  }

  const CellLaunches<A>& cell_;
  A* direct_;        // [B, R]: gradient of h between two steps but for the part through W_hh
  A* product_;       // [B, R]: that part
  A* dc_;            // [B, H]
  A* d_h0_;          // [B, R]: gradients of initial states that ended at resets
  A* d_c0_;          // [B, H]
  A* d_own_;         // [B, H]: gradient of what a projection was applied to
  A* d_operand_;     // [B, H]; of a norm [B, 3, H]
  char* d_gates_x_;  // S [chunk rows, G*H]: gradient of W_ih x
  char* d_gates_h_;  // S [chunk rows, G*H]: of W_hh h
  A* d_normed_x_;    // [chunk rows, G*H]: of W_ih x after its norm; those of the biases are sums
  A* d_normed_h_;    // of it, and without a norm of the two above
  char* d_h_;        // S [chunk rows, R]: of a projected h
  A* d_diag_;        // [chunk rows, unit weights * H]
  char* h_before_;   // S [chunk rows, R]: right operands of the weights' gradients
  char* operand_;    // S [chunk rows, H]
  char* own_;        // S [chunk rows, H]
  char* x_;          // S [chunk rows, I]
  A* slab_sums_[2];  // [slabs, columns], read and written in turn
  A* d_bias_ih_;     // [G*H]
  A* d_bias_hh_;
  A* d_diag_sum_;  // [unit weights * H]
  A* d_ih_;        // weight gradients of several chunks, before they are rounded to S
  A* d_hh_;
  A* d_hr_;
  A* more_;     // what a chunk adds to one of them
  A* d_x_;      // [chunk rows, I]
  A* d_input_;  // [N, I]: gradient of the input by the first direction
  A* between_;  // [betweens, N, D*R]: gradient of a layer's output
};

template <class Scan>
void run_scan(Scan&& scan, const Device& device) {
  Arena measure(nullptr);
  scan.lay_out(measure);
  Arena arena(device.allocate(device.host, measure.used()));
  scan.lay_out(arena);
  scan.run();
}

template <class A>
const CellLaunches<A>& launches(const char* cell) {
  const CellLaunches<A>* found = find_launches<A>(cell);
  if (!found)
    throw std::runtime_error(std::string("fused_rnn: cell '") + cell + "' has no kernels for CUDA");
  return *found;
}

}  // namespace

void stepwise_forward(const char* cell, DType type, const ForwardProblem& problem,
                      const Device& device) {
  if (type == DType::kFloat64)
    run_scan(ForwardScan<double>(launches<double>(cell), type, problem, device), device);
  else
    run_scan(ForwardScan<float>(launches<float>(cell), type, problem, device), device);
}

void stepwise_backward(const char* cell, DType type, const BackwardProblem& problem,
                       const Device& device) {
  if (type == DType::kFloat64)
    run_scan(BackwardScan<double>(launches<double>(cell), type, problem, device), device);
  else
    run_scan(BackwardScan<float>(launches<float>(cell), type, problem, device), device);
}

void copy_or_clear(const void* from, void* to, size_t bytes, const Device& device) {
  check(from ? dev::copy_bytes(to, from, bytes, device.stream)
             : dev::fill_bytes(to, 0, bytes, device.stream));
}

}  // namespace fused_rnn::cuda
