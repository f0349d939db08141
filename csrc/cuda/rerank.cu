// The k best of each row's candidate tokens by the score of all heads: one cluster of CTAs per row.
//
// Candidates are split over the cluster. Each warpgroup gathers tiles of 64 keys by asynchronous copies into its own
// ring of stages, in the swizzled layout that the tensor cores read; scores replace the candidates' addresses in
// shared memory, and the cluster selects from them (cluster_topk.cuh).
#include <cooperative_groups.h>

#include <algorithm>

#include "cluster_topk.cuh"
#include "common/ptx.cuh"
#include "common/select.cuh"
#include "key_scores.cuh"
#include "torch_op.h"

namespace cg = cooperative_groups;

namespace misa {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kTileKeys = 64;
constexpr int kKeyTileBytes = kTileKeys * kHeadDim;
constexpr int kScaleTileBytes = kTileKeys * 4;
constexpr int kStages = 3;  // per warpgroup
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kNoCell = ~0u;

template <bool kCluster>
using RerankTopK = TopK<kThreads, kCluster>;

struct RerankArguments {
  QueryHeads queries;
  const int32_t* candidates;
  int64_t candidates_stride;
  int candidate_count;
  IndexCache cache;
  Rows rows;
  int k;
  int visible_from, visible_to;
  int32_t* out;
  int64_t out_stride;
};

template <int kHeads, bool kCluster>
__global__ void __launch_bounds__(kThreads) rerank_kernel(const __grid_constant__ RerankArguments args) {
  using Layout = HeadLayout<kHeads>;
  using Selection = RerankTopK<kCluster>;
  extern __shared__ __align__(1024) char shared[];
  char* key_tiles = shared;
  char* query = key_tiles + kWarpgroups * kStages * kKeyTileBytes;
  char* scale_tiles = query + Layout::kQueryBytes;
  auto* topk_shared =
      reinterpret_cast<typename Selection::Shared*>(scale_tiles + kWarpgroups * kStages * kScaleTileBytes);
  auto* cells = reinterpret_cast<uint32_t*>(topk_shared + 1);  // page * 64 + slot, later the key of the score

  const int ranks = kCluster ? static_cast<int>(cg::this_cluster().num_blocks()) : 1;
  const int rank = kCluster ? static_cast<int>(cg::this_cluster().block_rank()) : 0;
  const int row = blockIdx.x / ranks;
  const int visible = args.rows.visible[row];
  if (visible < args.visible_from || visible >= args.visible_to) return;
  int32_t* out = args.out + row * args.out_stride;

  const int tiles = (args.candidate_count + kTileKeys - 1) / kTileKeys;
  const int tiles_per_cta = (tiles + ranks - 1) / ranks;
  const int first_candidate = min(rank * tiles_per_cta, tiles) * kTileKeys;
  const int tile_count = min(tiles_per_cta, tiles - first_candidate / kTileKeys);
  const int32_t* candidates = args.candidates + row * args.candidates_stride + first_candidate;
  const int candidate_count = min(tile_count * kTileKeys, args.candidate_count - first_candidate);
  if (visible > 0) {
    const int32_t* page_ids = args.rows.pages(row);
#pragma unroll 4
    for (int i = threadIdx.x; i < tile_count * kTileKeys; i += kThreads) {
      const int position = i < candidate_count ? candidates[i] : -1;
      cells[i] = position >= 0 ? static_cast<uint32_t>(page_ids[position / kPageTokens]) * kPageTokens +
                                     position % kPageTokens
                               : kNoCell;
    }
  } else {
    for (int i = threadIdx.x; i < tile_count * kTileKeys; i += kThreads) cells[i] = kNoCell;
  }
  const QueryHeads queries = args.queries.from_row(row);
  store_query<kHeads>(query, queries, 1);
  float gate[Layout::kHeadsPerLane];
  load_gates<kHeads>(gate, queries, 1);
  Selection topk(*topk_shared);
  topk.clear();
  __syncthreads();

  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  char* my_key_tiles = key_tiles + warpgroup * kStages * kKeyTileBytes;
  char* my_scale_tiles = scale_tiles + warpgroup * kStages * kScaleTileBytes;
  const int my_tiles = (tile_count - warpgroup + kWarpgroups - 1) / kWarpgroups;
  const auto gather = [&](int turn) {
    if (turn < my_tiles) {
      const uint32_t* tile_cells = cells + (turn * kWarpgroups + warpgroup) * kTileKeys;
      char* keys = my_key_tiles + turn % kStages * kKeyTileBytes;
      const int chunk = thread % 8;
#pragma unroll
      for (int key = thread / 8; key < kTileKeys; key += 16) {
        const uint32_t cell = tile_cells[key];
        const bool exists = cell != kNoCell;
        const uint8_t* source = args.cache.page(exists ? cell / kPageTokens : 0) + cell % kPageTokens * kHeadDim;
        ptx::cp_async_or_zero<16>(keys + key * kHeadDim + (chunk ^ (key & 7)) * 16, source + chunk * 16, exists);
      }
      if (thread < kTileKeys) {
        const uint32_t cell = tile_cells[thread];
        const bool exists = cell != kNoCell;
        ptx::cp_async_or_zero<4>(
            my_scale_tiles + turn % kStages * kScaleTileBytes + thread * 4,
            args.cache.page(exists ? cell / kPageTokens : 0) + kScalesOffset + cell % kPageTokens * 4, exists);
      }
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int turn = 0; turn < kStages - 1; ++turn) gather(turn);
  const int key_of_thread = thread / 32 * 16 + thread % 32 / 4;
  for (int turn = 0; turn < my_tiles; ++turn) {
    ptx::cp_async_wait<kStages - 2>();
    ptx::fence_proxy_async();
    sync_warpgroup(warpgroup);  // this tile has landed, and the last one has been read by all
    float d[Layout::kColumns / 2];
    start_tile<kHeads>(d, my_key_tiles + turn % kStages * kKeyTileBytes, query);
    gather(turn + kStages - 1);
    const auto* scales = reinterpret_cast<const float*>(my_scale_tiles + turn % kStages * kScaleTileBytes);
    const float scale[2] = {scales[key_of_thread], scales[key_of_thread + 8]};
    ptx::wgmma_wait<0>();
    ptx::pin_registers(d);
    float sum[2];
    sum_heads<kHeads>(sum, d, gate);
    if (Layout::has_result(1)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t* cell = cells + (turn * kWarpgroups + warpgroup) * kTileKeys + key_of_thread + 8 * half;
        const uint32_t key = *cell != kNoCell ? order_key(sum[half] * scale[half]) : 0;
        *cell = key;
        topk.count(key);
      }
    }
  }
  ptx::cp_async_wait<0>();

  const auto cut = topk.find(cells, tile_count * kTileKeys, args.k);
  topk.emit(cells, tile_count * kTileKeys, cut, [&](int place, int index) { out[place] = candidates[index]; });
  if (rank == 0) {
    for (int i = cut.selected + threadIdx.x; i < args.k; i += kThreads) out[i] = -1;
  }
}

// ---------------------------------------------------------------- launch

template <int kHeads, bool kCluster>
void launch_cluster(const RerankArguments& args, int cluster, cudaStream_t stream) {
  const int tiles = (args.candidate_count + kTileKeys - 1) / kTileKeys;
  const int shared_bytes = kWarpgroups * kStages * (kKeyTileBytes + kScaleTileBytes) +
                           HeadLayout<kHeads>::kQueryBytes +
                           static_cast<int>(sizeof(typename RerankTopK<kCluster>::Shared)) +
                           (tiles + cluster - 1) / cluster * kTileKeys * 4;
  STD_TORCH_CHECK(
      shared_bytes <= kMaxSharedBytes, "rerank_tokens: ", args.candidate_count,
      " candidates a row are too many for this kernel; choose at most 24576");
  const auto kernel = rerank_kernel<kHeads, kCluster>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "rerank_tokens");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.rows.count * cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = kCluster ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), "rerank_tokens");
}

template <int kHeads>
void launch(const RerankArguments& args, cudaStream_t stream) {
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  constexpr int kPortableCluster = 8, kFewestTiles = 4;
  const int tiles = (args.candidate_count + kTileKeys - 1) / kTileKeys;
  int cluster = 1;
  while (cluster < kPortableCluster && args.rows.count * cluster * 2 <= 2 * processors &&
         tiles >= 2 * cluster * kFewestTiles) {
    cluster *= 2;
  }
  cluster > 1 ? launch_cluster<kHeads, true>(args, cluster, stream) : launch_cluster<kHeads, false>(args, 1, stream);
}

void rerank_tokens(
    Tensor q, Tensor gates, Tensor candidates, Tensor index_cache, Tensor block_table, Tensor request, Tensor visible,
    int64_t k, Tensor out, int64_t visible_from, int64_t visible_to) {
  RerankArguments args = {};
  args.cache = index_cache_of(index_cache, false);
  args.rows = rows_of(block_table, request, visible);
  args.queries = query_heads(q, gates, args.rows);
  check_tensor(candidates, "candidates", ScalarType::Int, 2);
  check_tensor(out, "out", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      candidates.size(0) == args.rows.count && out.size(0) == args.rows.count,
      "candidates and out must have a row per query");
  STD_TORCH_CHECK(
      k >= 1 && candidates.size(1) >= k && out.size(1) >= k, "rerank_tokens: k = ", k,
      " must be at least 1 and at most the number of candidates (", candidates.size(1), ") and of output columns (",
      out.size(1), ")");
  if (args.rows.count == 0) return;
  args.candidates = static_cast<const int32_t*>(candidates.data_ptr());
  args.candidates_stride = candidates.stride(0);
  args.candidate_count = static_cast<int>(candidates.size(1));
  args.k = static_cast<int>(k);
  args.visible_from = static_cast<int>(visible_from);
  args.visible_to = static_cast<int>(std::min<int64_t>(visible_to, INT32_MAX));
  args.out = static_cast<int32_t*>(out.data_ptr());
  args.out_stride = out.stride(0);
  const auto launch_heads = args.queries.count <= 8    ? launch<8>
                            : args.queries.count <= 16 ? launch<16>
                            : args.queries.count <= 32 ? launch<32>
                                                       : launch<64>;
  launch_heads(args, current_stream(q));
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def(
      "rerank_tokens(Tensor q, Tensor gates, Tensor candidates, Tensor index_cache, Tensor block_table, "
      "Tensor request, Tensor visible, int k, Tensor(a!) out, int visible_from, int visible_to) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("rerank_tokens", TORCH_BOX(&misa::rerank_tokens));
}
