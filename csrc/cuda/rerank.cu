// The k best of each row's candidate tokens by the score of all heads: one cluster of CTAs per row.
//
// Candidates are split over the cluster. Three warps gather tiles of 64 keys by asynchronous copies into a ring of
// stages, in the swizzled layout that the tensor cores read; two warpgroups score them by turns. Scores replace the
// candidates' addresses in shared memory, and the cluster selects from them (cluster_topk.cuh).
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
constexpr int kThreads = 128 * kWarpgroups;  // score and select
constexpr int kGatherWarps = 3;
constexpr int kBlockThreads = kThreads + 32 * kGatherWarps;
constexpr int kTileKeys = 64;
constexpr int kKeyTileBytes = kTileKeys * kHeadDim;
constexpr int kScaleTileBytes = kTileKeys * 4;
constexpr int kStages = 6;
// A stage belongs to one warpgroup and to one gathering warp: nobody can be a lap ahead at its barriers.
static_assert(kStages % kWarpgroups == 0 && kStages % kGatherWarps == 0);
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr uint32_t kNoCell = ~0u;
constexpr int kUnit = 16;  // bytes; an address in the cache is counted in 32 bits of them

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

struct Pipeline {
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

/// One of the gathering warps: fills every kGatherWarps-th tile. What a candidate that does not exist leaves in its
/// place does not matter.
__device__ __forceinline__ void gather_tiles(
    const IndexCache& cache, const uint32_t* cells, int tile_count, const char* key_tiles, const char* scale_tiles,
    Pipeline& pipeline) {
  constexpr int kKeysOfLane = 16;  // 8 lanes a key
  constexpr int kOwnStages = kStages / kGatherWarps;
  const int lane = threadIdx.x % 32, chunk = lane % 8, first_key = lane / 8 * kKeysOfLane;
  const int warp = (threadIdx.x - kThreads) / 32;
  const uint8_t* const own_chunk = cache.data + chunk * 16;
  const uint8_t* const page_scales = cache.data + kScalesOffset;
  const auto page_units = static_cast<uint32_t>(cache.page_stride / kUnit);
  uint32_t swizzled[8];  // where the chunk of a key lies
#pragma unroll
  for (int i = 0; i < 8; ++i) swizzled[i] = i * kHeadDim + (chunk ^ i) * 16;
  int own_stage = 0;
  uint32_t phase = 1;
  for (int tile = warp; tile < tile_count; tile += kGatherWarps) {
    const int stage = own_stage * kGatherWarps + warp;
    const uint32_t* tile_cells = cells + tile * kTileKeys;
    const uint32_t keys = ptx::smem_address(key_tiles + stage * kKeyTileBytes + first_key * kHeadDim);
    const uint32_t scales = ptx::smem_address(scale_tiles + stage * kScaleTileBytes + lane * 4);
    ptx::mbarrier_wait(&pipeline.empty[stage], phase);
#pragma unroll
    for (int i = 0; i < kKeysOfLane; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(tile_cells + first_key + i);
      const uint32_t cell[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t units = cell[j] / kPageTokens * page_units + cell[j] % kPageTokens * (kHeadDim / kUnit);
        ptx::cp_async_if<16>(cell[j] != kNoCell, keys + i / 8 * (8 * kHeadDim) + swizzled[(i + j) % 8],
                    own_chunk + static_cast<uint64_t>(units) * kUnit);
      }
    }
#pragma unroll
    for (int i = 0; i < kTileKeys; i += 32) {
      const uint32_t cell = tile_cells[i + lane];
      const uint64_t page = static_cast<uint64_t>(cell / kPageTokens * page_units) * kUnit;
      ptx::cp_async_if<4>(cell != kNoCell, scales + i * 4, page_scales + page + cell % kPageTokens * 4);
    }
    ptx::cp_async_mbarrier_arrive(&pipeline.full[stage]);
    if (++own_stage == kOwnStages) {
      own_stage = 0;
      phase ^= 1;
    }
  }
  ptx::cp_async_wait_all();
}

template <int kHeads, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads, 2) rerank_kernel(const __grid_constant__ RerankArguments args) {
  using Layout = HeadLayout<kHeads>;
  using Selection = RerankTopK<kCluster>;
  extern __shared__ __align__(1024) char shared[];
  char* key_tiles = shared;
  char* query = key_tiles + kStages * kKeyTileBytes;
  char* scale_tiles = query + Layout::kQueryBytes;
  auto* pipeline = reinterpret_cast<Pipeline*>(scale_tiles + kStages * kScaleTileBytes);
  auto* topk_shared = reinterpret_cast<typename Selection::Shared*>(pipeline + 1);
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
    for (int i = threadIdx.x; i < tile_count * kTileKeys; i += kBlockThreads) {
      const int position = i < candidate_count ? candidates[i] : -1;
      cells[i] = position >= 0 ? static_cast<uint32_t>(page_ids[position / kPageTokens]) * kPageTokens +
                                     position % kPageTokens
                               : kNoCell;
    }
  } else {
    for (int i = threadIdx.x; i < tile_count * kTileKeys; i += kBlockThreads) cells[i] = kNoCell;
  }
  const QueryHeads queries = args.queries.from_row(row);
  store_query<kHeads>(query, queries, 1);
  Selection topk(*topk_shared);
  topk.clear();
  if (threadIdx.x < kStages) {
    ptx::mbarrier_init(&pipeline->full[threadIdx.x], 32);
    ptx::mbarrier_init(&pipeline->empty[threadIdx.x], 4);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    gather_tiles(args.cache, cells, tile_count, key_tiles, scale_tiles, *pipeline);
    return;  // barriers wait for threads that have not exited
  }

  float gate[Layout::kHeadsPerLane];
  load_gates<kHeads>(gate, queries, 1);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int key_of_thread = thread / 32 * 16 + thread % 32 / 4;
  for (int tile = warpgroup; tile < tile_count; tile += kWarpgroups) {
    const int stage = tile % kStages;
    ptx::mbarrier_wait(&pipeline->full[stage], tile / kStages & 1);
    ptx::fence_proxy_async();  // the gathering warps' copies are no accesses of the tensor cores' proxy
    float d[Layout::kColumns / 2] = {};
    start_tile<kHeads>(d, key_tiles + stage * kKeyTileBytes, query);
    const auto* scales = reinterpret_cast<const float*>(scale_tiles + stage * kScaleTileBytes);
    const float scale[2] = {scales[key_of_thread], scales[key_of_thread + 8]};
    ptx::wgmma_wait<0>();
    ptx::pin_registers(d);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&pipeline->empty[stage]);
    float sum[2];
    sum_heads<kHeads>(sum, d, gate);
    if (Layout::has_result(1)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t* cell = cells + tile * kTileKeys + key_of_thread + 8 * half;
        const uint32_t key = *cell != kNoCell ? order_key(sum[half] * scale[half]) : 0;
        *cell = key;
        topk.count(key);
      }
    }
  }

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
  const int shared_bytes = kStages * (kKeyTileBytes + kScaleTileBytes) + HeadLayout<kHeads>::kQueryBytes +
                           static_cast<int>(sizeof(Pipeline)) +
                           static_cast<int>(sizeof(typename RerankTopK<kCluster>::Shared)) +
                           (tiles + cluster - 1) / cluster * kTileKeys * 4;
  STD_TORCH_CHECK(
      shared_bytes <= kMaxSharedBytes, "rerank_tokens: ", args.candidate_count,
      " candidates a row are too many for this kernel; choose at most 24576");
  const auto kernel = rerank_kernel<kHeads, kCluster>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "rerank_tokens");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.rows.count * cluster);
  config.blockDim = dim3(kBlockThreads);
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
  STD_TORCH_CHECK(
      args.cache.num_pages * args.cache.page_stride <= static_cast<int64_t>(kUnit) << 32,
      "rerank_tokens: an index_cache of more than 64 GiB is not supported");
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
