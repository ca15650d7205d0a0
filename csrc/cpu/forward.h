// The forward scan of a stack: per layer and direction, the input product of a chunk of steps, then
// step by step the recurrent product with the cell applied to each tile while it is in L1.
#pragma once

#include "scan.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

template <class Cell, class S>
class ForwardScan : Scan<ForwardProblem> {
  using A = Accumulate<S>;
  static constexpr int L = kLanes<A>;
  static constexpr int G = Cell::kGates;
  static constexpr int kPanelWidth = kMaxVectors * L;

 public:
  ForwardScan(const ForwardProblem& problem, const Plan& plan)
      : Scan(problem, plan, saved_slots<Cell>(problem)) {}

  void lay_out(Arena& arena) {
    lay_out_teams(arena);
    const int64_t chunk_rows = part_rows_ * plan_.chunk_steps;
    directions_ = arena.take<Direction>(slots_of_work());
    for (int64_t slot = 0; slot < slots_of_work(); ++slot) {
      Direction measured;
      Direction& dir = directions_ ? directions_[slot] : measured;
      dir.packed_ih = arena.take<A>(plan_.pack_ih ? G * Hp_ * widest_ : 0);
      dir.packed_hh = arena.take<A>(plan_.pack_hh ? G * Hp_ * p_.R : 0);
      dir.packed_hr = arena.take<A>(plan_.pack_hh && p_.projected() ? Rp_ * p_.H : 0);
      dir.bias_ih = arena.take<A>(G * Hp_);
      dir.bias_hh = arena.take<A>(G * Hp_);
      dir.h[0] = arena.take<A>(steps_.B * Rp_);
      dir.h[1] = arena.take<A>(steps_.B * Rp_);
      dir.c = arena.take<A>(Cell::kStates > 1 ? steps_.B * Hp_ : 0);
      dir.unprojected = arena.take<A>(p_.projected() ? steps_.B * Hp_ : 0);
      // Members of a unit split share the rows, and each writes its own gates of them.
      const int64_t members = team(by_layers() ? 0 : slot).size();
      gates_stride_ = plan_.split == Split::kUnits ? 0 : chunk_rows * G * Hp_;
      dir.gates_x = arena.take<A>((gates_stride_ ? members : 1) * chunk_rows * G * Hp_);
      dir.staged = arena.take<A>(members * chunk_rows * widest_);
      dir.chunk_offsets = arena.take<int64_t>(members * (plan_.chunk_steps + 1));
    }
    between_ = arena.take<S>(betweens() * steps_.N * p_.dirs * p_.R);
  }

  void run(int begin, int end) {
    if (by_layers())
      return for_my_layers(begin, end, 0, 1,
                           [&](int64_t layer, const Crew& crew) { run_direction(layer, crew); });
    for (int64_t layer = 0; layer < p_.layers; ++layer) {
      for_my_crews(begin, end, [&](const Crew& crew) { run_direction(layer, crew); });
      // The next layer reads both directions' output, and packs into the memory that this one uses.
      if (layer + 1 < p_.layers) wait_for_everyone(begin, end);
    }
  }

 private:
  struct Direction {
    A* packed_ih;  // panels of [I, G*Hp]
    A* packed_hh;  // panels of [R, G*Hp]
    A* packed_hr;  // panels of [H, Rp]
    A* bias_ih;    // [G*Hp] in panel order
    A* bias_hh;
    A* h[2];                 // [B, Rp]: read at one step, written at the next
    A* c;                    // [B, Hp]
    A* unprojected;          // [B, Hp]
    A* gates_x;              // [members, chunk rows, G*Hp] in panel order
    A* staged;               // [members, chunk rows, I]
    int64_t* chunk_offsets;  // [members, chunk_steps + 1]: a member's rows of the chunk before each
                             // of its steps
  };

  // What one direction of one layer works on.
  struct Task {
    int64_t layer;
    int64_t d;
    Direction* dir;
    Weights weights;
    int64_t I;
    Sequence input;
    Sequence output;
  };

  Sequence between(int64_t layer) const {
    const int64_t features = p_.dirs * p_.R;
    return {between_ + layer % betweens() * steps_.N * features, steps_.B * features, features};
  }

  void run_direction(int64_t layer, const Crew& crew) {
    const int64_t d = crew.d;
    const Task task{layer,
                    d,
                    &directions_[slot_of_work(layer, d)],
                    p_.weights[layer * p_.dirs + d],
                    p_.input_size(layer),
                    layer == 0 ? p_.input : between(layer - 1),
                    layer + 1 == p_.layers ? p_.output : between(layer)};
    each_member(crew, [&](const Member& member) { prepare(task, member); });
    for (int block = 0; block < plan_.blocks; ++block) run_block(task, {d, crew.members, block});
  }

  void run_block(const Task& task, const Crew& crew) {
    each_member(crew, [&](const Member& member) { start(task, member); });
    // Members of a row split share the packed weights. Members of a unit split pack their own, but
    // read all of h.
    if (crew.block == 0 || plan_.split == Split::kUnits) wait_for_team(crew);
    for (int64_t done = 0; done < steps_.T; done += plan_.chunk_steps) {
      const int64_t count =
          plan_.chunk_steps < steps_.T - done ? plan_.chunk_steps : steps_.T - done;
      const int64_t first = task.d == 0 ? done : steps_.T - done - count;
      follow(task.layer - 1, crew.block, done);
      each_member(crew, [&](const Member& member) { input_product(task, member, first, count); });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = task.d == 0 ? first + i : first + count - 1 - i;
        each_member(
            crew, [&](const Member& member) { step(task, member, t, t - first, (done + i) % 2); });
        if (plan_.split == Split::kUnits) wait_for_team(crew);
      }
      lead(task.layer);
    }
    each_member(crew, [&](const Member& member) { finish(task, member); });
  }

  void prepare(const Task& task, const Member& member) {
    Direction& dir = *task.dir;
    const Weights& w = task.weights;
    const bool shared = plan_.split != Split::kUnits;
    int64_t turn = 0;
    for_panels<A, G>(member.units.begin, member.units.end, [&](int64_t unit, int vectors) {
      if (shared && turn++ % member.size != member.index) return;
      pack_bias<S, G>(static_cast<const S*>(w.bias_ih), p_.H, unit, vectors,
                      dir.bias_ih + unit * G);
      pack_bias<S, G>(static_cast<const S*>(w.bias_hh), p_.H, unit, vectors,
                      dir.bias_hh + unit * G);
      const auto pack = [&](const void* weight, int64_t K, A* packed) {
        if (packed)
          pack_transposed<S, G>(static_cast<const S*>(weight), p_.H, K, unit, vectors,
                                packed + unit * G * K);
      };
      pack(w.ih, task.I, dir.packed_ih);
      pack(w.hh, p_.R, dir.packed_hh);
    });
    if (plan_.pack_hh && p_.projected())
      for_panels<A, 1>(0, Rp_, [&](int64_t unit, int vectors) {
        if (turn++ % member.size != member.index) return;
        pack_transposed<S, 1>(static_cast<const S*>(w.hr), p_.R, p_.H, unit, vectors,
                              dir.packed_hr + unit * p_.H);
      });
  }

  // The states before the first step. Both buffers of h start from h0: in a ragged batch the
  // reverse direction meets new sequences at any step.
  void start(const Task& task, const Member& member) {
    const Direction& dir = *task.dir;
    const int64_t state = (task.layer * p_.dirs + task.d) * steps_.B;
    const S* h0 = static_cast<const S*>(p_.h0);
    const S* c0 = static_cast<const S*>(p_.c0);
    const Range rows = rows_to_start(member);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (A* h : dir.h) copy_row(h0 ? h0 + (state + b) * p_.R : nullptr, p_.R, Rp_, h + b * Rp_);
      if constexpr (Cell::kStates > 1)
        copy_row(c0 ? c0 + (state + b) * p_.H : nullptr, p_.H, Hp_, dir.c + b * Hp_);
    }
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

    const A* x = nullptr;
    int64_t ldx = 0;
    if constexpr (sizeof(S) == sizeof(A)) {
      const bool everyone = member.rows.size() == steps_.B;
      if (everyone &&
          (steps_.offsets || task.input.stride_t == steps_.B * task.input.stride_b || count == 1)) {
        x = row_of<S>(task.input, steps_, first, 0);
        ldx = task.input.stride_b;
      } else if (count == 1 || (member.rows.size() == 1 && !steps_.offsets)) {
        x = row_of<S>(task.input, steps_, first, member.rows.begin);
        ldx = count == 1 ? task.input.stride_b : task.input.stride_t;
      }
    }
    if (!x) {
      A* staged = dir.staged + member.index * part_rows_ * plan_.chunk_steps * widest_;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t m = 0; m < offsets[i + 1] - offsets[i]; ++m)
          stage(row_of<S>(task.input, steps_, first + i, member.rows.begin + m), task.I,
                staged + (offsets[i] + m) * task.I);
      x = staged;
      ldx = task.I;
    }

    A* gates = gates_x(task, member);
    for_panels<A, G>(member.units.begin, member.units.end, [&](int64_t unit, int vectors) {
      product<G>(rows, task.I, x, ldx, static_cast<const S*>(task.weights.ih), p_.H, dir.packed_ih,
                 unit, vectors, dir.bias_ih + unit * G, gates + unit * G, G * Hp_);
    });
  }

  static void stage(const S* src, int64_t n, A* dst) {
    for (int64_t i = 0; i < n; i += L) store_partial(dst + i, load_partial(src + i, n - i), n - i);
  }

  // out[m, panel] = x[m, :] W^T + bias for one panel of units.
  template <int gates>
  void product(int64_t rows, int64_t K, const A* x, int64_t ldx, const S* w, int64_t units,
               const A* packed, int64_t unit, int vectors, const A* bias, A* out,
               int64_t ldo) const {
    if (!packed) return dot<S, gates>(rows, K, x, ldx, w, units, unit, vectors, bias, out, ldo);
    const int64_t width = int64_t(gates) * vectors * L;
    for_row_tiles<A, Left::kRows, Right::kPanel>(
        rows, gates * vectors, [&](int64_t m, int64_t, TileFunction<A> tile) {
          tile(K, x + m * ldx, ldx, packed + unit * gates * K, width, bias, 0, out + m * ldo, ldo);
        });
  }

  // Where a member's rows of one step stand: pointers to its first sequence, at unit 0. Rows follow
  // one another at fixed distances.
  struct StepRows {
    const A* gates_x;  // [rows, G*Hp] in panel order
    const A* h;        // [rows, Rp]
    A* h_next;         // [rows, Rp]
    A* c;              // [rows, Hp], null for a cell without c
    A* unprojected;    // [rows, Hp], null without a projection
    S* y;              // [rows, R], ldy apart
    int64_t ldy;
    A* saved;  // [rows, slots, Hp], null in inference
  };

  StepRows rows_of_step(const Task& task, const Member& member, int64_t t, int64_t index_in_chunk,
                        int64_t parity) const {
    const Direction& dir = *task.dir;
    const int64_t first = member.rows.begin;
    const int64_t offset =
        dir.chunk_offsets[member.index * (plan_.chunk_steps + 1) + index_in_chunk];
    const int64_t saved_row = (task.layer * p_.dirs + task.d) * steps_.N + steps_.offset(t) + first;
    return {gates_x(task, member) + offset * G * Hp_,
            dir.h[parity] + first * Rp_,
            dir.h[1 - parity] + first * Rp_,
            dir.c ? dir.c + first * Hp_ : nullptr,
            dir.unprojected ? dir.unprojected + first * Hp_ : nullptr,
            row_of<S>(task.output, steps_, t, first) + task.d * p_.R,
            task.output.stride_b,
            p_.saved ? static_cast<A*>(p_.saved) + saved_row * slots_ * Hp_ : nullptr};
  }

  void step(const Task& task, const Member& member, int64_t t, int64_t index_in_chunk,
            int64_t parity) {
    const Direction& dir = *task.dir;
    const int64_t rows = alive(member, t);
    if (rows == 0) return;
    const StepRows at = rows_of_step(task, member, t, index_in_chunk, parity);

    alignas(64) A gates_h[kMaxRows * kPanelWidth];
    for_panels<A, G>(member.units.begin, member.units.end, [&](int64_t unit, int vectors) {
      const int64_t width = int64_t(G) * vectors * L;
      const A* bias = dir.bias_hh + unit * G;
      if (dir.packed_hh) {
        for_row_tiles<A, Left::kRows, Right::kPanel>(
            rows, G * vectors, [&](int64_t m, int64_t height, TileFunction<A> tile) {
              tile(p_.R, at.h + m * Rp_, Rp_, dir.packed_hh + unit * G * p_.R, width, bias, 0,
                   gates_h, width);
              apply_cell(at, m, height, unit, vectors, gates_h);
            });
      } else {
        for (int64_t m = 0; m < rows; m += kMaxRows) {
          const int64_t height = rows - m < kMaxRows ? rows - m : kMaxRows;
          dot<S, G>(height, p_.R, at.h + m * Rp_, Rp_, static_cast<const S*>(task.weights.hh), p_.H,
                    unit, vectors, bias, gates_h, width);
          apply_cell(at, m, height, unit, vectors, gates_h);
        }
      }
    });
    if (p_.projected()) project(task, at, rows);
  }

  // The cell for rows [m, m + height) of one panel: gates in, states out.
  void apply_cell(const StepRows& at, int64_t m, int64_t height, int64_t unit, int vectors,
                  const A* gates_h) const {
    using V = Vector<A>;
    const int64_t gate = vectors * L;
    for (int v = 0; v < vectors; ++v, unit += L) {
      const A* gx = at.gates_x + m * G * Hp_ + (unit - v * L) * G + v * L;
      const A* gh = gates_h + v * L;
      const A* h = at.h + m * Rp_ + unit;  // with a projection not followed
      A* h_next = at.h_next + m * Rp_ + unit;
      A* c = at.c ? at.c + m * Hp_ + unit : nullptr;
      A* unprojected = at.unprojected ? at.unprojected + m * Hp_ + unit : nullptr;
      S* y = at.y + m * at.ldy + unit;
      A* slot = at.saved ? at.saved + m * slots_ * Hp_ + unit : nullptr;
      for (int64_t i = 0; i < height; ++i) {
        V x[G], hh[G], prev[Cell::kStates], state[Cell::kStates], saved[Cell::kSaved + 1];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          x[g] = load(gx + g * gate);
          hh[g] = load(gh + g * gate);
        }
        // A projected cell (LSTM) does not read the h before it except through W_hh.
        prev[0] = unprojected ? V{} : load(h);
        if constexpr (Cell::kStates > 1) prev[1] = load(c);
        Cell::forward(x, hh, prev, state, saved);
        if constexpr (Cell::kStates > 1) {
          store(c, state[1]);
          c += Hp_;
        }
        if (!unprojected) state[0] = emit_h(state[0], p_.R - unit, h_next, y);
        if (slot) {
          store(unprojected ? slot + (slots_ - 1) * Hp_ : slot, state[0]);
#pragma GCC unroll 8
          for (int s = 1; s < Cell::kStates; ++s) store(slot + s * Hp_, state[s]);
#pragma GCC unroll 8
          for (int s = 0; s < Cell::kSaved; ++s) store(slot + (Cell::kStates + s) * Hp_, saved[s]);
          slot += slots_ * Hp_;
        }
        gx += G * Hp_;
        gh += G * gate;
        h += Rp_;
        h_next += Rp_;
        y += at.ldy;
        if (unprojected) {
          store(unprojected, state[0]);
          unprojected += Hp_;
        }
      }
    }
  }

  // h goes to the output, and on to the next step as the output holds it.
  static FUSED_RNN_INLINE Vector<A> emit_h(Vector<A> h, int64_t valid, A* h_next, S* y) {
    h = round_to<S>(h);
    store(h_next, h);
    store_partial(y, h, valid);
    return h;
  }

  // h = W_hr (o tanh c), for an LSTM with projection.
  void project(const Task& task, const StepRows& at, int64_t rows) const {
    alignas(64) A projected[kMaxRows * kPanelWidth];
    alignas(64) const A zeros[kPanelWidth] = {};
    for_panels<A, 1>(0, Rp_, [&](int64_t unit, int vectors) {
      for (int64_t m = 0; m < rows; m += kMaxRows) {
        const int64_t height = rows - m < kMaxRows ? rows - m : kMaxRows;
        product<1>(height, p_.H, at.unprojected + m * Hp_, Hp_,
                   static_cast<const S*>(task.weights.hr), p_.R, task.dir->packed_hr, unit, vectors,
                   zeros, projected, vectors * L);
        for (int64_t i = 0; i < height; ++i)
          for (int v = 0; v < vectors; ++v) {
            const int64_t u = unit + v * L;
            const Vector<A> h = emit_h(load(projected + (i * vectors + v) * L), p_.R - u,
                                       at.h_next + (m + i) * Rp_ + u, at.y + (m + i) * at.ldy + u);
            if (at.saved) store(at.saved + (m + i) * slots_ * Hp_ + u, h);
          }
      }
    });
  }

  void finish(const Task& task, const Member& member) {
    const Direction& dir = *task.dir;
    const int64_t state = (task.layer * p_.dirs + task.d) * steps_.B;
    const int64_t h_end = p_.projected() ? Rp_ : member.units.end;
    for (int64_t b = member.rows.begin; b < member.rows.end; ++b) {
      // Forwards a sequence ends with its own last step, backwards all end with step 0.
      const int64_t parity = (task.d == 0 ? steps_.length(b) : steps_.T) % 2;
      if (p_.h_n)
        store_row(dir.h[parity] + b * Rp_, member.units.begin, h_end, p_.R,
                  static_cast<S*>(p_.h_n) + (state + b) * p_.R);
      if constexpr (Cell::kStates > 1)
        store_row(dir.c + b * Hp_, member.units.begin, member.units.end, p_.H,
                  static_cast<S*>(p_.c_n) + (state + b) * p_.H);
    }
  }

  int64_t gates_stride_;   // of a member's gates_x
  Direction* directions_;  // [slots of work]
  S* between_;             // [betweens, N, D*R]: output of a layer, input of the next
};

template <class Cell, class S>
void forward(const ForwardProblem& problem, const Plan& plan, const Runtime& runtime) {
  ForwardScan<Cell, S> scan(problem, plan);
  run_scan(scan, plan.threads, runtime);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
