// Cuts axes into pieces of a fixed size such that no piece spans two sequences. Pieces live in
// slots whose number follows from shapes; which sequence owns a slot is found on the device.
//
// Sequence s of a packed axis that owns the `length` entries from `begin` on has the slots from
// begin / size + s on. With ascending, disjoint sequences no two share a slot, and all of them fit
// in ceil(axis / size) + num_seqs.
#pragma once
#include "device/thread.cuh"
#include "longctx/block_map.h"
#include "longctx/params.h"
#include "longctx/sequence.h"

namespace longctx::cuda {

inline int64_t num_slots(const SequenceParams& seqs, int64_t axis, int64_t size) {
  return (axis + size - 1) / size + (seqs.cu_seqlens_q == nullptr ? 0 : seqs.num_seqs);
}

LONGCTX_HD inline int64_t first_slot(const SequenceParams& seqs, int64_t begin, int64_t size,
                                     int64_t sequence) {
  return seqs.cu_seqlens_q == nullptr ? 0 : begin / size + sequence;
}

struct AxisSpan {
  int64_t begin = 0;
  int64_t length = 0;
};

LONGCTX_HD inline AxisSpan key_span(const Sequence& seq) { return {seq.k_begin, seq.k_len}; }

// Key j and query i of a sequence lie on diagonal j - i + q_len - 1 of the span.
LONGCTX_HD inline AxisSpan diagonal_span(const Sequence& seq) {
  const bool empty = seq.q_len == 0 || seq.k_len == 0;
  return {seq.q_begin + seq.k_begin, empty ? 0 : seq.q_len + seq.k_len - 1};
}

struct Piece {
  int64_t sequence = -1;  // -1: nobody owns the slot
  int64_t number = 0;     // of the piece in its sequence
};

// The owner of `slot`. Without packing that is `batch_index`, whatever its length. A whole warp
// calls this.
template <class Span>
LONGCTX_DEVICE Piece piece_at(const SequenceParams& seqs, int64_t batch_index, int64_t slot,
                              int64_t size, const Span& span) {
  if (seqs.cu_seqlens_q == nullptr) return {batch_index, slot};
  for (int64_t first = 0; first < seqs.num_seqs; first += device::kWarpSize) {
    const int64_t sequence = first + device::lane_index();
    int64_t number = -1, count = 0;
    if (sequence < seqs.num_seqs) {
      const AxisSpan own = span(sequence_at(seqs, sequence));
      number = slot - first_slot(seqs, own.begin, size, sequence);
      count = (own.length + size - 1) / size;
    }
    const uint32_t owners = device::ballot(number >= 0 && number < count);
    if (owners != 0) {
      const int lane = device::lowest_bit(owners);
      return {first + lane, device::shuffle(number, lane)};
    }
  }
  return {};
}

// Rows of a block map that one block of threads works on.
struct MapPiece {
  SequenceMap map;
  int64_t sequence = -1;  // -1: nobody owns the slot
  int64_t row = 0;        // the first one, counted from map.first_row
};

// The same for the rows of a block map, whose sequences own consecutive rows: where those of a
// sequence start is a prefix sum. A whole warp calls this.
LONGCTX_DEVICE MapPiece map_piece_at(const BlockMapParams& map, int64_t batch_index, int64_t slot,
                                     int64_t size) {
  if (map.seqs.cu_seqlens_q == nullptr) {
    return {sequence_map(map, batch_index, 0), batch_index, slot * size};
  }
  int64_t rows_before = 0;
  for (int64_t first = 0; first < map.seqs.num_seqs; first += device::kWarpSize) {
    const int64_t sequence = first + device::lane_index();
    int64_t own = 0;
    if (sequence < map.seqs.num_seqs) {
      const int64_t q_len = sequence_at(map.seqs, sequence).q_len;
      own = (q_len + map.block_size_q - 1) / map.block_size_q;
    }
    int64_t through = own;  // rows of the sequences up to this lane's
    for (int delta = 1; delta < device::kWarpSize; delta *= 2) {
      const int64_t other = device::shuffle_up(through, delta);
      if (device::lane_index() >= delta) through += other;
    }
    const int64_t first_row = clamp_index(rows_before + through - own, 0, map.num_q_blocks);
    const int64_t num_rows = clamp_index(own, 0, map.num_q_blocks - first_row);
    const int64_t number = slot - first_slot(map.seqs, first_row, size, sequence);
    const uint32_t owners = device::ballot(number >= 0 && number * size < num_rows);
    if (owners != 0) {
      const int lane = device::lowest_bit(owners);
      const int64_t row = device::shuffle(number, lane) * size;
      return {sequence_map(map, first + lane, device::shuffle(first_row, lane)), first + lane, row};
    }
    rows_before += device::shuffle(through, device::kWarpSize - 1);
  }
  return {};
}

}  // namespace longctx::cuda
