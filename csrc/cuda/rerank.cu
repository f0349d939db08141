// The k best of each row's candidate tokens by the score of all heads: one CTA per row, or a cluster where rows are few.
//
// Three warps gather tiles of 64 keys by asynchronous copies into a ring of stages, in the swizzled layout that the
// tensor cores read. Two warpgroups score them; each has the products of its next tile under way while it sums those of
// the last one. The scores stay in shared memory, where the CTA or the cluster selects from them.
#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

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
constexpr int kWarps = kThreads / 32;
constexpr int kGatherWarps = 3;
constexpr int kBlockThreads = kThreads + 128;  // registers are shared out by whole warpgroups
// Of 80 for each thread: two accumulators of 32 and the gates of 16 heads lie in a scoring thread's
constexpr int kScoreRegisters = 96;
constexpr int kGatherRegisters = 48;
constexpr int kTileKeys = 64;
constexpr int kKeyTileBytes = kTileKeys * kHeadDim;
constexpr int kScaleTileBytes = kTileKeys * 4;
constexpr int kStages = 6;
// A stage belongs to one warpgroup and to one gathering warp: nobody can be a lap ahead at its barriers.
static_assert(kStages % kWarpgroups == 0 && kStages % kGatherWarps == 0);
// A warpgroup sums two of its tiles in turn
constexpr int kStep = 2 * kWarpgroups;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kMostCandidates = 24576;
constexpr uint32_t kNoUnits = ~0u;
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
  alignas(16) uint32_t units[kGatherWarps][kTileKeys];  // where the keys of the warp's tile lie in the cache
};

/// The candidates of one CTA.
struct Candidates {
  const int32_t* positions;
  int count, tile_count;

  /// -1 if there is none.
  __device__ __forceinline__ int position(int index) const { return index < count ? positions[index] : -1; }
};

/// One of the gathering warps: fills every kGatherWarps-th tile. What a candidate that does not exist leaves in its
/// place does not matter. A lane looks up two keys of the tile, of which positions are loaded two tiles ahead and pages
/// one; eight lanes copy a key.
__device__ __forceinline__ void gather_tiles(
    const IndexCache& cache, const int32_t* page_ids, const Candidates& candidates, const char* key_tiles,
    const char* scale_tiles, Pipeline& pipeline) {
  constexpr int kKeysOfLane = 16;
  constexpr int kOwnStages = kStages / kGatherWarps;
  const int lane = threadIdx.x % 32, chunk = lane % 8, first_key = lane / 8 * kKeysOfLane;
  const int warp = (threadIdx.x - kThreads) / 32;
  // As pointers of unknown origin, or the sums that make them would be repeated for every key
  const uint8_t* const own_chunk = ptx::opaque(cache.data + chunk * 16);
  const uint8_t* const page_scales = ptx::opaque(cache.data + kScalesOffset);
  page_ids = ptx::opaque(page_ids);
  const auto page_units = static_cast<uint32_t>(cache.page_stride / kUnit);
  uint32_t* const units = pipeline.units[warp];
  const auto position_of = [&](int tile, int half) {
    return candidates.position(tile * kTileKeys + half * 32 + lane);
  };
  const auto page_of = [&](int position) { return position >= 0 ? page_ids[position / kPageTokens] : 0; };
  int position[2], page[2], next[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    position[half] = position_of(warp, half);
    next[half] = position_of(warp + kGatherWarps, half);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) page[half] = page_of(position[half]);
  int own_stage = 0;
  uint32_t phase = 1;
#pragma unroll 1
  for (int tile = warp; tile < candidates.tile_count; tile += kGatherWarps) {
    const int stage = own_stage * kGatherWarps + warp;
    ptx::mbarrier_wait(&pipeline.empty[stage], phase);
    const uint32_t scales = ptx::smem_address(scale_tiles + stage * kScaleTileBytes + lane * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t page_start = static_cast<uint32_t>(page[half]) * page_units;
      const uint32_t slot = static_cast<uint32_t>(position[half]) % kPageTokens;
      const bool exists = position[half] >= 0;
      units[half * 32 + lane] = exists ? page_start + slot * (kHeadDim / kUnit) : kNoUnits;
      ptx::cp_async_if<4>(exists, scales + half * 128,
                          page_scales + static_cast<uint64_t>(page_start) * kUnit + slot * 4);
      position[half] = next[half];
      page[half] = page_of(position[half]);
      next[half] = position_of(tile + 2 * kGatherWarps, half);
    }
    __syncwarp();
    // row r of eight has its chunks at chunk ^ r: in an address without carries, both steps are one
    const uint32_t keys = ptx::smem_address(key_tiles + stage * kKeyTileBytes + first_key * kHeadDim + chunk * 16);
#pragma unroll
    for (int i = 0; i < kKeysOfLane; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(units + first_key + i);
      const uint32_t at[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t row = (i + j) % 8;
        ptx::cp_async_if<16>(at[j] != kNoUnits, (keys ^ row * (kHeadDim + 16)) + i / 8 * (8 * kHeadDim),
                    own_chunk + static_cast<uint64_t>(at[j]) * kUnit);
      }
    }
    ptx::cp_async_mbarrier_arrive(&pipeline.full[stage]);
    __syncwarp();  // all have read the addresses
    if (++own_stage == kOwnStages) {
      own_stage = 0;
      phase ^= 1;
    }
  }
  ptx::cp_async_wait_all();
}

/// Gates times relu(d), summed over this lane's heads and those of the lane beside it: even lanes get the sum of the
/// first of the thread's two keys, odd lanes that of the second.
template <int kHeads>
__device__ __forceinline__ float sum_half_of_heads(
    const float (&d)[kHeads / 2], const float (&half_gate)[HeadLayout<kHeads>::kHeadsPerLane]) {
  float sum[2] = {};
#pragma unroll
  for (int i = 0; i < HeadLayout<kHeads>::kHeadsPerLane; ++i) {
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const float dot = d[4 * (i / 2) + 2 * key + i % 2];
      // 2 max(dot, 0): additions issue at twice the rate of maxima
      sum[key] = fmaf(half_gate[i], dot + fabsf(dot), sum[key]);
    }
  }
  const bool odd = threadIdx.x % 2 != 0;
  return (odd ? sum[1] : sum[0]) + __shfl_xor_sync(~0u, odd ? sum[0] : sum[1], 1);
}

/// The selection of a CTA on its own. Its scoring threads call each method together.
class RowSelection {
 public:
  using Shared = SelectScratch;

  __device__ explicit RowSelection(Shared& scratch) : scratch_(scratch) {}

  /// A barrier must follow before anything is counted.
  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kSelectBins; bin += kThreads) scratch_.bins[bin] = 0;
  }

  __device__ void count(uint32_t key) {
    if (key != 0) atomicAdd(&scratch_.bins[ScoreBins::of_any_scores().of(key)], 1u);
  }

  /// Writes the candidates of the k largest keys, in the order of the candidates, and -1 after them; key 0 means
  /// "none". Of equal keys those of lower index are selected.
  __device__ void write_best(const uint32_t* keys, const Candidates& candidates, int k, int32_t* out) {
    const int key_count = candidates.tile_count * kTileKeys;
    const auto value_of = [](uint32_t key, uint32_t index) {
      return static_cast<uint64_t>(key) << 32 | (0xFFFFFFFFu - index);
    };
    select_sync<kThreads>();
    const uint32_t total = choose_bin<kThreads>(k, scratch_);
    uint64_t cut = 1ull << 32;  // all that are not "none"
    if (total > static_cast<uint32_t>(k)) {
      const Cut start = cut_of_bin(ScoreBins::of_any_scores(), k, scratch_);
      select_sync<kThreads>();
      cut = end_search<kThreads>(
          start,
          [&](auto&& visit) {
#pragma unroll 2
            for (int i = 4 * threadIdx.x; i < key_count; i += 4 * kThreads) {
              const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
              visit(value_of(four.x, i));
              visit(value_of(four.y, i + 1));
              visit(value_of(four.z, i + 2));
              visit(value_of(four.w, i + 3));
            }
          },
          scratch_);
    }

    // A bit for each key that is selected, and how many are selected before each word of them
    constexpr int kMostWords = kMostCandidates / 32, kOwnWords = (kMostWords + kThreads - 1) / kThreads;
    static_assert(2 * kMostWords <= kSelectBins);
    uint32_t* const words = scratch_.bins;
    uint32_t* const before = scratch_.bins + kSelectBins / 2;
    const int word_count = key_count / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 4
    for (int word = warp; word < word_count; word += kWarps) {
      const int index = word * 32 + lane;
      const uint32_t selected = __ballot_sync(~0u, value_of(keys[index], index) >= cut);
      if (lane == 0) words[word] = selected;
    }
    select_sync<kThreads>();
    uint32_t sums[kOwnWords], sum = 0, all;
#pragma unroll
    for (int i = 0; i < kOwnWords; ++i) {
      const int word = threadIdx.x * kOwnWords + i;
      sums[i] = sum;
      if (word < word_count) sum += __popc(words[word]);
    }
    const uint32_t earlier = block_exclusive_sum<kThreads>(sum, scratch_.warp_sums, all);
#pragma unroll
    for (int i = 0; i < kOwnWords; ++i) {
      const int word = threadIdx.x * kOwnWords + i;
      if (word < word_count) before[word] = earlier + sums[i];
    }
    select_sync<kThreads>();
#pragma unroll 4
    for (int word = warp; word < word_count; word += kWarps) {
      const uint32_t selected = words[word];
      const uint32_t place = before[word] + __popc(selected & ((1u << lane) - 1));
      if (selected >> lane & 1) out[place] = candidates.positions[word * 32 + lane];
    }
    for (int i = all + threadIdx.x; i < k; i += kThreads) out[i] = -1;
  }

 private:
  Shared& scratch_;
};

/// The selection of a cluster.
class ClusterSelection {
 public:
  using Shared = RerankTopK<true>::Shared;

  __device__ explicit ClusterSelection(Shared& shared) : topk_(shared) {}

  __device__ void clear() { topk_.clear(); }
  __device__ void count(uint32_t key) { topk_.count(key); }

  __device__ void write_best(const uint32_t* keys, const Candidates& candidates, int k, int32_t* out) {
    const int key_count = candidates.tile_count * kTileKeys;
    const auto cut = topk_.find(keys, key_count, k);
    topk_.emit(keys, key_count, cut, [&](int place, int index) { out[place] = candidates.positions[index]; });
    if (cg::this_cluster().block_rank() == 0) {
      for (int i = cut.selected + threadIdx.x; i < k; i += kThreads) out[i] = -1;
    }
  }

 private:
  RerankTopK<true> topk_;
};

template <bool kCluster>
using Selection = std::conditional_t<kCluster, ClusterSelection, RowSelection>;

template <int kHeads, bool kCluster>
struct SharedLayout {
  static constexpr int kQuery = kStages * kKeyTileBytes;
  static constexpr int kScales = kQuery + HeadLayout<kHeads>::kQueryBytes;
  static constexpr int kPipeline = kScales + kStages * kScaleTileBytes;
  static constexpr int kSelection = kPipeline + static_cast<int>(sizeof(Pipeline));
  static constexpr int kKeys = kSelection + static_cast<int>(sizeof(typename Selection<kCluster>::Shared));
  static_assert(kPipeline % 16 == 0 && kSelection % 16 == 0 && kKeys % 16 == 0);

  // A warpgroup's second tile may be one or two past the last
  static constexpr int bytes(int tiles) { return kKeys + (tiles + kStep - 1) * kTileKeys * 4; }
};

template <int kHeads, bool kCluster>
__global__ void __launch_bounds__(kBlockThreads, 2) rerank_kernel(const __grid_constant__ RerankArguments args) {
  using Layout = HeadLayout<kHeads>;
  using Places = SharedLayout<kHeads, kCluster>;
  extern __shared__ __align__(1024) char shared[];
  const char* const key_tiles = shared;
  char* const query = shared + Places::kQuery;
  const char* const scale_tiles = shared + Places::kScales;
  auto& pipeline = *reinterpret_cast<Pipeline*>(shared + Places::kPipeline);
  auto& selection_shared = *reinterpret_cast<typename Selection<kCluster>::Shared*>(shared + Places::kSelection);
  auto* const keys = reinterpret_cast<uint32_t*>(shared + Places::kKeys);  // of the scores, in the candidates' order

  const int ranks = kCluster ? static_cast<int>(cg::this_cluster().num_blocks()) : 1;
  const int rank = kCluster ? static_cast<int>(cg::this_cluster().block_rank()) : 0;
  const int row = blockIdx.x / ranks;
  const int visible = args.rows.visible[row];
  if (visible < args.visible_from || visible >= args.visible_to) return;

  const int all_candidates = visible > 0 ? args.candidate_count : 0;  // of padding rows, anything may lie there
  const int tiles = (all_candidates + kTileKeys - 1) / kTileKeys;
  const int tiles_per_cta = (tiles + ranks - 1) / ranks;
  const int first_tile = min(rank * tiles_per_cta, tiles), tile_count = min(tiles_per_cta, tiles - first_tile);
  const int first_candidate = first_tile * kTileKeys;
  const Candidates candidates{
      args.candidates + row * args.candidates_stride + first_candidate,
      min(tile_count * kTileKeys, all_candidates - first_candidate), tile_count};
  if (threadIdx.x < kStages) {
    ptx::mbarrier_init(&pipeline.full[threadIdx.x], 32);
    ptx::mbarrier_init(&pipeline.empty[threadIdx.x], 4 * ptx::kArrivalsOfWarp);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    ptx::set_fewer_registers<kGatherRegisters>();
    if (threadIdx.x < kThreads + 32 * kGatherWarps && tile_count > 0) {
      gather_tiles(args.cache, args.rows.pages(row), candidates, key_tiles, scale_tiles, pipeline);
    }
    return;  // barriers wait for threads that have not exited
  }
  ptx::set_more_registers<kScoreRegisters>();

  const QueryHeads queries = args.queries.from_row(row);
  store_query<kHeads, kThreads>(query, queries, 1);
  Selection<kCluster> selection(selection_shared);
  selection.clear();
  float half_gate[Layout::kHeadsPerLane];
  load_gates<kHeads>(half_gate, queries, 1);
#pragma unroll
  for (int i = 0; i < Layout::kHeadsPerLane; ++i) half_gate[i] *= 0.5f;
  select_sync<kThreads>();

  const int lane = threadIdx.x % 32;
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // lets the compiler know that it is the warp's
  float d[2][Layout::kColumns / 2];
  int next_stage = warpgroup;
  uint32_t next_phase = 0;
  // Returns the tile's stage. The product of a tile that does not exist, of whatever lies there, is never looked at
  const auto start = [&](auto& accumulator, int tile) {
    const int stage = next_stage;
    if (tile < tile_count) ptx::mbarrier_wait(&pipeline.full[stage], next_phase);
    ptx::fence_proxy_async();  // the gathering warps' copies are no accesses of the tensor cores' proxy
    start_tile<kHeads>(accumulator, key_tiles + stage * kKeyTileBytes, query);
    next_stage += kWarpgroups;
    if (next_stage >= kStages) {
      next_stage = warpgroup;
      next_phase ^= 1;
    }
    return stage;
  };
  // Of the keys of two tiles a lane gets the sum of one: in its tile key_of_lane
  const int key_of_lane = threadIdx.x % 128 / 32 * 16 + lane / 4 + lane % 2 * 8;
  const bool in_second = (lane & 2) != 0;
  const auto* const scales = reinterpret_cast<const float*>(scale_tiles) + key_of_lane;
  const auto release = [&](int stage) {
    __syncwarp();
    ptx::mbarrier_arrive_warp(&pipeline.empty[stage], lane);
  };
#pragma unroll 1
  for (int tile = warpgroup; tile < tile_count; tile += kStep) {
    const int second = tile + kWarpgroups;
    const int first_stage = start(d[0], tile), second_stage = start(d[1], second);
    const int index = (in_second ? second : tile) * kTileKeys + key_of_lane;
    const bool exists = candidates.position(index) >= 0;
    const float first_scale = scales[first_stage * kTileKeys];
    ptx::wgmma_wait<1>();
    ptx::pin_registers(d[0]);
    release(first_stage);
    const float first_sum = sum_half_of_heads<kHeads>(d[0], half_gate);
    const float second_scale = scales[second_stage * kTileKeys];
    ptx::wgmma_wait<0>();
    ptx::pin_registers(d[1]);
    if (second < tile_count) release(second_stage);  // no one waits for what was not gathered
    const float second_sum = sum_half_of_heads<kHeads>(d[1], half_gate);
    const float sum = (in_second ? second_sum : first_sum) +
                      __shfl_xor_sync(~0u, in_second ? first_sum : second_sum, 2);
    const uint32_t key = exists ? order_key(sum * (in_second ? second_scale : first_scale)) : 0;
    keys[index] = key;
    selection.count(key);
  }
  selection.write_best(keys, candidates, args.k, args.out + row * args.out_stride);
}

// ---------------------------------------------------------------- launch

template <int kHeads, bool kCluster>
void launch_cluster(const RerankArguments& args, int cluster, cudaStream_t stream) {
  const int tiles = (args.candidate_count + kTileKeys - 1) / kTileKeys;
  const int shared_bytes = SharedLayout<kHeads, kCluster>::bytes((tiles + cluster - 1) / cluster);
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
  const auto launch_heads = args.queries.count <= 16   ? launch<16>
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
