// What the host knows about launches and devices, without a CUDA header.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>
#include <utility>

namespace fused_rnn::dev {

// Nothing, or a sentence that says what went wrong.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(const Status&) = default;
  Status(Status&&) = default;
  // Returns nothing: nvcc takes the reference for a Status that is thrown away.
  void operator=(Status other) { message_ = std::move(other.message_); }
  static Status error(std::string message) {
    Status status;
    status.message_ = std::move(message);
    return status;
  }
  bool ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

 private:
  std::string message_;
};

using Stream = void*;  // a cudaStream_t

struct Index {
  int x = 1;
  int y = 1;
  int z = 1;
};

struct LaunchConfig {
  Index grid = {};   // blocks
  Index block = {};  // threads
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident together, as sync_grid() needs
  int cluster = 1;           // blocks along x that share a cluster; more than one takes sm_90
};

struct DeviceInfo {
  std::string name;
  int capability = 0;  // 10 * major + minor
  int sms = 0;
  int threads_per_sm = 0;
  size_t shared_per_block = 0;  // dynamic shared memory a launch may ask for
  size_t shared_per_sm = 0;
  size_t l2_bytes = 0;
  bool cooperative = false;
  bool clusters = false;
};

}  // namespace fused_rnn::dev
