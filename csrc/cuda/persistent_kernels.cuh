// All steps of a layer and direction in one launch. A block has some units, and what W_hh has for
// them stays in its shared memory. What the others have made of a step, h or backward the gradients
// of the gates, it reads from global memory that was filled with kNothing before the launch: what
// is anything else has arrived, so there is no barrier between blocks. Every step has memory of its
// own.
#pragma once

#include <type_traits>

#include "cell_units.cuh"
#include "persistent.h"

namespace fused_rnn::cuda {

template <class S>
constexpr DType kTypeOf = __is_same(S, float)           ? DType::kFloat32
                          : __is_same(S, dev::bfloat16) ? DType::kBFloat16
                                                        : DType::kFloat16;

// 16 bytes of elements.
struct alignas(16) Words {
  uint32_t word[4];

  // Whether all elements of S have arrived.
  template <class S>
  FUSED_RNN_DEVICE bool arrived() const {
    uint32_t missing = 0;
    for (const uint32_t w : word) {
      if constexpr (sizeof(S) == 2)
        missing |= (~w - 0x00010001u) & w & 0x80008000u;  // a half of ~w is zero
      else
        missing |= w == kNothing;
    }
    return missing == 0;
  }
};

// What a block has in shared memory, as persistent.h sizes it.
template <class S>
struct PersistentShared {
  S* weights;       // of 16 bits as fragments have them; of float [sums, shared_row(K)]
  S* operands;      // of float: [kRowsAtOnce, shared_row(kStage or K)]
  float* partials;  // [2, warps, kRowsAtOnce, partial_stride(sums)]: written and read in turn

  FUSED_RNN_DEVICE PersistentShared(int sums, int64_t K) : weights(dev::shared<S>()) {
    operands = weights + weight_count(sums, K, sizeof(S));
    const int64_t staged = sizeof(S) == 2 ? 0 : kRowsAtOnce * shared_row(K < kStage ? K : kStage);
    partials = reinterpret_cast<float*>(operands + staged);
  }
};

// The rows that a block multiplies its weights by, at one step.
struct Operands {
  const char* data;  // S [rows, K]
  int rows, K;
};

// Sums over k of kSums rows of weights, those of a block, times some rows: sum(b, i) of row i.
template <class S, int kSums>
class PersistentProduct {
  static constexpr int kTiles = (kSums + kSumTile - 1) / kSumTile;  // the last one may be half

 public:
  // weight(i, k) is one of them; those of rows and k that are not there are not asked for.
  template <class Weight>
  FUSED_RNN_DEVICE PersistentProduct(int rows, int K, Weight weight) : shared_(kSums, K) {
    const auto checked = [&](int i, int k) { return i < rows && k < K ? weight(i, k) : S(0.0f); };
    const int thread = dev::thread_rank();
    if constexpr (sizeof(S) == 4) {
      for (int at = thread; at < kSums * K; at += kPersistentThreads)
        shared_.weights[at / K * shared_row(K) + at % K] = checked(at / K, at % K);
    } else {
      const int count = int(weight_count(kSums, K, sizeof(S)));
      for (int at = thread; at < count; at += kPersistentThreads) {
        const int e = at % 8, lane = at / 8 % dev::kWarp, j = at / 8 / dev::kWarp % 2;
        const int part = at / 8 / dev::kWarp / 2, parts = (K + kPart - 1) / kPart;
        const int i = part / parts * kSumTile + lane / 4 + e / 2 % 2 * 8;
        const int k = part % parts * kPart + lane % 4 * 8 + j * 4 + e / 4 * 2 + e % 2;
        shared_.weights[at] = checked(i, k);
      }
    }
  }

  // What is multiplied next, which may still have to arrive; loads of it are under way from here
  // on. By all threads of the block, as everything but sum().
  FUSED_RNN_DEVICE void begin(const Operands& in) {
    in_ = in;
    load(next_, 0);
  }

  FUSED_RNN_DEVICE void multiply() {
    turn_ = 1 - turn_;
    if constexpr (sizeof(S) == 4)
      by_fma();
    else
      by_mma();
    dev::sync_block();
  }

  FUSED_RNN_DEVICE float sum(int b, int i) const {
    const float* partial = partials(0) + b * partial_stride(kSums) + i;
    float sum = 0;
    for (int warp = 0; warp < kPersistentWarps; ++warp)
      sum += partial[warp * kRowsAtOnce * partial_stride(kSums)];
    return sum;
  }

 private:
  FUSED_RNN_DEVICE float* partials(int warp) const {
    return shared_.partials +
           (turn_ * kPersistentWarps + warp) * kRowsAtOnce * partial_stride(kSums);
  }
  // Of a warp, where a sum stands M16N8K16::c, for each half of the rows.
  FUSED_RNN_DEVICE void put(const float (&sums)[kTiles][2][4]) const {
    float* const partial = partials(dev::warp_index());
    for (int tile = 0; tile < kTiles; ++tile)
      for (int half = 0; half < 2; ++half)
        for (int r = 0; r < 4; ++r) {
          const dev::Element e = dev::M16N8K16::c(dev::lane_index(), r);
          const int i = tile * kSumTile + e.row, b = half * dev::M16N8K16::N + e.col;
          if (i < kSums) partial[b * partial_stride(kSums) + i] = sums[tile][half][r];
        }
  }

  // Pieces of 16 bytes whose loads a thread has under way together. Of 16 bits a warp loads what it
  // multiplies, parts of k for two rows each: a piece of a row is what a lane holds of two
  // fragments, if k is counted so that element e of fragment j in the part is lane % 4 * 8 + j * 4
  // + e, e < 4. Weights stand in that order too. Floats are loaded by all threads for all, a stage
  // of k at once.
  static constexpr int kPieces = 8;
  struct Batch {
    Words words[kPieces];
  };
  static constexpr int kBatch = kPieces / 2;  // parts of k
  static_assert(kPieces * kPersistentThreads * 4 == kRowsAtOnce * kStage);

  // Piece n of the batch that begins at part or stage `first`, of this warp or the block: its row
  // and element of k; false where there is none.
  FUSED_RNN_DEVICE bool place(int first, int n, int* b, int* k) const {
    if constexpr (sizeof(S) == 2) {
      const int lane = dev::lane_index();
      *b = n % 2 * 8 + lane / 4;
      *k = ((first + n / 2) * kPersistentWarps + dev::warp_index()) * kPart + lane % 4 * 8;
    } else {
      constexpr int kPerRow = kStage / 4, kRows = kPersistentThreads / kPerRow;
      *b = n * kRows + dev::thread_rank() / kPerRow;
      *k = first * kStage + dev::thread_rank() % kPerRow * 4;
    }
    return *b < in_.rows && *k < in_.K;
  }
  FUSED_RNN_DEVICE void load(Batch& batch, int first) const {
    for (int n = 0; n < kPieces; ++n) {
      int b, k;
      batch.words[n] = {};
      if (place(first, n, &b, &k))
        dev::load_relaxed(batch.words[n].word, in_.data + (b * in_.K + k) * int(sizeof(S)));
    }
  }
  // Loads again until all is there.
  FUSED_RNN_DEVICE void await(Batch& batch, int first) const {
    const auto missing = [&] {
      bool any = false;
      for (const Words& words : batch.words) any |= !words.template arrived<S>();
      return any;
    };
    while (dev::ballot(missing())) load(batch, first);
  }

  FUSED_RNN_DEVICE void by_mma() {
    const int lane = dev::lane_index(), parts = (in_.K + kPart - 1) / kPart;
    float sums[kTiles][2][4] = {};
    for (int first = 0; first * kPersistentWarps + dev::warp_index() < parts; first += kBatch) {
      await(next_, first);
      const Batch batch = next_;
      if ((first + kBatch) * kPersistentWarps < parts) load(next_, first + kBatch);
      for (int n = 0; n < kBatch; ++n) {
        const int part = (first + n) * kPersistentWarps + dev::warp_index();
        if (part >= parts) continue;
        for (int tile = 0; tile < kTiles; ++tile) {
          const auto* weights = reinterpret_cast<const Words*>(shared_.weights) +
                                int64_t(tile * parts + part) * 2 * dev::kWarp + lane;
          for (int j = 0; j < 2; ++j) {
            const Words w = weights[j * dev::kWarp];
            for (int half = 0; half < 2; ++half) {
              if (half * 8 >= in_.rows) continue;
              const uint32_t* b = batch.words[2 * n + half].word + 2 * j;
              dev::mma_m16n8k16<S>(sums[tile][half], w.word, {b[0], b[1]});
            }
          }
        }
      }
    }
    put(sums);
  }

  // A lane has 2 of 16 sums and 4 of 16 rows.
  FUSED_RNN_DEVICE void by_fma() {
    constexpr int kFour = kPartOfFloats;
    struct alignas(16) Four {
      float v[kFour];
    };
    const auto four = [&](const S* at) { return *reinterpret_cast<const Four*>(at); };
    const int lane = dev::lane_index(), K = in_.K;
    const int64_t ld = shared_row(K < kStage ? K : kStage);
    float sums[kTiles][2][4] = {};
    for (int stage = 0; stage * kStage < K; ++stage) {
      await(next_, stage);
      if (stage > 0) dev::sync_block();  // what is overwritten was read
      for (int n = 0; n < kPieces; ++n) {
        int b, k;
        if (place(stage, n, &b, &k))
          *reinterpret_cast<Words*>(shared_.operands + b * ld + k - stage * kStage) =
              next_.words[n];
      }
      dev::sync_block();
      if ((stage + 1) * kStage < K) load(next_, stage + 1);
      const int end = K - stage * kStage < kStage ? K - stage * kStage : kStage;
      for (int k = dev::warp_index() * kFour; k < end; k += kPersistentWarps * kFour) {
        Four operand[2][2];
        for (int half = 0; half < 2; ++half)
          for (int j = 0; j < 2; ++j)
            operand[half][j] = four(shared_.operands + (half * 8 + lane % 4 * 2 + j) * ld + k);
        for (int tile = 0; tile < kTiles; ++tile)
          for (int i = 0; i < 2; ++i) {
            const int row = tile * kSumTile + i * 8;
            if (row >= kSums) continue;
            const Four w =
                four(shared_.weights + (row + lane / 4) * shared_row(K) + stage * kStage + k);
            for (int part = 0; part < kFour; ++part)
              for (int half = 0; half < 2; ++half)
                for (int j = 0; j < 2; ++j)
                  sums[tile][half][2 * i + j] += w.v[part] * operand[half][j].v[part];
          }
      }
    }
    put(sums);
  }

  const PersistentShared<S> shared_;
  int turn_ = 0;
  Operands in_{};
  Batch next_;
};

// The units and sequences of a block.
struct PersistentBlock {
  int first, units;   // units of this block
  int64_t row, rows;  // [row, rows): sequences

  FUSED_RNN_DEVICE PersistentBlock(const PersistentShares& shares, int64_t H, int64_t B) {
    const int block = dev::block_index().x % shares.blocks;
    const int group = dev::block_index().x / shares.blocks;
    first = block * shares.units;
    units = first + shares.units < H ? shares.units : int(H) - first;
    row = int64_t(group) * shares.rows;
    rows = row + shares.rows < B ? row + shares.rows : B;
  }

  // Calls body(rows at once), for all of them; all threads do.
  template <class Body>
  FUSED_RNN_DEVICE void for_rows(Body body) const {
    for (int64_t at = row; at < rows; at += kRowsAtOnce) body(at, count(at));
  }
  FUSED_RNN_DEVICE int count(int64_t at) const {
    return int(rows - at < kRowsAtOnce ? rows - at : int64_t(kRowsAtOnce));
  }
};

// What the steps of plan_persistent are without, so that the compiler knows.
template <class S>
FUSED_RNN_DEVICE ForwardStep<float> plain(ForwardStep<float> s) {
  s.type = kTypeOf<S>;
  s.R = s.H;
  s.own = s.masked_after = nullptr;
  s.all_c = s.h_mask = s.candidate_mask = {};
  s.zoneout = {};
  s.next = {};
  s.y.order = s.h_n.order = s.c_n.order = nullptr;
  return s;
}
template <class S>
FUSED_RNN_DEVICE BackwardStep<float> plain(BackwardStep<float> s) {
  s.type = s.gates_type = s.incoming.type = kTypeOf<S>;
  s.R = s.H;
  s.own_slot = 0;
  s.begins = s.incoming.ended = {};
  s.zoneout = {};
  s.candidate_mask = s.incoming.h_mask = s.incoming.d_all_c = {};
  s.incoming.d_h0 = s.incoming.d_c0 = nullptr;
  s.d_own = nullptr;
  s.d_diag = nullptr;
  for (Rows* rows :
       {&s.initial.h, &s.initial.c, &s.incoming.d_output, &s.incoming.d_h_n, &s.incoming.d_c_n})
    rows->order = nullptr;
  return s;
}

template <class Cell, class S, int kSums>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kPersistentThreads,
                                         1) void persistent_forward(ForwardSteps<float> steps) {
  ForwardStep<float> s = plain<S>(steps.first);
  const PersistentBlock block(steps.shares, s.H, s.rows);
  const int H = int(s.H), units = steps.shares.units;
  const auto* w = static_cast<const S*>(s.weight_hh);
  PersistentProduct<S, kSums> product(Cell::kGates * units, H, [&](int i, int k) {
    if (i % units >= block.units) return S(0.0f);
    return w[(int64_t(i / units) * H + block.first + i % units) * H + k];
  });
  dev::sync_block();
  const int mine = dev::thread_rank() / block.units;  // of the rows at once
  const int unit = dev::thread_rank() % block.units;
  const int64_t u = block.first + unit;
  const Biases<Cell, float> biases(s, u);
  for (int64_t step = 0; step < steps.count; ++step) {
    const bool last = step + 1 == steps.count;
    if (step > 0) {
      s.gates_x += steps.gates_x;
      s.y.data = static_cast<S*>(s.y.data) + steps.y;
      if (s.saved) s.saved += steps.saved;
      s.h = s.h_after;
    }
    s.h_after = last ? steps.first.h_after : static_cast<S*>(steps.exchange) + step * s.rows * H;
    s.ends = steps.ends && last ? 0 : s.rows;
    const auto operands = [&](int64_t row) {
      return Operands{static_cast<const char*>(s.h) + row * H * int64_t(sizeof(S)),
                      block.count(row), H};
    };
    product.begin(operands(block.row));
    block.for_rows([&](int64_t row, int count) {
      ForwardInput<Cell, float> in;
      if (mine < count) in = ForwardInput<Cell, float>(s, row + mine, u);
      product.multiply();
      if (row + kRowsAtOnce < block.rows) product.begin(operands(row + kRowsAtOnce));
      if (mine < count)
        forward_unit<Cell>(s, row + mine, u, in, biases,
                           [&](int g) { return product.sum(mine, g * units + unit); });
    });
  }
}

template <class Cell, class S, int kSums>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kPersistentThreads,
                                         1) void persistent_backward(BackwardSteps<float> steps) {
  BackwardStep<float> s = plain<S>(steps.first);
  const PersistentBlock block(steps.shares, s.H, s.rows);
  const int H = int(s.H), K = Cell::kGates * H;
  const auto* w = static_cast<const S*>(s.weight_hh);
  PersistentProduct<S, kSums> product(
      block.units, K, [&](int i, int k) { return w[int64_t(k) * H + block.first + i]; });
  dev::sync_block();
  const int mine = dev::thread_rank() / block.units;  // of the rows at once
  const int unit = dev::thread_rank() % block.units;
  const int64_t u = block.first + unit;
  for (int64_t step = 0; step < steps.count; ++step) {
    const void* const walked = s.d_gates_h;
    if (step > 0) {
      s.saved += steps.saved;
      s.before += steps.saved;
      if (s.incoming.d_output.data)
        s.incoming.d_output.data = static_cast<char*>(s.incoming.d_output.data) + steps.d_output;
      s.d_gates_x = static_cast<S*>(s.d_gates_x) + steps.gates;
      s.d_gates_h = static_cast<S*>(s.d_gates_h) + steps.gates;
      if (s.h_before) s.h_before = static_cast<S*>(s.h_before) + steps.h_before;
      s.incoming.first = s.rows;
    }
    if (steps.ends && step + 1 == steps.count) s.before_rows = 0;
    const auto operands = [&](int64_t row) {
      return Operands{static_cast<const char*>(walked) + row * K * int64_t(sizeof(S)),
                      block.count(row), K};
    };
    // What is behind the first of these steps is a product that was made before.
    if (step > 0) product.begin(operands(block.row));
    block.for_rows([&](int64_t row, int count) {
      BackwardInput<Cell, float> in;
      IncomingH<float> incoming;
      if (mine < count) {
        in = BackwardInput<Cell, float>(s, row + mine, u);
        incoming = IncomingH<float>(s.incoming, row + mine, u, H);
      }
      if (step > 0) {
        product.multiply();
        if (row + kRowsAtOnce < block.rows) product.begin(operands(row + kRowsAtOnce));
      }
      if (mine >= count) return;
      float sum = 0;
      if (step > 0)
        sum = product.sum(mine, unit);
      else if (s.incoming.product)
        sum = s.incoming.product[(row + mine) * H + u];
      backward_unit<Cell>(s, row + mine, u, in, incoming(sum));
    });
  }
}

template <auto kKernel, class Steps>
dev::Status launch_persistent(const Steps& steps, dev::Stream stream) {
  dev::LaunchConfig config;
  config.grid = {steps.shares.blocks * steps.shares.groups, 1, 1};
  config.block = {kPersistentThreads, 1, 1};
  config.shared_bytes = steps.shares.shared_bytes;
  config.cooperative = true;  // for that all blocks are there together
  return dev::launch<kKernel>(config, stream, steps);
}

template <class Cell, class S, int kSums = kSumTile>
dev::Status launch_forward(const ForwardSteps<float>& steps, dev::Stream stream) {
  if constexpr (kSums < Cell::kGates * kMostUnits)
    if (steps.shares.sums > kSums) return launch_forward<Cell, S, kSums + kSumTile>(steps, stream);
  return launch_persistent<persistent_forward<Cell, S, kSums>>(steps, stream);
}

template <class Cell, class S>
dev::Status launch_backward(const BackwardSteps<float>& steps, dev::Stream stream) {
  static_assert(kMostUnits == kSumTile);
  if constexpr (sizeof(S) == 4)
    if (steps.shares.sums < kSumTile)
      return launch_persistent<persistent_backward<Cell, S, kSumTile / 2>>(steps, stream);
  return launch_persistent<persistent_backward<Cell, S, kSumTile>>(steps, stream);
}

// Calls body(null pointer to S).
template <class Body>
dev::Status with_storage(DType type, Body body) {
  if (type == DType::kFloat32) return body(static_cast<float*>(nullptr));
  if (type == DType::kBFloat16) return body(static_cast<dev::bfloat16*>(nullptr));
  return body(static_cast<dev::half*>(nullptr));
}

template <class Cell>
void fill_persistent(CellLaunches<float>& cell) {
  cell.persistent_forward = [](const ForwardSteps<float>& steps, dev::Stream stream) {
    return with_storage(steps.first.type,
                        [&]<class S>(S*) { return launch_forward<Cell, S>(steps, stream); });
  };
  cell.persistent_backward = [](const BackwardSteps<float>& steps, dev::Stream stream) {
    return with_storage(steps.first.type,
                        [&]<class S>(S*) { return launch_backward<Cell, S>(steps, stream); });
  };
}

}  // namespace fused_rnn::cuda
