// The backward scan of a stack: per layer and direction, back through the steps, chunk by chunk;
// after each chunk what is parallel over time (gradients of the weights and of the input) as large
// products.
#pragma once

#include "scan.h"
#include "zoneout.h"

namespace fused_rnn::cpu::FUSED_RNN_ISA {

template <class S>
class BackwardScan : Scan<BackwardProblem> {
  using A = Accumulate<S>;
  using O = Operand<S>;
  using W = Packed<S>;
  static constexpr int L = kLanes<A>;
  static constexpr bool kLowPrecision = sizeof(S) != sizeof(A);
  // Gradients are rounded where they are multiplied by weights in pairs.
  static constexpr bool kRounds = !std::is_same_v<O, A>;
  static constexpr int64_t kPanel = kMaxVectors * L;
  // Rows of one outer product: so many lines of both its operands stay in L1.
  static constexpr int64_t kSlab = 256;
  // Rows read with a stride that is a power of two fall on few cache sets; one more line avoids it.
  static constexpr int64_t kSkew = 64 / sizeof(A);

 public:
  BackwardScan(const CellRows<A>& cell, const BackwardProblem& problem, const Plan& plan)
      : Scan(cell.info, problem, plan),
        cell_(cell),
        G_(cell.info.gates),
        first_gates_(info_.two_products() ? info_.first_gates : G_),
        block_rows_(largest_part(problem.steps, plan.blocks)),
        ldg_((G_ + info_.diagonals) * Hp_ + kSkew),
        ld_normed_(info_.norm_gates ? (info_.sums_gates ? 1 : 2) * G_ * Hp_ : 0),
        ld_norms_(info_.gains() * Hp_ + ld_normed_) {}

  void lay_out(Arena& arena) {
    lay_out_teams(arena);
    const int64_t chunk_rows = block_rows_ * plan_.chunk_steps;
    const bool weights = p_.d_weights != nullptr;
    // Pairs are there in panels only.
    const bool pack_ih = plan_.pack_ih != Pack::kNothing || kRounds;
    const bool pack_hh = plan_.pack_hh != Pack::kNothing || kRounds;
    const bool sums = weights && kLowPrecision && !one_product();
    directions_ = arena.take<Direction>(slots_of_work());
    for (int64_t slot = 0; slot < slots_of_work(); ++slot) {
      Direction measured;
      Direction& dir = directions_ ? directions_[slot] : measured;
      const int64_t d = by_layers() ? 0 : slot;
      const int64_t packed_H = packed_rows<W>(Hp_);  // so many rows of a panel for a gate
      dir.packed_ih = arena.take<W>(
          pack_ih && (p_.layers > 1 || p_.d_input.data) ? G_ * packed_H * pad_units(widest_) : 0);
      dir.packed_hh = arena.take<W>(pack_hh && info_.recurrent ? first_gates_ * packed_H * Rp_ : 0);
      dir.packed_second = arena.take<W>(pack_hh ? second_gates() * packed_H * Rp_ : 0);
      dir.packed_hr = arena.take<W>(pack_hh && p_.projected() ? packed_rows<W>(Rp_) * Hp_ : 0);
      dir.diag = arena.take<A>(info_.unit_weights() * Hp_);
      dir.zeros = arena.take<A>(p_.reset.data ? Hp_ : 0);
      dir.h0 = arena.take<A>(steps_.B * Rp_);
      dir.c0 = arena.take<A>(has_c() ? steps_.B * Hp_ : 0);
      dir.dh = arena.take<A>(steps_.B * Rp_);
      dir.dc = arena.take<A>(has_c() ? steps_.B * Hp_ : 0);
      // The part of it that comes from later sequences of the same row.
      const bool adds_up = p_.reset.data && p_.reset_to_initial && p_.d_h0;
      dir.d_h0 = arena.take<A>(adds_up ? steps_.B * Rp_ : 0);
      dir.d_c0 = arena.take<A>(adds_up && has_c() ? steps_.B * Hp_ : 0);
      dir.h_mask = arena.take<A>(p_.h_mask ? steps_.B * Rp_ : 0);
      dir.candidate_mask = arena.take<A>(p_.candidate_mask ? steps_.B * Hp_ : 0);
      dir.d_masked = arena.take<A>(p_.h_mask ? steps_.B * Rp_ : 0);
      dir.d_operand = arena.take<A>(steps_.B * operand_size());
      dir.d_normed = arena.take<A>(steps_.B * ld_normed_);
      dir.d_norms = arena.take<A>(steps_.B * ld_norms_);
      dir.gates_x = arena.take<A>(chunk_rows * ldg_);
      const bool same_gates = info_.sums_gates && !info_.norm_gates;
      dir.gates_h = same_gates ? dir.gates_x : arena.take<A>(chunk_rows * ldg_);
      if constexpr (kRounds) {
        dir.operand_x = arena.take<O>(chunk_rows * ldg_);
        dir.operand_h = same_gates ? dir.operand_x : arena.take<O>(chunk_rows * ldg_);
        dir.operand_r = arena.take<O>(p_.projected() ? steps_.B * (Rp_ + kSkew) : 0);
      } else {
        dir.operand_x = dir.gates_x;
        dir.operand_h = dir.gates_h;
        dir.operand_r = nullptr;
      }
      dir.x = arena.take<A>(weights ? chunk_rows * pad_units(widest_) : 0);
      dir.h = arena.take<A>(weights && info_.recurrent ? chunk_rows * Rp_ : 0);
      dir.operand = arena.take<A>(weights && info_.two_products() ? chunk_rows * Hp_ : 0);
      dir.unprojected = arena.take<A>(weights && p_.projected() ? chunk_rows * Hp_ : 0);
      dir.d_unprojected = arena.take<A>(p_.projected() ? steps_.B * Hp_ : 0);
      dir.d_projected = arena.take<A>(p_.projected() ? chunk_rows * (Rp_ + kSkew) : 0);
      dir.d_bias_ih = arena.take<A>(weights ? (G_ + info_.unit_weights()) * Hp_ : 0);
      dir.d_bias_hh = arena.take<A>(weights && !info_.sums_gates ? G_ * Hp_ : 0);
      dir.d_ih = arena.take<A>(sums ? G_ * p_.H * widest_ : 0);
      dir.d_hh = arena.take<A>(sums && info_.recurrent ? G_ * p_.H * p_.R : 0);
      dir.d_hr = arena.take<A>(sums && p_.projected() ? p_.R * p_.H : 0);
      dir.chunk_offsets = arena.take<int64_t>(team(d).size() * (plan_.chunk_steps + 1));
      dir.walkers = arena.take<Member>(team(d).size());
      // Directions add up in the gradient of their input: the second one, and where that sum would
      // be rounded twice the first, write to memory of their own.
      dir.d_input =
          arena.take<A>(p_.dirs == 2 && (d == 1 || kLowPrecision) ? steps_.N * widest_ : 0);
    }
    between_ = arena.take<A>(betweens() * steps_.N * p_.dirs * p_.R);
  }

  void run(int begin, int end) {
    if (by_layers())
      return for_my_layers(begin, end, p_.layers - 1, -1,
                           [&](int64_t layer, Crew& crew) { run_direction(layer, crew); });
    for (int64_t layer = p_.layers - 1; layer >= 0; --layer) {
      for_my_crews(begin, end, [&](Crew& crew) { run_direction(layer, crew); });
      if (p_.dirs == 2 && needs_input(layer)) {
        wait_for_everyone(begin, end);
        for (int id = begin; id < end; ++id)
          add_directions(layer, part_of(steps_.N, 1, id, plan_.threads));
      }
      if (layer > 0) wait_for_everyone(begin, end);
    }
  }

 private:
  struct Direction {
    W* packed_ih;       // panels of [G*Hp, I]
    W* packed_hh;       // panels of [first gates * Hp, R]
    W* packed_second;   // panels of [other gates * Hp, R], where a cell has two products
    W* packed_hr;       // panels of [Rp, H]
    A* diag;            // [P, Hp]
    A* zeros;           // [Hp], a state after a reset
    A* h_mask;          // [B, Rp]
    A* candidate_mask;  // [B, Hp]
    A* d_masked;        // [B, Rp]: gradient of h times its mask
    A* h0;              // [B, Rp]
    A* c0;              // [B, Hp]
    A* dh;              // [B, Rp]: gradient of the state between two steps
    A* dc;              // [B, Hp]
    A* d_h0;            // [B, Rp]
    A* d_c0;            // [B, Hp]
    A* d_operand;       // [B, Hp]; of a norm [B, 3, Hp]: normalised, as it was, and its value
    A* d_normed;   // [B, ld_normed]: of the gates of W_ih x after their norm, and where they are
                   // not the same of those of W_hh h
    A* d_norms;    // [B, ld_norms]: of gains, and then of shifts, which are those above; summed
                   // over the steps of a chunk
    A* gates_x;    // [chunk rows, ldg]: gradient of W_ih x, gates of Hp units one after another,
                   // behind them that of diagonals
    A* gates_h;    // the same of W_hh h
    O* operand_x;  // what of them is multiplied by weights: the same, or rounded
    O* operand_h;
    O* operand_r;      // [B, R + skew], likewise of a step's d_projected, where it is rounded
    A* x;              // panels of [chunk rows, I]
    A* h;              // panels of [chunk rows, R]: h before each step
    A* operand;        // panels of [chunk rows, H]
    A* unprojected;    // panels of [chunk rows, H]: what the projection was applied to
    A* d_unprojected;  // [B, Hp]
    A* d_projected;    // [chunk rows, R + skew]
    A* d_bias_ih;      // [(G + unit weights)*Hp]
    A* d_bias_hh;
    A* d_ih;  // weight gradients before they are rounded to S
    A* d_hh;
    A* d_hr;
    A* d_input;              // [N, I]
    int64_t* chunk_offsets;  // [members, chunk_steps + 1]: rows of the chunk before each step
    Member* walkers;         // [members]
  };

  struct Task {
    int64_t layer;
    int64_t d;
    Direction* dir;
    Weights weights;
    int64_t I;
    int64_t plane;  // layer and direction
  };

  // The steps [first, first + count) of a block of sequences, whose gate gradients are in memory
  // together.
  struct Chunk {
    int64_t first;
    int64_t count;
    int64_t begin;           // the first sequence
    const int64_t* offsets;  // [count + 1]: rows before each step
    bool is_first;           // of the sequence, as backward walks it, and of the blocks

    int64_t rows() const { return offsets[count]; }
    int64_t row(int64_t t, int64_t b) const { return offsets[t - first] + b - begin; }
    int64_t rows_at(int64_t t) const { return offsets[t - first + 1] - offsets[t - first]; }
  };

  A* between(int64_t layer) const {
    return between_ + layer % betweens() * steps_.N * p_.dirs * p_.R;
  }

  bool needs_input(int64_t layer) const { return layer > 0 || p_.d_input.data; }

  const A* saved_row(int64_t plane, int64_t row) const {
    return static_cast<const A*>(p_.saved) + (plane * steps_.N + row) * slots_ * Hp_;
  }

  void run_direction(int64_t layer, Crew& crew) {
    const int64_t d = crew.d;
    const int64_t plane = layer * p_.dirs + d;
    const Task task{
        layer, d, &directions_[slot_of_work(layer, d)], p_.weights[plane], p_.input_size(layer),
        plane};
    each_member(crew, [&](const Member& member) { prepare(task, member); });
    for (int block = 0; block < plan_.blocks; ++block) {
      crew.block = block;
      run_block(task, crew);
    }
    each_member(crew, [&](const Member& member) { finish_weights(task, member); });
  }

  void run_block(const Task& task, Crew& crew) {
    each_member(crew, [&](const Member& member) { start(task, member); });
    if (crew.block == 0 || by_units() || shares_chunks()) wait_for_team(crew);
    const Range rows = rows_of_block(crew);
    for (int64_t done = 0; done < steps_.T && crew.members.size(); done += plan_.chunk_steps) {
      const int64_t count =
          plan_.chunk_steps < steps_.T - done ? plan_.chunk_steps : steps_.T - done;
      const int64_t first = task.d == 0 ? steps_.T - done - count : done;
      follow(task.layer + 1, crew.block, done);
      int64_t* offsets = task.dir->chunk_offsets + crew.members.begin * (plan_.chunk_steps + 1);
      offsets[0] = 0;
      for (int64_t i = 0; i < count; ++i) offsets[i + 1] = offsets[i] + alive(rows, first + i);
      const Chunk chunk{first, count, rows.begin, offsets, done == 0 && crew.block == 0};
      each_member(crew, [&](const Member& member) { share_chunk(task, member, rows, chunk); });
      const auto each_walker = [&](auto body) {
        each_member(crew, [&](const Member& member) { body(task.dir->walkers[member.index]); });
      };
      if (info_.norm_gates)
        each_walker([&](const Member& member) { clear_norms(task, member, chunk); });
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = task.d == 0 ? first + count - 1 - i : first + i;
        each_stage(crew, [&](Range stages) {
          each_walker(
              [&](const Member& member) { gate_gradients(task, member, chunk, t, stages); });
        });
        // Behind the last step lies h0, whose gradient may not be wanted.
        if (p_.d_h0 || done + i + 1 < steps_.T)
          each_walker([&](const Member& member) {
            if (info_.recurrent) state_gradients(task, member, chunk, t);
            reset(task, member, t);
          });
      }
      each_member(crew, [&](const Member& member) { stage(task, member, chunk); });
      wait_for_team(crew);
      each_member(crew, [&](const Member& member) {
        if (p_.d_weights) weight_gradients(task, member, chunk);
        if (needs_input(task.layer)) input_gradients(task, member, chunk);
      });
      // The next chunk overwrites what the products read.
      wait_for_team(crew);
      lead(task.layer);
    }
    each_member(crew, [&](const Member& member) { finish(task, member); });
  }

  // Whether members that have sequences of their own share them anew in every chunk: they wait for
  // each other there, and in one chunk only the longest are alive.
  bool shares_chunks() const { return plan_.split == Split::kRows && steps_.lengths; }

  // What a member walks through in a chunk.
  void share_chunk(const Task& task, const Member& member, Range rows, const Chunk& chunk) {
    Member& walker = task.dir->walkers[member.index];
    walker = member;
    if (!shares_chunks()) return;
    RowParts parts(steps_, member.size, rows, {chunk.first, chunk.first + chunk.count});
    for (int i = 0; i <= member.index; ++i) walker.rows = parts.next();
  }

  void prepare(const Task& task, const Member& member) {
    Direction& dir = *task.dir;
    const Weights& w = task.weights;
    int64_t turn = 0;
    const auto pack = [&](const void* weight, int64_t gates, int64_t units, int64_t columns,
                          Range range, bool shared, W* packed) {
      if (!packed) return;
      const int64_t Hp = pad_units(units), rows = packed_rows<W>(gates * Hp);
      const int64_t first_turn = turn;
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t j = 0; j < Hp; j += kRowsAtOnce) {
          turn = first_turn;
          for_panels<A>(1, range.begin, range.end, [&](int64_t column, int vectors) {
            if (shared && turn++ % member.size != member.index) return;
            pack_rows(static_cast<const S*>(weight), gates, units, Hp, columns, g, j, column,
                      vectors, packed + column * rows);
          });
        }
    };
    const Range columns = by_units() ? member.units : Range{0, Rp_};
    pack(w.hh, first_gates_, p_.H, p_.R, columns, !by_units(), dir.packed_hh);
    pack(second_hh(w), second_gates(), p_.H, p_.R, columns, !by_units(), dir.packed_second);
    if (needs_input(task.layer))
      pack(w.ih, G_, p_.H, task.I, {0, pad_units(task.I)}, true, dir.packed_ih);
    pack(w.hr, 1, p_.R, p_.H, {0, Hp_}, true, dir.packed_hr);
    if (by_units() || member.index == 0)
      pack_diagonals(static_cast<const S*>(w.diag), info_.unit_weights(), p_.H, member.units.begin,
                     member.units.end, dir.diag);
    if (member.index == 0 && dir.zeros) copy_row<A>(nullptr, 0, Hp_, dir.zeros);
  }

  int second_gates() const { return G_ - first_gates_; }
  const S* second_hh(const Weights& w) const {
    return second_gates() ? static_cast<const S*>(w.hh) + first_gates_ * p_.H * p_.R : nullptr;
  }

  // The gradients of the states after the last step.
  void start(const Task& task, const Member& member) {
    Direction& dir = *task.dir;
    const auto row = [&](const void* tensor, int64_t b, int64_t n) {
      const int64_t state = task.plane * steps_.B + steps_.place(b);
      return tensor ? static_cast<const S*>(tensor) + state * n : nullptr;
    };
    const Range rows = rows_to_start(member);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      copy_row(row(p_.h0, b, p_.R), p_.R, Rp_, dir.h0 + b * Rp_);
      copy_row(row(p_.d_h_n, b, p_.R), p_.R, Rp_, dir.dh + b * Rp_);
      if (dir.h_mask) copy_row(row(p_.h_mask, b, p_.R), p_.R, Rp_, dir.h_mask + b * Rp_);
      if (dir.candidate_mask)
        copy_row(row(p_.candidate_mask, b, p_.H), p_.H, Hp_, dir.candidate_mask + b * Hp_);
      if (dir.d_h0) copy_row<A>(nullptr, 0, Rp_, dir.d_h0 + b * Rp_);
      if (has_c()) {
        copy_row(row(p_.c0, b, p_.H), p_.H, Hp_, dir.c0 + b * Hp_);
        copy_row(row(p_.d_c_n, b, p_.H), p_.H, Hp_, dir.dc + b * Hp_);
        if (dir.d_c0) copy_row<A>(nullptr, 0, Hp_, dir.d_c0 + b * Hp_);
      }
    }
  }

  // The saved row of sequence b before step t, or -1 where the sequence starts with t.
  int64_t row_before(const Task& task, int64_t t, int64_t b) const {
    if (begins(task.d, t, b)) return -1;
    if (task.d == 0) return t > 0 ? steps_.offset(t - 1) + b : -1;
    return t + 1 < steps_.T && b < steps_.rows(t + 1) ? steps_.offset(t + 1) + b : -1;
  }

  // The states before step t.
  struct Before {
    const A* h;
    const A* c;
  };
  Before states_before(const Task& task, int64_t t, int64_t b) const {
    const int64_t before = row_before(task, t, b);
    if (before >= 0) {
      const A* saved = saved_row(task.plane, before);
      return {saved, has_c() ? saved + Hp_ : nullptr};
    }
    const Direction& dir = *task.dir;
    if (!p_.reset_to_initial && begins(task.d, t, b)) return {dir.zeros, dir.zeros};
    return {dir.h0 + b * Rp_, has_c() ? dir.c0 + b * Hp_ : nullptr};
  }

  // dh += d_output[t, b] for units [begin, end).
  void add_output_gradient(const Task& task, int64_t t, int64_t b, int64_t begin, int64_t end,
                           A* dh) const {
    const int64_t column = task.d * p_.R;
    const auto add = [&](const auto* dy) {
      for (int64_t u = begin; u < end; u += L)
        store(dh + u, load(dh + u) + load_partial(dy + column + u, p_.R - u));
    };
    if (task.layer + 1 == p_.layers) {
      if (p_.d_output.data) add(row_of<S>(p_.d_output, steps_, t, b));
    } else {
      add(between(task.layer) + (steps_.offset(t) + b) * p_.dirs * p_.R);
    }
  }

  // Through the cell: from the gradients of the states after step t to those of its gates, and of
  // the states before it but for the part that flows through W_hh. Some stages of it: the cell's
  // own formula; its operand, by a product or a norm; the norms of its gates.
  void gate_gradients(const Task& task, const Member& member, const Chunk& chunk, int64_t t,
                      Range stages) {
    const int64_t end = member.rows.begin + alive(member, t);
    if (end == member.rows.begin) return;
    if (stages.begin == 0) output_gradients(task, member, chunk, t, end);
    if (stages.begin == 0 || info_.norm_gates)
      for (int64_t b = member.rows.begin; b < end; ++b) {
        const BackwardRow<A> at = row_of_step(task, member, chunk, t, b);
        if (stages.begin == 0) cell_.backward(at);
        if (info_.norm_gates)
          for (int64_t stage = stages.begin; stage < stages.end; ++stage)
            through_norms(at, norms_of(task, b), stage);
      }
    if (!info_.two_products()) {
      if (stages.end == info_.stages()) round_gates(task, member, chunk, t, 0, G_);
      return;
    }
    if (stages.begin == 0) round_gates(task, member, chunk, t, first_gates_, G_);
    if (stages.end == info_.stages()) operand_gradients(task, member, chunk, t);
  }

  // To the gradients of the cell's own states after step t, of sequences before `end`.
  void output_gradients(const Task& task, const Member& member, const Chunk& chunk, int64_t t,
                        int64_t end) {
    Direction& dir = *task.dir;
    const int64_t h_end = units_of_h(member.units).end;
    for (int64_t b = member.rows.begin; b < end; ++b) {
      add_output_gradient(task, t, b, member.units.begin, h_end, dir.dh + b * Rp_);
      if (!p_.d_all_c.data) continue;
      const S* d_c = row_of<const S>(p_.d_all_c, steps_, t, b) + task.d * p_.H;
      A* dc = dir.dc + b * Hp_;
      for (int64_t u = member.units.begin; u < member.units.end; u += L)
        store(dc + u, load(dc + u) + load_partial(d_c + u, p_.H - u));
    }
    if (p_.projected()) unproject(task, member, end, chunk, t);
  }

  // What products with weights will read of a step's gate gradients.
  void round_gates(const Task& task, const Member& member, const Chunk& chunk, int64_t t,
                   int first_gate, int end_gate) {
    if constexpr (kRounds) {
      const Direction& dir = *task.dir;
      const auto round = [&](const A* gates, O* operand) {
        const int64_t begin = chunk.row(t, member.rows.begin);
        for (int64_t row = begin; row < begin + alive(member, t); ++row)
          for (int g = first_gate; g < end_gate; ++g)
            for (int64_t u = member.units.begin; u < member.units.end; u += L) {
              const int64_t at = row * ldg_ + g * Hp_ + u;
              store(operand + at, load(gates + at));
            }
      };
      round(dir.gates_x, dir.operand_x);
      if (dir.operand_h != dir.operand_x) round(dir.gates_h, dir.operand_h);
    }
  }

  int64_t operand_size() const {
    return info_.normed_operand ? 3 * Hp_ : info_.two_products() ? Hp_ : 0;
  }

  // Where the norms of sequence b have their gradients.
  struct Norms {
    A* d;
    A* d_gains;
    A* d_shifts;
  };
  Norms norms_of(const Task& task, int64_t b) const {
    A* d_norms = task.dir->d_norms + b * ld_norms_;
    return {task.dir->d_normed + b * ld_normed_, d_norms, d_norms + info_.gains() * Hp_};
  }

  // Of the sequences that have a step in a chunk.
  void clear_norms(const Task& task, const Member& member, const Chunk& chunk) const {
    for (int64_t i = 0; i < alive(member, chunk.first); ++i)
      for (int64_t slot = 0; slot < ld_norms_; slot += Hp_)
        for (int64_t u = member.units.begin; u < member.units.end; u += L)
          store(norms_of(task, member.rows.begin + i).d_gains + slot + u, Vector<A>{});
  }

  // One stage of the way from the gradients of normalised gates to those of the products.
  void through_norms(const BackwardRow<A>& at, const Norms& norms, int64_t stage) const {
    if (stage + 1 == info_.stages()) return through_gate_norms(at, norms);
    if (info_.normed_operand) {
      if (stage == 0)
        return cell_.saved_operand(at, at.begin, at.end, at.d_operand + 2 * Hp_ + at.begin);
      through_operand_norm(at, norms);
    }
    for (int64_t slot = 0; slot < ld_normed_; slot += Hp_) {
      const A* d = slot < G_ * Hp_ ? at.gates_x + slot : at.gates_h + slot - G_ * Hp_;
      for (int64_t u = at.begin; u < at.end; u += L) store(norms.d + slot + u, load(d + u));
      add_units(d, {at.begin, at.end}, norms.d_shifts + slot);
    }
  }

  void through_operand_norm(BackwardRow<A> at, const Norms& norms) const {
    const Range units{at.begin, at.end};
    const int64_t gain = 2 * G_ * Hp_, shift = gain + Hp_;
    const A* const normed = at.d_operand;
    at.d_operand += Hp_;  // as it was: what no other member reads
    add_units(normed, units, norms.d_gains + shift);
    normalise_backward(GatesInSlots<A>{0, 1, p_.H, Hp_}, units, at.d_operand + Hp_,
                       at.w + info_.diagonals * Hp_ + gain, normed, norms.d_gains + gain,
                       [&](int64_t u, Vector<A> d) __attribute__((always_inline)) {
                         store(at.d_operand + u, load(at.d_operand + u) + d);
                       });
    cell_.operand_backward(at);
  }

  void through_gate_norms(const BackwardRow<A>& at, const Norms& norms) const {
    const int64_t gates = G_ * Hp_;
    const A* const gains = at.w + info_.diagonals * Hp_;
    const A* const raw = at.states + (slots_ - 2 * G_) * Hp_;
    const A* const dh = info_.sums_gates ? norms.d : norms.d + gates;
    each_norm([&](int first, int count) {
      const auto through = [&](const A* row, const A* gain, const A* d, A* to, A* d_gain) {
        normalise_backward(GatesInSlots<A>{first, count, p_.H, Hp_}, {at.begin, at.end}, row, gain,
                           d, d_gain,
                           [&](int64_t u, Vector<A> d_row)
                               __attribute__((always_inline)) { store(to + u, d_row); });
      };
      through(raw, gains, norms.d, at.gates_x, norms.d_gains);
      through(raw + gates, gains + gates, dh, at.gates_h, norms.d_gains + gates);
    });
  }

  static void add_units(const A* from, Range units, A* to) {
    for (int64_t u = units.begin; u < units.end; u += L)
      store(to + u, load(to + u) + load(from + u));
  }

  BackwardRow<A> row_of_step(const Task& task, const Member& member, const Chunk& chunk, int64_t t,
                             int64_t b) const {
    const Direction& dir = *task.dir;
    const Before before = states_before(task, t, b);
    const A* states = saved_row(task.plane, steps_.offset(t) + b);
    const int64_t gates = chunk.row(t, b) * ldg_;
    BackwardRow<A> at{};
    at.begin = member.units.begin;
    at.end = member.units.end;
    at.slot = Hp_;
    at.states = states;
    at.saved = states + info_.states * Hp_;
    // A projected cell (LSTM) does not read the h before it except through W_hh.
    at.h_before = p_.projected() ? nullptr : before.h;
    at.c_before = before.c;
    at.w = dir.diag;
    at.h_mask = dir.h_mask ? dir.h_mask + b * Rp_ : nullptr;
    at.candidate_mask = dir.candidate_mask ? dir.candidate_mask + b * Hp_ : nullptr;
    at.dh = p_.projected() ? dir.d_unprojected + b * Hp_ : dir.dh + b * Rp_;
    at.dc = has_c() ? dir.dc + b * Hp_ : nullptr;
    at.gates_x = dir.gates_x + gates;
    at.gates_h = dir.gates_h + gates;
    if (p_.zoned()) {
      at.own = at.saved + info_.saved * Hp_;
      for (int s = 0; s < 2; ++s) at.zoneout[s] = A(p_.zoneout[s]);
      if (p_.zoneout_mask.data)
        at.zoneout_mask = static_cast<const uint8_t*>(p_.zoneout_mask.data) +
                          task.plane * p_.zoneout_plane + p_.zoneout_mask.at(steps_, t, b);
      at.zoneout_state = p_.R;
      at.valid_c = p_.H;
    }
    at.d_operand = dir.d_operand ? dir.d_operand + b * operand_size() : nullptr;
    return at;
  }

  // Through the second product of a cell that has one, to its operand and what depends on that.
  void operand_gradients(const Task& task, const Member& member, const Chunk& chunk, int64_t t) {
    Direction& dir = *task.dir;
    const int64_t rows = alive(member, t);
    if (rows == 0) return;
    const O* gates = dir.operand_h + chunk.row(t, member.rows.begin) * ldg_ + first_gates_ * Hp_;
    A* out = dir.d_operand + member.rows.begin * Hp_;
    const int64_t at_once = dir.packed_second ? rows : 0;
    for_panels_at_once<W>(at_once, second_gates() * Hp_, 1, member.units.begin, member.units.end,
                          turn(t), [&](int64_t column, int vectors, int panels, int64_t next) {
                            times(0, rows, second_gates(), p_.H, p_.R, gates, ldg_,
                                  second_hh(task.weights), dir.packed_second, column, next, vectors,
                                  panels, nullptr, 0, out + column, Hp_);
                          });
    for (int64_t b = member.rows.begin; b < member.rows.begin + rows; ++b)
      cell_.operand_backward(row_of_step(task, member, chunk, t, b));
    round_gates(task, member, chunk, t, 0, first_gates_);
  }

  // Through h = W_hr m, m the cell's own output. Keeps dh of the chunk for the gradient of W_hr.
  void unproject(const Task& task, const Member& member, int64_t end, const Chunk& chunk,
                 int64_t t) {
    const int64_t begin = member.rows.begin;
    Direction& dir = *task.dir;
    const int64_t ld = Rp_ + kSkew;
    A* const d_projected = dir.d_projected + chunk.row(t, begin) * ld;
    for (int64_t b = begin; b < end; ++b) {
      const BackwardRow<A> at =
          p_.zoned() ? row_of_step(task, member, chunk, t, b) : BackwardRow<A>{};
      A* dh = dir.dh + b * Rp_;
      for (int64_t u = 0; u < Rp_; u += L) {
        const Vector<A> d = load(dh + u);
        const Vector<A> kept = p_.zoned() ? d * zoneout_share(at, 0, u, p_.R - u) : Vector<A>{};
        store(d_projected + (b - begin) * ld + u, d - kept);
        store(dh + u, kept);
      }
    }
    const O* operand;
    if constexpr (kRounds) {
      O* rounded = dir.operand_r + begin * ld;
      for (int64_t m = 0; m < end - begin; ++m)
        for (int64_t u = m * ld; u < m * ld + Rp_; u += L)
          store(rounded + u, load(d_projected + u));
      operand = rounded;
    } else {
      operand = d_projected;
    }
    const int64_t at_once = dir.packed_hr ? end - begin : 0;
    for_panels_at_once<W>(
        at_once, Rp_, 1, 0, Hp_, [&](int64_t column, int vectors, int panels, int64_t next) {
          times(0, end - begin, 1, p_.R, p_.H, operand, ld, task.weights.hr, dir.packed_hr, column,
                next, vectors, panels, nullptr, 0, dir.d_unprojected + begin * Hp_ + column, Hp_);
        });
  }

  // out[m, column...] = a[m, :] W + add for a panel of columns of W[gates*units, N], or two packed
  // ones. These are the rows from `first` on of those that meet the panel, before that of columns
  // `next`.
  void times(int64_t first, int64_t rows, int64_t gates, int64_t units, int64_t N, const O* a,
             int64_t lda, const void* w, const W* packed, int64_t column, int64_t next, int vectors,
             int panels, const A* add, int64_t ld_add, A* out, int64_t ldo) const {
    const int64_t padded = pad_units(units);
    if constexpr (!kRounds)
      if (!packed)
        return times_rows(rows, gates, units, padded, N, a, lda, static_cast<const S*>(w), column,
                          vectors, add, ld_add, out, ldo);
    const int64_t K = gates * padded;
    const W* panel = packed + column * packed_rows<W>(K);
    packed_product<O, W>(first, rows, K, a, lda, panel, fetched(packed, 1, K, column, next),
                         vectors, panels, add, ld_add, out, ldo);
  }

  // dh += dgates W_hh for this member's units.
  void state_gradients(const Task& task, const Member& member, const Chunk& chunk, int64_t t) {
    Direction& dir = *task.dir;
    const int64_t rows = alive(member, t);
    if (rows == 0) return;
    const O* gates = dir.operand_h + chunk.row(t, member.rows.begin) * ldg_;
    A* dh = dir.dh + member.rows.begin * Rp_;
    A* out = dir.h_mask ? dir.d_masked + member.rows.begin * Rp_ : dh;
    const A* before = dir.h_mask ? nullptr : dh;
    const Range columns = units_of_h(member.units);
    const int64_t at_once = dir.packed_hh ? rows : 0;
    for_panels_at_once<W>(at_once, first_gates_ * Hp_, 1, columns.begin, columns.end, turn(t),
                          [&](int64_t column, int vectors, int panels, int64_t next) {
                            times(0, rows, first_gates_, p_.H, p_.R, gates, ldg_, task.weights.hh,
                                  dir.packed_hh, column, next, vectors, panels,
                                  before ? before + column : nullptr, Rp_, out + column, Rp_);
                          });
    const A* mask = dir.h_mask + member.rows.begin * Rp_;
    for (int64_t m = 0; dir.h_mask && m < rows; ++m)
      for (int64_t u = m * Rp_ + columns.begin; u < m * Rp_ + columns.end; u += L)
        store(dh + u, load(dh + u) + load(mask + u) * load(out + u));
  }

  // Where a sequence begins with step t, its gradient does not flow on to the step before: it is
  // lost, or that of h0 and c0.
  void reset(const Task& task, const Member& member, int64_t t) {
    if (!p_.reset.data) return;
    const Direction& dir = *task.dir;
    const auto end_here = [](Range units, A* gradient, A* total) {
      for (int64_t u = units.begin; u < units.end; u += L) {
        if (total) store(total + u, load(total + u) + load(gradient + u));
        store(gradient + u, Vector<A>{});
      }
    };
    for (int64_t b = member.rows.begin; b < member.rows.begin + alive(member, t); ++b) {
      if (!begins(task.d, t, b)) continue;
      end_here(units_of_h(member.units), dir.dh + b * Rp_, dir.d_h0 ? dir.d_h0 + b * Rp_ : nullptr);
      if (has_c())
        end_here(member.units, dir.dc + b * Hp_, dir.d_c0 ? dir.d_c0 + b * Hp_ : nullptr);
    }
  }

  // Right operands of the weight gradients stand in slabs of kSlab rows, and each slab in panels.
  // Writes row `row` of `rows`: load(column) for every vector of it.
  template <class Load>
  static FUSED_RNN_INLINE void stage_row(int64_t columns, int64_t rows, int64_t row, A* slabs,
                                         Load load) {
    const int64_t first = row / kSlab * kSlab;
    const int64_t count = slab_rows(rows, first);
    A* panels = slabs + first * columns;
    for_panels<A>(1, 0, columns, [&](int64_t column, int vectors) {
      for (int v = 0; v < vectors; ++v) {
        const PanelVector at(panels + column * count, count, vectors, v, L);
        store(at.data + (row - first) * at.stride, load(column + v * L));
      }
    });
  }

  static int64_t slab_rows(int64_t rows, int64_t first) {
    return rows - first < kSlab ? rows - first : kSlab;
  }

  // Right operands of the weight gradients: x, and the h before each step.
  void stage(const Task& task, const Member& member, const Chunk& chunk) {
    if (!p_.d_weights) return;
    Direction& dir = *task.dir;
    const int64_t rows = chunk.rows();
    for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
      const Range part = part_of(chunk.rows_at(t), 1, member.index, member.size);
      for (int64_t b = chunk.begin + part.begin; b < chunk.begin + part.end; ++b) {
        const int64_t row = chunk.row(t, b);
        if (task.layer == 0) {
          const S* x = row_of<const S>(p_.input, steps_, t, b);
          stage_row(pad_units(task.I), rows, row, dir.x,
                    [&](int64_t i) { return load_partial(x + i, task.I - i); });
        } else {
          // h of the layer below, where saved has it. Its directions meet without a gap.
          const A* below = saved_row((task.layer - 1) * p_.dirs, steps_.offset(t) + b);
          const int64_t next_direction = steps_.N * slots_ * Hp_;
          stage_row(pad_units(task.I), rows, row, dir.x, [&](int64_t i) {
            if (i + L <= p_.R) return load(below + i);
            if (i >= p_.R) return load_partial(below + next_direction + i - p_.R, task.I - i);
            A both[L];
            for (int lane = 0; lane < L; ++lane) {
              const int64_t u = i + lane;
              both[lane] = u < p_.R     ? below[u]
                           : u < task.I ? below[next_direction + u - p_.R]
                                        : A{};
            }
            return load(both);
          });
        }
        if (info_.recurrent) {
          const A* h = states_before(task, t, b).h;
          const A* mask = dir.h_mask ? dir.h_mask + b * Rp_ : nullptr;
          stage_row(Rp_, rows, row, dir.h, [&](int64_t i) {
            const Vector<A> units = load_partial(h + i, p_.R - i);
            return mask ? units * load(mask + i) : units;
          });
        }
        if (info_.two_products()) {
          const BackwardRow<A> at = row_of_step(task, member, chunk, t, b);
          stage_row(Hp_, rows, row, dir.operand, [&](int64_t i) {
            A operand[L];
            cell_.saved_operand(at, i, i + L, operand);
            return load(operand);
          });
        }
        if (p_.projected()) {
          const A* m =
              saved_row(task.plane, steps_.offset(t) + b) + (info_.states + info_.saved) * Hp_;
          stage_row(Hp_, rows, row, dir.unprojected, [&](int64_t i) { return load(m + i); });
        }
      }
    }
  }

  // Whether one product is the whole gradient of a weight: it is then rounded at once.
  bool one_product() const {
    return plan_.blocks == 1 && plan_.chunk_steps >= steps_.T && steps_.N <= kSlab;
  }

  // The right operand of an outer product, and where its gradient is added up: in the tensor
  // itself, or before rounding in memory of our own.
  struct Factor {
    const A* panels;
    int64_t N;
    void* tensor;
    A* own;

    // Of what stands so many rows further in the gradient.
    Factor of_rows(const A* other, int64_t rows) const {
      return {other, N, static_cast<S*>(tensor) + rows * N, own ? own + rows * N : nullptr};
    }
  };

  void weight_gradients(const Task& task, const Member& member, const Chunk& chunk) {
    Direction& dir = *task.dir;
    const WeightGrads& grads = p_.d_weights[task.plane];
    const Range units = part_of(Hp_, kUnitPad, member.index, member.size);
    // Where x and h meet the same gradients, in one go.
    const bool both = dir.gates_h == dir.gates_x && info_.recurrent && !info_.two_products();
    const Factor x{dir.x, task.I, grads.ih, dir.d_ih}, h{dir.h, p_.R, grads.hh, dir.d_hh};
    outer_product(chunk, G_, p_.H, units, dir.gates_x, ldg_, x, both ? &h : nullptr);
    if (info_.recurrent && !both)
      outer_product(chunk, first_gates_, p_.H, units, dir.gates_h, ldg_, h);
    if (info_.two_products())
      outer_product(chunk, second_gates(), p_.H, units, dir.gates_h + first_gates_ * Hp_, ldg_,
                    h.of_rows(dir.operand, first_gates_ * p_.H));
    if (p_.projected())
      outer_product(chunk, 1, p_.R, part_of(Rp_, kUnitPad, member.index, member.size),
                    dir.d_projected, Rp_ + kSkew,
                    Factor{dir.unprojected, p_.H, grads.hr, dir.d_hr});
    const Rows gates_x{dir.gates_x, chunk.rows(), ldg_}, gates_h{dir.gates_h, chunk.rows(), ldg_};
    A* const d_weights = dir.d_bias_ih + G_ * Hp_;
    sum_rows(gates_x.behind(G_ * Hp_), units, info_.diagonals, chunk.is_first, d_weights);
    const Rows norms{dir.d_norms + chunk.begin * ld_norms_, chunk.rows_at(chunk.first), ld_norms_};
    const int gains = info_.gains();
    sum_rows(norms, units, gains, chunk.is_first, d_weights + info_.diagonals * Hp_);
    if (!grads.bias_ih) return;
    const Rows biases = info_.norm_gates ? norms.behind(gains * Hp_) : gates_x;
    sum_rows(biases, units, G_, chunk.is_first, dir.d_bias_ih);
    if (info_.sums_gates) return;
    const Rows others = info_.norm_gates ? biases.behind(G_ * Hp_) : gates_h;
    sum_rows(others, units, G_, chunk.is_first, dir.d_bias_hh);
  }

  // d[g*units + j, i] += sum over the chunk of left[row, g, j] * right[row, i], for j in `range`
  // and the right operands given, one or two.
  static void outer_product(const Chunk& chunk, int64_t gates, int64_t units, Range range,
                            const A* left, int64_t ld_left, const Factor& right,
                            const Factor* other = nullptr) {
    const int64_t height = (range.end < units ? range.end : units) - range.begin;
    if (height <= 0) return;
    // Every panel must take the tiles of the widest.
    static_assert(max_rows(3) >= max_rows(4) || kUnitPad / L % 2 == 0);
    // Tiles take a few columns of `left`, whose rows are far apart: copied, they are streams that
    // all panels meet. So many are copied that large panels need not come from afar for each tile.
    // Whole vectors are copied, and the next row overwrites what was too much.
    constexpr int64_t kColumns = 4 * kMaxRows;
    alignas(64) A columns[kSlab * kColumns + kMaxRows + L];
    for (int64_t slab = 0; slab < chunk.rows(); slab += kSlab) {
      const int64_t count = slab_rows(chunk.rows(), slab);
      const bool overwrite = chunk.is_first && slab == 0;
      for (int64_t g = 0; g < gates; ++g)
        for_heights(height, kColumns, [&](int64_t first, int64_t copied) {
          const A* from = left + slab * ld_left + g * pad_units(units) + range.begin + first;
          const int64_t row = g * units + range.begin + first;
          for_heights(copied, kMaxRows, [&](int64_t m, int64_t width) {
            A* to = columns + m * count;
            for (int64_t k = 0; k < count; ++k, to += width)
              for (int i = 0; i < kMaxRows; i += L)  // else a call of memmove
                if (i < width) store(to + i, load(from + k * ld_left + m + i));
          });
          for (const Factor* factor : {&right, other}) {
            if (!factor) continue;
            const auto add_to = [&](auto* d) {
              const A* panels = factor->panels + slab * pad_units(factor->N);
              accumulate(copied, count, columns, panels, factor->N, overwrite, d + row * factor->N);
            };
            kLowPrecision && factor->own ? add_to(factor->own)
                                         : add_to(static_cast<S*>(factor->tensor));
          }
        });
    }
  }

  // c[m, i] (+)= sum over k of columns[k, m] * right[k, i], with m in groups as they are copied.
  template <class C>
  static void accumulate(int64_t M, int64_t K, const A* columns, const A* right, int64_t N,
                         bool overwrite, C* c) {
    alignas(64) A edge[kMaxRows * kPanel];
    for_panels<A>(1, 0, pad_units(N), [&](int64_t column, int vectors) {
      const A* panel = right + column * K;
      const int64_t width = vectors * L < N - column ? vectors * L : N - column;
      const auto product = [&](int64_t height, const A* left, int64_t ld_left, C* to) {
        const TileFunction<A> tile =
            kTiles<A, A, Left::kColumns, Right::kPanel>.at[vectors - 1][height - 1];
        for (int64_t i = 0; i < height; ++i)  // what is added to, of a large weight, is far
          for (int64_t n = 0; n < width; n += kLine / int64_t(sizeof(C)))
            __builtin_prefetch(to + i * N + n, 0, 2);
        if constexpr (std::is_same_v<C, A>)
          if (width == vectors * L)
            return tile({K, left, ld_left, panel, 0}, overwrite ? nullptr : to, N, to, N, 1);
        tile({K, left, ld_left, panel, 0}, nullptr, 0, edge, kPanel, 1);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t n = 0; n < width; n += L) {
            const int64_t valid = width - n;
            Vector<A> sum = load(edge + i * kPanel + n);
            if (!overwrite) sum += load_partial(to + i * N + n, valid);
            store_partial(to + i * N + n, sum, valid);
          }
      };
      for_heights(M, kMaxRows, [&](int64_t first, int64_t copied) {
        for_heights(copied, max_rows(kMaxVectors), [&](int64_t m, int64_t height) {
          product(height, columns + first * K + m, copied, c + (first + m) * N + column);
        });
      });
    });
  }

  struct Rows {
    const A* data;
    int64_t count;
    int64_t stride;
    Rows behind(int64_t offset) const { return {data + offset, count, stride}; }
  };

  // out[slots, Hp] += the sum of some rows, or is it. Blocks are summed first: a bias is a sum over
  // all rows, with no product to hide behind, and one long row of additions loses more digits than
  // torch does.
  void sum_rows(const Rows& rows, Range units, int slots, bool overwrite, A* out) const {
    constexpr int64_t kBlock = 8;
    constexpr int kAtOnce = kUnitPad / L;  // vectors: one of a row alone is less than a line
    for (int s = 0; s < slots; ++s)
      for (int64_t u = units.begin; u < units.end; u += kUnitPad) {
        Vector<A> sum[kAtOnce] = {};
        for (int64_t first = 0; first < rows.count; first += kBlock) {
          const int64_t end = first + kBlock < rows.count ? first + kBlock : rows.count;
          Vector<A> block[kAtOnce] = {};
          for (int64_t row = first; row < end; ++row)
#pragma GCC unroll 8
            for (int v = 0; v < kAtOnce; ++v)
              block[v] += load(rows.data + row * rows.stride + s * Hp_ + u + v * L);
#pragma GCC unroll 8
          for (int v = 0; v < kAtOnce; ++v) sum[v] += block[v];
        }
#pragma GCC unroll 8
        for (int v = 0; v < kAtOnce; ++v) {
          A* total = out + s * Hp_ + u + v * L;
          store(total, overwrite ? sum[v] : sum[v] + load(total));
        }
      }
  }

  // Where the input gradient of direction d goes: into memory of our own (rows of I), or into the
  // result.
  A* own_input_gradient(const Task& task) const {
    if (task.dir->d_input) return task.dir->d_input;
    return task.layer > 0 ? between(task.layer - 1) : nullptr;
  }

  void input_gradients(const Task& task, const Member& member, const Chunk& chunk) {
    Direction& dir = *task.dir;
    const Range part = part_of(chunk.rows(), 1, member.index, member.size);
    A* own = own_input_gradient(task);
    alignas(64) A tile_out[kRowsOfPiece * kPanel];
    // As for many rows: one panel at a time.
    for_panels_at_once<W>(
        kRowsOfPiece, G_ * Hp_, 1, 0, pad_units(task.I),
        [&](int64_t column, int vectors, int, int64_t next) {
          int64_t t = chunk.first;
          for (int64_t row = part.begin; row < part.end; row += kRowsOfPiece) {
            const int64_t height = part.end - row < kRowsOfPiece ? part.end - row : kRowsOfPiece;
            times(row - part.begin, height, G_, p_.H, task.I, dir.operand_x + row * ldg_, ldg_,
                  task.weights.ih, dir.packed_ih, column, next, vectors, 1, nullptr, 0, tile_out,
                  kPanel);
            for (int64_t i = 0; i < height; ++i) {
              while (row + i >= chunk.offsets[t + 1 - chunk.first]) ++t;
              const int64_t b = row + i - chunk.row(t, 0);
              const A* from = tile_out + i * kPanel - column;
              if (own)
                store_row<A>(from, column, column + vectors * L, task.I,
                             own + (steps_.offset(t) + b) * task.I);
              else
                store_row<S>(from, column, column + vectors * L, task.I,
                             row_of<S>(p_.d_input, steps_, t, b));
            }
          }
        });
  }

  // The input's gradient is the sum of both directions'.
  void add_directions(int64_t layer, Range rows) {
    const int64_t I = p_.input_size(layer);
    int64_t t = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const auto add = [&](const auto* first, auto* out) {
        const A* second = directions_[1].d_input + row * I;
        for (int64_t i = 0; i < I; i += L)
          store_partial(out + i, load_partial(first + i, I - i) + load_partial(second + i, I - i),
                        I - i);
      };
      const A* own = directions_[0].d_input ? directions_[0].d_input + row * I : nullptr;
      if (layer > 0) {
        A* out = between(layer - 1) + row * I;
        own ? add(own, out) : add(static_cast<const A*>(out), out);
      } else {
        while (row >= steps_.offset(t) + steps_.rows(t)) ++t;
        S* out = row_of<S>(p_.d_input, steps_, t, row - steps_.offset(t));
        own ? add(own, out) : add(static_cast<const S*>(out), out);
      }
    }
  }

  void finish(const Task& task, const Member& member) {
    const Direction& dir = *task.dir;
    const auto write = [&](Range units, A* gradient, const A* total, int64_t n, void* tensor,
                           int64_t b) {
      for (int64_t u = units.begin; total && u < units.end; u += L)
        store(gradient + u, load(gradient + u) + load(total + u));
      const int64_t state = task.plane * steps_.B + steps_.place(b);
      store_row(gradient, units.begin, units.end, n, static_cast<S*>(tensor) + state * n);
    };
    for (int64_t b = member.rows.begin; b < member.rows.end; ++b) {
      if (p_.d_h0)
        write(units_of_h(member.units), dir.dh + b * Rp_, dir.d_h0 ? dir.d_h0 + b * Rp_ : nullptr,
              p_.R, p_.d_h0, b);
      if (p_.d_c0)
        write(member.units, dir.dc + b * Hp_, dir.d_c0 ? dir.d_c0 + b * Hp_ : nullptr, p_.H,
              p_.d_c0, b);
    }
  }

  void finish_weights(const Task& task, const Member& member) {
    if (!p_.d_weights) return;
    const Direction& dir = *task.dir;
    const WeightGrads& grads = p_.d_weights[task.plane];
    const Range units = part_of(Hp_, kUnitPad, member.index, member.size);
    for (int p = 0; p < info_.unit_weights(); ++p)
      store_row(dir.d_bias_ih + (G_ + p) * Hp_, units.begin, units.end, p_.H,
                static_cast<S*>(grads.diag) + p * p_.H);
    if (grads.bias_ih)
      for (int g = 0; g < G_; ++g) {
        const A* d_bias_hh = info_.sums_gates ? dir.d_bias_ih : dir.d_bias_hh;
        store_row(dir.d_bias_ih + g * Hp_, units.begin, units.end, p_.H,
                  static_cast<S*>(grads.bias_ih) + g * p_.H);
        store_row(d_bias_hh + g * Hp_, units.begin, units.end, p_.H,
                  static_cast<S*>(grads.bias_hh) + g * p_.H);
      }
    if constexpr (kLowPrecision) {
      const auto round_rows = [](const A* own, void* tensor, int64_t gates, int64_t height,
                                 Range range, int64_t N) {
        if (!own) return;
        const int64_t end = range.end < height ? range.end : height;
        for (int64_t g = 0; g < gates; ++g)
          for (int64_t row = g * height + range.begin; row < g * height + end; ++row)
            for (int64_t i = 0; i < N; i += L)
              store_partial(static_cast<S*>(tensor) + row * N + i,
                            load_partial(own + row * N + i, N - i), N - i);
      };
      round_rows(dir.d_ih, grads.ih, G_, p_.H, units, task.I);
      if (info_.recurrent) round_rows(dir.d_hh, grads.hh, G_, p_.H, units, p_.R);
      if (p_.projected())
        round_rows(dir.d_hr, grads.hr, 1, p_.R, part_of(Rp_, kUnitPad, member.index, member.size),
                   p_.H);
    }
  }

  const CellRows<A>& cell_;
  const int G_;
  const int first_gates_;     // those that W_hh h adds to
  const int64_t block_rows_;  // sequences of a block, at most
  const int64_t ldg_;         // of the gate gradients
  const int64_t ld_normed_;   // of those of normalised gates
  const int64_t ld_norms_;    // of those of the norms
  Direction* directions_;     // [slots of work]
  A* between_;                // [betweens, N, D*R]: gradient of a layer's output
};

template <class S>
void backward(const AnyCell& cell, const BackwardProblem& problem, const Plan& plan,
              const Runtime& runtime) {
  BackwardScan<S> scan(static_cast<const CellRows<Accumulate<S>>&>(cell), problem, plan);
  run_scan(scan, plan.threads, runtime);
}

}  // namespace fused_rnn::cpu::FUSED_RNN_ISA
