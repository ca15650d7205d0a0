// A kernel for every word of csrc/cuda/platform.cuh, judged by plain host code: in the emulator,
// and on a GPU. Where both agree with the host, the emulator's word on other kernels is worth
// something.
//
//   conformance [NAME]      prints each name and what failed
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>

#include "buffer.h"

namespace fused_rnn::dev {
namespace {

int failures = 0;

// Counts a failure and prints the first twenty.
template <class... Args>
void that(bool holds, const char* format, Args... args) {
  if (holds || ++failures > 20) return;
  std::printf("FAILED: ");
  std::printf(format, args...);
  std::printf("\n");
}

void started(const Status& status) {
  that(status.ok(), "%s", status.message().c_str());
}

template <class T>
void equal(const char* what, const std::vector<T>& got, const std::vector<T>& wanted) {
  for (size_t i = 0; i < got.size(); ++i) {
    that(std::memcmp(&got[i], &wanted[i], sizeof(T)) == 0, "%s[%zu] is %.17g, not %.17g", what, i,
         double(got[i]), double(wanted[i]));
  }
}

// Who am I.

FUSED_RNN_KERNEL void write_indices(int* y) {
  const Index t = thread_index(), b = block_index(), n = block_size(), g = grid_size();
  const int rank = t.x + n.x * (t.y + n.y * t.z);
  const int block = b.x + g.x * (b.y + g.y * b.z);
  int* mine = y + 4 * (block * n.x * n.y * n.z + rank);
  mine[0] = thread_rank();
  mine[1] = lane_index();
  mine[2] = warp_index();
  mine[3] = 100 * (n.x * 16 + n.y * 4 + n.z) + g.x * 16 + g.y * 4 + g.z;
}

void indices() {
  const LaunchConfig config{.grid = {3, 2, 2}, .block = {5, 4, 3}};
  Buffer<int> y(size_t(4 * 12 * 60), -1);
  started(launch<write_indices>(config, nullptr, y.data()));
  std::vector<int> wanted;
  for (int i = 0; i < 12 * 60; ++i) {
    const int rank = i % 60;
    wanted.insert(wanted.end(), {rank, rank % 32, rank / 32, 100 * (80 + 16 + 3) + 48 + 8 + 2});
  }
  equal("index", y.host(), wanted);
}

// Barriers.

FUSED_RNN_KERNEL void reverse_in_block(const int* x, int* y, int rounds) {
  int* s = shared<int>();
  const int t = thread_rank(), n = block_size().x;
  int v = x[t];
  for (int i = 0; i < rounds; ++i) {
    s[t] = v;
    sync_block();
    v = s[n - 1 - t] + i;
    sync_block();
  }
  y[t] = v;
}

void block_barrier() {
  constexpr int n = 1000, rounds = 5;
  std::vector<int> x, wanted;
  for (int t = 0; t < n; ++t) {
    x.push_back(t * t);
    const int from = rounds % 2 ? n - 1 - t : t;
    wanted.push_back(from * from + rounds * (rounds - 1) / 2);
  }
  Buffer<int> in(x), out(n, -1);
  const LaunchConfig config{.block = {n}, .shared_bytes = n * sizeof(int)};
  started(launch<reverse_in_block>(config, nullptr, in.data(), out.data(), rounds));
  equal("block", out.host(), wanted);
}

// Even and odd lanes wait for their own kind, in turns of their own.
FUSED_RNN_KERNEL void sync_some_lanes(int* y) {
  int* s = shared<int>();
  const int lane = lane_index();
  const unsigned mask = lane % 2 ? 0xaaaaaaaau : 0x55555555u;
  int v = lane;
  for (int i = 0; i < 3 + lane % 2; ++i) {
    s[lane] = v;
    sync_warp(mask);
    v = s[(lane + 2) % kWarp] + 1;
    sync_warp(mask);
  }
  sync_warp();
  y[lane] = v;
}

void warp_barrier() {
  Buffer<int> out(kWarp, -1);
  const LaunchConfig config{.block = {kWarp}, .shared_bytes = kWarp * sizeof(int)};
  started(launch<sync_some_lanes>(config, nullptr, out.data()));
  std::vector<int> wanted;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int rounds = 3 + lane % 2;
    wanted.push_back((lane + 2 * rounds) % kWarp + rounds);
  }
  equal("warp", out.host(), wanted);
}

// Each block hands its number on, step after step.
FUSED_RNN_KERNEL void pass_on(int* x, int steps) {  // x is [2, blocks]
  const int b = block_index().x, n = grid_size().x;
  if (thread_rank() == 0) x[b] = b;
  for (int i = 0; i < steps; ++i) {
    sync_grid();
    const int* from = x + i % 2 * n;
    int* to = x + (i + 1) % 2 * n;
    if (thread_rank() == 0) to[b] = from[(b + 1) % n] + 100;
  }
}

void grid_barrier() {
  constexpr int blocks = 7, steps = 6;
  Buffer<int> x(2 * blocks, -1);
  const LaunchConfig config{.grid = {blocks}, .block = {64}, .cooperative = true};
  started(launch<pass_on>(config, nullptr, x.data(), steps));
  std::vector<int> got = x.host();
  got.resize(blocks);
  std::vector<int> wanted;
  for (int b = 0; b < blocks; ++b) wanted.push_back((b + steps) % blocks + 100 * steps);
  equal("grid", got, wanted);
}

FUSED_RNN_KERNEL void gather_cluster(int* y, int blocks) {
  int* s = shared<int>();
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  s[t] = 1000 * b + t;
  sync_cluster();
  for (int rank = 0; rank < blocks; ++rank) {
    y[(b * blocks + rank) * n + t] = cluster_shared(s, rank)[n - 1 - t] + 100000 * cluster_rank();
  }
  sync_cluster();
}

void clusters() {
  DeviceInfo device;
  must(device_info(0, &device));
  if (!device.clusters) {
    std::printf("  (this device has none)\n");
    return;
  }
  for (const int size : {2, 4, 8}) {
    const int threads = 40, blocks = 2 * size;
    Buffer<int> y(size_t(blocks * size * threads), -1);
    const LaunchConfig config{.grid = {blocks},
                              .block = {threads},
                              .shared_bytes = size_t(threads) * sizeof(int),
                              .cluster = size};
    started(launch<gather_cluster>(config, nullptr, y.data(), size));
    std::vector<int> wanted;
    for (int i = 0; i < blocks * size * threads; ++i) {
      const int t = i % threads, rank = i / threads % size, b = i / threads / size;
      wanted.push_back(1000 * (b / size * size + rank) + threads - 1 - t + 100000 * (b % size));
    }
    equal("cluster", y.host(), wanted);
  }
}

// In rounds, each block sends a row of words and a row of pairs to all of its cluster, and adds up
// what it got. The phases of two barriers take turns.
template <int kBlock>
struct Mail {
  uint64_t phases[2];
  uint64_t pairs[2][16 * kBlock];
  float words[2][16 * kBlock];
};

template <int kBlock>
FUSED_RNN_KERNEL void send_in_cluster(float* y, uint64_t* clock, int rounds) {
  auto* mail = shared<Mail<kBlock>>();
  const int t = thread_rank(), b = block_index().x, mine = cluster_rank() * kBlock + t;
  const int size = cluster_size(), bytes = size * kBlock * int(sizeof(uint64_t) + sizeof(float));
  const uint64_t begin = nanoseconds();
  if (t == 0)
    for (uint64_t& phase : mail->phases) phase_init(&phase, 2);
  sync_cluster();
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const int i = round % 2;
    uint64_t* phase = mail->phases + i;
    if (t < 2) phase_expect(phase, bytes / 2);
    for (int to = 0; to < size; ++to) {
      store_async(&mail->words[i][mine], float(b + t + to), phase, to);
      store_async(&mail->pairs[i][mine], uint64_t(round) << 40, phase, to);
    }
    while (!phase_done(phase, round / 2 % 2)) continue;
    for (int from = 0; from < size; ++from)
      sum += mail->words[i][from * kBlock + t] + float(mail->pairs[i][from * kBlock + t] >> 40);
    sync_block();
  }
  y[b * kBlock + t] = sum;
  if (t == 0) clock[b] = nanoseconds() - begin;
  sync_cluster();
}

void phases() {
  DeviceInfo device;
  must(device_info(0, &device));
  if (!device.clusters) {
    std::printf("  (this device has no clusters)\n");
    return;
  }
  constexpr int kBlock = 40, rounds = 5;
  for (const int size : {2, 4, 8}) {
    const int blocks = 2 * size;
    Buffer<float> y(size_t(blocks * kBlock), -1);
    Buffer<uint64_t> clock(size_t(blocks), 0);
    const LaunchConfig config{
        .grid = {blocks}, .block = {kBlock}, .shared_bytes = sizeof(Mail<kBlock>), .cluster = size};
    int held = 0;
    started(active_clusters<send_in_cluster<kBlock>>(config, &held));
    that(held >= 2, "%d clusters of %d", held, size);
    started(launch<send_in_cluster<kBlock>>(config, nullptr, y.data(), clock.data(), rounds));
    std::vector<float> wanted;
    for (int i = 0; i < blocks * kBlock; ++i) {
      const int b = i / kBlock, first = b / size * size;
      float sum = 0;
      for (int round = 0; round < rounds; ++round)
        for (int from = 0; from < size; ++from)
          sum += float(first + from + i % kBlock + b % size + round);
      wanted.push_back(sum);
    }
    equal("sum", y.host(), wanted);
    for (const uint64_t passed : clock.host())
      that(passed < 10'000'000'000u, "%llu nanoseconds", (unsigned long long)passed);
  }
}

// Warp collectives.

template <class T>
FUSED_RNN_KERNEL void shuffles(const T* x, T* y) {
  const int lane = lane_index();
  const T v = x[lane];
  y[lane] = shuffle(v, lane * 7 % kWarp);
  y[32 + lane] = shuffle_xor(v, 5);
  y[64 + lane] = shuffle_down(v, 3);
  T half_warp = v;
  if (lane >= 8 && lane < 24) half_warp = shuffle_xor(v, 7, 0x00ffff00u);
  y[96 + lane] = half_warp;
}

template <class T>
void shuffle_of() {
  std::vector<T> x, wanted(4 * kWarp);
  for (int i = 0; i < kWarp; ++i) x.push_back(T(i * 1000000007LL) + T(0.25));
  for (int i = 0; i < kWarp; ++i) {
    wanted[size_t(i)] = x[size_t(i * 7 % kWarp)];
    wanted[size_t(32 + i)] = x[size_t(i ^ 5)];
    wanted[size_t(64 + i)] = x[size_t(i + 3 < kWarp ? i + 3 : i)];
    wanted[size_t(96 + i)] = x[size_t(i >= 8 && i < 24 ? i ^ 7 : i)];
  }
  Buffer<T> in(x), out(4 * kWarp, T(-1));
  started(launch<shuffles<T>>({.block = {kWarp}}, nullptr, in.data(), out.data()));
  equal("shuffle", out.host(), wanted);
}

void shuffle_words() {
  shuffle_of<int>();
  shuffle_of<unsigned>();
  shuffle_of<float>();
  shuffle_of<double>();
  shuffle_of<long long>();
}

// Of a block whose last warp is short.
FUSED_RNN_KERNEL void ballots(uint32_t* y) {
  const int lane = lane_index();
  if (warp_index() == 0) {
    y[lane] = ballot(lane % 3 == 0);
    if (lane < 16) y[32 + lane] = ballot(lane % 2 == 0, 0xffffu);
  } else {
    y[48 + lane] = ballot(lane % 2 == 1, 0xffu);
  }
}

void ballot_words() {
  Buffer<uint32_t> y(56, 0);
  started(launch<ballots>({.block = {kWarp + 8}}, nullptr, y.data()));
  std::vector<uint32_t> wanted(32, 0x49249249u);
  wanted.resize(48, 0x5555u);
  wanted.resize(56, 0xaau);
  equal("ballot", y.host(), wanted);
}

// Copies.

template <int kBytes>
FUSED_RNN_KERNEL void copy_through(const unsigned char* x, unsigned char* y, int valid) {
  unsigned char* s = shared<unsigned char>();
  const int t = thread_rank(), n = block_size().x;
  copy_async<kBytes>(s + t * kBytes, x + t * kBytes, t < valid);
  copy_async_commit();
  copy_async_wait<0>();
  sync_block();
  for (int i = 0; i < kBytes; ++i) y[t * kBytes + i] = s[(n - 1 - t) * kBytes + i];
}

template <int kBytes>
void copies_of() {
  constexpr int n = 96, valid = 75;
  std::vector<unsigned char> x, wanted;
  for (int i = 0; i < n * kBytes; ++i) x.push_back((unsigned char)(i * 31 + 1));
  for (int i = 0; i < n * kBytes; ++i) {
    const int from = n - 1 - i / kBytes;
    wanted.push_back(from < valid ? x[size_t(from * kBytes + i % kBytes)] : 0);
  }
  Buffer<unsigned char> in(x), out(x.size(), 0xee);
  const LaunchConfig config{.block = {n}, .shared_bytes = n * kBytes};
  started(launch<copy_through<kBytes>>(config, nullptr, in.data(), out.data(), valid));
  equal("copy", out.host(), wanted);
}

// Three stages, two under way while one is used.
FUSED_RNN_KERNEL void pipeline(const float* x, float* y, int steps) {
  float* s = shared<float>();  // [3, n]
  const int t = thread_rank(), n = block_size().x;
  const auto issue = [&](int step) {
    if (step < steps) copy_async<4>(s + step % 3 * n + t, x + step * n + t);
    copy_async_commit();
  };
  issue(0);
  issue(1);
  float sum = 0;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<1>();
    sync_block();  // stage `step` is there, and what was in the stage of step + 2 has been used
    issue(step + 2);
    sum += s[step % 3 * n + n - 1 - t];
  }
  y[t] = sum;
}

void copies() {
  copies_of<4>();
  copies_of<8>();
  copies_of<16>();
  constexpr int n = 64, steps = 9;
  std::vector<float> x, wanted;
  for (int i = 0; i < n * steps; ++i) x.push_back(float(i * i % 1009));
  for (int t = 0; t < n; ++t) {
    float sum = 0;
    for (int step = 0; step < steps; ++step) sum += x[size_t(step * n + n - 1 - t)];
    wanted.push_back(sum);
  }
  Buffer<float> in(x), out(n, -1);
  const LaunchConfig config{.block = {n}, .shared_bytes = 3 * n * sizeof(float)};
  started(launch<pipeline>(config, nullptr, in.data(), out.data(), steps));
  equal("pipeline", out.host(), wanted);
}

// More shared memory than a kernel has without asking for it.
FUSED_RNN_KERNEL void fill_shared(int* y, int n) {
  int* s = shared<int>();
  for (int i = thread_rank(); i < n; i += block_size().x) s[i] = 3 * i;
  sync_block();
  for (int i = thread_rank(); i < n; i += block_size().x) y[i] = s[n - 1 - i];
}

void much_shared_memory() {
  DeviceInfo device;
  must(device_info(0, &device));
  const int n = int(device.shared_per_block / sizeof(int));
  that(n > 48 * 1024 / 4, "only %d words of shared memory", n);
  Buffer<int> y(size_t(n), -1);
  const LaunchConfig config{.block = {128}, .shared_bytes = size_t(n) * sizeof(int)};
  started(launch<fill_shared>(config, nullptr, y.data(), n));
  std::vector<int> wanted;
  for (int i = 0; i < n; ++i) wanted.push_back(3 * (n - 1 - i));
  equal("shared", y.host(), wanted);
}

// Matrix products: a is [M, K], b [K, N], d [M, N] and added to.

template <class T>
FUSED_RNN_DEVICE uint32_t pack(T low, T high) {
  return uint32_t(__builtin_bit_cast(uint16_t, low)) | uint32_t(__builtin_bit_cast(uint16_t, high))
                                                           << 16;
}

template <class T>
FUSED_RNN_KERNEL void multiply_16_bits(const T* a, const T* b, float* d) {
  using S = M16N8K16;
  const int lane = lane_index();
  const auto from = [](const T* p, Element e, int cols) { return p[e.row * cols + e.col]; };
  uint32_t ra[4], rb[2];
  for (int r = 0; r < 4; ++r) {
    ra[r] = pack(from(a, S::a(lane, 2 * r), S::K), from(a, S::a(lane, 2 * r + 1), S::K));
  }
  for (int r = 0; r < 2; ++r) {
    rb[r] = pack(from(b, S::b(lane, 2 * r), S::N), from(b, S::b(lane, 2 * r + 1), S::N));
  }
  float rd[4];
  for (int r = 0; r < 4; ++r) rd[r] = d[S::c(lane, r).row * S::N + S::c(lane, r).col];
  mma_m16n8k16<T>(rd, ra, rb);
  for (int r = 0; r < 4; ++r) d[S::c(lane, r).row * S::N + S::c(lane, r).col] = rd[r];
}

// The same, with the operands read as load_matrices does: A as it is, B transposed.
template <class T>
FUSED_RNN_KERNEL void multiply_loaded(const T* a, const T* b, float* d) {
  using S = M16N8K16;
  T* sa = shared<T>();
  T* sb = sa + S::M * S::K;
  const int lane = lane_index();
  for (int i = lane; i < S::M * S::K; i += kWarp) sa[i] = a[i];
  for (int i = lane; i < S::K * S::N; i += kWarp) sb[i] = b[i];
  sync_warp();
  uint32_t ra[4], rb[4];
  // Matrices 0 to 3: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  load_matrices(ra, sa + lane % 16 * S::K + lane / 16 * 8);
  // Rows 0-7 and 8-15 of B; the other two addresses are read, and their matrices not used.
  load_matrices_transposed(rb, sb + lane % 16 * S::N);
  const uint32_t two[2] = {rb[0], rb[1]};
  float rd[4];
  for (int r = 0; r < 4; ++r) rd[r] = d[S::c(lane, r).row * S::N + S::c(lane, r).col];
  mma_m16n8k16<T>(rd, ra, two);
  for (int r = 0; r < 4; ++r) d[S::c(lane, r).row * S::N + S::c(lane, r).col] = rd[r];
}

FUSED_RNN_KERNEL void multiply_tf32(const float* a, const float* b, float* d) {
  using S = M16N8K8;
  const int lane = lane_index();
  uint32_t ra[4], rb[2];
  for (int r = 0; r < 4; ++r) ra[r] = to_tf32(a[S::a(lane, r).row * S::K + S::a(lane, r).col]);
  for (int r = 0; r < 2; ++r) rb[r] = to_tf32(b[S::b(lane, r).row * S::N + S::b(lane, r).col]);
  float rd[4];
  for (int r = 0; r < 4; ++r) rd[r] = d[S::c(lane, r).row * S::N + S::c(lane, r).col];
  mma_m16n8k8(rd, ra, rb);
  for (int r = 0; r < 4; ++r) d[S::c(lane, r).row * S::N + S::c(lane, r).col] = rd[r];
}

FUSED_RNN_KERNEL void multiply_double(const double* a, const double* b, double* d) {
  using S = M8N8K4;
  const int lane = lane_index();
  double rd[2];
  for (int r = 0; r < 2; ++r) rd[r] = d[S::c(lane, r).row * S::N + S::c(lane, r).col];
  mma_m8n8k4(rd, a[S::a(lane, 0).row * S::K + S::a(lane, 0).col],
             b[S::b(lane, 0).row * S::N + S::b(lane, 0).col]);
  for (int r = 0; r < 2; ++r) d[S::c(lane, r).row * S::N + S::c(lane, r).col] = rd[r];
}

// On whole numbers, where every sum is exact, and on others up to `error` of the sum of magnitudes.
template <auto kKernel, class Shape, class T, class Sum>
void product(const char* name, double error) {
  const auto value = [](T v) { return double(widen(v)); };
  for (const bool whole : {true, false}) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    const auto draw = [&] {
      return whole ? double(int(random() % 17) - 8)
                   : std::ldexp(std::floor(normal(random) * 64), -6);
    };
    std::vector<T> a(Shape::M * Shape::K), b(Shape::K * Shape::N);
    std::vector<Sum> d(Shape::M * Shape::N);
    for (T& v : a) v = narrow<T>(Accumulate<T>(draw()));
    for (T& v : b) v = narrow<T>(Accumulate<T>(draw()));
    for (Sum& v : d) v = Sum(draw());
    Buffer<T> in_a(a), in_b(b);
    Buffer<Sum> out(d);
    const LaunchConfig config{.block = {kWarp}, .shared_bytes = 1024};
    started(launch<kKernel>(config, nullptr, in_a.data(), in_b.data(), out.data()));
    const std::vector<Sum> got = out.host();
    for (int i = 0; i < Shape::M * Shape::N; ++i) {
      double sum = double(d[size_t(i)]), size = std::fabs(sum);
      for (int k = 0; k < Shape::K; ++k) {
        const double p = value(a[size_t(i / Shape::N * Shape::K + k)]) *
                         value(b[size_t(k * Shape::N + i % Shape::N)]);
        sum += p;
        size += std::fabs(p);
      }
      const double off = std::fabs(double(got[size_t(i)]) - sum);
      that(whole ? off == 0 : off <= error * size, "%s, %s numbers: d[%d, %d] is %.9g, not %.9g",
           name, whole ? "whole" : "other", i / Shape::N, i % Shape::N, double(got[size_t(i)]),
           sum);
    }
  }
}

void products() {
  product<multiply_16_bits<half>, M16N8K16, half, float>("half", 1e-6);
  product<multiply_16_bits<bfloat16>, M16N8K16, bfloat16, float>("bfloat16", 1e-6);
  product<multiply_tf32, M16N8K8, float, float>("tf32", 1e-6);
  product<multiply_double, M8N8K4, double, double>("double", 1e-15);
}

void loaded_products() {
  product<multiply_loaded<half>, M16N8K16, half, float>("half", 1e-6);
  product<multiply_loaded<bfloat16>, M16N8K16, bfloat16, float>("bfloat16", 1e-6);
}

FUSED_RNN_KERNEL void round_to_tf32(const float* x, float* y, int n) {
  const int i = block_index().x * block_size().x + thread_rank();
  if (i < n) y[i] = __builtin_bit_cast(float, to_tf32(x[i]));
}

void tf32() {
  const float x0 = 1, ulp = std::ldexp(1.0f, -10);
  const std::vector<float> x = {
      x0,   x0 + 0.5f * ulp, -x0 - 0.5f * ulp, x0 + 0.499f * ulp, x0 + 1.5f * ulp,
      0.0f, -0.0f,           __builtin_inff(), -__builtin_inff(), 3e-39f};
  std::vector<float> wanted = {x0,    x0 + ulp,         -x0 - ulp,        x0, x0 + 2 * ulp, 0.0f,
                               -0.0f, __builtin_inff(), -__builtin_inff()};
  Buffer<float> in(x), out(x.size(), -1);
  started(launch<round_to_tf32>({.block = {32}}, nullptr, in.data(), out.data(), int(x.size())));
  std::vector<float> got = out.host();
  that(std::fabs(double(got.back()) - 3e-39) <= 1e-41, "a denormal is %g", double(got.back()));
  got.pop_back();
  equal("tf32", got, wanted);
}

// Storage types: every 16-bit pattern, and floats around each.

template <class T>
FUSED_RNN_KERNEL void convert(const float* x, uint16_t* low, float* wide, int n) {
  const int i = block_index().x * block_size().x + thread_rank();
  if (i >= n) return;
  low[i] = __builtin_bit_cast(uint16_t, narrow<T>(x[i]));
  wide[i] = widen(__builtin_bit_cast(T, uint16_t(i)));
}

template <class T>
void conversions_of(const char* name) {
  constexpr int n = 1 << 16;
  std::mt19937 random(3);
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) {
    const float v = widen(__builtin_bit_cast(T, uint16_t(i)));
    const float next = widen(__builtin_bit_cast(T, uint16_t(i + 1)));
    // Itself, halfway to the next, or somewhere between.
    const float shares[] = {0, 0.5f, float(random() % 1000) / 1000};
    x[size_t(i)] = v + shares[i % 3] * (next - v);
  }
  Buffer<float> in(x), wide(n, -1);
  Buffer<uint16_t> low(n, 0);
  const LaunchConfig config{.grid = {n / 256}, .block = {256}};
  started(launch<convert<T>>(config, nullptr, in.data(), low.data(), wide.data(), n));
  const std::vector<uint16_t> got_low = low.host();
  const std::vector<float> got_wide = wide.host();
  for (int i = 0; i < n; ++i) {
    const float v = widen(__builtin_bit_cast(T, uint16_t(i))), w = got_wide[size_t(i)];
    that(std::isnan(v) ? std::isnan(w) : v == w, "%s: %04x widens to %g", name, i, double(w));
    const T wanted = narrow<T>(x[size_t(i)]), got = __builtin_bit_cast(T, got_low[size_t(i)]);
    that(std::isnan(x[size_t(i)]) ? std::isnan(widen(got))
                                  : __builtin_bit_cast(uint16_t, wanted) == got_low[size_t(i)],
         "%s: %.9g narrows to %.9g", name, double(x[size_t(i)]), double(widen(got)));
  }
}

void conversions() {
  conversions_of<half>("half");
  conversions_of<bfloat16>("bfloat16");
}

// Memory shared with other blocks.

// Each block waits for the one before it, and hands a row on with something added.
template <class Flag>
FUSED_RNN_KERNEL void relay(float* rows, Flag* flags) {
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  if (b > 0) {
    if (t == 0) {
      while (load_acquire(flags + b - 1) != Flag(7)) continue;
    }
    sync_block();
    rows[b * n + t] = rows[(b - 1) * n + n - 1 - t] + 1;
  } else {
    rows[t] = float(t);
  }
  sync_block();
  if (t == 0) store_release(flags + b, Flag(7));
}

template <class Flag>
void relay_by() {
  constexpr int blocks = 6, n = 64;
  Buffer<float> rows(blocks * n, -1);
  Buffer<Flag> flags(blocks, Flag(0));
  const LaunchConfig config{.grid = {blocks}, .block = {n}, .cooperative = true};
  started(launch<relay<Flag>>(config, nullptr, rows.data(), flags.data()));
  std::vector<float> wanted;
  for (int i = 0; i < blocks * n; ++i) {
    const int b = i / n, t = i % n;
    wanted.push_back(float((b % 2 ? n - 1 - t : t) + b));
  }
  equal("relay", rows.host(), wanted);
}

// A barrier of the grid by a counter, and what the additions return.
FUSED_RNN_KERNEL void count(uint32_t* counters, float* x, float* y, uint32_t* order) {
  const int t = thread_rank(), b = block_index().x, n = grid_size().x;
  order[b * block_size().x + t] = add_relaxed(counters, 1);
  if (t == 0) {
    x[b] = float(b);
    add_release(counters + 1, 2);
    while (load_acquire(counters + 1) != uint32_t(2 * n)) continue;
    y[b] = x[n - 1 - b];
    if (add_acq_rel(counters + 2, 1) == uint32_t(n - 1)) {  // the last one has seen all y
      float sum = 0;
      for (int i = 0; i < n; ++i) sum += y[i];
      y[n] = sum;
    }
  }
}

void counters() {
  constexpr int blocks = 5, n = 32;
  Buffer<uint32_t> counters(3, 0), order(blocks * n, 0);
  Buffer<float> x(blocks, -1), y(blocks + 1, -1);
  const LaunchConfig config{.grid = {blocks}, .block = {n}, .cooperative = true};
  started(launch<count>(config, nullptr, counters.data(), x.data(), y.data(), order.data()));
  equal("counter", counters.host(), {blocks * n, 2 * blocks, blocks});
  equal("y", y.host(), {4, 3, 2, 1, 0, 10});
  std::vector<bool> seen(blocks * n);
  for (const uint32_t before : order.host()) {
    that(before < seen.size() && !seen[before], "add_relaxed returned %u", before);
    if (before < seen.size()) seen[before] = true;
  }
}

// The value is the flag: whoever reads it by relaxed loads knows it when it is no NaN.
FUSED_RNN_KERNEL void hand_values_on(float* x) {
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  float v = float(t);
  if (b > 0) {
    do v = load_relaxed(x + (b - 1) * n + t);
    while (v != v);
  }
  store_relaxed(x + b * n + t, v + 1);
}

// The same of eight values of 16 bits that threads of the block before stored each for itself.
FUSED_RNN_KERNEL void hand_pieces_on(uint16_t* x) {
  const int t = thread_rank(), b = block_index().x, n = block_size().x;
  uint16_t v = uint16_t(t);
  if (b > 0) {
    uint32_t words[4];
    bool missing = true;
    while (missing) {
      load_relaxed(words, x + (b - 1) * n + t / 8 * 8);
      missing = false;
      for (const uint32_t word : words) missing |= word % 65536 == 65535 || word / 65536 == 65535;
    }
    for (int i = 0; i < 4; ++i)
      if (i == t % 8 / 2) v = uint16_t(words[i] >> t % 2 * 16);
  }
  store_relaxed(x + b * n + t, uint16_t(v + 1));
}

void flags() {
  relay_by<uint32_t>();
  relay_by<int>();
  relay_by<uint64_t>();
  relay_by<float>();
  constexpr int blocks = 4, n = 32;
  Buffer<float> x(blocks * n, __builtin_nanf(""));
  const LaunchConfig config{.grid = {blocks}, .block = {n}, .cooperative = true};
  started(launch<hand_values_on>(config, nullptr, x.data()));
  std::vector<float> wanted;
  for (int i = 0; i < blocks * n; ++i) wanted.push_back(float(i % n + i / n + 1));
  equal("value", x.host(), wanted);
  Buffer<uint16_t> pieces(blocks * n, uint16_t(65535));
  started(launch<hand_pieces_on>(config, nullptr, pieces.data()));
  equal("piece", pieces.host(), std::vector<uint16_t>(wanted.begin(), wanted.end()));
}

// The host's side.

FUSED_RNN_KERNEL void parameters(double* y, int a, float b, Index c, const LaunchConfig* unused) {
  y[0] = a;
  y[1] = double(b);
  y[2] = c.x + 10 * c.y + 100 * c.z;
  y[3] = unused == nullptr;
}

void launches() {
  Buffer<double> y(4, -1);
  started(launch<parameters>({}, nullptr, y.data(), short(3), 2.5, Index{1, 2, 3}, nullptr));
  equal("parameter", y.host(), {3, 2.5, 321, 1});

  DeviceInfo device;
  must(device_info(0, &device));
  that(device.sms > 0 && device.capability >= 80 && device.threads_per_sm >= 1024 &&
           device.shared_per_block >= 48 * 1024 && device.l2_bytes > 0 && !device.name.empty(),
       "%s: capability %d, %d SMs", device.name.c_str(), device.capability, device.sms);
  int blocks = 0;
  started(blocks_per_sm<fill_shared>(256, 0, &blocks));
  that(blocks >= 1 && blocks <= device.threads_per_sm / 256, "%d blocks per SM", blocks);
  const int all = blocks * device.sms;
  started(blocks_per_sm<fill_shared>(256, device.shared_per_block, &blocks));
  that(blocks == 1, "%d blocks per SM with all shared memory", blocks);

  // What cannot be launched says so, and does no harm to what is launched next.
  const auto refused = [&](const char* what, const LaunchConfig& config) {
    const Status status = launch<fill_shared>(config, nullptr, nullptr, 0);
    that(!status.ok() && status.message().find("launch") != std::string::npos, "%s: \"%s\"", what,
         status.message().c_str());
  };
  refused("threads", {.block = {1025}, .shared_bytes = 4});
  refused("no blocks", {.grid = {0}, .shared_bytes = 4});
  refused("shared memory", {.shared_bytes = device.shared_per_block + 1});
  refused("cooperative", {.grid = {4 * all}, .block = {256}, .cooperative = true});
  started(launch<parameters>({}, nullptr, y.data(), 4, 2.5f, Index{}, nullptr));
  equal("parameter", y.host(), {4, 2.5, 111, 1});

  Buffer<double> z(4, -1);
  started(copy_bytes(z.data(), y.data(), 3 * sizeof(double), nullptr));
  started(fill_bytes(z.data(), 0, sizeof(double), nullptr));
  equal("copied", z.host(), {0, 2.5, 111, -1});
}

#ifndef FUSED_RNN_EMULATE
// On a stream of its own that does not wait for the default one, and recorded into a graph.
void streams() {
  cudaStream_t stream;
  must(status_of(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"));
  constexpr int blocks = 7, steps = 6;
  Buffer<int> x(2 * blocks, -1);
  const LaunchConfig config{.grid = {blocks}, .block = {64}, .cooperative = true};
  cudaGraph_t graph;
  cudaGraphExec_t recorded;
  must(status_of(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture"));
  started(fill_bytes(x.data(), 0xff, 2 * blocks * sizeof(int), stream));
  started(launch<pass_on>(config, stream, x.data(), steps));
  must(status_of(cudaStreamEndCapture(stream, &graph), "capture"));
  that(x.host()[0] == -1, "%s", "what was recorded has run");
  must(status_of(cudaGraphInstantiate(&recorded, graph, 0), "graph"));
  for (int run = 0; run < 3; ++run) {
    must(status_of(cudaGraphLaunch(recorded, stream), "graph"));
    must(wait_for(stream));
    that(x.host()[0] == steps % blocks + 100 * steps, "run %d: %d", run, x.host()[0]);
  }
  cudaGraphExecDestroy(recorded);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}
#endif

const struct {
  const char* name;
  void (*body)();
} kAll[] = {
    {"indices", indices},
    {"sync_block", block_barrier},
    {"sync_warp", warp_barrier},
    {"sync_grid", grid_barrier},
    {"sync_cluster", clusters},
    {"phases", phases},
    {"shuffle", shuffle_words},
    {"ballot", ballot_words},
    {"copy_async", copies},
    {"shared", much_shared_memory},
    {"mma", products},
    {"load_matrices", loaded_products},
    {"to_tf32", tf32},
    {"widen_narrow", conversions},
    {"flags", flags},
    {"counters", counters},
    {"launch", launches},
#ifndef FUSED_RNN_EMULATE
    {"streams", streams},
#endif
};

}  // namespace
}  // namespace fused_rnn::dev

int main(int count, char** arguments) {
  using namespace fused_rnn::dev;
  int devices = 0;
  must(device_count(&devices));
  for (const auto& one : kAll) {
    if (count > 1 && std::strcmp(arguments[1], one.name) != 0) continue;
    std::printf("%s\n", one.name);
    std::fflush(stdout);
    one.body();
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
