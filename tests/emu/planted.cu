// Kernels with one bug each, and the same kernels without: the emulator has to find the bugs and
// nothing else, or its word on other kernels is worth nothing.
//
//   planted right [NAME]    all without their bugs, in every order; on a GPU too
//   planted wrong [NAME]    those that this build has to catch, until one order does; fails when
//                           none does. With NAME: in every order, with all that is said.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>

#include "buffer.h"
#include "cuda/row_sums.cuh"

namespace fused_rnn::dev {
namespace {

// Wherever bug is false the kernel is right.

template <bool bug>
FUSED_RNN_KERNEL void read_before_sync_block(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  s[t] = float(t);
  if (!bug) sync_block();
  y[t] = s[n - 1 - t];
}

template <bool bug>
FUSED_RNN_KERNEL void overwritten_before_sync_block(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    s[t] = float(step * t);
    sync_block();
    sum += s[(t + n / 2) % n];
    if (!bug) sync_block();
  }
  y[t] = sum;
}

template <bool bug>
FUSED_RNN_KERNEL void read_before_sync_warp(float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  s[t] = float(t);
  if (!bug) sync_warp();
  y[t] = s[t ^ 1];
}

// A shuffle waits, but orders nothing.
template <bool bug>
FUSED_RNN_KERNEL void shuffle_for_a_barrier(float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  s[t] = float(t);
  const float other = shuffle_xor(float(t), 1);
  if (!bug) sync_warp();
  y[t] = s[t ^ 1] + other;
}

// A mask for half a warp leaves the other half behind.
template <bool bug>
FUSED_RNN_KERNEL void sync_warp_of_too_few(float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  s[t] = float(t);
  sync_warp(bug ? (t % kWarp < 16 ? 0xffffu : 0xffff0000u) : kFullWarp);
  y[t] = s[t ^ 16];
}

template <bool bug>
FUSED_RNN_KERNEL void read_before_sync_grid(float* x, float* y) {
  const int n = block_size().x, blocks = grid_size().x, b = block_index().x, t = thread_rank();
  x[b * n + t] = float(b * n + t);
  if (!bug) sync_grid();
  y[b * n + t] = x[(blocks - 1 - b) * n + t];
}

// h of the next step goes where others still read that of this one.
template <bool bug>
FUSED_RNN_KERNEL void one_buffer_for_two_steps(float* h, float* y) {
  const int n = grid_size().x, b = block_index().x;
  float sum = 0;
  for (int step = 0; step < 4; ++step) {
    float* mine = h + (bug ? 0 : step % 2 * n);
    if (thread_rank() == 0) mine[b] = float(step * n + b);
    sync_grid();
    sum += mine[(b + 1) % n];
  }
  if (thread_rank() == 0) y[b] = sum;
}

template <bool bug>
FUSED_RNN_KERNEL void read_before_sync_cluster(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  s[t] = float(b * n + t);
  if (!bug) sync_cluster();
  y[b * n + t] = cluster_shared(s, cluster_rank() ^ 1)[t];
  sync_cluster();
}

template <bool bug>
FUSED_RNN_KERNEL void block_ends_before_its_readers(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  s[t] = float(b * n + t);
  const float* there = cluster_shared(s, cluster_rank() ^ 1);
  sync_cluster();
  y[b * n + t] = there[t];
  if (!bug) sync_cluster();
}

// Counted stores are seen when their phase has ended.
template <bool bug>
FUSED_RNN_KERNEL void read_before_phase_ends(float* y) {
  uint64_t* phase = shared<uint64_t>();
  float* s = reinterpret_cast<float*>(phase + 1);
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  if (t == 0) {
    phase_init(phase, 1);
    phase_expect(phase, n * int(sizeof(float)));
  }
  sync_cluster();
  store_async(s + t, float(b * n + t), phase, cluster_rank() ^ 1);
  if (!bug)
    while (!phase_done(phase, 0)) continue;
  sync_block();
  y[b * n + t] = s[t];
  sync_cluster();
}

enum class FlagBug { kNone, kRelaxedStore, kRelaxedLoad, kFlagFirst, kNeverSet };

// Block 0 hands a row to the others.
template <FlagBug bug>
FUSED_RNN_KERNEL void hand_over(float* row, float* y, uint32_t* flag) {
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  if (b == 0) {
    if (bug == FlagBug::kFlagFirst && t == 0) store_release(flag, 1u);
    row[t] = float(t);
    sync_block();
    if (t == 0) {
      if (bug == FlagBug::kRelaxedStore) store_relaxed(flag, 1u);
      if (bug == FlagBug::kNone || bug == FlagBug::kRelaxedLoad) store_release(flag, 1u);
    }
    y[t] = row[t];
  } else {
    if (t == 0) {
      if (bug == FlagBug::kRelaxedLoad) {
        while (load_relaxed(flag) == 0) continue;
      } else {
        while (load_acquire(flag) == 0) continue;
      }
    }
    sync_block();
    y[b * n + t] = row[t];
  }
}

// A barrier of all blocks by a counter that only grows.
template <bool bug>
FUSED_RNN_KERNEL void count_arrivals(float* x, float* y, uint32_t* count) {
  const int b = block_index().x, n = grid_size().x;
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    float* mine = x + step % 2 * n;
    sync_block();  // whoever still reads the step before
    if (thread_rank() == 0) {
      mine[b] = float(step * n + b);
      if (bug) {
        add_relaxed(count, 1);
      } else {
        add_release(count, 1);
      }
      while (load_acquire(count) < uint32_t(n * (step + 1))) continue;
    }
    sync_block();
    sum += mine[n - 1 - b];
  }
  if (thread_rank() == 0) y[b] = sum;
}

// Many threads, one counter.
template <bool bug>
FUSED_RNN_KERNEL void count_without_atomics(uint32_t* count) {
  if (bug) {
    *count += 1;
  } else {
    add_relaxed(count, 1);
  }
}

// Two blocks of an ordinary launch, in whatever order, write the same places.
template <bool bug>
FUSED_RNN_KERNEL void blocks_that_overlap(float* y) {
  const int t = thread_rank(), n = block_size().x;
  y[block_index().x * (bug ? n - 1 : n) + t] = float(t);
}

template <bool bug>
FUSED_RNN_KERNEL void beyond_shared(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  s[t] = float(t);
  sync_block();
  y[t] = s[t] + (t + 1 < n + int(bug) ? 0 * s[t + 1] : 0);
}

template <bool bug>
FUSED_RNN_KERNEL void writes_beyond_shared(float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  s[t + int(bug)] = float(t);
  sync_block();
  y[t] = s[t + int(bug)];
}

template <bool bug>
FUSED_RNN_KERNEL void beyond_global(float* y, int n) {
  const int i = block_index().x * block_size().x + thread_rank();
  if (i < n + int(bug)) y[i] = float(i);
}

template <bool bug>
FUSED_RNN_KERNEL void misaligned_vector(const float* x, float* y) {
  const int t = thread_rank();
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * t + (bug ? 1 : 0));
  y[t] = v.x + v.w;
}

// t * row does not fit 32 bits.
template <bool bug>
FUSED_RNN_KERNEL void offset_in_32_bits(float* y, int row, int t, int64_t* offset) {
  const int64_t at = bug ? t * row : int64_t(t) * row;
  if (thread_rank() == 0) *offset = at;
  y[thread_rank()] = 0;
}

template <bool bug>
FUSED_RNN_KERNEL void divergent_sync_block(float* y) {
  const int t = thread_rank(), n = block_size().x;
  float* s = shared<float>();
  s[t] = float(t);
  if (bug && t < n / 2) {
    sync_block();
  } else {
    sync_block();
  }
  y[t] = s[n - 1 - t];
}

// Half the block goes round once less, and ends in another barrier.
template <bool bug>
FUSED_RNN_KERNEL void unequal_rounds(float* y) {
  const int t = thread_rank(), n = block_size().x;
  for (int i = 0; i < (bug && t < n / 2 ? 2 : 3); ++i) sync_block();
  y[t] = float(t);
  sync_block();
}

template <bool bug>
FUSED_RNN_KERNEL void half_a_warp_shuffles(float* y) {
  const int t = thread_rank();
  float v = float(t);
  if (!bug || t % kWarp < 16) v = shuffle_xor(v, 1);
  sync_warp();
  y[t] = v;
}

template <bool bug>
FUSED_RNN_KERNEL void source_outside_the_mask(float* y) {
  const int t = thread_rank();
  float v = float(t);
  if (t % kWarp < 16) v = shuffle_xor(v, bug ? 16 : 1, 0xffffu);
  y[t] = v;
}

template <bool bug>
FUSED_RNN_KERNEL void return_before_sync_grid(float* y) {
  const int b = block_index().x;
  if (bug && b == 1) return;
  sync_grid();
  if (thread_rank() == 0) y[b] = float(b);
}

template <bool bug>
FUSED_RNN_KERNEL void read_before_wait(const float* x, float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  copy_async<4>(s + t, x + t);
  copy_async_commit();
  if (!bug) copy_async_wait<0>();
  y[t] = s[t];
  copy_async_wait<0>();
}

// Two stages under way, and the one that is needed now is the older.
template <bool bug>
FUSED_RNN_KERNEL void wait_for_one_group_less(const float* x, float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  for (int stage = 0; stage < 2; ++stage) {
    copy_async<4>(s + stage * n + t, x + stage * n + t);
    copy_async_commit();
  }
  copy_async_wait<bug ? 2 : 1>();
  y[t] = s[t];
  copy_async_wait<0>();
  y[n + t] = s[n + t];
}

template <bool bug>
FUSED_RNN_KERNEL void wait_without_sync_block(const float* x, float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  copy_async<16>(s + 4 * t, x + 4 * t);
  copy_async_commit();
  copy_async_wait<0>();
  if (!bug) sync_block();
  y[t] = s[4 * (n - 1 - t)];
}

// The next stage lands where the last is still being read.
template <bool bug>
FUSED_RNN_KERNEL void stage_refilled_too_soon(const float* x, float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), n = block_size().x;
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    copy_async<4>(s + t, x + step * n + t);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    sum += s[n - 1 - t];
    if (!bug) sync_block();
  }
  y[t] = sum;
}

template <bool bug>
FUSED_RNN_KERNEL void sums_into_uninitialised(float* y) {
  float* s = shared<float>();
  const int t = thread_rank();
  if (!bug) s[t] = 0;
  s[t] += float(t);
  y[t] = s[t];
}

// Rows 8 to 15 and columns 8 to 15 of A are in registers 1 and 2.
template <bool bug>
FUSED_RNN_KERNEL void exchanged_registers(float* y) {
  const int lane = lane_index();
  uint32_t a[4], b[2];
  const auto two = [](int row, int col, int scale) {
    const bfloat16 low = narrow<bfloat16>(float(row + scale * col));
    const bfloat16 high = narrow<bfloat16>(float(row + scale * (col + 1)));
    return uint32_t(__builtin_bit_cast(uint16_t, low)) |
           uint32_t(__builtin_bit_cast(uint16_t, high)) << 16;
  };
  for (int r = 0; r < 4; ++r) {
    const Element e = M16N8K16::a(lane, 2 * r);
    a[bug ? (r % 2 * 2 + r / 2) : r] = two(e.row, e.col, 2);
  }
  for (int r = 0; r < 2; ++r) {  // B[k, n] = 3 n + k, with k along a register
    const Element e = M16N8K16::b(lane, 2 * r);
    b[r] = two(3 * e.col, e.row, 1);
  }
  float d[4] = {};
  mma_m16n8k16<bfloat16>(d, a, b);
  for (int r = 0; r < 4; ++r) {
    const Element e = M16N8K16::c(lane, r);
    y[e.row * 8 + e.col] = d[r];
  }
}

// Sums over a block as RowSums takes them, with one place where it has two in turn.
template <bool bug>
FUSED_RNN_KERNEL void next_sum_overwrites_the_last(float* y) {
  float* s = shared<float>();
  const int t = thread_rank(), warps = block_size().x / kWarp;
  float all = 0;
  for (int round = 1; round <= 3; ++round) {
    float* partial = s + (bug ? 0 : round % 2) * warps;
    const float sum = cuda::sum_of_lanes(float(round * t));
    if (lane_index() == 0) partial[warp_index()] = sum;
    sync_block();
    for (int w = 0; w < warps; ++w) all += partial[w];
  }
  y[t] = all;
}

enum class TailBug { kNone, kReads, kReturns };

// A row that does not fill its block: threads without a unit bring nothing, but come.
template <TailBug bug>
FUSED_RNN_KERNEL void row_with_a_tail(const float* x, float* y) {
  constexpr int kUnits = 37;
  const int t = thread_rank();
  if (bug == TailBug::kReturns && t >= kUnits) return;
  cuda::RowSums<float> sum;
  float sums[2] = {};
  cuda::for_each_unit(bug == TailBug::kReads ? kUnits + 1 : kUnits, [&](int64_t u) {
    sums[0] += x[u];
    sums[1] += 1;
  });
  sum(sums);
  y[t] = sums[0] / sums[1];
}

// What a kernel should have given.

using Expected = std::function<float(int)>;

bool agrees(const std::vector<float>& y, const Expected& expected) {
  for (size_t i = 0; i < y.size(); ++i) {
    if (y[i] == expected(int(i))) continue;
    std::printf("y[%zu] is %g, not %g\n", i, double(y[i]), double(expected(int(i))));
    return false;
  }
  return true;
}

bool started(const Status& status) {
  if (!status.ok()) std::printf("%s\n", status.message().c_str());
  return status.ok();
}

constexpr float kNaN = __builtin_nanf("");
constexpr int kThreads = 64, kBlocks = 4;

// One block of 64 threads, one result each.
template <auto kKernel>
bool in_block(const Expected& expected) {
  Buffer<float> y(kThreads, kNaN);
  const LaunchConfig config{.block = {kThreads}, .shared_bytes = kThreads * sizeof(float)};
  return started(launch<kKernel>(config, nullptr, y.data())) && agrees(y.host(), expected);
}

// The same with x[i] = i.
template <auto kKernel>
bool in_block_from(int inputs, int outputs, size_t floats, const Expected& expected) {
  std::vector<float> numbers;
  for (int i = 0; i < inputs; ++i) numbers.push_back(float(i));
  Buffer<float> x(numbers), y(size_t(outputs), kNaN);
  const LaunchConfig config{.block = {kThreads}, .shared_bytes = floats * sizeof(float)};
  return started(launch<kKernel>(config, nullptr, x.data(), y.data())) &&
         agrees(y.host(), expected);
}

template <auto kKernel, bool kScratch = true>
bool in_grid(int outputs, const Expected& expected) {
  Buffer<float> x(kBlocks * kThreads, kNaN), y(size_t(outputs), kNaN);
  const LaunchConfig config{.grid = {kBlocks}, .block = {kThreads}, .cooperative = true};
  Status status;
  if constexpr (kScratch) {
    status = launch<kKernel>(config, nullptr, x.data(), y.data());
  } else {
    status = launch<kKernel>(config, nullptr, y.data());
  }
  return started(status) && agrees(y.host(), expected);
}

template <auto kKernel>
bool with_flag(int outputs, const Expected& expected) {
  Buffer<float> x(kBlocks * kThreads, kNaN), y(size_t(outputs), kNaN);
  Buffer<uint32_t> flag(1, 0);
  const LaunchConfig config{.grid = {kBlocks}, .block = {kThreads}, .cooperative = true};
  return started(launch<kKernel>(config, nullptr, x.data(), y.data(), flag.data())) &&
         agrees(y.host(), expected);
}

template <auto kKernel>
bool in_clusters(const Expected& expected) {
  Buffer<float> y(kBlocks * kThreads, kNaN);
  const LaunchConfig config{.grid = {kBlocks},
                            .block = {kThreads},
                            .shared_bytes = sizeof(uint64_t) + kThreads * sizeof(float),
                            .cluster = 2};
  return started(launch<kKernel>(config, nullptr, y.data())) && agrees(y.host(), expected);
}

template <auto kKernel>
bool counted() {
  Buffer<uint32_t> count(1, 0);
  const LaunchConfig config{.grid = {kBlocks}, .block = {kThreads}};
  return started(launch<kKernel>(config, nullptr, count.data())) &&
         count.host()[0] == kBlocks * kThreads;
}

template <auto kKernel>
bool overlapping() {
  Buffer<float> y(kBlocks * kThreads, 0);
  const LaunchConfig config{.grid = {kBlocks}, .block = {kThreads}};
  return started(launch<kKernel>(config, nullptr, y.data()));
}

template <auto kKernel>
bool with_a_tail() {
  constexpr int n = 2 * kThreads + 5;
  Buffer<float> y(n, kNaN);
  const LaunchConfig config{.grid = {3}, .block = {kThreads}};
  return started(launch<kKernel>(config, nullptr, y.data(), n)) &&
         agrees(y.host(), [](int i) { return float(i); });
}

template <auto kKernel>
bool far_away() {
  Buffer<float> y(kThreads, kNaN);
  Buffer<int64_t> offset(1, 0);
  const LaunchConfig config{.block = {kThreads}};
  return started(launch<kKernel>(config, nullptr, y.data(), 1 << 16, 70000, offset.data())) &&
         offset.host()[0] == int64_t(70000) << 16;
}

template <auto kKernel>
bool product() {
  Buffer<float> y(16 * 8, kNaN);
  const auto expected = [](int i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += float((i / 8 + 2 * k) * (3 * (i % 8) + k));
    return sum;
  };
  return started(launch<kKernel>({.block = {kWarp}}, nullptr, y.data())) &&
         agrees(y.host(), expected);
}

bool grid_barrier(bool cooperative) {
  Buffer<float> y(kBlocks, kNaN);
  const LaunchConfig config{.grid = {kBlocks}, .block = {kThreads}, .cooperative = cooperative};
  return started(launch<return_before_sync_grid<false>>(config, nullptr, y.data())) &&
         agrees(y.host(), [](int i) { return float(i); });
}

float backwards(int t) {
  return float(kThreads - 1 - t);
}
float itself(int t) {
  return float(t);
}
float mirrored_block(int i) {
  return float((kBlocks - 1 - i / kThreads) * kThreads + i % kThreads);
}
float other_of_cluster(int i) {
  return float((i / kThreads ^ 1) * kThreads + i % kThreads);
}
float thread_of(int i) {
  return float(i % kThreads);
}
// What block b has at each of so many steps, summed.
float over_steps(int b, int steps) {
  float sum = 0;
  for (int step = 0; step < steps; ++step) sum += float(step * kBlocks + b);
  return sum;
}

struct Case {
  const char* name;
  const char* caught_by;  // the builds that have to, in one of the orders: plain, asan, tsan
  bool (*right)();
  bool (*wrong)();
};

#ifdef FUSED_RNN_EMULATE
#define WRONG(...)             \
  [] {                         \
    constexpr bool bug = true; \
    return __VA_ARGS__;        \
  }
#else
#define WRONG(...) nullptr
#endif
#define PLANTED(name, caught_by, ...) \
  Case {                              \
    #name, #caught_by,                \
        [] {                          \
          constexpr bool bug = false; \
          return __VA_ARGS__;         \
        },                            \
        WRONG(__VA_ARGS__)            \
  }

template <bool bug, TailBug which>
constexpr auto kRowWithATail = row_with_a_tail < bug ? which : TailBug::kNone > ;
template <bool bug, FlagBug which>
constexpr auto kHandOver = hand_over < bug ? which : FlagBug::kNone > ;

const Case kCases[] = {
    PLANTED(read_before_sync_block, plain tsan, in_block<read_before_sync_block<bug>>(backwards)),
    PLANTED(overwritten_before_sync_block, plain tsan,
            in_block<overwritten_before_sync_block<bug>>(
                [](int t) { return float((t + kThreads / 2) % kThreads * 3); })),
    PLANTED(read_before_sync_warp, plain tsan,
            in_block<read_before_sync_warp<bug>>([](int t) { return float(t ^ 1); })),
    PLANTED(shuffle_for_a_barrier, tsan,
            in_block<shuffle_for_a_barrier<bug>>([](int t) { return float(2 * (t ^ 1)); })),
    PLANTED(sync_warp_of_too_few, plain tsan,
            in_block<sync_warp_of_too_few<bug>>([](int t) { return float(t ^ 16); })),
    PLANTED(read_before_sync_grid, plain tsan,
            in_grid<read_before_sync_grid<bug>>(kBlocks* kThreads, mirrored_block)),
    PLANTED(one_buffer_for_two_steps, plain tsan,
            in_grid<one_buffer_for_two_steps<bug>>(
                kBlocks, [](int b) { return over_steps((b + 1) % kBlocks, 4); })),
    PLANTED(read_before_sync_cluster, plain tsan,
            in_clusters<read_before_sync_cluster<bug>>(other_of_cluster)),
    PLANTED(read_before_phase_ends, plain tsan,
            in_clusters<read_before_phase_ends<bug>>(other_of_cluster)),
    PLANTED(block_ends_before_its_readers, asan,
            in_clusters<block_ends_before_its_readers<bug>>(other_of_cluster)),
    PLANTED(relaxed_store, tsan,
            with_flag<kHandOver<bug, FlagBug::kRelaxedStore>>(kBlocks* kThreads, thread_of)),
    PLANTED(relaxed_load, tsan,
            with_flag<kHandOver<bug, FlagBug::kRelaxedLoad>>(kBlocks* kThreads, thread_of)),
    PLANTED(flag_first, tsan,
            with_flag<kHandOver<bug, FlagBug::kFlagFirst>>(kBlocks* kThreads, thread_of)),
    PLANTED(flag_never_set, plain,
            with_flag<kHandOver<bug, FlagBug::kNeverSet>>(kBlocks* kThreads, thread_of)),
    PLANTED(count_arrivals, tsan,
            with_flag<count_arrivals<bug>>(kBlocks,
                                           [](int b) { return over_steps(kBlocks - 1 - b, 3); })),
    PLANTED(count_without_atomics, tsan, counted<count_without_atomics<bug>>()),
    PLANTED(blocks_that_overlap, tsan, overlapping<blocks_that_overlap<bug>>()),
    PLANTED(beyond_shared, asan, in_block<beyond_shared<bug>>(itself)),
    PLANTED(writes_beyond_shared, asan, in_block<writes_beyond_shared<bug>>(itself)),
    PLANTED(beyond_global, asan, with_a_tail<beyond_global<bug>>()),
    PLANTED(misaligned_vector, asan,
            in_block_from<misaligned_vector<bug>>(4 * kThreads + 4, kThreads, 0,
                                                  [](int t) { return float(8 * t + 3); })),
    PLANTED(offset_in_32_bits, asan, far_away<offset_in_32_bits<bug>>()),
    PLANTED(divergent_sync_block, plain, in_block<divergent_sync_block<bug>>(backwards)),
    PLANTED(unequal_rounds, plain, in_block<unequal_rounds<bug>>(itself)),
    PLANTED(half_a_warp_shuffles, plain,
            in_block<half_a_warp_shuffles<bug>>([](int t) { return float(t ^ 1); })),
    PLANTED(source_outside_the_mask, plain, in_block<source_outside_the_mask<bug>>([](int t) {
              return float(t % kWarp < 16 ? t ^ 1 : t);
            })),
    PLANTED(return_before_sync_grid, plain,
            in_grid<return_before_sync_grid<bug>, false>(kBlocks, itself)),
    PLANTED(grid_barrier_without_cooperation, plain, grid_barrier(!bug)),
    PLANTED(read_before_wait, plain,
            in_block_from<read_before_wait<bug>>(kThreads, kThreads, kThreads, itself)),
    PLANTED(wait_for_one_group_less, plain,
            in_block_from<wait_for_one_group_less<bug>>(2 * kThreads, 2 * kThreads, 2 * kThreads,
                                                        itself)),
    PLANTED(wait_without_sync_block, plain tsan,
            in_block_from<wait_without_sync_block<bug>>(
                4 * kThreads, kThreads, 4 * kThreads,
                [](int t) { return float(4 * (kThreads - 1 - t)); })),
    PLANTED(stage_refilled_too_soon, plain tsan,
            in_block_from<stage_refilled_too_soon<bug>>(
                3 * kThreads, kThreads, kThreads,
                [](int t) { return float(3 * (2 * kThreads - 1 - t)); })),
    PLANTED(sums_into_uninitialised, plain, in_block<sums_into_uninitialised<bug>>(itself)),
    PLANTED(next_sum_overwrites_the_last, plain tsan,
            in_block<next_sum_overwrites_the_last<bug>>(
                [](int) { return float(6 * kThreads * (kThreads - 1) / 2); })),
    PLANTED(tail_is_not_masked, asan,
            in_block_from<kRowWithATail<bug, TailBug::kReads>>(37, kThreads, kThreads,
                                                               [](int) { return 18.0f; })),
    PLANTED(threads_of_the_tail_return, plain,
            in_block_from<kRowWithATail<bug, TailBug::kReturns>>(37, kThreads, kThreads,
                                                                 [](int) { return 18.0f; })),
    PLANTED(exchanged_registers, plain, product<exchanged_registers<bug>>()),
};

#if defined(__SANITIZE_THREAD__)
constexpr char kBuild[] = "tsan";
constexpr const char* kOrders[] = {"forward", "random:1"};
#elif defined(__SANITIZE_ADDRESS__)
constexpr char kBuild[] = "asan";
constexpr const char* kOrders[] = {"forward", "random:1"};
#elif defined(FUSED_RNN_EMULATE)
constexpr char kBuild[] = "plain";
constexpr const char* kOrders[] = {"forward", "reverse", "eager", "random:1", "random:2"};
#else
constexpr char kBuild[] = "gpu";
constexpr const char* kOrders[] = {"its own"};
#endif

void set_order([[maybe_unused]] const char* order) {
#ifdef FUSED_RNN_EMULATE
  emu::set_order(order);
#endif
}

// In a child, whose words come back. A sanitizer speaks on stderr and fails the child, at the
// latest when it ends.
bool passes_in_child(bool (*body)(), std::string* words) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 1);
    dup2(ends[1], 2);
    close(ends[0]);
    const bool right = body();
    std::exit(right ? 0 : 1);
  }
  close(ends[1]);
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof(buffer))) > 0;) {
    words->append(buffer, size_t(n));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// The first line that says something: not the ruler above it.
std::string first_line(const std::string& words) {
  for (size_t at = 0; at < words.size();) {
    const size_t end = std::min(words.find('\n', at), words.size());
    if (end > at && words[at] != '=') return words.substr(at, end - at);
    at = end + 1;
  }
  return {};
}

int run_right(const char* only) {
  for (const Case& c : kCases) {
    if (only && std::strcmp(only, c.name) != 0) continue;
    for (const char* order : kOrders) {
      std::printf("%s %s", c.name, order);
      std::fflush(stdout);  // a sanitizer may have the last word
      set_order(order);
      if (!c.right()) return 1;
      std::printf(" passed\n");
    }
  }
  return 0;
}

int run_wrong(const char* only) {
  int missed = 0;
  for (const Case& c : kCases) {
    if (only ? std::strcmp(only, c.name) != 0 : std::strstr(c.caught_by, kBuild) == nullptr) {
      continue;
    }
    int caught = 0;
    for (const char* order : kOrders) {
      if (caught && !only) break;
      set_order(order);
      std::string words;
      const bool passed = passes_in_child(c.wrong, &words);
      caught += !passed;
      std::printf("%s %s %s: %s\n", c.name, order, passed ? "passed" : "caught",
                  only ? words.c_str() : first_line(words).c_str());
    }
    missed += caught == 0;
  }
  return missed != 0;
}

}  // namespace
}  // namespace fused_rnn::dev

int main(int count, char** arguments) {
  using namespace fused_rnn::dev;
  const char* which = count > 1 ? arguments[1] : "";
  const char* only = count > 2 ? arguments[2] : nullptr;
  if (std::strcmp(which, "right") == 0) return run_right(only);
  if (std::strcmp(which, "wrong") == 0 && std::strcmp(kBuild, "gpu") != 0) return run_wrong(only);
  std::printf("planted right|wrong [NAME]\n");
  return 2;
}
