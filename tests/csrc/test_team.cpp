// Who does what: sequences shared by their steps, and a barrier whose threads may take over from
// one another. Each step adds the step's number to one sum per id, by whoever stands for the id; a
// step reads what the one before has left of every id.
#include "cpu/team.h"

#include <thread>
#include <vector>

#include "check.h"

using namespace fused_rnn::cpu;

namespace {

constexpr int kSteps = 400;

struct Walked {
  std::vector<long> sums;   // of each id
  std::vector<Range> left;  // of each thread, at the end
};

// Threads stand for the ids between their borders; from step `first` on, `late` sleeps in its work.
Walked walk(std::vector<int> borders, int late, int first) {
  const int ids = borders.back(), threads = int(borders.size()) - 1;
  Walked walked{std::vector<long>(size_t(ids)), std::vector<Range>(size_t(threads))};
  std::vector<long> sums[2] = {walked.sums, walked.sums};
  Barrier barrier(ids);
  const auto work = [&](int thread) {
    begin_together();
    Range mine{borders[size_t(thread)], borders[size_t(thread) + 1]};
    for (int step = 0; step < kSteps; ++step) {
      const std::vector<long>& before = sums[step % 2];
      for (int64_t id = mine.begin; id < mine.end; ++id) {
        for (int other = 0; other < ids; ++other)
          check::that(before[size_t(other)] == long(step) * (step - 1) / 2 + other * (step > 0),
                      "id %d before step %d: %ld", other, step, before[size_t(other)]);
        sums[1 - step % 2][size_t(id)] = before[size_t(id)] + step + (step == 0 ? id : 0);
      }
      if (thread == late && step >= first && mine.size() > 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      mine = barrier.wait(mine);
      if (mine.size() == 0) break;
    }
    walked.left[size_t(thread)] = mine;
    check::that(
        barrier.left({borders[size_t(thread)], borders[size_t(thread) + 1]}).size() == mine.size(),
        "thread %d forgets what is left", thread);
  };
  std::vector<std::thread> team;
  for (int thread = 0; thread < threads; ++thread) team.emplace_back(work, thread);
  for (std::thread& thread : team) thread.join();
  walked.sums = sums[kSteps % 2];
  return walked;
}

// Where nobody sleeps a thread may have lost its core all the same, and one that sleeps may be the
// first to ask.
void check_walk(const char* name, std::vector<int> borders, int late, int first) {
  const Walked walked = walk(borders, late, first);
  for (size_t id = 0; id < walked.sums.size(); ++id)
    check::that(walked.sums[id] == long(kSteps) * (kSteps - 1) / 2 + long(id), "%s: sum of %zu",
                name, id);
  int owners = 0;
  for (size_t thread = 0; thread < walked.left.size(); ++thread) {
    const Range left = walked.left[thread];
    owners += left.size() > 0;
    if (late >= 0)
      check::that(left.size() == 0 || left.size() == borders.back(),
                  "%s: thread %zu has [%ld, %ld)", name, thread, long(left.begin), long(left.end));
  }
  check::that(owners == 1 || (late < 0 && owners == int(walked.left.size())),
              "%s: %d threads at the end", name, owners);
}

// Sequences that differ in length are shared by what they have of some steps.
void check_parts() {
  const int64_t lengths[] = {50, 48, 30, 20, 10};
  fused_rnn::Steps steps;
  steps.T = 50;
  steps.B = 5;
  steps.lengths = lengths;
  const auto first_part = [&](Range rows, Range time) {
    RowParts parts(steps, 2, rows, time);
    const Range first = parts.next(), second = parts.next();
    check::that(first.begin == rows.begin && first.end == second.begin && second.end == rows.end,
                "parts do not follow one another");
    return int(first.end);
  };
  check::that(first_part({0, 5}, {0, 50}) == 2, "of all steps");
  check::that(first_part({0, 5}, {40, 50}) == 1, "of the last ten");
  check::that(first_part({0, 5}, {0, 10}) == 2, "of the first ten");
  check::that(first_part({1, 5}, {15, 40}) == 2, "of some rows and steps");
}

}  // namespace

int main() {
  check_parts();
  check_walk("nobody is late", {0, 1, 2, 3}, -1, 0);
  check_walk("the second is late", {0, 1, 2}, 1, 3);
  check_walk("the first is late", {0, 1, 2}, 0, 0);
  check_walk("two wait for one, who stands for two", {0, 1, 3, 4}, 1, 5);
  check_walk("one waits, who stands for two", {0, 2, 3}, 1, 5);
  return check::finish();
}
