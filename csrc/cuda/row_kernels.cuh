// Kernels that know no cell: states at the ends of a scan, rows on their way to and from the
// products over time, sums of columns.
#pragma once

#include "states.cuh"

namespace fused_rnn::cuda {

// Integers for the device as arguments of a launch: a graph that is captured holds them, and no
// memory of the host has to outlive the call.
struct Integers {
  static constexpr int kCount = 256;
  int64_t value[kCount];
};

// One thread, one integer. A template, so that it may stand in a header.
template <class Values>
FUSED_RNN_KERNEL void write_integers(Values from, int64_t count, int64_t* to) {
  for_each_element(1, count, [&](int64_t, int64_t i) { to[i] = from.value[i]; });
}

// The states before the first step, [B, H]: the initial ones, or zeros for who begins with that
// step.
template <class A>
struct Start {
  DType type;
  int64_t B, H, R;
  Initial initial;
  Begins from_zero;
  void* h[2];       // S [B, R]: the buffers that steps read and write in turn
  void* masked[2];  // S [B, R], or null
  Rows h_mask;
  A* c;           // [B, H], or null
  int64_t ends;   // rows from here on have no steps: these are their final states
  Rows h_n, c_n;  // S, data null when not wanted
};

template <class A>
FUSED_RNN_KERNEL void start_states(Start<A> s) {
  for_each_element(s.B, s.H, [&](int64_t b, int64_t u) {
    const bool zero = s.from_zero(b);
    if (u < s.R) {
      const A h = zero ? A(0) : load_or_zero<A>(s.type, s.initial.h.data, s.initial.h.at(b) + u);
      for (int i = 0; i < 2; ++i) {
        publish(s.type, s.h[i], b * s.R + u, h);
        if (s.masked[i])
          store(s.type, s.masked[i], b * s.R + u,
                h * load<A>(s.type, s.h_mask.data, s.h_mask.at(b) + u));
      }
      if (b >= s.ends && s.h_n.data) store(s.type, s.h_n.data, s.h_n.at(b) + u, h);
    }
    if (!s.c) return;
    const A c = zero ? A(0) : load_or_zero<A>(s.type, s.initial.c.data, s.initial.c.at(b) + u);
    s.c[b * s.H + u] = c;
    if (b >= s.ends && s.c_n.data) store(s.type, s.c_n.data, s.c_n.at(b) + u, c);
  });
}

// h = W_hr m of a step goes where the h of other cells goes.
template <class A>
FUSED_RNN_KERNEL void projected_step(ForwardStep<A> s, const A* projected) {
  for_each_element(s.rows, s.R, [&](int64_t b, int64_t u) {
    A h = projected[b * s.R + u];
    if (s.zoneout.any) h = zone_out(s.zoneout, 0, b, u, load<A>(s.type, s.h, b * s.R + u), h);
    h = emit_h(s, b, u, h);
    if (s.saved) s.saved[b * s.ld_saved + u] = h;
  });
}

template <class A>
FUSED_RNN_KERNEL void unproject_step(UnprojectStep<A> s) {
  for_each_element(s.rows, s.H, [&](int64_t b, int64_t u) {
    if (u < s.R) {
      const A d = incoming_h(s.incoming, b, u, s.R);
      const A kept = s.zoneout.any ? d * zoneout_share<A>(s.zoneout, 0, b, u) : A(0);
      if (s.zoneout.any) s.incoming.direct[b * s.R + u] = kept;
      store(s.incoming.type, s.d_h, b * s.R + u, d - kept);
    }
    if (s.own) store(s.incoming.type, s.own, b * s.H + u, s.saved[b * s.ld_saved + u]);
  });
}

// The gradients of h0 and c0: what flows out of the first step, and what ended before.
template <class A>
struct FinishGradients {
  Incoming<A> incoming;  // as a step before the first one would find it
  int64_t B, H, R;
  Rows d_h0, d_c0;  // S, data null when not wanted
};

template <class A>
FUSED_RNN_KERNEL void finish_gradients(FinishGradients<A> s) {
  for_each_element(s.B, s.H, [&](int64_t b, int64_t u) {
    const Incoming<A>& in = s.incoming;
    if (s.d_h0.data && u < s.R) {
      A d = incoming_h(in, b, u, s.R);
      if (in.d_h0) d += in.d_h0[b * s.R + u];
      store(in.type, s.d_h0.data, s.d_h0.at(b) + u, d);
    }
    if (s.d_c0.data) {
      A d = incoming_c(in, b, u, s.H);
      if (in.d_c0) d += in.d_c0[b * s.H + u];
      store(in.type, s.d_c0.data, s.d_c0.at(b) + u, d);
    }
  });
}

// Where the rows of many steps stand in a tensor of the caller.
struct RowMap {
  int64_t T, B;
  const int64_t* offsets;  // [T] on the device: rows before each step; null for a dense batch
  const int64_t* order;    // [B], or null
  Sequence sequence;       // packed or not

  FUSED_RNN_DEVICE int64_t at(int64_t row) const {
    if (sequence.packed) return row * sequence.stride_b;
    int64_t t = 0, b = 0;
    if (!offsets) {
      t = row / B;
      b = row - t * B;
    } else {
      int64_t end = T;  // the last t with offsets[t] <= row is in [t, end)
      while (end - t > 1) {
        const int64_t middle = (t + end) / 2;
        (offsets[middle] <= row ? t : end) = middle;
      }
      b = row - offsets[t];
    }
    return t * sequence.stride_t + (order ? order[b] : b) * sequence.stride_b;
  }
};

// Rows [first, first + rows) of all steps of a tensor side by side: to[row, :] = from[first + row].
// E is an integer of the size of S.
template <class E>
FUSED_RNN_KERNEL void gather_rows(int64_t first, int64_t rows, int64_t features, RowMap from,
                                  E* to) {
  for_each_element(rows, features, [&](int64_t row, int64_t i) {
    to[row * features + i] = static_cast<const E*>(from.sequence.data)[from.at(first + row) + i];
  });
}

// The way back: to[first + row] = from[row, :] + more[row, :].
template <class A>
FUSED_RNN_KERNEL void scatter_rows(DType type, int64_t first, int64_t rows, int64_t features,
                                   const A* from, const A* more, RowMap to) {
  for_each_element(rows, features, [&](int64_t row, int64_t i) {
    const int64_t at = row * features + i;
    store(type, to.sequence.data, to.at(first + row) + i, more ? more[at] + from[at] : from[at]);
  });
}

// The output of the layer below, from what it saved: [rows, directions * R].
template <class A>
FUSED_RNN_KERNEL void gather_saved(DType type, int64_t rows, int64_t directions, int64_t R,
                                   const A* saved, int64_t ld_saved, int64_t direction, void* to) {
  for_each_element(rows, directions * R, [&](int64_t row, int64_t i) {
    const int64_t d = i >= R ? 1 : 0;
    store(type, to, row * directions * R + i, saved[d * direction + row * ld_saved + i - d * R]);
  });
}

// Rows of a slab that one thread adds up.
constexpr int64_t kSlabRows = 64;

// One thread, one column of one slab of rows: out[slab, column] (+)= the sum. Blocks are summed
// first: one long row of additions would lose more digits.
template <class A>
FUSED_RNN_KERNEL void sum_rows(DType type, const void* in, int64_t rows, int64_t columns,
                               bool accumulate, A* out) {
  constexpr int64_t kBlock = 8;
  for_each_element((rows + kSlabRows - 1) / kSlabRows, columns, [&](int64_t slab, int64_t column) {
    const int64_t first = slab * kSlabRows;
    const int64_t end = first + kSlabRows < rows ? first + kSlabRows : rows;
    A sum = accumulate ? out[slab * columns + column] : A(0);
    for (int64_t from = first; from < end; from += kBlock) {
      A block = 0;
      for (int64_t row = from; row < from + kBlock && row < end; ++row)
        block += load<A>(type, in, row * columns + column);
      sum += block;
    }
    out[slab * columns + column] = sum;
  });
}

// sum += more, and where `to` is not null also rounded to S there. One thread, one element.
template <class A>
FUSED_RNN_KERNEL void add_up(DType type, int64_t count, A* sum, const A* more, void* to) {
  for_each_element(1, count, [&](int64_t, int64_t i) {
    A value = sum[i];
    if (more) sum[i] = value += more[i];
    if (to) store(type, to, i, value);
  });
}

}  // namespace fused_rnn::cuda
