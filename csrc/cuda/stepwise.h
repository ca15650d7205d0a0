// The schedule that serves every shape, dtype and cell: what is parallel over time is a product of
// a library, and each step one product more and a kernel of our own with the cell in it.
#pragma once

#include "../core/problem.h"
#include "host.h"

namespace fused_rnn::cuda {

// Rows of a matrix are contiguous and `ld` elements apart.
struct Matrix {
  void* data = nullptr;
  DType type = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  bool transposed = false;  // a factor is the transpose of what is described here

  bool operator==(const Matrix&) const = default;
  Matrix t() const {
    Matrix other = *this;
    other.transposed = !transposed;
    return other;
  }
};

// What a schedule borrows from its host.
struct Device {
  dev::Stream stream = nullptr;
  void* host = nullptr;
  // Uninitialised device memory that lives until all that the call has launched is done.
  void* (*allocate)(void* host, size_t bytes) = nullptr;
  // out = a b on the stream. Both factors are of one type, out is of that type or, where it has 16
  // bits, float32; sums are in float32, or float64 for float64.
  void (*multiply)(void* host, const Matrix& a, const Matrix& b, const Matrix& out) = nullptr;
};

// Bytes of gates that a call holds for the products over time: so many steps are one chunk. Only
// tests change it.
extern int64_t chunk_bytes;
// Steps of so many rows at most have the recurrent product in their kernel. Likewise.
extern int64_t fused_rows;

// All pointers of the problem are the device's, but those of `steps`. Errors are exceptions.
// Nothing is waited for: the call may be captured in a graph, which then holds for these sizes.
void stepwise_forward(const char* cell, DType type, const ForwardProblem& problem,
                      const Device& device);
void stepwise_backward(const char* cell, DType type, const BackwardProblem& problem,
                       const Device& device);

// Copies bytes on the device, or clears them where `from` is null.
void copy_or_clear(const void* from, void* to, size_t bytes, const Device& device);

}  // namespace fused_rnn::cuda
