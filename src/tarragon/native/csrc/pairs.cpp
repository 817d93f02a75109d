// tarragon::dispatch and tarragon::replay: a copy of each (token, expert) pair's row into the region of the
// expert's host.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "checks.h"

namespace tarragon {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kCopyGrainBytes = 512 << 10;

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

// Pairs that are to be written, and the region row that follows the last one written, by slot.
struct Plan {
  std::vector<int64_t> pairs;
  std::vector<int64_t> next;
  std::vector<int64_t> count;
  bool reachable = true;
};

void check_shapes(const Placement& p) {
  TORCH_CHECK_VALUE(p.x.dim() == 2 && p.expert_ids.dim() == 2 && p.expert_ids.size(0) == p.x.size(0),
                    "x must be [T, H] and expert_ids [T, K], but they are ", p.x.sizes(), " and ",
                    p.expert_ids.sizes());
  TORCH_CHECK_VALUE(p.expert_ids.is_contiguous(), "expert_ids must be contiguous");
  check_rows(p.x, p.x.size(1), p.x.scalar_type(), "x");
  TORCH_CHECK_VALUE(p.region_rows.size() == p.region_ids.size(), "there are ", p.region_rows.size(),
                    " row regions, but ", p.region_ids.size(), " id regions");
}

// Decide and check everything; write nothing, so that an error leaves all as it was.
template <class Id>
Plan plan_pairs(const Placement& p, const Id* ids, const int32_t* pair_slot, std::optional<int64_t> lost_slot,
                const int32_t* starts) {
  const int64_t pairs = p.expert_ids.numel(), experts = p.owner.numel();
  const int64_t slots = static_cast<int64_t>(p.region_rows.size());
  const int32_t* owner = int32_data(p.owner, experts, "owner");
  Plan plan;
  plan.pairs.reserve(pairs);
  plan.count.assign(slots, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (lost_slot && pair_slot[pair] != *lost_slot) continue;
    const int64_t expert = static_cast<int64_t>(ids[pair]);
    TORCH_CHECK_VALUE(expert >= 0 && expert < experts, "expert id ", expert, " of pair ", pair,
                      " is out of range: there are ", experts, " experts");
    const int64_t slot = owner[expert];
    TORCH_CHECK_VALUE(slot >= -1 && slot < slots, "expert ", expert, " is owned by slot ", slot, ", but there are ",
                      slots, " regions");
    TORCH_CHECK_VALUE(!lost_slot || slot == -1 || slot != *lost_slot, "expert ", expert,
                      " is still owned by the lost slot ", slot);
    if (slot >= 0) ++plan.count[slot];
    else plan.reachable = false;
    plan.pairs.push_back(pair);
  }
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t first = starts == nullptr ? 0 : starts[slot], count = plan.count[slot];
    plan.next.push_back(first);
    if (count == 0) continue;
    const Tensor& rows = p.region_rows[slot];
    check_rows(rows, p.x.size(1), p.x.scalar_type(), "region_rows");
    TORCH_CHECK_VALUE(first >= 0 && first + count <= rows.size(0), "the region of slot ", slot, " holds ",
                      rows.size(0), " rows, but ", count, " are to be written from row ", first, " on");
    int32_data(p.region_ids[slot], first + count, "region_ids");
  }
  return plan;
}

void copy_rows(const Placement& p, const Plan& plan, const int32_t* pair_slot, const int32_t* pair_row) {
  struct Target {
    char* rows;
    int64_t stride;
  };
  const int64_t element = static_cast<int64_t>(p.x.element_size()), bytes = p.x.size(1) * element;
  std::vector<Target> targets;
  for (size_t slot = 0; slot < p.region_rows.size(); ++slot) {
    const bool used = plan.count[slot] > 0;
    const Tensor& rows = p.region_rows[slot];
    targets.push_back(used ? Target{static_cast<char*>(rows.mutable_data_ptr()), rows.stride(0) * element}
                           : Target{});
  }
  const char* from = static_cast<const char*>(p.x.const_data_ptr());
  const int64_t from_stride = p.x.stride(0) * element, top_k = p.expert_ids.size(1);
  const int64_t grain = 1 + kCopyGrainBytes / std::max<int64_t>(bytes, 1);
  at::parallel_for(0, static_cast<int64_t>(plan.pairs.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = plan.pairs[i];
      if (pair_slot[pair] < 0) continue;
      const Target& to = targets[pair_slot[pair]];
      std::memcpy(to.rows + pair_row[pair] * to.stride, from + pair / top_k * from_stride, bytes);
    }
  });
}

template <class Id>
bool place(const Placement& p, std::optional<int64_t> lost_slot, const int32_t* starts) {
  const int64_t pairs = p.expert_ids.numel(), slots = static_cast<int64_t>(p.region_rows.size());
  const Id* ids = p.expert_ids.const_data_ptr<Id>();
  const int32_t* owner = int32_data(p.owner, p.owner.numel(), "owner");
  int32_t* pair_slot = int32_data(p.pair_slot, pairs, "pair_slot");
  int32_t* pair_row = int32_data(p.pair_row, pairs, "pair_row");
  int32_t* counts = int32_data(p.counts, slots, "counts");
  Plan plan = plan_pairs(p, ids, pair_slot, lost_slot, starts);
  // A replay is all or nothing: what it moved would no longer be found under the lost slot.
  if (lost_slot && !plan.reachable) return false;
  std::vector<int32_t*> region_ids;
  for (const Tensor& tensor : p.region_ids) region_ids.push_back(static_cast<int32_t*>(tensor.mutable_data_ptr()));
  for (const int64_t pair : plan.pairs) {
    const int32_t slot = owner[ids[pair]];
    pair_slot[pair] = slot;
    pair_row[pair] = slot < 0 ? -1 : static_cast<int32_t>(plan.next[slot]++);
    if (slot >= 0) region_ids[slot][pair_row[pair]] = static_cast<int32_t>(ids[pair]);
  }
  std::copy(plan.count.begin(), plan.count.end(), counts);
  copy_rows(p, plan, pair_slot, pair_row);
  return plan.reachable;
}

bool place_any(const Placement& p, std::optional<int64_t> lost_slot, const int32_t* starts) {
  check_shapes(p);
  switch (p.expert_ids.scalar_type()) {
    case at::kInt: return place<int32_t>(p, lost_slot, starts);
    case at::kLong: return place<int64_t>(p, lost_slot, starts);
    default:
      TORCH_CHECK_TYPE(false, "expert_ids must be int32 or int64, but is ", p.expert_ids.scalar_type());
  }
}

bool dispatch(const Tensor& x, const Tensor& expert_ids, const Tensor& owner, TensorList region_rows,
              TensorList region_ids, const Tensor& pair_slot, const Tensor& pair_row, const Tensor& counts) {
  return place_any({x, expert_ids, owner, region_rows, region_ids, pair_slot, pair_row, counts}, std::nullopt,
                   nullptr);
}

bool replay(const Tensor& x, const Tensor& expert_ids, const Tensor& owner, int64_t lost_slot,
            TensorList region_rows, TensorList region_ids, const Tensor& starts, const Tensor& pair_slot,
            const Tensor& pair_row, const Tensor& counts) {
  const int32_t* first = int32_data(starts, static_cast<int64_t>(region_rows.size()), "starts");
  return place_any({x, expert_ids, owner, region_rows, region_ids, pair_slot, pair_row, counts}, lost_slot, first);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def(
      "dispatch(Tensor x, Tensor expert_ids, Tensor owner, Tensor(a!)[] region_rows, Tensor(b!)[] region_ids, "
      "Tensor(c!) pair_slot, Tensor(d!) pair_row, Tensor(e!) counts) -> bool");
  m.def(
      "replay(Tensor x, Tensor expert_ids, Tensor owner, int lost_slot, Tensor(a!)[] region_rows, "
      "Tensor(b!)[] region_ids, Tensor starts, Tensor(c!) pair_slot, Tensor(d!) pair_row, Tensor(e!) counts) -> "
      "bool");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("dispatch", dispatch);
  m.impl("replay", replay);
}

}  // namespace tarragon
