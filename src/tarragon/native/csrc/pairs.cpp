// tarragon::dispatch and tarragon::replay: rows of (token, expert) pairs into the regions of their experts' hosts.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "checks.h"

namespace tarragon {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kCopyGrainBytes = 256 << 10;

struct Region {
  char* rows;
  int64_t stride_bytes;
  int32_t* ids;
};

// One placement: which pairs move, where their experts live, and what was recorded about them.
struct Placement {
  const Tensor& x;
  const Tensor& expert_ids;
  const Tensor& owner;
  TensorList region_rows;
  TensorList region_ids;
  const Tensor& pair_slot;
  const Tensor& pair_row;
  const Tensor& counts;
};

template <class Id>
bool place(const Placement& p, std::optional<int64_t> lost_slot, const int32_t* starts) {
  const int64_t tokens = p.x.size(0), top_k = p.expert_ids.size(1), pairs = tokens * top_k;
  const int64_t experts = p.owner.numel(), slots = static_cast<int64_t>(p.region_rows.size());
  const Id* ids = p.expert_ids.const_data_ptr<Id>();
  const int32_t* owner = int32_data(p.owner, experts, "owner");
  int32_t* pair_slot = int32_data(p.pair_slot, pairs, "pair_slot");
  int32_t* pair_row = int32_data(p.pair_row, pairs, "pair_row");
  int32_t* counts = int32_data(p.counts, slots, "counts");
  const auto moves = [&](int64_t pair) { return !lost_slot || pair_slot[pair] == *lost_slot; };

  // First pass: count and check, so that an error leaves everything as it was.
  std::vector<int64_t> next(slots, 0);
  bool reachable = true;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (!moves(pair)) continue;
    const int64_t expert = static_cast<int64_t>(ids[pair]);
    TORCH_CHECK_VALUE(expert >= 0 && expert < experts, "expert id ", expert, " of pair ", pair,
                      " is out of range: there are ", experts, " experts");
    const int64_t slot = owner[expert];
    TORCH_CHECK_VALUE(slot >= -1 && slot < slots, "expert ", expert, " is owned by slot ", slot, ", but there are ",
                      slots, " regions");
    TORCH_CHECK_VALUE(!lost_slot || slot != *lost_slot || slot == -1, "expert ", expert,
                      " is still owned by the lost slot ", slot);
    if (slot >= 0) ++next[slot];
    else reachable = false;
  }
  if (lost_slot && !reachable) return false;

  std::vector<Region> regions(slots);
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t first = starts == nullptr ? 0 : starts[s], count = next[s];
    counts[s] = static_cast<int32_t>(count);
    next[s] = first;
    if (count == 0) continue;
    const Tensor &rows = p.region_rows[s], &region_ids = p.region_ids[s];
    check_rows(rows, p.x.size(1), p.x.scalar_type(), "region_rows");
    TORCH_CHECK_VALUE(first >= 0 && first + count <= rows.size(0), "region of slot ", s, " holds ", rows.size(0),
                      " rows, but ", count, " are to be written from row ", first, " on");
    regions[s] = {static_cast<char*>(rows.mutable_data_ptr()),
                  rows.stride(0) * static_cast<int64_t>(rows.element_size()),
                  int32_data(region_ids, first + count, "region_ids")};
  }
  return write_pairs(p, lost_slot, ids, owner, next, regions, pair_slot, pair_row), reachable;
}

}  // namespace
}  // namespace tarragon
