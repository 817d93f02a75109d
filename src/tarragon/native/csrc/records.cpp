// tarragon_commit, tarragon::release_record, record_whole: the commit records of a checkpoint bucket, which make
// complete prefixes visible (6.1).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "crc32c.h"

namespace tarragon {
namespace {

using at::Tensor;

// A record as it lies in a bucket; the blocks of its groups follow, `blocks_max` for each.
struct Record {
  uint64_t version;  // odd while it is being written
  uint32_t live;
  uint32_t attempt;
  uint32_t committed;  // positions whose rows are complete in every layer
  uint32_t id_bytes;
  uint32_t check;  // CRC-32C of all that follows from `live` on, but itself
  uint32_t reserved;
  char id[192];
};
static_assert(sizeof(Record) == 224);

// Blocks that so many positions fill, in whole or in part.
int64_t blocks_of(int64_t positions, int64_t block_size) { return (positions + block_size - 1) / block_size; }

// CRC-32C of a record but its blocks, to go on from.
uint32_t fixed_check(const Record& record) {
  const uint32_t crc = crc32c(~0U, reinterpret_cast<const uint8_t*>(&record.live), 16);
  return crc32c(crc, reinterpret_cast<const uint8_t*>(record.id), sizeof(record.id));
}

// Blocks of each group that a record of so many bytes has room for.
int64_t blocks_room(int64_t record_bytes, int64_t groups) {
  return groups > 0 ? (record_bytes - static_cast<int64_t>(sizeof(Record))) / (4 * groups) : 0;
}

Record* record_at(const Bytes& records, int64_t index) {
  TORCH_CHECK_VALUE(index >= 0 && index < records.rows, "record ", index, " of ", records.rows);
  return reinterpret_cast<Record*>(records.data + index * records.row_bytes);
}

// The record says nothing any more: what it named may be overwritten from now on.
void release_record(const Tensor& records, int64_t index) {
  Record* record = record_at(bytes_of(records, "records"), index);
  ++record->version;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  record->live = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  ++record->version;
}

// Whether a copy of one record is whole: its checksum fits its content.
bool record_whole(const Tensor& copy, at::IntArrayRef block_sizes) {
  const Bytes one = bytes_of(copy, "copy");
  const Record* record = record_at(one, 0);
  const int64_t room = blocks_room(one.row_bytes, static_cast<int64_t>(block_sizes.size()));
  TORCH_CHECK_VALUE(room > 0, "records of ", one.row_bytes, " bytes have no room for blocks");
  const int32_t* blocks = reinterpret_cast<const int32_t*>(record + 1);
  uint32_t check = fixed_check(*record);
  for (const int64_t size : block_sizes) {
    const int64_t used = blocks_of(record->committed, size);
    if (used > room) return false;
    check = crc32c(check, reinterpret_cast<const uint8_t*>(blocks), used * 4);
    blocks += room;
  }
  return record->check == check;
}

// What a commit needs of one cache group; native/records.py has the same layout.
struct Group {
  const int32_t* table;  // row i has the blocks of the batch's i-th request
  int64_t row_stride, columns, block_size;
};

// What every commit of one batch needs; native/records.py has the same layout.
struct Batch {
  uint8_t* records;
  int64_t record_count, record_bytes;
  const uint32_t* seal;      // not 0: nothing may be written any more
  const int32_t* computed;   // positions that were complete before the step
  const int32_t* indices;    // records, negative ones are left out
  int64_t requests;
  const Group* groups;
  int64_t group_count;
};

enum Outcome : int32_t { kCommitted = 0, kSealed = 1, kNoRoom = 2 };

int64_t positions_of(const Batch& batch, const int32_t* added, int64_t i) {
  return int64_t{batch.computed[i]} + (added ? added[i] : 1);
}

bool fits(const Batch& batch, int64_t room, const int32_t* added) {
  for (int64_t i = 0; i < batch.requests; ++i) {
    if (batch.indices[i] < 0) continue;
    const int64_t positions = positions_of(batch, added, i);
    if (batch.indices[i] >= batch.record_count || positions < 0) return false;
    for (int64_t g = 0; g < batch.group_count; ++g) {
      const int64_t used = blocks_of(positions, batch.groups[g].block_size);
      if (used > room || used > batch.groups[g].columns) return false;
    }
  }
  return true;
}

void write_record(Record* record, int64_t positions, const Batch& batch, int64_t row, int64_t room) {
  int32_t* blocks = reinterpret_cast<int32_t*>(record + 1);
  ++record->version;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  record->live = 1;
  record->committed = static_cast<uint32_t>(positions);
  uint32_t check = fixed_check(*record);
  for (int64_t g = 0; g < batch.group_count; ++g) {
    const Group& group = batch.groups[g];
    int32_t* to = blocks + g * room;
    const int64_t bytes = blocks_of(positions, group.block_size) * 4;
    std::memcpy(to, group.table + row * group.row_stride, bytes);
    check = crc32c(check, reinterpret_cast<const uint8_t*>(to), bytes);
  }
  record->check = check;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  ++record->version;
}

}  // namespace

// Every record of the batch covers added[i] positions more, or one each. No op of torch's: with cold caches its
// dispatcher takes four times as long as all of this.
extern "C" __attribute__((visibility("default"))) int32_t tarragon_commit(const Batch* batch, const int32_t* added) {
  if (__atomic_load_n(batch->seal, __ATOMIC_SEQ_CST)) return kSealed;
  const int64_t room = blocks_room(batch->record_bytes, batch->group_count);
  if (!fits(*batch, room, added)) return kNoRoom;
  for (int64_t i = 0; i < batch->requests; ++i) {
    if (batch->indices[i] < 0) continue;
    auto* record = reinterpret_cast<Record*>(batch->records + batch->indices[i] * batch->record_bytes);
    write_record(record, positions_of(*batch, added, i), *batch, i, room);
  }
  return kCommitted;
}

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("release_record(Tensor(a!) records, int index) -> ()");
  m.def("record_whole(Tensor copy, int[] block_sizes) -> bool");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("release_record", release_record);
  m.impl("record_whole", record_whole);
}

}  // namespace tarragon
