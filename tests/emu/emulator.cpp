// Executes launches on the host; see emulator.h. Compiled without sanitizers, whatever the kernels
// are compiled with: what is done here is the hardware's doing and no access of a kernel. So there
// is no memcpy on what kernels see (ThreadSanitizer intercepts it), and no allocation while fibers
// run.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "cuda/platform.cuh"

// There where the program is linked with the sanitizer.
extern "C" {
#define FUSED_RNN_WEAK __attribute__((weak))
FUSED_RNN_WEAK void* __tsan_get_current_fiber();
FUSED_RNN_WEAK void* __tsan_create_fiber(unsigned flags);
FUSED_RNN_WEAK void __tsan_destroy_fiber(void* fiber);
FUSED_RNN_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
FUSED_RNN_WEAK void __tsan_acquire(void* address);
FUSED_RNN_WEAK void __tsan_release(void* address);
FUSED_RNN_WEAK void __tsan_ignore_thread_begin();
FUSED_RNN_WEAK void __tsan_ignore_thread_end();
FUSED_RNN_WEAK void __sanitizer_start_switch_fiber(void** fake, const void* bottom, size_t size);
FUSED_RNN_WEAK void __sanitizer_finish_switch_fiber(void* fake, const void** bottom, size_t* size);
FUSED_RNN_WEAK void __asan_poison_memory_region(const volatile void* address, size_t size);
FUSED_RNN_WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}

namespace fused_rnn::dev::emu {
namespace {

const bool kTsan = __tsan_create_fiber != nullptr;
const bool kAsan = __sanitizer_start_switch_fiber != nullptr && !kTsan;

// ThreadSanitizer has room for some 8,000 fibers, but is slow long before.
constexpr int kTsanFibers = 1000;
constexpr int kResident = 2048;  // threads at a time of a launch that is not cooperative
const size_t kStack = kAsan || kTsan ? 128 * 1024 : 16 * 1024;
// At the low end of a stack: guard pages would split the huge pages, without which thousands of
// stacks are as many entries of the TLB.
constexpr uint64_t kCanary = 0x6b63617473207073;

// What threads release when they come to a barrier and acquire when they leave: two in turn,
// because a thread may come to the next one before another has left the last.
struct Tokens {
  char of[2] = {};
  void release(unsigned generation) {
    if (kTsan) __tsan_release(&of[generation % 2]);
  }
  void acquire(unsigned generation) {
    if (kTsan) __tsan_acquire(&of[generation % 2]);
  }
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  Where where;
  Tokens tokens;
};

// Collectives of one mask.
struct Group {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  Collective kind = Collective::kSync;
  Where where;
  Tokens tokens;
  alignas(16) unsigned char given[2][kWarp * kDeposit];
  Group* next = nullptr;
};

struct Warp {
  unsigned alive = 0;
  int first = 0;  // fiber
  Group* groups = nullptr;
};

struct Cluster {
  int alive = 0;
  int first = 0;  // block
  Barrier barrier;
};

struct Block {
  int alive = 0;
  int first = 0;  // fiber
  Index index;
  unsigned char* shared = nullptr;
  Cluster* cluster = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

enum class State { kReady, kBarrier, kCollective, kDone };

struct Pending {
  Copy copy;
  unsigned group;
};

// A stack of its own, and what ThreadSanitizer knows of whoever runs there.
struct Seat {
  unsigned char* stack = nullptr;
  void* tsan = nullptr;
  bool abandoned = false;
};

struct Fiber : Thread {
  State state = State::kReady;
  Block* block = nullptr;
  Warp* warp = nullptr;
  // What it waits for.
  const void* waits_for = nullptr;
  const char* name = nullptr;
  Where where;
  // Copies on their way, the oldest at `taken`.
  std::vector<Pending> copies;
  size_t taken = 0;
  unsigned group = 0;
  Seat* seat = nullptr;
  void* fake = nullptr;  // AddressSanitizer's
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

const char* name_of(Scope scope) {
  return scope == Scope::kBlock  ? "sync_block"
         : scope == Scope::kGrid ? "sync_grid"
                                 : "sync_cluster";
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSync:
      return "sync_warp";
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kBallot:
      return "ballot";
    case Collective::kMma:
      return "mma";
    default:
      return "load_matrices";
  }
}

bool same(const Where& a, const Where& b) {
  if (std::memcmp(&a, &b, sizeof(a)) == 0) return true;  // nearly always
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof(buffer), format, arguments);
  va_end(arguments);
  return buffer;
}

std::string text(const Where& where) {
  return text("%s:%u:%u", where.file_name(), where.line(), where.column());
}

std::string text(Index i) {
  return text("(%d, %d, %d)", i.x, i.y, i.z);
}

struct Random {
  uint64_t state = 0;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return int((next() >> 32) * uint64_t(n) >> 32); }
};

// Those who can go on, a ring.
struct Ready {
  std::vector<int> ring;
  unsigned mask = 0, head = 0, tail = 0;

  void clear(int capacity) {
    unsigned size = 1;
    while (size < unsigned(capacity)) size *= 2;
    ring.resize(size);
    mask = size - 1;
    head = tail = 0;
  }
  int size() const { return int(tail - head); }
  int& at(unsigned i) { return ring[i & mask]; }
  void push_back(int fiber) { at(tail++) = fiber; }
  void push_front(int fiber) { at(--head) = fiber; }
  int pop() { return at(head++); }
};

// The launch that runs. Launches of several host threads wait for each other.
struct Machine {
  std::mutex mutex;
  std::vector<Seat> seats;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  Barrier grid_barrier;
  Ready ready;
  Random random;
  Fiber host;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  LaunchConfig config;
  int threads = 0;  // of a block
  Order order = Order::kForward;
  void (*invoke)(const void*) = nullptr;
  const void* arguments = nullptr;
  int total = 0;  // threads of the launch
  int alive = 0;
  uint64_t idle = 0;  // passes since something happened
  std::string failure;
  char begun = 0, ended = 0;  // tokens
  Counts counts;
  // Groups, handed out anew in each wave.
  std::vector<Group*> groups;
  size_t groups_used = 0;
};

Machine& m = *new Machine;  // never destroyed: kernels may be launched until the very end

Fiber* self() {
  return static_cast<Fiber*>(current);
}

// Switching.

#if defined(__x86_64__)
// Saves what the callee has to save, and ends in a jump: a return would be mispredicted.
extern "C" void fused_rnn_emu_switch(void** save, void* load);
asm(R"(
.text
.globl fused_rnn_emu_switch
.hidden fused_rnn_emu_switch
.type fused_rnn_emu_switch, @function
fused_rnn_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size fused_rnn_emu_switch, .-fused_rnn_emu_switch
)");
#endif

void switch_to(Fiber* to) {
  Fiber* from = self();
  current = to;
  ++m.counts.switches;
  const bool ends = from->state == State::kDone && from->seat;
  if (kTsan) __tsan_switch_to_fiber(to->seat ? to->seat->tsan : to->fake, 1);  // 1: no order
  if (kAsan) {
    const void* bottom = to->seat ? to->seat->stack : m.host_stack;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake, bottom,
                                   to->seat ? kStack : m.host_stack_bytes);
  }
#if defined(__x86_64__)
  fused_rnn_emu_switch(&from->sp, to->sp);
#else
  swapcontext(&from->context, &to->context);
#endif
  if (kAsan) __sanitizer_finish_switch_fiber(from->fake, nullptr, nullptr);
}

[[noreturn]] void unreachable() {
  std::abort();
}

// Goes on with the next who can; the host when there is none.
void switch_away() {
  if (m.ready.size() == 0) {
    switch_to(&m.host);
    return;
  }
  if (m.order == Order::kRandom) {
    const unsigned i = unsigned(m.random.below(m.ready.size()));
    std::swap(m.ready.at(m.ready.head), m.ready.at(m.ready.head + i));
  }
  Fiber* next = &m.fibers[size_t(m.ready.pop())];
  if (next != self()) switch_to(next);
}

// Ends the launch: m.failure says why.
[[noreturn]] void stop() {
  switch_to(&m.host);
  unreachable();
}

// All who wait for this become ready.
void wake(const void* what, int first, int count) {
  m.idle = 0;
  const Order order = m.order;
  const bool backwards = order == Order::kReverse || order == Order::kEager;
  for (int n = 0; n < count; ++n) {
    const int i = backwards ? first + count - 1 - n : first + n;
    Fiber& fiber = m.fibers[size_t(i)];
    if (fiber.waits_for != what) continue;
    fiber.waits_for = nullptr;
    fiber.state = State::kReady;
    if (order == Order::kEager) {
      m.ready.push_front(i);
    } else {
      m.ready.push_back(i);
    }
  }
}

// NaN in every type, and written as no sanitizer sees.
void poison(void* p, size_t bytes) {
  auto* words = static_cast<volatile uint32_t*>(p);
  for (size_t i = 0; i < bytes / 4; ++i) words[i] = 0xffffffffu;
}

void complete(Barrier& barrier, int first, int count) {
  barrier.arrived = 0;
  ++barrier.generation;
  wake(&barrier, first, count);
}

void complete(Group& group, Warp& warp) {
  group.arrived = 0;
  ++group.generation;
  const int behind = m.threads - m.fibers[size_t(warp.first)].rank;  // the last warp may be short
  wake(&group, warp.first, std::min(kWarp, behind));
}

// The thread has returned from the kernel: who waited for all others may go on.
void leave() {
  Fiber* f = self();
  f->state = State::kDone;
  m.idle = 0;
  --m.alive;
  if (kTsan) __tsan_release(&m.ended);
  Block& block = *f->block;
  if (block.alive == 1 && block.shared) {
    // Nobody may look at it any more.
    if (!kTsan) poison(block.shared, m.config.shared_bytes);
    if (kAsan) __asan_poison_memory_region(block.shared, m.config.shared_bytes);
  }
  if (--block.alive > 0 && block.barrier.arrived == block.alive) {
    complete(block.barrier, block.first, m.threads);
  }
  Cluster& cluster = *block.cluster;
  if (--cluster.alive > 0 && cluster.barrier.arrived == cluster.alive) {
    complete(cluster.barrier, m.blocks[size_t(cluster.first)].first, m.threads * m.config.cluster);
  }
  Warp& warp = *f->warp;
  warp.alive &= ~(1u << f->rank % kWarp);
  for (Group* g = warp.groups; g; g = g->next) {
    if (g->arrived && g->arrived == (g->mask & warp.alive)) complete(*g, warp);
  }
  switch_away();
  unreachable();
}

void enter() {
  if (kAsan) {
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (m.host_stack == nullptr) {
      m.host_stack = bottom;
      m.host_stack_bytes = size;
    }
  }
  if (kTsan) __tsan_acquire(&m.begun);
  m.invoke(m.arguments);
  leave();
}

void prepare(Fiber& f) {
#if defined(__x86_64__)
  // Stacks begin at different offsets of their pages, or they would fight for a few cache sets. As
  // if enter had been called, the stack pointer is 8 below a multiple of 16.
  const size_t offset = size_t(f.seat - m.seats.data()) % 64 * 64 + 16;
  void** top = reinterpret_cast<void**>(f.seat->stack + kStack - offset);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&enter);
  top -= 6;
  for (int i = 0; i < 6; ++i) top[i] = nullptr;
  f.sp = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.seat->stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
#endif
}

void seat(int count) {
  if (int(m.seats.size()) < count) {
    const size_t more = size_t(count) - m.seats.size();
    void* memory = mmap(nullptr, more * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (!kTsan && !kAsan) madvise(memory, more * kStack, MADV_HUGEPAGE);
    for (size_t i = 0; i < more; ++i) {
      Seat s;
      s.stack = static_cast<unsigned char*>(memory) + i * kStack;
      *reinterpret_cast<uint64_t*>(s.stack) = kCanary;
      m.seats.push_back(s);
    }
  }
  for (int i = 0; i < count; ++i) {
    Seat& s = m.seats[size_t(i)];
    if (s.abandoned) {
      if (kAsan) __asan_unpoison_memory_region(s.stack, kStack);
      if (kTsan) {
        __tsan_destroy_fiber(s.tsan);
        s.tsan = nullptr;
      }
      s.abandoned = false;
    }
    if (kTsan && s.tsan == nullptr) s.tsan = __tsan_create_fiber(0);
  }
}

// Who waits where.
std::string deadlock() {
  struct Line {
    const char* name;
    Where where;
    int threads;
    Index block, thread;
  };
  std::vector<Line> lines;
  int done = 0;
  for (const Fiber& f : m.fibers) {
    if (f.state == State::kDone) {
      ++done;
      continue;
    }
    bool known = false;
    for (Line& line : lines) {
      if (line.name == f.name && same(line.where, f.where)) {
        ++line.threads;
        known = true;
        break;
      }
    }
    if (!known) lines.push_back({f.name, f.where, 1, f.Thread::block, f.thread});
  }
  std::string sentence = "deadlock:";
  for (const Line& line : lines) {
    sentence +=
        text(" %d threads wait in %s at %s (first: block %s thread %s),", line.threads, line.name,
             text(line.where).c_str(), text(line.block).c_str(), text(line.thread).c_str());
  }
  return sentence + text(" %d have returned", done);
}

std::string check(const LaunchConfig& c) {
  const DeviceInfo& device = options().device;
  const auto positive = [](Index i) { return i.x > 0 && i.y > 0 && i.z > 0; };
  if (!positive(c.grid) || !positive(c.block)) return "a size is not positive";
  if (c.grid.y > 65535 || c.grid.z > 65535) return "grid: at most 65535 along y and z";
  const int64_t threads = int64_t(c.block.x) * c.block.y * c.block.z;
  if (threads > 1024 || c.block.z > 64) return "block: at most 1024 threads, 64 along z";
  if (c.shared_bytes > device.shared_per_block) {
    return text("%zu bytes of shared memory, the device has %zu", c.shared_bytes,
                device.shared_per_block);
  }
  if (c.cluster < 1 || c.cluster > 16 || c.grid.x % c.cluster != 0) {
    return "cluster: 1 to 16, and the grid a multiple along x";
  }
  if (c.cluster > 1 && !device.clusters) return "the device has no clusters";
  const int64_t blocks = int64_t(c.grid.x) * c.grid.y * c.grid.z;
  const int64_t room = int64_t(device.sms) * blocks_per_sm(int(threads), c.shared_bytes);
  if (c.cooperative && blocks > room) {
    return text("cooperative: %lld blocks, and %lld are resident at a time", (long long)blocks,
                (long long)room);
  }
  if (kTsan && (c.cooperative ? blocks : c.cluster) * threads > kTsanFibers) {
    return text("under ThreadSanitizer at most %d threads at a time", kTsanFibers);
  }
  return {};
}

// Some blocks that are resident together.
void run_wave(const std::vector<int>& order, size_t first, size_t count, size_t wave) {
  const LaunchConfig& c = m.config;
  const int threads = m.threads;
  const int fibers = int(count) * threads;
  seat(fibers);
  m.fibers.resize(size_t(fibers));
  m.blocks.assign(count, Block{});
  m.clusters.assign(count / size_t(c.cluster), Cluster{});
  m.grid_barrier = Barrier{};
  m.groups_used = 0;
  m.ready.clear(fibers);
  m.alive = fibers;
  m.idle = 0;
  const int warps = (threads + kWarp - 1) / kWarp;
  // One group per warp is all that most kernels need; the others come when asked for.
  while (m.groups.size() < count * size_t(warps)) m.groups.push_back(new Group);
  for (size_t b = 0; b < count; ++b) {
    Block& block = m.blocks[b];
    const int id = order[first + b];
    block.first = int(b) * threads;
    block.alive = threads;
    block.index = {id % c.grid.x, id / c.grid.x % c.grid.y, id / c.grid.x / c.grid.y};
    block.cluster = &m.clusters[b / size_t(c.cluster)];
    block.cluster->first = int(b) / c.cluster * c.cluster;
    block.cluster->alive = threads * c.cluster;
    block.warps.resize(size_t(warps));
    if (c.shared_bytes > 0) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, c.shared_bytes) != 0) throw std::bad_alloc();
      std::memset(memory, 0xff, c.shared_bytes);  // NaN in every type
      block.shared = static_cast<unsigned char*>(memory);
    }
    for (int t = 0; t < threads; ++t) {
      const int i = block.first + t;
      Fiber& f = m.fibers[size_t(i)];
      Warp& warp = block.warps[size_t(t / kWarp)];
      if (t % kWarp == 0) warp.first = i;
      warp.alive |= 1u << t % kWarp;
      f.thread = {t % c.block.x, t / c.block.x % c.block.y, t / c.block.x / c.block.y};
      f.Thread::block = block.index;
      f.block_size = c.block;
      f.grid = c.grid;
      f.rank = t;
      f.cluster_rank = block.index.x % c.cluster;
      f.cluster_size = c.cluster;
      f.shared = block.shared;
      f.shared_bytes = c.shared_bytes;
      f.state = State::kReady;
      f.block = &block;
      f.warp = &warp;
      f.waits_for = nullptr;
      f.copies.clear();
      f.taken = 0;
      f.group = 0;
      // Another wave's threads sit elsewhere: on the same seat their accesses would be in order.
      f.seat = &m.seats[(size_t(i) + wave * 7) % size_t(fibers)];
      f.fake = nullptr;
      prepare(f);
    }
  }
  for (int i = 0; i < fibers; ++i) {
    m.ready.push_back(m.order == Order::kReverse ? fibers - 1 - i : i);
  }
  current = &m.host;
  switch_away();
  current = nullptr;
  if (m.failure.empty() && m.alive > 0) m.failure = deadlock();
  for (const Fiber& f : m.fibers) {
    if (f.state != State::kDone) f.seat->abandoned = true;
    if (*reinterpret_cast<uint64_t*>(f.seat->stack) != kCanary) {
      std::fprintf(stderr, "emulator: a kernel needs more than %zu bytes of stack\n", kStack);
      std::abort();  // what lies below is spoilt
    }
  }
  if (kTsan) __tsan_acquire(&m.ended);
  for (Block& block : m.blocks) std::free(block.shared);
}

}  // namespace

Thread* current = nullptr;

void parse(const char* wish, Options* o) {
  const std::string order(wish, std::strcspn(wish, ":"));
  const char* const names[] = {"forward", "reverse", "eager", "random"};
  const auto* name = std::find(std::begin(names), std::end(names), order);
  if (name == std::end(names)) {
    std::fprintf(stderr, "emulator: %s is not forward, reverse, eager or random, and :seed\n",
                 wish);
    std::abort();
  }
  o->order = Order(name - std::begin(names));
  o->seed = wish[order.size()] ? std::strtoull(wish + order.size() + 1, nullptr, 10) : 0;
}

Options& options() {
  static Options* all = [] {
    auto* o = new Options;
    if (const char* wish = std::getenv("FUSED_RNN_EMULATOR_ORDER")) parse(wish, o);
    return o;
  }();
  return *all;
}

void set_order(const char* wish) {
  parse(wish, &options());
}

const Counts& counts() {
  return m.counts;
}

void fail(const char* sentence, Where where) {
  const Fiber* f = self();
  m.failure = text("%s: %s (block %s thread %s)", text(where).c_str(), sentence,
                   text(f->Thread::block).c_str(), text(f->thread).c_str());
  stop();
}

namespace {

// Whether the barrier there is the one that is to be left out.
bool left_out(const Where& where) {
  static std::array<Where, 64> places;
  static int count = 0;
  int i = 0;
  while (i < count && !same(places[size_t(i)], where)) ++i;
  if (i == count) places.at(size_t(count++)) = where;
  return i == options().without;
}

}  // namespace

void barrier(Scope scope, const Where& where) {
  if (options().without >= 0 && left_out(where)) return pass(false);
  Fiber* f = self();
  Block& block = *f->block;
  Barrier* barrier = &block.barrier;
  int expected = block.alive, first = block.first, count = m.threads;
  if (scope == Scope::kCluster) {
    barrier = &block.cluster->barrier;
    expected = block.cluster->alive;
    first = m.blocks[size_t(block.cluster->first)].first;
    count = m.threads * m.config.cluster;
  } else if (scope == Scope::kGrid) {
    if (!m.config.cooperative) fail("sync_grid in a launch that is not cooperative", where);
    barrier = &m.grid_barrier;
    expected = m.total;  // who has returned is missed
    first = 0;
    count = m.total;
  }
  f->name = name_of(scope);
  f->where = where;
  if (barrier->arrived == 0) {
    barrier->where = where;
  } else if (!same(barrier->where, where)) {
    m.failure =
        text("divergent barrier: %d threads wait in %s at %s, and block %s thread %s comes to %s",
             barrier->arrived, f->name, text(barrier->where).c_str(),
             text(f->Thread::block).c_str(), text(f->thread).c_str(), text(where).c_str());
    stop();
  }
  const unsigned generation = barrier->generation;
  barrier->tokens.release(generation);
  f->waits_for = barrier;
  f->state = State::kBarrier;
  if (++barrier->arrived == expected) complete(*barrier, first, count);
  switch_away();
  barrier->tokens.acquire(generation);
}

const void* collective(Collective kind, unsigned mask, const void* in, size_t bytes,
                       const Where& where) {
  Fiber* f = self();
  Warp& warp = *f->warp;
  const int lane = f->rank % kWarp;
  if (!(mask >> lane & 1)) fail("a lane that is not in its own mask", where);
  if ((kind == Collective::kMma || kind == Collective::kLoadMatrices) && warp.alive != kFullWarp) {
    fail("a matrix operation of a warp without all of its 32 lanes", where);
  }
  Group* g = warp.groups;
  while (g && g->mask != mask) g = g->next;
  if (g == nullptr) {
    if (m.groups_used == m.groups.size()) m.groups.push_back(new Group);
    g = m.groups[m.groups_used++];
    g->mask = mask;
    g->arrived = 0;
    g->next = warp.groups;
    warp.groups = g;
  }
  f->name = name_of(kind);
  f->where = where;
  const unsigned generation = g->generation;
  unsigned char* given = g->given[generation % 2];
  if (g->arrived == 0) {
    g->kind = kind;
    g->where = where;
    if ((mask & warp.alive) != kFullWarp) {
      // Lanes that are not there give NaN.
      poison(given, kWarp * bytes);
    }
  } else if (g->kind != kind || (kind != Collective::kSync && !same(g->where, where))) {
    m.failure = text(
        "divergent warp: %d lanes wait in %s at %s, and lane %d of block %s thread %s comes "
        "to %s at %s",
        __builtin_popcount(g->arrived), name_of(g->kind), text(g->where).c_str(), lane,
        text(f->Thread::block).c_str(), text(f->thread).c_str(), f->name, text(where).c_str());
    stop();
  }
  for (size_t i = 0; i < bytes / 4; ++i) {
    reinterpret_cast<volatile uint32_t*>(given + size_t(lane) * bytes)[i] =
        static_cast<const volatile uint32_t*>(in)[i];
  }
  if (kind == Collective::kSync) g->tokens.release(generation);
  f->waits_for = g;
  f->state = State::kCollective;
  g->arrived |= 1u << lane;
  if (g->arrived == (mask & warp.alive)) complete(*g, warp);
  switch_away();
  if (kind == Collective::kSync) g->tokens.acquire(generation);
  return given;
}

void pass(bool waiting) {
  if (!waiting) m.idle = 0;
  if (++m.idle > 100000 + 200 * m.fibers.size()) {
    m.failure = "livelock: threads wait for a value that nobody writes, the last in block " +
                text(self()->Thread::block) + " thread " + text(self()->thread);
    stop();
  }
  if (m.ready.size() == 0) return;
  m.ready.push_back(int(self() - m.fibers.data()));
  switch_away();
}

unsigned char* cluster_shared(void* p, int rank, const Where& where) {
  const Fiber* f = self();
  const ptrdiff_t offset = static_cast<unsigned char*>(p) - f->shared;
  if (rank < 0 || rank >= m.config.cluster) fail("cluster_shared: no such rank", where);
  if (f->shared == nullptr || offset < 0 || offset >= ptrdiff_t(f->shared_bytes)) {
    fail("cluster_shared: not an address in shared memory", where);
  }
  const Block& other = m.blocks[size_t(f->block->cluster->first + rank)];
  if (other.alive == 0) fail("cluster_shared: that block has ended", where);
  return other.shared + offset;
}

void issue(const Copy& copy, const Where& where) {
  Fiber* f = self();
  const auto* to = static_cast<const unsigned char*>(copy.to);
  const auto* from = static_cast<const unsigned char*>(copy.from);
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % size_t(copy.bytes) != 0;
  };
  if (f->shared == nullptr || to < f->shared || to + copy.bytes > f->shared + f->shared_bytes) {
    fail("copy_async: the destination is not in shared memory", where);
  }
  if (misaligned(to)) fail("copy_async: the destination is not aligned", where);
  if (misaligned(from)) fail("copy_async: the source is not aligned", where);
  if (f->taken == f->copies.size()) {
    f->copies.clear();
    f->taken = 0;
  }
  f->copies.push_back({copy, f->group});
}

void commit() {
  ++self()->group;
}

bool take(int groups, Copy* copy) {
  Fiber* f = self();
  if (f->taken == f->copies.size()) return false;
  const Pending& oldest = f->copies[f->taken];
  if (oldest.group + unsigned(groups) >= f->group) return false;
  *copy = oldest.copy;
  ++f->taken;
  return true;
}

int blocks_per_sm(int threads, size_t shared_bytes) {
  const DeviceInfo& device = options().device;
  if (threads < 1 || threads > 1024 || shared_bytes > device.shared_per_block) return 0;
  const int warps = (threads + kWarp - 1) / kWarp;
  const int by_threads = device.threads_per_sm / (warps * kWarp);
  const int by_shared = int(device.shared_per_sm / (shared_bytes + 1024));
  return std::min({32, by_threads, by_shared});
}

Status run(const LaunchConfig& config, void (*invoke)(const void*), const void* arguments) {
  if (std::string wrong = check(config); !wrong.empty()) return Status::error("launch: " + wrong);
  const std::lock_guard lock(m.mutex);
  m.config = config;
  m.invoke = invoke;
  m.arguments = arguments;
  m.failure.clear();
  ++m.counts.launches;
  m.random.state = options().seed * 1000003 + m.counts.launches;
  m.host.state = State::kReady;
  m.host_stack = nullptr;
  if (kTsan) {
    m.host.fake = __tsan_get_current_fiber();
    __tsan_release(&m.begun);
    // Of the host's thread, and not of the fibers: an allocation would be an access.
    __tsan_ignore_thread_begin();
  }

  const Index grid = config.grid;
  const int threads = config.block.x * config.block.y * config.block.z;
  m.threads = threads;
  m.order = options().order;
  const size_t blocks = size_t(grid.x) * size_t(grid.y) * size_t(grid.z);
  const size_t cluster = size_t(config.cluster);
  m.total = int(blocks) * threads;
  // Clusters in the order asked for, the blocks of each in their own.
  std::vector<int> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = int(i);
  const size_t clusters = blocks / cluster;
  const auto exchange = [&](size_t a, size_t b) {
    for (size_t i = 0; i < cluster; ++i) std::swap(order[a * cluster + i], order[b * cluster + i]);
  };
  if (m.order == Order::kRandom) {
    for (size_t i = clusters; i > 1; --i) exchange(i - 1, size_t(m.random.below(int(i))));
  }
  const size_t resident = size_t(kTsan ? kTsanFibers : kResident);
  const size_t together = std::max(cluster, resident / size_t(threads) / cluster * cluster);
  const size_t wave = config.cooperative ? blocks : together;
  const size_t waves = (blocks + wave - 1) / wave;
  for (size_t n = 0; n < waves && m.failure.empty(); ++n) {
    const size_t first = (m.order == Order::kReverse ? waves - 1 - n : n) * wave;
    run_wave(order, first, std::min(wave, blocks - first), n);
  }
  if (kTsan) __tsan_ignore_thread_end();
  return m.failure.empty() ? Status() : Status::error("emulator: " + m.failure);
}

}  // namespace fused_rnn::dev::emu
