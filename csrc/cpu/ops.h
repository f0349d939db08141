// The CPU operators. Contracts: misa_vllm.kernels.Kernels and the functions of the same names in
// misa_vllm.reference; here outputs are arguments and misa_vllm.rows.QueryRows is taken apart.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace misa {

using torch::stable::Tensor;

void write_index_keys(const Tensor& k, const Tensor& index_cache, const Tensor& slot_mapping);

void update_page_means(const Tensor& index_cache, const Tensor& slot_mapping);

void route_heads(const Tensor& q, const Tensor& gates, const Tensor& index_cache, const Tensor& block_table,
                 const Tensor& request, const Tensor& visible, int64_t pool_block, const Tensor& heads);

void update_signed_means(const Tensor& index_cache, const Tensor& slot_mapping);

void route_heads_by_signs(const Tensor& q, const Tensor& gates, const Tensor& index_cache, const Tensor& block_table,
                          const Tensor& request, const Tensor& visible, int64_t pool_block, const Tensor& heads);

void select_tokens(const Tensor& q, const Tensor& gates, const std::optional<Tensor>& heads, const Tensor& index_cache,
                   const Tensor& block_table, const Tensor& request, const Tensor& visible, int64_t k,
                   const Tensor& out, int64_t visible_from, int64_t visible_to);

void rerank_tokens(const Tensor& q, const Tensor& gates, const Tensor& candidates, const Tensor& index_cache,
                   const Tensor& block_table, const Tensor& request, const Tensor& visible, int64_t k,
                   const Tensor& out, int64_t visible_from, int64_t visible_to);

void sparse_mla_attention(const Tensor& q, const Tensor& kv_cache, const Tensor& block_table, const Tensor& request,
                          const Tensor& tokens, double scale, int64_t kv_lora_rank, const Tensor& out);

}  // namespace misa
