#include "ops.h"

#include <torch/csrc/stable/library.h>

#define ROWS "Tensor block_table, Tensor request, Tensor visible"

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("cpu_write_index_keys(Tensor k, Tensor(a!) index_cache, Tensor slot_mapping) -> ()");
  m.def("cpu_update_page_means(Tensor(a!) index_cache, Tensor slot_mapping) -> ()");
  m.def("cpu_route_heads(Tensor q, Tensor gates, Tensor index_cache, " ROWS ", int pool_block, Tensor(a!) heads) -> ()");
  m.def("cpu_update_signed_means(Tensor(a!) index_cache, Tensor slot_mapping) -> ()");
  m.def("cpu_route_heads_by_signs(Tensor q, Tensor gates, Tensor index_cache, " ROWS
        ", int pool_block, Tensor(a!) heads) -> ()");
  m.def("cpu_select_tokens(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, " ROWS
        ", int k, Tensor(a!) out, int visible_from, int visible_to) -> ()");
  m.def("cpu_rerank_tokens(Tensor q, Tensor gates, Tensor candidates, Tensor index_cache, " ROWS
        ", int k, Tensor(a!) out, int visible_from, int visible_to) -> ()");
  m.def("cpu_sparse_mla_attention(Tensor q, Tensor kv_cache, Tensor block_table, Tensor request, Tensor tokens, "
        "float scale, int kv_lora_rank, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CPU, m) {
  m.impl("cpu_write_index_keys", TORCH_BOX(&misa::write_index_keys));
  m.impl("cpu_update_page_means", TORCH_BOX(&misa::update_page_means));
  m.impl("cpu_route_heads", TORCH_BOX(&misa::route_heads));
  m.impl("cpu_update_signed_means", TORCH_BOX(&misa::update_signed_means));
  m.impl("cpu_route_heads_by_signs", TORCH_BOX(&misa::route_heads_by_signs));
  m.impl("cpu_select_tokens", TORCH_BOX(&misa::select_tokens));
  m.impl("cpu_rerank_tokens", TORCH_BOX(&misa::rerank_tokens));
  m.impl("cpu_sparse_mla_attention", TORCH_BOX(&misa::sparse_mla_attention));
}
