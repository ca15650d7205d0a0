// What it costs that every block learns what every other one has: what a recurrent kernel over many
// SMs waits for between two steps. Each of some ways is timed alone, and what arrives is compared
// with what the host knows must arrive.
//
//   exchange WAY [EXCHANGES [BLOCKS [PAIRS [FAULT]]]]
//
// prints a line per number of blocks and payload: way, blocks, blocks per cluster, clusters that
// the GPU holds, bytes that every block receives, exchanges, microseconds per exchange. With FAULT
// a block leaves out that exchange, and the others have to notice. benchmarks/exchange.py runs all.
//
// No wait is endless: after kLimit a kernel gives up and says so. Only the barriers of a grid and
// of a cluster cannot be left; no block of theirs ever goes without having been there.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "buffer.h"
#include "cuda/platform.cuh"

namespace fused_rnn::dev {
namespace {

#ifdef FUSED_RNN_EMULATE
constexpr int kThreads = 64;
#else
constexpr int kThreads = 256;
#endif
constexpr uint64_t kLimit = 100'000'000;  // nanoseconds of a launch
constexpr int kBatch = 4;                 // loads of a thread that are under way together
constexpr uint32_t kNothing = 0xffffffffu;

// Two words are one item, 8 bytes. All blocks of an exchange get all of them.
struct Pair {
  uint32_t low, high;
};

struct Run {
  int pairs;          // of all blocks together
  int exchanges;      // one after another
  int fault;          // of these the one that the first block leaves out, or -1
  uint64_t* slots;    // of the blocks of a grid: as many bytes as Way::kSlotBytes says
  uint32_t* arrived;  // counts blocks
  uint32_t* gave_up;
  uint32_t* sums;  // [blocks, threads]: what a thread has received in the last exchange
};

struct Shared {
  uint64_t phases[2];
  int stop[2];  // at exchanges in turn
  alignas(16) uint64_t slots[1];
};

// What a thread of a block works with.
struct Place {
  const Run& run;
  Shared* shared;
  int rank, count;  // of this block among those that exchange
  uint64_t deadline;
};

// Any word but kNothing.
FUSED_RNN_HD uint32_t word(uint32_t exchange, uint32_t i, uint32_t received) {
  uint32_t v = (exchange * 0x9e3779b9u) ^ (i * 0x85ebca6bu) ^ received;
  v = (v ^ v >> 15) * 0x2c1b3c6du;
  return v == kNothing ? 0 : v;
}
FUSED_RNN_HD Pair pair(int exchange, int i, uint32_t received) {
  return {word(uint32_t(exchange), uint32_t(2 * i), received),
          word(uint32_t(exchange), uint32_t(2 * i + 1), received)};
}
// The first item of a block's share.
FUSED_RNN_HD int share(int pairs, int rank, int count) {
  return int(int64_t(pairs) * rank / count);
}

FUSED_RNN_DEVICE uint64_t bits(Pair p) {
  return __builtin_bit_cast(uint64_t, p);
}
FUSED_RNN_DEVICE Pair pair_of(uint64_t bits) {
  return __builtin_bit_cast(Pair, bits);
}

// Whether it is too late. Threads of a block learn it together, at the end of an exchange.
FUSED_RNN_DEVICE bool late(const Place& p, int exchange) {
  if (nanoseconds() < p.deadline) return false;
  store_relaxed(p.run.gave_up, uint32_t(exchange) + 1);
  return true;
}

// Items come in batches: v[j] is item i + j * threads, as far as there are so many. Loads of a
// batch are under way together. False: it is too late.

FUSED_RNN_DEVICE void load_batch(const uint64_t* slots, int i, int pairs, Pair (&v)[kBatch]) {
  uint64_t got[kBatch] = {};
  for (int j = 0; j < kBatch; ++j)
    if (i + j * kThreads < pairs) got[j] = load_relaxed(slots + i + j * kThreads);
  for (int j = 0; j < kBatch; ++j) v[j] = pair_of(got[j]);
}

// In global memory, two buffers in turn, and a barrier.
struct InTurn {
  static constexpr bool kClusters = false, kCooperative = true;
  static size_t slot_bytes(int pairs, int) { return 2 * size_t(pairs) * sizeof(uint64_t); }
  FUSED_RNN_DEVICE static uint64_t* slots(const Place& p, int exchange) {
    return p.run.slots + exchange % 2 * p.run.pairs;
  }
  FUSED_RNN_DEVICE static void begin(const Place&, int) {}
  FUSED_RNN_DEVICE static void put(const Place& p, int exchange, int i, Pair v) {
    slots(p, exchange)[i] = bits(v);
  }
  FUSED_RNN_DEVICE static bool get(const Place& p, int exchange, int i, Pair (&v)[kBatch]) {
    load_batch(slots(p, exchange), i, p.run.pairs, v);
    return true;
  }
  FUSED_RNN_DEVICE static void end() {}
};

// The barrier of cooperative groups.
struct GridBarrier : InTurn {
  static constexpr const char* kName = "grid-barrier";
  FUSED_RNN_DEVICE static bool wait(const Place&, int) {
    sync_grid();
    return true;
  }
};

// One counter: a block that has written adds itself, and waits for the others.
struct FlagBarrier : InTurn {
  static constexpr const char* kName = "flag-barrier";
  FUSED_RNN_DEVICE static bool wait(const Place& p, int exchange) {
    sync_block();
    bool in_time = true;
    if (thread_rank() == 0) {
      if (p.rank > 0 || exchange != p.run.fault) add_release(p.run.arrived, 1u);
      const uint32_t all = uint32_t(exchange + 1) * uint32_t(p.count);
      while (in_time && load_acquire(p.run.arrived) < all) in_time = !late(p, exchange);
    }
    if (!in_time) store_relaxed(p.shared->stop + exchange % 2, 1);
    sync_block();
    return load_relaxed(p.shared->stop + exchange % 2) == 0;
  }
};

// Data that say themselves that they are there: each word has the number of its exchange beside it.
// Twice the volume, in two buffers in turn.
struct Tagged {
  static constexpr const char* kName = "tagged-data";
  static constexpr bool kClusters = false, kCooperative = true;
  static size_t slot_bytes(int pairs, int) { return 4 * size_t(pairs) * sizeof(uint64_t); }
  FUSED_RNN_DEVICE static uint64_t* slot(const Place& p, int exchange, int i) {
    return p.run.slots + 2 * (exchange % 2 * p.run.pairs + i);
  }
  FUSED_RNN_DEVICE static void begin(const Place&, int) {}
  FUSED_RNN_DEVICE static void put(const Place& p, int exchange, int i, Pair v) {
    uint64_t* to = slot(p, exchange, i);
    const uint32_t tag = uint32_t(exchange);
    store_relaxed(to, bits({v.low, tag}));
    store_relaxed(to + 1, bits({v.high, tag}));
  }
  FUSED_RNN_DEVICE static bool wait(const Place&, int) { return true; }
  FUSED_RNN_DEVICE static bool get(const Place& p, int exchange, int i, Pair (&v)[kBatch]) {
    const uint32_t tag = uint32_t(exchange);
    for (bool there = false; !there;) {
      Pair low[kBatch], high[kBatch];
      for (int j = 0; j < kBatch; ++j) {
        low[j] = high[j] = {0, tag};
        if (i + j * kThreads >= p.run.pairs) continue;
        const uint64_t* from = slot(p, exchange, i + j * kThreads);
        low[j] = pair_of(load_relaxed(from));
        high[j] = pair_of(load_relaxed(from + 1));
      }
      there = true;
      for (int j = 0; j < kBatch; ++j) {
        there = there && low[j].high == tag && high[j].high == tag;
        v[j] = {low[j].low, high[j].low};
      }
      if (!there && late(p, exchange)) return false;
    }
    return true;
  }
  FUSED_RNN_DEVICE static void end() {}
};

// One word is never sent (of numbers, a NaN), and memory is full of it: what is anything else has
// arrived. Every exchange has slots of its own, as the output of a layer has.
struct Sentinel {
  static constexpr const char* kName = "sentinel-data";
  static constexpr bool kClusters = false, kCooperative = true;
  static size_t slot_bytes(int pairs, int exchanges) {
    return size_t(exchanges) * size_t(pairs) * sizeof(uint64_t);
  }
  FUSED_RNN_DEVICE static uint64_t* slots(const Place& p, int exchange) {
    return p.run.slots + int64_t(exchange) * p.run.pairs;
  }
  FUSED_RNN_DEVICE static void begin(const Place&, int) {}
  FUSED_RNN_DEVICE static void put(const Place& p, int exchange, int i, Pair v) {
    store_relaxed(slots(p, exchange) + i, bits(v));
  }
  FUSED_RNN_DEVICE static bool wait(const Place&, int) { return true; }
  FUSED_RNN_DEVICE static bool get(const Place& p, int exchange, int i, Pair (&v)[kBatch]) {
    for (bool there = false; !there;) {
      load_batch(slots(p, exchange), i, p.run.pairs, v);
      there = true;
      for (int j = 0; j < kBatch; ++j)
        there = there && v[j].low != kNothing && v[j].high != kNothing;
      if (!there && late(p, exchange)) return false;
    }
    return true;
  }
  FUSED_RNN_DEVICE static void end() {}
};

// In the shared memory of the blocks of a cluster, two buffers in turn: each block writes its share
// into all of them.
struct InCluster {
  static constexpr bool kClusters = true, kCooperative = false;
  static size_t slot_bytes(int, int) { return 0; }
  FUSED_RNN_DEVICE static uint64_t* slot(const Place& p, int exchange, int i) {
    return p.shared->slots + exchange % 2 * p.run.pairs + i;
  }
  FUSED_RNN_DEVICE static bool get(const Place& p, int exchange, int i, Pair (&v)[kBatch]) {
    for (int j = 0; j < kBatch; ++j) {
      v[j] = {};
      if (i + j * kThreads < p.run.pairs) v[j] = pair_of(*slot(p, exchange, i + j * kThreads));
    }
    return true;
  }
  // No block ends while another may write to it.
  FUSED_RNN_DEVICE static void end() { sync_cluster(); }
};

struct ClusterBarrier : InCluster {
  static constexpr const char* kName = "cluster-barrier";
  FUSED_RNN_DEVICE static void begin(const Place&, int) {}
  FUSED_RNN_DEVICE static void put(const Place& p, int exchange, int i, Pair v) {
    for (int to = 0; to < p.count; ++to) *cluster_shared(slot(p, exchange, i), to) = bits(v);
  }
  FUSED_RNN_DEVICE static bool wait(const Place&, int) {
    sync_cluster();
    return true;
  }
};

// The stores themselves are counted where they arrive.
struct CountedStores : InCluster {
  static constexpr const char* kName = "counted-stores";
  FUSED_RNN_DEVICE static void begin(const Place& p, int exchange) {
    if (thread_rank() == 0)
      phase_expect(&p.shared->phases[exchange % 2], p.run.pairs * int(sizeof(uint64_t)));
  }
  FUSED_RNN_DEVICE static void put(const Place& p, int exchange, int i, Pair v) {
    for (int to = 0; to < p.count; ++to)
      store_async(slot(p, exchange, i), bits(v), &p.shared->phases[exchange % 2], to);
  }
  FUSED_RNN_DEVICE static bool wait(const Place& p, int exchange) {
    while (!phase_done(&p.shared->phases[exchange % 2], exchange / 2 % 2))
      if (late(p, exchange)) return false;
    return true;
  }
};

// A thread sends the items of its block's share, every kThreads-th, and adds up every kThreads-th
// of all; what it sends depends on that sum of the exchange before, as h on the h before.
template <class Way>
FUSED_RNN_KERNEL FUSED_RNN_LAUNCH_BOUNDS(kThreads, 2) void exchange(Run run) {
  const int t = thread_rank();
  Shared* const s = shared<Shared>();
  if (t == 0) {
    s->stop[0] = s->stop[1] = 0;
    if constexpr (Way::kClusters)
      for (uint64_t& phase : s->phases) phase_init(&phase, 1);
  }
  const int block = block_index().x;
  int rank = block, count = grid_size().x;
  if constexpr (Way::kClusters) {
    rank = cluster_rank();
    count = cluster_size();
    sync_cluster();
  } else {
    sync_block();
  }
  const Place p{run, s, rank, count, nanoseconds() + kLimit};
  const int first = share(run.pairs, rank, count), last = share(run.pairs, rank + 1, count);
  uint32_t received = 0;
  for (int e = 0; e < run.exchanges; ++e) {
    Way::begin(p, e);
    if (rank > 0 || e != run.fault)
      for (int i = first + t; i < last; i += kThreads) Way::put(p, e, i, pair(e, i, received));
    bool in_time = Way::wait(p, e);
    received = 0;
    for (int i = t; in_time && i < run.pairs; i += kBatch * kThreads) {
      Pair v[kBatch];
      in_time = Way::get(p, e, i, v);
      for (int j = 0; j < kBatch; ++j) received += v[j].low ^ (v[j].high >> 1);
    }
    if (!in_time) store_relaxed(s->stop + e % 2, 1);
    // Who goes on has received everything, and so have the other threads of the block: what they
    // read may be written again. Together they see that it is too late.
    sync_block();
    if (load_relaxed(s->stop + e % 2)) break;
  }
  run.sums[block * kThreads + t] = received;
  Way::end();
}

// The host's side.

// What a thread of every block has received in the end, [threads].
std::vector<uint32_t> expected(int pairs, int exchanges, int count) {
  std::vector<uint32_t> received(kThreads, 0);
  for (int e = 0; e < exchanges; ++e) {
    std::vector<uint32_t> next(kThreads, 0);
    for (int rank = 0; rank < count; ++rank) {
      const int first = share(pairs, rank, count), last = share(pairs, rank + 1, count);
      for (int i = first; i < last; ++i) {
        const Pair v = pair(e, i, received[size_t((i - first) % kThreads)]);
        next[size_t(i % kThreads)] += v.low ^ (v.high >> 1);
      }
    }
    received = next;
  }
  return received;
}

// Calls body and gives the microseconds that it took on the GPU.
template <class Body>
double timed(Body body) {
#ifdef FUSED_RNN_EMULATE
  body();
  return 0;
#else
  cudaEvent_t start, end;
  must(status_of(cudaEventCreate(&start), "event"));
  must(status_of(cudaEventCreate(&end), "event"));
  must(status_of(cudaEventRecord(start), "event"));
  body();
  must(status_of(cudaEventRecord(end), "event"));
  must(status_of(cudaEventSynchronize(end), "exchange"));
  float milliseconds = 0;
  must(status_of(cudaEventElapsedTime(&milliseconds, start, end), "event"));
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  return 1e3 * double(milliseconds);
#endif
}

struct Sizes {
  int exchanges, blocks, pairs, fault;
};

// The best of some launches; false where something was wrong.
template <class Way>
bool measure(int blocks, int cluster, int pairs, const Sizes& sizes) {
  const int exchanges = sizes.exchanges;
  LaunchConfig config{.grid = {blocks}, .block = {kThreads}, .cluster = cluster};
  config.shared_bytes = sizeof(Shared) + (Way::kClusters ? 2 * size_t(pairs) * 8 : 0);
  config.cooperative = Way::kCooperative;
  int held = 0;
  if (Way::kClusters) {
    if (!active_clusters<exchange<Way>>(config, &held).ok() || held == 0) return true;
    // As many as the GPU holds at a time, where more than one is asked for.
    if (blocks > cluster) config.grid.x = blocks = std::min(blocks / cluster, held) * cluster;
  }
  Buffer<uint64_t> slots(Way::slot_bytes(pairs, exchanges) / 8 + 1, 0);
  Buffer<uint32_t> words(2, 0), sums(size_t(blocks) * kThreads, 0);
  const Run run{pairs,        exchanges,        sizes.fault, slots.data(),
                words.data(), words.data() + 1, sums.data()};
  const int count = Way::kClusters ? cluster : blocks;
  const std::vector<uint32_t> wanted = expected(pairs, exchanges, count);
  double best = 1e30;
  for (int turn = 0; turn < 3; ++turn) {
    must(fill_bytes(slots.data(), 0xff, Way::slot_bytes(pairs, exchanges), nullptr));
    must(fill_bytes(words.data(), 0, 2 * sizeof(uint32_t), nullptr));
    must(fill_bytes(sums.data(), 0, size_t(blocks) * kThreads * sizeof(uint32_t), nullptr));
    best = std::min(best, timed([&] { must(launch<exchange<Way>>(config, nullptr, run)); }));
    const uint32_t gave_up = words.host()[1];
    if (gave_up) {
      std::printf("%s: %d blocks gave up waiting in exchange %u\n", Way::kName, blocks,
                  gave_up - 1);
      return false;
    }
    const std::vector<uint32_t> got = sums.host();
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] == wanted[i % kThreads]) continue;
      std::printf("%s: %d blocks, %d pairs: thread %zu of block %zu received %08x, not %08x\n",
                  Way::kName, blocks, pairs, i % kThreads, i / kThreads, got[i],
                  wanted[i % kThreads]);
      return false;
    }
  }
  std::printf("%s,%d,%d,%d,%d,%d,%.4f\n", Way::kName, blocks, cluster, held, 8 * pairs, exchanges,
              best / exchanges);
  std::fflush(stdout);
  return true;
}

template <class Way>
bool measure_all(const Sizes& sizes) {
  bool right = true;
  // One item of each block, which is the time of waiting alone, and a step of an RNN.
  const auto both = [&](int blocks, int cluster, int count) {
    right = right && measure<Way>(blocks, cluster, count, sizes);
    right = right && measure<Way>(blocks, cluster, sizes.pairs, sizes);
  };
  if constexpr (Way::kClusters) {
    for (int cluster = 2; cluster <= 16 && cluster <= sizes.blocks; cluster *= 2) {
      both(cluster, cluster, cluster);
      if (sizes.blocks >= 2 * cluster) both(sizes.blocks / cluster * cluster, cluster, cluster);
    }
  } else {
    for (int blocks = 1; blocks < sizes.blocks; blocks *= 2) both(blocks, 1, blocks);
    both(sizes.blocks, 1, sizes.blocks);
  }
  return right;
}

template <class... Ways>
int run_way(const char* name, const Sizes& sizes) {
  bool known = false, right = false;
  const auto one = [&]<class Way>() {
    if (std::strcmp(name, Way::kName) != 0) return;
    known = true;
    right = measure_all<Way>(sizes);
  };
  (one.template operator()<Ways>(), ...);
  if (known) return right ? 0 : 1;
  std::printf("exchange WAY [EXCHANGES [BLOCKS [PAIRS [FAULT]]]], WAY one of");
  (std::printf(" %s", Ways::kName), ...);
  std::printf("\n");
  return 2;
}

}  // namespace
}  // namespace fused_rnn::dev

int main(int count, char** arguments) {
  using namespace fused_rnn::dev;
  const auto number = [&](int i, int otherwise) {
    return count > i ? std::atoi(arguments[i]) : otherwise;
  };
  DeviceInfo device;
  must(device_info(0, &device));
  // h of a step: B = 16, H = 768, 16 bits.
  const Sizes sizes{number(2, 1000), number(3, device.sms), number(4, 16 * 768 * 2 / 8),
                    number(5, -1)};
  return run_way<GridBarrier, FlagBarrier, Tagged, Sentinel, ClusterBarrier, CountedStores>(
      count > 1 ? arguments[1] : "", sizes);
}
