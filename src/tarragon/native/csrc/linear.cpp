// tarragon::pack_linear and tarragon::linear.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "linear_kernel.h"

namespace tarragon {
namespace {

using at::Tensor;

constexpr double kThreadNs = 20'000;  // waking a thread that sleeps costs about 15 us
constexpr double kFlopsPerNs = 50, kBytesPerNs = 15;

Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16: return Storage::kBFloat16;
    case at::kHalf: return Storage::kFloat16;
    case at::kFloat: return Storage::kFloat32;
    default:
      TORCH_CHECK_TYPE(false, name, " must be bfloat16, float16 or float32, but is ", tensor.scalar_type());
  }
}

Tensor pack_linear(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 2, "weight must be [N, K], but has ", weight.dim(), " dimensions");
  const Storage storage = storage_of(weight, "weight");
  const Tensor rows = weight.size(1) <= 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  const int64_t n = rows.size(0), k = rows.size(1), panels = panel_count(n);
  Tensor packed = at::empty({panels, k, 16}, rows.options());
  const void* from = rows.const_data_ptr();
  void* to = packed.mutable_data_ptr();
  const int64_t stride = rows.stride(0);
  at::parallel_for(0, panels, std::max<int64_t>(1, 65'536 / std::max<int64_t>(16 * k, 1)),
                   [&](int64_t begin, int64_t end) {
                     pack_panels(from, to, n, k, stride, storage, begin, end);
                   });
  return packed;
}

Tensor linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  TORCH_CHECK_VALUE(packed.dim() == 3 && packed.size(2) == 16 && packed.is_contiguous(),
                    "packed must come from pack_linear: contiguous [ceil(N / 16), K, 16]");
  TORCH_CHECK_VALUE(packed.size(0) == panel_count(n), "packed has ", packed.size(0), " panels, but n = ", n,
                    " needs ", panel_count(n));
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == packed.size(1), "x is ", x.sizes(), ", but the weight has K = ",
                    packed.size(1));
  TORCH_CHECK_TYPE(x.scalar_type() == packed.scalar_type(), "x is ", x.scalar_type(), ", the weight is ",
                   packed.scalar_type());
  LinearCall call{};
  call.k = packed.size(1);
  call.n = n;
  call.storage = storage_of(x, "x");

  const bool flat = x.dim() == 2;
  const Tensor flattened = flat ? x : x.reshape({c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)), call.k});
  const Tensor rows = call.k <= 1 || flattened.stride(1) == 1 ? flattened : flattened.contiguous();
  call.rows = rows.size(0);
  call.x_stride = rows.stride(0);
  call.x = rows.const_data_ptr();
  call.packed = packed.const_data_ptr();

  Tensor addend;
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, "bias must be [", n, "], but is ", bias->sizes());
    addend = bias->contiguous();
    call.bias_storage = storage_of(addend, "bias");
    call.bias = addend.const_data_ptr();
  }

  Tensor out = at::empty({call.rows, n}, x.options());
  call.out = out.mutable_data_ptr();
  const int64_t tasks = linear_tasks(call);
  if (tasks > 0) {
    const double macs = 16.0 * static_cast<double>(call.k);
    const double rows_per_task = static_cast<double>(call.rows * panel_count(n)) / static_cast<double>(tasks);
    const double task_ns = std::max(2 * macs * rows_per_task / kFlopsPerNs,
                                    macs * static_cast<double>(packed.element_size()) / kBytesPerNs);
    const int64_t grain = 1 + static_cast<int64_t>(kThreadNs / std::max(task_ns, 1.0));
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { linear_run(call, begin, end); });
  }
  if (flat) return out;
  auto shape = x.sizes().vec();
  shape.back() = n;
  return out.view(shape);
}

Tensor pack_linear_meta(const Tensor& weight) {
  return at::empty_symint({(weight.sym_size(0) + 15) / 16, weight.sym_size(1), 16}, weight.options());
}

Tensor linear_meta(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t n) {
  auto shape = x.sym_sizes().vec();
  shape.back() = n;
  return at::empty_symint(shape, x.options());
}

std::string instruction_set() { return linear_instruction_set(); }

}  // namespace

TORCH_LIBRARY_FRAGMENT(tarragon, m) {
  m.def("pack_linear(Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("instruction_set() -> str", instruction_set);
}
TORCH_LIBRARY_IMPL(tarragon, CPU, m) {
  m.impl("pack_linear", pack_linear);
  m.impl("linear", linear);
}
TORCH_LIBRARY_IMPL(tarragon, Meta, m) {
  m.impl("pack_linear", pack_linear_meta);
  m.impl("linear", linear_meta);
}

}  // namespace tarragon
