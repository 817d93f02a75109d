// tarragon::segment_write, segment_read, commit_records, release_record, checksum: K,V rows into a checkpoint
// bucket and back, and the commit records that make complete prefixes visible (6.1).
#include <ATen/core/Tensor.h>
#include <torch/library.h>
#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "checks.h"

namespace tarragon {
namespace {

using at::Tensor;
using at::TensorList;

constexpr uint32_t kAbsent = 0;  // the checksum of a row that was never written

#if !defined(__SSE4_2__)
std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78U : 0U);
    table[i] = crc;
  }
  return table;
}
#endif

// CRC-32C of `size` bytes, going on from `crc`.
uint32_t crc32c(uint32_t crc, const uint8_t* data, int64_t size) {
#if defined(__SSE4_2__)
  uint64_t wide = crc;
  int64_t at = 0;
  for (; at + 8 <= size; at += 8) {
    uint64_t word;
    std::memcpy(&word, data + at, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; at < size; ++at) crc = _mm_crc32_u8(crc, data[at]);
#else
  static const std::array<uint32_t, 256> table = make_table();
  for (int64_t at = 0; at < size; ++at) crc = table[(crc ^ data[at]) & 0xFF] ^ (crc >> 8);
#endif
  return crc;
}

uint32_t checksum_of(const uint8_t* row, int64_t size) {
  const uint32_t crc = crc32c(~0U, row, size);
  return crc == kAbsent ? 1 : crc;
}

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

uint32_t record_check(const Record& record, const int32_t* blocks, int64_t blocks_max,
                      at::ArrayRef<int64_t> block_sizes) {
  uint32_t crc = crc32c(~0U, reinterpret_cast<const uint8_t*>(&record.live), 16);
  crc = crc32c(crc, reinterpret_cast<const uint8_t*>(record.id), sizeof(record.id));
  for (size_t group = 0; group < block_sizes.size(); ++group) {
    const int64_t used = (record.committed + block_sizes[group] - 1) / block_sizes[group];
    crc = crc32c(crc, reinterpret_cast<const uint8_t*>(blocks + group * blocks_max), used * 4);
  }
  return crc;
}

struct Matrix {
  uint8_t* data;
  int64_t rows, bytes;
};

Matrix matrix(const Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kByte, name, " must be uint8");
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.is_contiguous(), name, " must be a contiguous matrix");
  return {tensor.data_ptr<uint8_t>(), tensor.size(0), tensor.size(1)};
}

struct Halves {
  uint8_t *key, *value;
  int64_t key_stride, value_stride, key_bytes, value_bytes;
};

// Bytes of one row of `rows`, [T, ...], whose inner dimensions must lie without gaps.
int64_t inner_bytes(const Tensor& rows) {
  int64_t size = static_cast<int64_t>(rows.element_size());
  for (int64_t d = rows.dim() - 1; d > 0; --d) {
    TORCH_CHECK_VALUE(rows.size(d) <= 1 || rows.stride(d) * static_cast<int64_t>(rows.element_size()) == size,
                      "key and value must have contiguous rows");
    size *= rows.size(d);
  }
  return size;
}

Halves halves(const Tensor& key, const Tensor& value, int64_t count, int64_t row_size) {
  for (const Tensor* half : {&key, &value}) {
    TORCH_CHECK_VALUE(half->dim() >= 2 && half->size(0) >= count, "key and value must have one row for each slot");
  }
  const int64_t key_bytes = inner_bytes(key), value_bytes = inner_bytes(value);
  TORCH_CHECK_VALUE(key_bytes + value_bytes <= row_size, "rows of ", key_bytes + value_bytes,
                    " bytes do not fit a bucket's ", row_size);
  return {static_cast<uint8_t*>(key.data_ptr()),
          static_cast<uint8_t*>(value.data_ptr()),
          key.stride(0) * static_cast<int64_t>(key.element_size()),
          value.stride(0) * static_cast<int64_t>(value.element_size()),
          key_bytes,
          value_bytes};
}

const int64_t* slots_of(const Tensor& slots) {
  TORCH_CHECK_TYPE(slots.scalar_type() == at::kLong, "slots must be int64");
  TORCH_CHECK_VALUE(slots.dim() == 1 && slots.is_contiguous(), "slots must be a contiguous vector");
  return slots.const_data_ptr<int64_t>();
}

void check_slots(const int64_t* slots, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(slots[i] < limit, "slot ", slots[i], " is beyond the bucket's ", limit);
  }
}

// Copy row i of keys[n] and values[n] into slot slots[n][i] of layer layers[n]; negative slots are padding.
void segment_write(TensorList keys, TensorList values, TensorList slots, at::IntArrayRef layers, const Tensor& rows,
                   const Tensor& checks) {
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kByte, "rows must be uint8");
  TORCH_CHECK_VALUE(rows.dim() == 3 && rows.is_contiguous(), "rows must be contiguous, [layers, slots, row bytes]");
  TORCH_CHECK_VALUE(keys.size() == layers.size() && values.size() == layers.size() && slots.size() == layers.size(),
                    "a segment is a layer, its keys, its values and their slots");
  const int64_t layer_slots = rows.size(1), bytes = rows.size(2);
  uint8_t* const to = rows.data_ptr<uint8_t>();
  int32_t* const check = int32_data(checks, rows.size(0) * layer_slots, "checks");
  for (size_t n = 0; n < layers.size(); ++n) {
    TORCH_CHECK_VALUE(layers[n] >= 0 && layers[n] < rows.size(0), "layer ", layers[n], " of ", rows.size(0));
    check_slots(slots_of(slots[n]), slots[n].size(0), layer_slots);
    halves(keys[n], values[n], slots[n].size(0), bytes);
  }
  for (size_t n = 0; n < layers.size(); ++n) {
    const int64_t count = slots[n].size(0), first = layers[n] * layer_slots;
    const int64_t* slot = slots[n].const_data_ptr<int64_t>();
    const Halves from = halves(keys[n], values[n], count, bytes);
    for (int64_t i = 0; i < count; ++i) {
      if (slot[i] < 0) continue;
      uint8_t* row = to + (first + slot[i]) * bytes;
      std::memcpy(row, from.key + i * from.key_stride, from.key_bytes);
      std::memcpy(row + from.key_bytes, from.value + i * from.value_stride, from.value_bytes);
      check[first + slot[i]] = static_cast<int32_t>(checksum_of(row, from.key_bytes + from.value_bytes));
    }
  }
}

// Copy slot slots[i] into row i of key and value. Returns the first i whose row is absent or damaged, or -1.
int64_t segment_read(const Tensor& rows, const Tensor& checks, const Tensor& slots, const Tensor& key,
                     const Tensor& value) {
  const Matrix from = matrix(rows, "rows");
  const int64_t count = slots.size(0);
  const int64_t* slot = slots_of(slots);
  const Halves to = halves(key, value, count, from.bytes);
  const int32_t* check = int32_data(checks, from.rows, "checks");
  check_slots(slot, count, from.rows);
  const int64_t size = to.key_bytes + to.value_bytes;
  for (int64_t i = 0; i < count; ++i) {
    if (slot[i] < 0) return i;
    const uint8_t* row = from.data + slot[i] * from.bytes;
    uint8_t* to_key = to.key + i * to.key_stride;
    uint8_t* to_value = to.value + i * to.value_stride;
    std::memcpy(to_key, row, to.key_bytes);
    std::memcpy(to_value, row + to.key_bytes, to.value_bytes);
    // Of the copy, not of the bucket: what is checked is what is used.
    uint32_t crc;
    if (to.key_bytes % 8 == 0) {
      crc = crc32c(crc32c(~0U, to_key, to.key_bytes), to_value, to.value_bytes);
      if (crc == kAbsent) crc = 1;
    } else {
      crc = checksum_of(row, size);
    }
    if (static_cast<uint32_t>(check[slot[i]]) != crc) return i;
  }
  return -1;
}

Record* record_at(const Matrix& records, int64_t index) {
  TORCH_CHECK_VALUE(index >= 0 && index < records.rows, "record ", index, " of ", records.rows);
  return reinterpret_cast<Record*>(records.data + index * records.bytes);
}

int64_t blocks_max_of(const Matrix& records, size_t groups) {
  const int64_t blocks_max =
      groups ? (records.bytes - static_cast<int64_t>(sizeof(Record))) / (4 * static_cast<int64_t>(groups)) : 0;
  TORCH_CHECK_VALUE(blocks_max > 0, "records of ", records.bytes, " bytes have no room for blocks");
  return blocks_max;
}

// Record indices[i] now covers committed[i] positions, which lie in the blocks of row table_rows[i] of each table.
void commit_records(const Tensor& records, const Tensor& indices, const Tensor& committed, const Tensor& table_rows,
                    TensorList tables, at::IntArrayRef block_sizes) {
  const Matrix all = matrix(records, "records");
  const int64_t count = indices.numel();
  const int32_t* index = int32_data(indices, count, "indices");
  const int32_t* positions = int32_data(committed, count, "committed");
  const int32_t* table_row = int32_data(table_rows, count, "table_rows");
  TORCH_CHECK_VALUE(tables.size() == block_sizes.size(), "one block size for each table");
  const int64_t blocks_max = blocks_max_of(all, tables.size());
  for (int64_t i = 0; i < count; ++i) {
    Record* record = record_at(all, index[i]);
    int32_t* blocks = reinterpret_cast<int32_t*>(record + 1);
    ++record->version;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    record->live = 1;
    record->committed = static_cast<uint32_t>(positions[i]);
    for (size_t group = 0; group < tables.size(); ++group) {
      const Tensor& table = tables[group];
      const int64_t used = (positions[i] + block_sizes[group] - 1) / block_sizes[group];
      TORCH_CHECK_VALUE(used <= blocks_max && used <= table.size(1) && table_row[i] < table.size(0),
                        "a record cannot hold ", used, " blocks");
      std::memcpy(blocks + group * blocks_max,
                  table.const_data_ptr<int32_t>() + table_row[i] * table.stride(0), used * 4);
    }
    record->check = record_check(*record, blocks, blocks_max, block_sizes);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    ++record->version;
  }
}

// The record says nothing any more: what it named may be overwritten from now on.
void release_record(const Tensor& records, int64_t index) {
  Record* record = record_at(matrix(records, "records"), index);
  ++record->version;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  record->live = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  ++record->version;
}

// Whether a copy of one record is whole: its checksum fits its content.
bool record_whole(const Tensor& copy, at::IntArrayRef block_sizes) {
  const Matrix one = matrix(copy, "copy");
  const Record* record = record_at(one, 0);
  const int64_t blocks_max = blocks_max_of(one, block_sizes.size());
  for (const int64_t size : block_sizes) {
    if (record->committed > static_cast<uint64_t>(size) * static_cast<uint64_t>(blocks_max)) return false;
  }
  return record->check ==
         record_check(*record, reinterpret_cast<const int32_t*>(record + 1), blocks_max, block_sizes);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def(
      "segment_write(Tensor[] keys, Tensor[] values, Tensor[] slots, int[] layers, Tensor(a!) rows, "
      "Tensor(b!) checks) -> ()");
  m.def("segment_read(Tensor rows, Tensor checks, Tensor slots, Tensor(a!) key, Tensor(b!) value) -> int");
  m.def(
      "commit_records(Tensor(a!) records, Tensor indices, Tensor committed, Tensor table_rows, Tensor[] tables, "
      "int[] block_sizes) -> ()");
  m.def("release_record(Tensor(a!) records, int index) -> ()");
  m.def("record_whole(Tensor copy, int[] block_sizes) -> bool");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("segment_write", segment_write);
  m.impl("segment_read", segment_read);
  m.impl("commit_records", commit_records);
  m.impl("release_record", release_record);
  m.impl("record_whole", record_whole);
}

}  // namespace tarragon
