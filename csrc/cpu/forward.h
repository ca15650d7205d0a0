// The forward scan of a stack: per layer and direction, the input product of a chunk of steps, then
// step by step the recurrent product with the cell applied to each block of it while that is in L1.
#pragma once

#include "packed.h"
#include "zoneout.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

// One step of one member's rows: what the cell reads and writes, and what becomes of its states.
// Pointers stand at the first row and at unit 0.
template <class S>
struct StepOfRows : ForwardStep<Accumulate<S>> {
  using A = Accumulate<S>;
  using O = Operand<S>;  // what is the left operand of a product
  const O* h;            // before the step, [rows, ld_h]
  O* h_next;             // after it, as the output holds it
  int64_t ld_h;
  const A* h_mask;  // [rows, ld_h] what h is multiplied by for W_hh, into `masked`; or null
  O* masked;
  A* c;               // [rows, ld]
  O* unprojected;     // the cell's h, where a projection follows, else null
  O* second_operand;  // `operand` for its product
  S* y;               // the output
  int64_t ldy;
  const int64_t* y_order;  // of rows in y, null where they follow one another
  const int64_t* order;    // of rows in the caller's tensors, likewise
  int64_t valid;           // units of y
  S* all_c;                // c for the caller, null when not wanted
  int64_t ld_all_c, valid_c;
  bool zoned;
  A zoneout[2];                 // the share of h and c that stays
  const uint8_t* zoneout_mask;  // or which units of them, of a row those of h and then those of c;
                                // null where there is none
  int64_t ld_zoneout, zoneout_state;

  int64_t place(int64_t row) const { return order ? order[row] : row; }
  S* y_row(int64_t row) const { return y + (y_order ? y_order[row] : row) * ldy; }
};

// What state `s` becomes by zoneout, for a row and the units from u on; n are valid.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> zone_out(const StepOfRows<S>& at, int s, int64_t row,
                                                int64_t u, int64_t n, Vector<Accumulate<S>> before,
                                                Vector<Accumulate<S>> after) {
  if (!at.zoneout_mask) return after + at.zoneout[s] * (before - after);
  const uint8_t* mask = at.zoneout_mask + at.place(row) * at.ld_zoneout + s * at.zoneout_state + u;
  return math::select(load_mask<Accumulate<S>>(mask, n) != 0, before, after);
}

// h of a row and of the units from u on goes to the output, and on to the next step: as the output
// holds it, and times its mask for the product.
template <class S>
FUSED_RNN_INLINE Vector<Accumulate<S>> emit_h(const StepOfRows<S>& at, int64_t row, int64_t u,
                                              Vector<Accumulate<S>> h) {
  if (at.zoned) h = zone_out(at, 0, row, u, at.valid - u, load(at.h + row * at.ld_h + u), h);
  h = round_to<S>(h);
  store(at.h_next + row * at.ld_h + u, h);
  if (at.h_mask) store(at.masked + row * at.ld_h + u, h * load(at.h_mask + row * at.ld_h + u));
  store_partial(at.y_row(row) + u, h, at.valid - u);
  if (at.saved) store(at.saved + row * at.ld_saved + u, h);
  return h;
}

template <class S>
class ForwardScan : Scan<ForwardProblem> {
  using A = Accumulate<S>;
  using O = Operand<S>;
  using W = Packed<S>;
  // Whether products read what the cell has written.
  static constexpr bool kSame = std::is_same_v<O, A>;
  static constexpr int L = kLanes<A>;
  static constexpr int kPanelWidth = kMaxVectors * L;
  // Bytes of L1 for products that the cell is applied to.
  static constexpr int64_t kProducts = 16384;
  static_assert(kAcrossRows * kAcrossPanels * kPanelWidth * int64_t(sizeof(A)) <= kProducts);
  alignas(64) static constexpr A kZeros[kAcrossPanels * kPanelWidth] = {};  // a bias

 public:
  ForwardScan(const CellRows<A>& cell, const ForwardProblem& problem, const Plan& plan)
      : Scan(cell.info, problem, plan), cell_(cell), G_(cell.info.gates) {
    // Backward and norms work on whole rows.
    const int64_t panel = widest_panel<A>(info_);
    if (!p_.saved && !info_.norm_gates) units_ = (p_.H + panel - 1) / panel * panel;
    if (units_ > Hp_) units_ = Hp_;
  }

  void lay_out(Arena& arena) {
    lay_out_teams(arena);
    const int64_t chunk_rows = part_rows_ * plan_.chunk_steps;
    directions_ = arena.take<Direction>(slots_of_work());
    for (int64_t slot = 0; slot < slots_of_work(); ++slot) {
      Direction measured;
      Direction& dir = directions_ ? directions_[slot] : measured;
      const WeightSizes largest{widest_, p_.H, p_.R, p_.projected()};
      if (!p_.frozen())
        dir.packed.lay_out(arena, info_, largest, plan_.pack_ih == Pack::kWeights,
                           plan_.pack_hh == Pack::kWeights);
      dir.h[0] = arena.take<O>(steps_.B * Rp_);
      dir.h[1] = arena.take<O>(steps_.B * Rp_);
      dir.c = arena.take<A>(has_c() ? steps_.B * Hp_ : 0);
      dir.own_h = arena.take<A>(p_.projected() || !kSame ? steps_.B * Hp_ : 0);
      dir.own_c = arena.take<A>(has_c() && p_.zoned() ? steps_.B * Hp_ : 0);
      dir.unprojected = arena.take<O>(p_.projected() && !kSame ? steps_.B * Hp_ : 0);
      dir.operand = arena.take<A>(info_.two_products() ? steps_.B * Hp_ : 0);
      dir.second_operand = arena.take<O>(info_.two_products() && !kSame ? steps_.B * Hp_ : 0);
      dir.normed = arena.take<A>(info_.normed_operand ? steps_.B * 2 * Hp_ : 0);
      const int64_t gates_h = steps_.B * G_ * Hp_;
      dir.gates_h = arena.take<A>(info_.norm_gates || packs_rows(plan_.pack_hh) ? gates_h : 0);
      dir.normed_h = by_units() && info_.norm_gates ? arena.take<A>(gates_h) : dir.gates_h;
      dir.h_mask = arena.take<A>(p_.h_mask ? steps_.B * Rp_ : 0);
      dir.candidate_mask = arena.take<A>(p_.candidate_mask ? steps_.B * Hp_ : 0);
      for (O*& masked : dir.masked) masked = arena.take<O>(p_.h_mask ? steps_.B * Rp_ : 0);
      // Members of a unit split share the rows, and each writes its own gates of them.
      const int64_t members = team(by_layers() ? 0 : slot).size();
      gates_stride_ = by_units() ? 0 : chunk_rows * G_ * Hp_;
      dir.gates_x = arena.take<A>((gates_stride_ ? members : 1) * chunk_rows * G_ * Hp_);
      dir.staged = arena.take<O>(members * chunk_rows * widest_);
      // A vector of rows more than there are.
      const int64_t ih = packs_rows(plan_.pack_ih) ? (chunk_rows + L) * widest_ : 0;
      const int64_t hh = packs_rows(plan_.pack_hh) ? (part_rows_ + L) * p_.R : 0;
      left_stride_ = ih > hh ? ih : hh;
      dir.packed_left = arena.take<O>(members * left_stride_);
      dir.chunk_offsets = arena.take<int64_t>(members * (plan_.chunk_steps + 1));
      dir.steps = arena.take<StepOfRows<S>>(members);
    }
    between_ = arena.take<S>(betweens() * steps_.N * p_.dirs * p_.R);
  }

  void run(int begin, int end) {
    if (by_layers())
      return for_my_layers(begin, end, 0, 1,
                           [&](int64_t layer, Crew& crew) { run_direction(layer, crew); });
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      for_my_crews(begin, end, [&](Crew& crew) { run_direction(layer, crew); });
      // The next layer reads both directions' output, and packs into the memory that this one uses.
      if (layer + 1 < p_.layers) wait_for_everyone(begin, end);
    }
  }

 private:
  struct Direction {
    PackedWeights<S> packed;  // of the layer at work; unused where weights are frozen
    O* h[2];                  // [B, Rp]: read at one step, written at the next
    A* c;                     // [B, Hp]
    A* own_h;                 // [B, Hp]: the cell's, where that is not what products read
    A* own_c;                 // [B, Hp]: the cell's, where zoneout makes another of it
    O* unprojected;           // [B, Hp]: own_h for a product, where it must be another
    A* operand;               // [B, Hp], of the second product
    O* second_operand;        // the same for the product, where it must be another
    A* normed;                // [B, 2, Hp]: the operand of a norm, normalised and not
    A* gates_h;               // [B, G*Hp] in panel order, where all are made before the cell
    A* normed_h;              // the same after that: elsewhere, where others still read them
    A* h_mask;                // [B, Rp]
    A* candidate_mask;        // [B, Hp]
    O* masked[2];             // [B, Rp]: h times its mask
    A* gates_x;               // [members, chunk rows, G*Hp] in panel order
    O* packed_left;           // [members, left_stride_]: of one product, for dot_left
    O* staged;                // [members, chunk rows, I]
    StepOfRows<S>* steps;     // [members]
    int64_t* chunk_offsets;  // [members, chunk_steps + 1]: a member's rows of the chunk before each
                             // of its steps
  };

  // What one direction of one layer works on.
  struct Task {
    int64_t layer;
    int64_t d;
    Direction* dir;
    Weights weights;
    PackedWeights<S> packed;
    int64_t I;
    Sequence input;
    Sequence output;
  };

  Sequence between(int64_t layer) const {
    const int64_t features = p_.dirs * p_.R;
    return {between_ + layer % betweens() * steps_.N * features, steps_.B * features, features,
            steps_.offsets != nullptr};
  }

  PackedWeights<S> packed_weights(int64_t layer, int64_t d) const {
    if (!p_.frozen()) return directions_[slot_of_work(layer, d)].packed;
    // Only read, but an Arena hands out what may be written.
    return weights_in<S>(const_cast<void*>(p_.weights[layer * p_.dirs + d].packed), info_,
                         p_.weight_sizes(layer));
  }

  void run_direction(int64_t layer, Crew& crew) {
    const int64_t d = crew.d;
    const Task task{layer,
                    d,
                    &directions_[slot_of_work(layer, d)],
                    p_.weights[layer * p_.dirs + d],
                    packed_weights(layer, d),
                    p_.input_size(layer),
                    layer == 0 ? p_.input : between(layer - 1),
                    layer + 1 == p_.layers ? p_.output : between(layer)};
    if (!p_.frozen()) each_member(crew, [&](const Member& member) { prepare(task, member); });
    for (int block = 0; block < plan_.blocks; ++block) {
      crew.block = block;
      run_block(task, crew);
    }
  }

  void run_block(const Task& task, Crew& crew) {
    each_member(crew, [&](const Member& member) { start(task, member); });
    // Members of a row split share the packed weights. Members of a unit split pack their own, but
    // read all of h.
    if (crew.block == 0 || by_units()) wait_for_team(crew);
    for (int64_t done = 0; done < steps_.T && crew.members.size(); done += plan_.chunk_steps) {
      const int64_t count =
          plan_.chunk_steps < steps_.T - done ? plan_.chunk_steps : steps_.T - done;
      const int64_t first = task.d == 0 ? done : steps_.T - done - count;
      follow(task.layer - 1, crew.block, done);
      each_member(crew, [&](const Member& member) { input_product(task, member, first, count); });
      if (info_.norm_gates) {
        if (by_units()) wait_for_team(crew);
        each_member(crew,
                    [&](const Member& member) { normalise_input(task, member, first, count); });
        if (by_units()) wait_for_team(crew);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = task.d == 0 ? first + i : first + count - 1 - i;
        each_stage(crew, [&](Range stages) {
          each_member(crew, [&](const Member& member) {
            step(task, member, t, t - first, (done + i) % 2, stages);
          });
        });
      }
      lead(task.layer);
    }
    each_member(crew, [&](const Member& member) { finish(task, member); });
  }

  void prepare(const Task& task, const Member& member) {
    int64_t turn = 0;
    const auto mine = [&] { return by_units() || turn++ % member.size == member.index; };
    task.packed.pack(info_, p_.weight_sizes(task.layer), task.weights, member.units, mine);
  }

  // The states before the first step. Both buffers of h start from h0: in a ragged batch the
  // reverse direction meets new sequences at any step.
  void start(const Task& task, const Member& member) {
    task.dir->steps[member.index] = rows_of_block(task, member);
    const Range rows = rows_to_start(member);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const bool from_zero =
          task.d == 0 && !p_.reset_to_initial && b < steps_.rows(0) && begins(0, 0, b);
      const int64_t state = (task.layer * p_.dirs + task.d) * steps_.B + steps_.place(b);
      if (task.dir->h_mask)
        copy_row(static_cast<const S*>(p_.h_mask) + state * p_.R, p_.R, Rp_,
                 task.dir->h_mask + b * Rp_);
      if (task.dir->candidate_mask)
        copy_row(static_cast<const S*>(p_.candidate_mask) + state * p_.H, p_.H, Hp_,
                 task.dir->candidate_mask + b * Hp_);
      for (int parity = 0; parity < 2; ++parity)
        begin_sequence(task, {0, Hp_}, b, parity, from_zero);
    }
  }

  // The states of sequence b become its initial ones, or zeros, in some units.
  void begin_sequence(const Task& task, Range units, int64_t b, int64_t parity, bool from_zero) {
    const Direction& dir = *task.dir;
    const int64_t state = (task.layer * p_.dirs + task.d) * steps_.B + steps_.place(b);
    const auto copy = [&](const void* tensor, Range range, int64_t n, auto* to) {
      const S* from = tensor && !from_zero ? static_cast<const S*>(tensor) + state * n : nullptr;
      for (int64_t u = range.begin; u < range.end; u += L)
        store(to + u, from ? load_partial(from + u, n - u) : Vector<A>{});
    };
    const Range h_units = units_of_h(units);
    O* h = dir.h[parity] + b * Rp_;
    copy(p_.h0, h_units, p_.R, h);
    if (!kSame && !p_.projected()) copy(p_.h0, h_units, p_.R, dir.own_h + b * Hp_);
    for (int64_t u = h_units.begin; dir.h_mask && u < h_units.end; u += L)
      store(dir.masked[parity] + b * Rp_ + u, load(h + u) * load(dir.h_mask + b * Rp_ + u));
    if (has_c()) copy(p_.c0, units, p_.H, dir.c + b * Hp_);
  }

  // After a step: whose sequence begins anew with the next one, t.
  void reset(const Task& task, const Member& member, int64_t t, int64_t parity) {
    if (!p_.reset.data || t < 0 || t >= steps_.T) return;
    for (int64_t b = member.rows.begin; b < member.rows.begin + alive(member, t); ++b)
      if (begins(task.d, t, b)) begin_sequence(task, member.units, b, parity, !p_.reset_to_initial);
  }

  A* gates_x(const Task& task, const Member& member) const {
    return task.dir->gates_x + member.index * gates_stride_;
  }

  // gates_x[row, :] = W_ih x[row] + b_ih for this member's rows of steps [first, first + count).
  void input_product(const Task& task, const Member& member, int64_t first, int64_t count) {
    const Direction& dir = *task.dir;
    int64_t* offsets = dir.chunk_offsets + member.index * (plan_.chunk_steps + 1);
    offsets[0] = 0;
    for (int64_t i = 0; i < count; ++i) offsets[i + 1] = offsets[i] + alive(member, first + i);
    const int64_t rows = offsets[count];
    if (rows == 0) return;

    const O* x = nullptr;
    int64_t ldx = 0;
    if constexpr (std::is_same_v<S, O>) {
      const Sequence& in = task.input;
      const bool gapless = in.packed || (!steps_.offsets && in.stride_t == steps_.B * in.stride_b);
      const bool one_step = count == 1 && (in.packed || !steps_.order);
      const bool one_row = member.rows.size() == 1 && !in.packed;
      if (one_step || one_row || (gapless && member.rows.size() == steps_.B)) {
        x = row_of<S>(in, steps_, first, member.rows.begin);
        ldx = one_row && !one_step ? in.stride_t : in.stride_b;
      }
    }
    if (!x) {
      O* staged = dir.staged + member.index * part_rows_ * plan_.chunk_steps * widest_;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t m = 0; m < offsets[i + 1] - offsets[i]; ++m)
          stage(row_of<S>(task.input, steps_, first + i, member.rows.begin + m), task.I,
                staged + (offsets[i] + m) * task.I);
      x = staged;
      ldx = task.I;
    }

    A* gates = gates_x(task, member);
    if (packs_rows(plan_.pack_ih))
      return product_of_rows(task, member, rows, task.I, x, ldx, task.weights.ih,
                             task.packed.bias_ih, gates);
    for_panels_at_once<W>(
        task.packed.ih ? rows : 0, task.I, G_, member.units.begin, member.units.end,
        [&](int64_t unit, int vectors, int panels, int64_t next) {
          const A* bias = info_.norm_gates ? kZeros : task.packed.bias_ih + unit * G_;
          const bool fetches = p_.saved && info_.norm_gates;
          // A tile over several panels takes all rows, and weights as they are should be read once.
          const bool all = panels > 1 || !task.packed.ih || !fetches;
          const int64_t highest = all ? rows : max_rows(G_ * vectors);
          int64_t i = 0;
          for_heights(rows, highest, [&](int64_t m, int64_t n) {
            for (int64_t row = m; fetches && row < m + n; ++row) {
              while (row >= offsets[i + 1]) ++i;
              const int64_t b = member.rows.begin + row - offsets[i];
              fetch(saved_row(task, first + i, b, slots_ - 2 * G_) + unit, G_,
                    panels * vectors * L);
            }
            product(G_, m, n, task.I, x + m * ldx, ldx, static_cast<const S*>(task.weights.ih),
                    p_.H, task.packed.ih, unit, next, vectors, panels, bias,
                    gates + m * G_ * Hp_ + unit * G_, G_ * Hp_);
          });
        });
  }

  // The rows of a chunk, of a unit split a share of them: the products of all units are there.
  void normalise_input(const Task& task, const Member& member, int64_t first, int64_t count) const {
    const Direction& dir = *task.dir;
    const int64_t* offsets = dir.chunk_offsets + member.index * (plan_.chunk_steps + 1);
    const Range rows = by_units() ? part_of(offsets[count], 1, member.index, member.size)
                                  : Range{0, offsets[count]};
    int64_t i = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      while (row >= offsets[i + 1]) ++i;
      A* gates = gates_x(task, member) + row * G_ * Hp_;
      normalise_gates(
          {0, Hp_}, gates, task.packed.gain_ih, task.packed.bias_ih,
          saved_row(task, first + i, member.rows.begin + row - offsets[i], slots_ - 2 * G_), gates);
    }
  }

  // From a row of products, in panel order, to the pre-activations of some units. Keeps what the
  // row was in `raw`.
  void normalise_gates(Range units, const A* row, const A* gain, const A* shift, A* raw,
                       A* normed) const {
    if (raw)
      for_panels<A>(G_, units.begin, units.end, [&](int64_t unit, int vectors) {
        for (int g = 0; g < G_; ++g)
          for (int v = 0; v < vectors; ++v)
            store(raw + g * Hp_ + unit + v * L, load(row + unit * G_ + (g * vectors + v) * L));
      });
    each_norm([&](int first, int count) {
      with_count(count, [&](auto n) {
        normalise(GatesInPanels<A, n>{first, p_.H, Hp_, G_}, units, row, gain, shift, normed);
      });
    });
  }

  // Null in inference.
  A* saved_row(const Task& task, int64_t t, int64_t b, int64_t slot) const {
    const int64_t row = (task.layer * p_.dirs + task.d) * steps_.N + steps_.offset(t) + b;
    return p_.saved ? static_cast<A*>(p_.saved) + (row * slots_ + slot) * Hp_ : nullptr;
  }

  static void stage(const S* src, int64_t n, O* dst) {
    for (int64_t i = 0; i < n; i += L) store_partial(dst + i, load_partial(src + i, n - i), n - i);
  }

  // out[m, panel] = x[m, :] W^T + bias for a panel of units, or more packed ones. These are the
  // rows from `first` on of those that meet the panel, before that of units `next`.
  void product(int gates, int64_t first, int64_t rows, int64_t K, const O* x, int64_t ldx,
               const S* w, int64_t units, const W* packed, int64_t unit, int64_t next, int vectors,
               int panels, const A* bias, A* out, int64_t ldo) const {
    if (!packed) return dot<S>(rows, K, x, ldx, w, gates, units, unit, vectors, bias, out, ldo);
    const W* panel = packed + unit * gates * packed_rows<W>(K);
    packed_product<O, W>(first, rows, K, x, ldx, panel, fetched(packed, gates, K, unit, next),
                         gates * vectors, panels, bias, 0, out, ldo);
  }

  static constexpr bool kPacksRows = std::is_same_v<S, A>;
  static bool packs_rows(Pack pack) { return kPacksRows && pack == Pack::kRows; }

  // The same for all units of a member, with the rows of x packed: out[m, panels].
  void product_of_rows(const Task& task, const Member& member, int64_t rows, int64_t K, const O* x,
                       int64_t ldx, const void* w, const A* bias, A* out) const {
    if constexpr (kPacksRows) {
      A* packed = task.dir->packed_left + member.index * left_stride_;
      pack_left(rows, K, x, ldx, packed);
      dot_left(rows, K, packed, static_cast<const A*>(w), G_, p_.H, member.units.begin,
               member.units.end, info_.norm_gates ? nullptr : bias, out, G_ * Hp_);
    }
  }

  // Where a member's rows stand, but for what moves from step to step.
  StepOfRows<S> rows_of_block(const Task& task, const Member& member) const {
    const Direction& dir = *task.dir;
    const int64_t first = member.rows.begin;
    const auto row_of_state = [&](auto* state, int64_t size) {
      return state ? state + first * size : nullptr;
    };
    StepOfRows<S> at{};
    at.ldx = G_ * Hp_;
    at.w = task.packed.diag;
    at.w_stride = Hp_;
    at.ld = Hp_;
    at.c_before = at.c = row_of_state(dir.c, Hp_);
    at.c_after = row_of_state(p_.zoned() ? dir.own_c : dir.c, Hp_);
    at.operand = row_of_state(dir.operand, Hp_);
    at.candidate_mask = row_of_state(dir.candidate_mask, Hp_);
    at.normed = row_of_state(dir.normed, 2 * Hp_);
    at.ld_normed = 2 * Hp_;
    at.ld_saved = slots_ * Hp_;
    at.slot = Hp_;
    // Those of the cell are kept behind all others, where they do not last.
    const int behind = info_.states + info_.saved;
    at.own[0] = p_.zoned() || p_.projected() ? behind : 0;
    at.own[1] = p_.zoned() ? behind + 1 : 1;
    at.ld_h = Rp_;
    at.h_mask = row_of_state(dir.h_mask, Rp_);
    if (info_.two_products()) at.operand_mask = at.h_mask;
    at.valid = p_.R;
    at.ldy = task.output.stride_b;
    at.order = steps_.order ? steps_.order + first : nullptr;
    at.y_order = task.output.packed ? nullptr : at.order;
    at.ld_all_c = p_.all_c.stride_b;
    at.valid_c = p_.H;
    at.zoned = p_.zoned();
    for (int s = 0; s < 2; ++s) at.zoneout[s] = A(p_.zoneout[s]);
    at.ld_zoneout = p_.zoneout_mask.stride_b;
    at.zoneout_state = p_.R;
    if constexpr (kSame) {
      at.unprojected = row_of_state(dir.own_h, Hp_);
      at.second_operand = at.operand;
    } else {
      at.unprojected = row_of_state(dir.unprojected, Hp_);
      at.second_operand = row_of_state(dir.second_operand, Hp_);
    }
    at.before = at.after = row_of_state(dir.own_h, Hp_);  // unless a step has others
    return at;
  }

  // To unit 0 of its first sequence at step t.
  const StepOfRows<S>& rows_of_step(const Task& task, const Member& member, int64_t t,
                                    int64_t index_in_chunk, int64_t parity) const {
    const Direction& dir = *task.dir;
    StepOfRows<S>& at = dir.steps[member.index];
    const int64_t first = member.rows.begin;
    const int64_t plane = task.layer * p_.dirs + task.d;
    const int64_t offset =
        dir.chunk_offsets[member.index * (plan_.chunk_steps + 1) + index_in_chunk];
    // Where there is an order, it counts from the first row of the tensor.
    const auto row_of_tensor = [&](const Sequence& tensor) {
      return tensor.packed || !steps_.order ? tensor.at(steps_, t, first) : t * tensor.stride_t;
    };
    at.x = gates_x(task, member) + offset * G_ * Hp_;
    at.h = dir.h[parity] + first * Rp_;
    at.h_next = dir.h[1 - parity] + first * Rp_;
    if constexpr (kSame)
      if (!p_.projected()) at.before = at.h, at.after = at.h_next;
    if (dir.h_mask) at.masked = dir.masked[1 - parity] + first * Rp_;
    at.y = static_cast<S*>(task.output.data) + row_of_tensor(task.output) + task.d * p_.R;
    // The output is far, and written best one by one between the cells' calculations.
    if constexpr (std::is_same_v<S, A>)
      if (!at.zoned && !at.h_mask && !at.unprojected && !at.y_order)
        at.also = at.y, at.ld_also = at.ldy;
    if (p_.all_c.data)
      at.all_c = static_cast<S*>(p_.all_c.data) + row_of_tensor(p_.all_c) + task.d * p_.H;
    if (p_.zoneout_mask.data)
      at.zoneout_mask = static_cast<const uint8_t*>(p_.zoneout_mask.data) +
                        plane * p_.zoneout_plane + row_of_tensor(p_.zoneout_mask);
    at.saved = saved_row(task, t, first, 0);
    return at;
  }

  // Some stages of one step. They are its products, each with as much of the cell as follows from
  // it; or, where products are normalised, the product, its norm with the cell up to an operand
  // that is normalised as well, and the norm of that with the rest.
  void step(const Task& task, const Member& member, int64_t t, int64_t index_in_chunk,
            int64_t parity, Range stages) {
    const int64_t rows = alive(member, t);
    if (rows > 0) {
      const StepOfRows<S>& at = rows_of_step(task, member, t, index_in_chunk, parity);
      for (int64_t which = stages.begin; which < stages.end && which <= info_.two_products();
           ++which)
        recurrent_product(task, member, at, rows, parity, int(which));
      if (info_.norm_gates) normed_stages(task, member, at, rows, t, stages);
      if (p_.projected()) project(task, at, rows);
    }
    if (stages.end == info_.stages()) reset(task, member, task.d == 0 ? t + 1 : t - 1, 1 - parity);
  }

  // One recurrent product, and what needs nothing else.
  void recurrent_product(const Task& task, const Member& member, const StepOfRows<S>& at,
                         int64_t rows, int64_t parity, int which) const {
    const auto& r = task.packed.recurrent[which];
    if (packs_rows(plan_.pack_hh)) {
      const int64_t first = member.rows.begin, ldh = G_ * Hp_;
      A* gates = task.dir->gates_h + first * ldh;
      product_of_rows(task, member, rows, p_.R, h_of(task, parity) + first * Rp_, Rp_,
                      task.weights.hh, r.bias, gates);
      if (!info_.norm_gates)
        for_equal_panels<A>(
            G_, member.units.begin, member.units.end, [&](int64_t unit, int vectors, int panels) {
              apply_cell(member, at, 0, rows, 0, unit, vectors, panels, gates + unit * G_, ldh);
            });
      return;
    }
    for_equal_panels<A>(
        r.gates, member.units.begin, member.units.end, [&](int64_t unit, int vectors, int panels) {
          const bool across = r.packed && goes_across<W>(rows, p_.R, r.gates * vectors);
          const int64_t highest = across ? kAcrossRows : max_rows(r.gates * vectors);
          const int64_t width = int64_t(r.gates) * vectors * L;
          const int64_t height =
              rows_of_block(rows, highest, across ? kAcrossPanels * width : width);
          const int64_t most = across ? kAcrossPanels : panels_of_block(height, width);
          for_each_in(turn(parity), quotient(panels + most - 1, most),
                      [&](int64_t i, int64_t next) {
                        const int64_t p = i * most, left = panels - p;
                        for (int64_t m = 0; m < rows; m += height)
                          block(task, member, at, m, rows - m < height ? rows - m : height, parity,
                                which, unit + p * vectors * L, unit + next * most * vectors * L,
                                vectors, int(left < most ? left : most));
                      });
        });
  }

  // The rows of a block: of so many tiles that the cell has much to do at once. All, but for
  // members of a unit split, which have every sequence.
  static int64_t rows_of_block(int64_t rows, int64_t highest, int64_t width) {
    const int64_t fit = quotient(kProducts, width * int64_t(sizeof(A)));
    if (rows <= fit) return rows;
    const int64_t tiles = quotient(rows + highest - 1, highest);
    const int64_t most = fit < 2 * highest ? 1 : quotient(fit, highest);
    const int64_t blocks = quotient(tiles + most - 1, most);
    return most == 1 ? quotient(rows + blocks - 1, blocks)
                     : quotient(tiles + blocks - 1, blocks) * highest;
  }
  // How many panels are done together where there are few rows.
  static int64_t panels_of_block(int64_t rows, int64_t width) {
    const int64_t panels = quotient(kProducts, rows * width * int64_t(sizeof(A)));
    return panels > 1 ? panels : 1;
  }

  // h before a step, as W_hh meets it.
  const O* h_of(const Task& task, int64_t parity) const {
    return task.dir->h_mask ? task.dir->masked[parity] : task.dir->h[parity];
  }

  // Some rows and panels of it: the product, and while that is in L1, the cell.
  void block(const Task& task, const Member& member, const StepOfRows<S>& at, int64_t m,
             int64_t height, int64_t parity, int which, int64_t unit, int64_t next, int vectors,
             int panels) const {
    const Direction& dir = *task.dir;
    const auto& r = task.packed.recurrent[which];
    const int64_t width = int64_t(r.gates) * vectors * L;
    const A* bias = r.bias + unit * r.gates;
    if (!info_.recurrent)
      return apply_cell(member, at, m, height, which, unit, vectors, panels, bias, 0);
    const int64_t lda = which == 0 ? Rp_ : Hp_;
    const O* a = which == 0 ? h_of(task, parity) + (member.rows.begin + m) * lda
                            : at.second_operand + m * lda;
    const S* w = static_cast<const S*>(task.weights.hh) + r.first * p_.H * p_.R;
    alignas(64) A products[kProducts / sizeof(A)];
    A* out = products;
    int64_t ldo = panels * width;
    if (info_.norm_gates) {
      out = dir.gates_h + (member.rows.begin + m) * G_ * Hp_ + unit * G_;
      ldo = G_ * Hp_;
    }
    const bool fetches = at.saved && which == info_.two_products();
    for_panels_at_once<W>(
        r.packed ? height : 0, p_.R, r.gates, unit, unit + panels * vectors * L, turn(parity),
        [&](int64_t u, int, int at_once, int64_t after) {
          const int64_t column = (u - unit) * r.gates;
          const bool all = at_once > 1 || !r.packed || !fetches;  // as of input_product
          const int64_t highest = all ? height : max_rows(r.gates * vectors);
          for_heights(height, highest, [&](int64_t i, int64_t n) {
            if (fetches) fetch_results(at, m + i, n, u, at_once * vectors * L);
            product(r.gates, m + i, n, p_.R, a + i * lda, lda, w, p_.H, r.packed, u,
                    after == u ? next : after, vectors, at_once,
                    info_.norm_gates ? kZeros : bias + column, out + i * ldo + column, ldo);
          });
        });
    if (!info_.norm_gates)
      apply_cell(member, at, m, height, which, unit, vectors, panels, products, ldo);
  }

  // Has the lines brought that the cell will write, while the product before it is made: what is
  // saved of a long sequence is far. Inline, since g++ drops the call of a function that only
  // fetches.
  FUSED_RNN_INLINE void fetch_results(const StepOfRows<S>& at, int64_t m, int64_t height,
                                      int64_t unit, int64_t units) const {
    for (int64_t i = m; i < m + height; ++i) {
      const A* saved = at.saved + i * at.ld_saved + unit;
      for (int64_t u = unit; !at.unprojected && u < unit + units; u += kLine / int64_t(sizeof(A)))
        __builtin_prefetch(at.y_row(i) + u, 0, 2);
      fetch(saved, info_.states + info_.saved, units);
      if (info_.norm_gates) fetch(saved + (slots_ - G_) * Hp_, G_, units);
    }
  }
  // Some units of slots that follow one another.
  FUSED_RNN_INLINE void fetch(const A* slots, int count, int64_t units) const {
    for (int64_t u = 0; u < units; u += kLine / int64_t(sizeof(A)))
      for (int s = 0; s < count; ++s) __builtin_prefetch(slots + s * Hp_ + u, 0, 2);
  }

  // The stages of a step after its products, where those are normalised.
  void normed_stages(const Task& task, const Member& member, const StepOfRows<S>& at, int64_t rows,
                     int64_t t, Range stages) const {
    for (int64_t m = 0; m < rows; m += kMaxRows) {  // while they are in L1
      const Range some{m, rows - m < kMaxRows ? rows : m + kMaxRows};
      for (int64_t stage = stages.begin > 1 ? stages.begin : 1; stage < stages.end; ++stage)
        stage == 1 ? normed_gates(task, member, at, some, t)
                   : normed_operand(task, member, at, some);
    }
  }

  void normed_gates(const Task& task, const Member& member, const StepOfRows<S>& at, Range rows,
                    int64_t t) const {
    const int64_t ldh = G_ * Hp_, first = member.rows.begin;
    for (int64_t b = first + rows.begin; b < first + rows.end; ++b)
      normalise_gates(member.units, task.dir->gates_h + b * ldh, task.packed.gain_hh,
                      task.packed.recurrent[0].bias, saved_row(task, t, b, slots_ - G_),
                      task.dir->normed_h + b * ldh);
    each_tile(member, rows, [&](Tile<A>& tile) {
      tile.h = task.dir->normed_h + (first + tile.row) * ldh + tile.x_at;
      tile.ldh = ldh;
      tile.h_gate = tile.x_gate;
      info_.normed_operand ? cell_.operand(at, tile) : apply(at, tile);
    });
  }

  void normed_operand(const Task& task, const Member& member, const StepOfRows<S>& at,
                      Range rows) const {
    const A* gain = task.packed.diag + (info_.diagonals + 2 * G_) * Hp_;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      A* normed = at.normed + i * at.ld_normed;
      normalise(GatesInSlots<A>{0, 1, p_.H, Hp_}, member.units, normed + Hp_, gain, gain + Hp_,
                normed);
    }
    each_tile(member, rows, [&](Tile<A>& tile) {
      tile.h = at.normed + tile.row * at.ld_normed + tile.unit;
      tile.ldh = at.ld_normed;
      tile.h_gate = Hp_;
      apply(at, tile);
    });
  }

  // Calls body(tile) for some rows of a member, with all gates and without h.
  template <class Body>
  void each_tile(const Member& member, Range rows, Body body) const {
    for_equal_panels<A>(G_, member.units.begin, member.units.end,
                        [&](int64_t unit, int vectors, int panels) {
                          Tile<A> tile{rows.begin, rows.size(), unit,    vectors, panels,
                                       unit * G_,  vectors * L, nullptr, 0,       0};
                          body(tile);
                        });
  }

  void apply_cell(const Member& member, const StepOfRows<S>& at, int64_t m, int64_t height,
                  int which, int64_t unit, int vectors, int panels, const A* gates_h,
                  int64_t ldh) const {
    const int64_t gate = vectors * L;
    if (!info_.two_products())
      return apply(at, {m, height, unit, vectors, panels, unit * G_, gate, gates_h, ldh, gate});
    // The panels of x are those of all gates.
    const int64_t most = panel_units<A>(G_);
    const int64_t gates = which == 0 ? info_.first_gates : G_ - info_.first_gates;
    for (int i = 0; i < panels * vectors; ++i) {
      const int64_t u = unit + i * L;
      const int64_t panel = member.units.begin + (u - member.units.begin) / most * most;
      const int64_t end = panel + most < member.units.end ? panel + most : member.units.end;
      const A* h = gates_h + i / vectors * gates * gate + i % vectors * L;
      const Tile<A> tile{m, height, u, 1, 1, panel * G_ + u - panel, end - panel, h, ldh, gate};
      which == 0 ? cell_.operand(at, tile) : apply(at, tile);
    }
    if (which == 0) round_operand(at, m, height, {unit, unit + panels * gate});
  }

  void apply(const StepOfRows<S>& at, const Tile<A>& tile) const {
    const Range units{tile.unit, tile.unit + tile.panels * tile.vectors * L};
    if (at.also && units.end > at.valid) {  // whole vectors would reach beyond the output
      ForwardStep<A> step = at;
      step.also = nullptr;
      cell_.forward(step, tile);
    } else {
      cell_.forward(at, tile);
    }
    settle(at, tile.row, tile.rows, units);
  }

  // What follows from new states of the cell, of so many rows from m on: each goes where the call
  // wants it.
  void settle(const StepOfRows<S>& at, int64_t m, int64_t height, Range units) const {
    if (at.zoned || at.all_c)
      for (int64_t row = m; row < m + height; ++row) settle_c(at, row, units);
    if (at.unprojected) {
      for (int64_t row = m; !kSame && row < m + height; ++row)
        copy(at.after + row * Hp_, units, at.unprojected + row * Hp_);
    } else if (at.zoned || at.h_mask) {
      for (int64_t row = m; row < m + height; ++row)
        for (int64_t u = units.begin; u < units.end; u += L) {
          const Vector<A> h = emit_h(at, row, u, load(at.after + row * Hp_ + u));
          if (!kSame) store(at.after + row * Hp_ + u, h);
        }
    } else if (!at.also || units.end > at.valid) {
      settle_h(at, m, height, units);
    }
  }
  // The same for h in most calls: what emit_h() does without zoneout and masks. The cell has
  // written it to the next step and what is saved, but not rounded.
  void settle_h(const StepOfRows<S>& at, int64_t m, int64_t height, Range units) const {
    const int64_t whole = at.valid < units.end ? (at.valid - units.begin) / L * L : units.size();
    for (int64_t row = m; row < m + height; ++row) {
      const int64_t state = row * Hp_ + units.begin;
      A* const h = at.after + state;
      O* const next = at.h_next + state;
      A* const slot = at.saved ? at.saved + row * at.ld_saved + units.begin : nullptr;
      S* const y = at.y_row(row) + units.begin;
      const auto rounded = [&](int64_t u) __attribute__((always_inline)) {
        const Vector<A> value = round_to<S>(load(h + u));
        if constexpr (!std::is_same_v<S, A>) {
          store(next + u, value);
          if (!kSame) store(h + u, value);
          if (slot) store(slot + u, value);
        }
        return value;
      };
      int64_t u = 0;
      for (; u < whole; u += L) store(y + u, rounded(u));
      for (; u < units.size(); u += L) store_partial(y + u, rounded(u), at.valid - units.begin - u);
    }
  }
  void settle_c(const StepOfRows<S>& at, int64_t row, Range units) const {
    for (int64_t u = units.begin; at.c_after && u < units.end; u += L) {
      Vector<A> c = load(at.c_after + row * Hp_ + u);
      if (at.zoned) {
        A* state = at.c + row * Hp_ + u;
        c = zone_out(at, 1, row, u, at.valid_c - u, load(state), c);
        store(state, c);
        if (at.saved) store(at.saved + row * at.ld_saved + at.slot + u, c);
      }
      if (at.all_c) store_partial(at.all_c + at.place(row) * at.ld_all_c + u, c, at.valid_c - u);
    }
  }
  void round_operand(const StepOfRows<S>& at, int64_t m, int64_t height, Range units) const {
    for (int64_t row = m; !kSame && row < m + height; ++row)
      copy(at.operand + row * Hp_, units, at.second_operand + row * Hp_);
  }
  static void copy(const A* from, Range units, O* to) {
    for (int64_t u = units.begin; u < units.end; u += L) store(to + u, load(from + u));
  }

  // h = W_hr (o tanh c), for an LSTM with projection.
  void project(const Task& task, const StepOfRows<S>& at, int64_t rows) const {
    constexpr int64_t most = std::max(kMaxRows, kMostAcross);  // rows whose results are kept
    alignas(64) A projected[most * kAcrossPanels * kPanelWidth];
    const int64_t at_once = task.packed.hr ? rows : 0;
    for_panels_at_once<W>(
        at_once, p_.H, 1, 0, Rp_, [&](int64_t unit, int vectors, int panels, int64_t next) {
          for (int64_t m = 0; m < rows; m += most) {
            const int64_t height = rows - m < most ? rows - m : most;
            product(1, m, height, p_.H, at.unprojected + m * Hp_, Hp_,
                    static_cast<const S*>(task.weights.hr), p_.R, task.packed.hr, unit, next,
                    vectors, panels, kZeros, projected, panels * vectors * L);
            for (int64_t i = m; i < m + height; ++i)
              for (int v = 0; v < panels * vectors; ++v) {
                const int64_t u = unit + v * L;
                emit_h(at, i, u, load(projected + ((i - m) * panels * vectors + v) * L));
              }
          }
        });
  }

  void finish(const Task& task, const Member& member) {
    const Direction& dir = *task.dir;
    const Range h_units = units_of_h(member.units);
    for (int64_t b = member.rows.begin; b < member.rows.end; ++b) {
      const int64_t state = (task.layer * p_.dirs + task.d) * steps_.B + steps_.place(b);
      // Forwards a sequence ends with its own last step, backwards all end with step 0.
      const int64_t parity = (task.d == 0 ? steps_.length(b) : steps_.T) % 2;
      if (p_.h_n)
        store_row(dir.h[parity] + b * Rp_, h_units.begin, h_units.end, p_.R,
                  static_cast<S*>(p_.h_n) + state * p_.R);
      if (p_.c_n)
        store_row(dir.c + b * Hp_, member.units.begin, member.units.end, p_.H,
                  static_cast<S*>(p_.c_n) + state * p_.H);
    }
  }

  const CellRows<A>& cell_;
  const int G_;
  int64_t gates_stride_;   // of a member's gates_x
  int64_t left_stride_;    // of a member's packed_left
  Direction* directions_;  // [slots of work]
  S* between_;             // [betweens, N, D*R]: output of a layer, input of the next
};

template <class S>
void forward(const AnyCell& cell, const ForwardProblem& problem, const Plan& plan,
             const Runtime& runtime) {
  ForwardScan<S> scan(static_cast<const CellRows<Accumulate<S>>&>(cell), problem, plan);
  run_scan(scan, plan.threads, runtime);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
