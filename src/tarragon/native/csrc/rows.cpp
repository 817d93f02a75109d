// tarragon::combine, and tarragon::gather_batch and scatter_batch: rows that come back, and rows of many workers
// side by side.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "checks.h"
#include "vector.h"

namespace tarragon {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::TensorList;

constexpr int64_t kGrainBytes = 512 << 10;

// sum over k, in router order, of weights[k] * rows[k], starting at zero: product and sum are rounded apart, and
// the result once.
template <class T>
void weighted_sum(const T* const* rows, const float* weights, int64_t top_k, int64_t hidden, T* out) {
  int64_t h = 0;
  for (; h + kLanes <= hidden; h += kLanes) {
    Vec8 sum = zero8();
    for (int64_t k = 0; k < top_k; ++k) sum = add(sum, multiply(broadcast8(weights + k), load8(rows[k] + h)));
    store8(out + h, sum);
  }
  if (h == hidden) return;
  Vec8 sum = zero8();
  const int64_t tail = hidden - h;
  T padded[kLanes] = {};
  for (int64_t k = 0; k < top_k; ++k) {
    std::copy(rows[k] + h, rows[k] + hidden, padded);
    sum = add(sum, multiply(broadcast8(weights + k), load8(padded)));
  }
  store8(padded, sum);
  std::copy(padded, padded + tail, out + h);
}

template <class T>
void combine_rows(TensorList results, const int32_t* pair_slot, const int32_t* pair_row, const Tensor& weights,
                  const Tensor& out) {
  struct Source {
    const T* rows;
    int64_t stride;
  };
  std::vector<Source> sources;
  for (const Tensor& rows : results) {
    const bool matrix = rows.dim() == 2;
    sources.push_back({static_cast<const T*>(rows.const_data_ptr()), matrix ? rows.stride(0) : 0});
  }
  const int64_t tokens = out.size(0), hidden = out.size(1), top_k = weights.size(1);
  const float* weight = weights.const_data_ptr<float>();
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t to_stride = out.stride(0);
  const int64_t token_bytes = (top_k + 1) * row_bytes(out);
  at::parallel_for(0, tokens, 1 + kGrainBytes / std::max<int64_t>(token_bytes, 1), [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(top_k);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t k = 0; k < top_k; ++k) {
        const Source& source = sources[pair_slot[t * top_k + k]];
        rows[k] = source.rows + pair_row[t * top_k + k] * source.stride;
      }
      weighted_sum(rows.data(), weight + t * top_k, top_k, hidden, to + t * to_stride);
    }
  });
}

// Every pair must point at a row that exists, in a tensor of out's kind.
void check_pairs(TensorList results, const int32_t* pair_slot, const int32_t* pair_row, int64_t pairs,
                 const Tensor& out) {
  std::vector<int64_t> last(results.size(), -1);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t slot = pair_slot[pair], row = pair_row[pair];
    TORCH_CHECK_VALUE(slot >= 0 && slot < static_cast<int64_t>(results.size()) && row >= 0, "pair ", pair,
                      " lies in row ", row, " of slot ", slot, ", but there are ", results.size(), " results");
    last[slot] = std::max(last[slot], row);
  }
  for (size_t slot = 0; slot < results.size(); ++slot) {
    if (last[slot] < 0) continue;
    check_rows(results[slot], out.size(1), out.scalar_type(), "results");
    TORCH_CHECK_VALUE(last[slot] < results[slot].size(0), "a pair lies in row ", last[slot], " of slot ", slot,
                      ", which has ", results[slot].size(0), " rows");
  }
}

void combine(TensorList results, const Tensor& pair_slot, const Tensor& pair_row, const Tensor& weights,
             const Tensor& out) {
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, "weights must be float32, but is ", weights.scalar_type());
  TORCH_CHECK_VALUE(out.dim() == 2 && weights.dim() == 2 && weights.size(0) == out.size(0),
                    "out must be [T, H] and weights [T, K], but they are ", out.sizes(), " and ", weights.sizes());
  TORCH_CHECK_VALUE(weights.is_contiguous(), "weights must be contiguous");
  check_rows(out, out.size(1), out.scalar_type(), "out");
  const int64_t pairs = weights.numel();
  const int32_t* slot = int32_data(pair_slot, pairs, "pair_slot");
  const int32_t* row = int32_data(pair_row, pairs, "pair_row");
  check_pairs(results, slot, row, pairs, out);
  switch (out.scalar_type()) {
    case at::kBFloat16: return combine_rows<bf16>(results, slot, row, weights, out);
    case at::kHalf: return combine_rows<fp16>(results, slot, row, weights, out);
    case at::kFloat: return combine_rows<float>(results, slot, row, weights, out);
    default: TORCH_CHECK_TYPE(false, "out must be bfloat16, float16 or float32, but is ", out.scalar_type());
  }
}

// Check that frame f = rows [starts[f], starts[f] + counts[f]) of parts[f] exists; return the rows of all frames.
int64_t check_frames(TensorList parts, IntArrayRef starts, IntArrayRef counts, const Tensor& batch) {
  TORCH_CHECK_VALUE(parts.size() == starts.size() && parts.size() == counts.size(), "there are ", parts.size(),
                    " parts, ", starts.size(), " starts and ", counts.size(), " counts");
  check_rows(batch, batch.size(-1), batch.scalar_type(), "batch");
  int64_t total = 0;
  for (size_t f = 0; f < parts.size(); ++f) {
    check_rows(parts[f], batch.size(1), batch.scalar_type(), "part");
    TORCH_CHECK_VALUE(starts[f] >= 0 && counts[f] >= 0 && starts[f] + counts[f] <= parts[f].size(0), "frame ", f,
                      " has ", counts[f], " rows from row ", starts[f], " on, but its part holds ",
                      parts[f].size(0));
    TORCH_CHECK_VALUE(parts[f].size(0) <= 1 || parts[f].stride(0) == parts[f].size(1), "part ", f,
                      " must be contiguous");
    total += counts[f];
  }
  TORCH_CHECK_VALUE(total <= batch.size(0) && (batch.size(0) <= 1 || batch.stride(0) == batch.size(1)),
                    "the batch must be contiguous and hold ", total, " rows, but is ", batch.sizes());
  return total;
}

int64_t gather_batch(TensorList rows, TensorList ids, IntArrayRef starts, IntArrayRef counts, const Tensor& out_rows,
                     const Tensor& out_ids) {
  const int64_t total = check_frames(rows, starts, counts, out_rows);
  TORCH_CHECK_VALUE(ids.size() == rows.size(), "there are ", rows.size(), " parts, but ", ids.size(), " id vectors");
  for (size_t f = 0; f < ids.size(); ++f) int32_data(ids[f], starts[f] + counts[f], "ids");
  int32_t* to_ids = int32_data(out_ids, total, "out_ids");
  char* to = static_cast<char*>(out_rows.mutable_data_ptr());
  const int64_t bytes = row_bytes(out_rows);
  for (size_t f = 0; f < rows.size(); ++f) {
    const int32_t* from_ids = ids[f].const_data_ptr<int32_t>() + starts[f];
    std::copy(from_ids, from_ids + counts[f], to_ids);
    std::memcpy(to, static_cast<const char*>(rows[f].const_data_ptr()) + starts[f] * bytes, counts[f] * bytes);
    to_ids += counts[f];
    to += counts[f] * bytes;
  }
  return total;
}

void scatter_batch(const Tensor& batch, IntArrayRef starts, IntArrayRef counts, TensorList results) {
  check_frames(results, starts, counts, batch);
  const char* from = static_cast<const char*>(batch.const_data_ptr());
  const int64_t bytes = row_bytes(batch);
  for (size_t f = 0; f < results.size(); ++f) {
    std::memcpy(static_cast<char*>(results[f].mutable_data_ptr()) + starts[f] * bytes, from, counts[f] * bytes);
    from += counts[f] * bytes;
  }
}

void combine_meta(TensorList, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {}

int64_t gather_batch_meta(TensorList, TensorList, IntArrayRef, IntArrayRef counts, const Tensor&, const Tensor&) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

void scatter_batch_meta(const Tensor&, IntArrayRef, IntArrayRef, TensorList) {}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("combine(Tensor[] results, Tensor pair_slot, Tensor pair_row, Tensor weights, Tensor(a!) out) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "gather_batch(Tensor[] rows, Tensor[] ids, int[] starts, int[] counts, Tensor(a!) out_rows, "
      "Tensor(b!) out_ids) -> int");
  m.def("scatter_batch(Tensor batch, int[] starts, int[] counts, Tensor(a!)[] results) -> ()");
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("combine", combine);
  m.impl("gather_batch", gather_batch);
  m.impl("scatter_batch", scatter_batch);
}
TORCH_LIBRARY_IMPL(tarragon, Meta, m) {
  m.impl("combine", combine_meta);
  m.impl("gather_batch", gather_batch_meta);
  m.impl("scatter_batch", scatter_batch_meta);
}

}  // namespace tarragon
