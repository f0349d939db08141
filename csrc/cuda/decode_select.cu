// Scores and top-k selection for few rows: one cluster of CTAs per row, one launch, scores never leave the chip.
//
// Each CTA takes a contiguous part of the row's pages. Pages arrive by the copy engine in a ring of stages, two
// warpgroups take them in turn, and the scores stay in shared memory as order-preserving integers, from which the
// cluster selects (cluster_topk.cuh). A part that does not fit is scored in rounds (`kRounds`): after each round only
// the CTA's own k best stay, which contain all that the cluster can select.
#include <cooperative_groups.h>

#include <algorithm>

#include "cluster_topk.cuh"
#include "common/ptx.cuh"
#include "common/select.cuh"
#include "key_scores.cuh"
#include "tensor_map.h"
#include "torch_op.h"

namespace cg = cooperative_groups;

namespace misa {
namespace {

constexpr int kWarpgroups = 2;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kKeyTileBytes = kPageTokens * kHeadDim;
constexpr int kScaleTileBytes = kPageTokens * 4;
constexpr int kStageBytes = kKeyTileBytes + kScaleTileBytes + 8;  // keys, scales, barrier
constexpr int kMaxStages = 16;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kHalfSharedBytes = 113 * 1024;  // two CTAs on a multiprocessor, 1 KiB each reserved by the system

using ClusterTopK = TopK<kThreads, true>;
using CtaTopK = TopK<kThreads, false>;
static_assert(sizeof(ClusterTopK::Shared) == sizeof(CtaTopK::Shared));

struct SelectArguments {
  const uint8_t* q;
  int64_t q_row_stride, q_head_stride;
  const float* gates;
  int64_t gates_stride;
  const int32_t* heads;  // [M, head_count] or null: heads 0 .. head_count - 1
  int64_t heads_stride;
  int head_count;
  IndexCache cache;
  Rows rows;
  int k;
  int visible_from, visible_to;
  int32_t* out;
  int64_t out_stride;
  int stages;
  int capacity;  // scores that a CTA holds
};

template <int kHeads, bool kRounds>
__global__ void __launch_bounds__(kThreads) decode_select_kernel(
    const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectArguments args) {
  using Layout = HeadLayout<kHeads>;
  extern __shared__ __align__(1024) char shared[];
  const int stages = args.stages;
  char* key_tiles = shared;
  char* query = key_tiles + stages * kKeyTileBytes;
  char* scale_tiles = query + Layout::kQueryBytes;
  auto* topk_shared = reinterpret_cast<ClusterTopK::Shared*>(scale_tiles + stages * kScaleTileBytes);
  auto* keys = reinterpret_cast<uint32_t*>(topk_shared + 1);
  // only with rounds: positions of the keys, and room for the survivors of a round
  auto* positions = keys + args.capacity;
  auto* kept_keys = positions + args.capacity;
  auto* kept_positions = kept_keys + args.k;
  auto* full = reinterpret_cast<uint64_t*>(kRounds ? kept_positions + args.k : keys + args.capacity);

  auto cluster = cg::this_cluster();
  const int ranks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int row = blockIdx.x / ranks;
  const int visible = args.rows.visible[row];
  if (visible < args.visible_from || visible >= args.visible_to) return;
  int32_t* out = args.out + row * args.out_stride;
  if (visible <= args.k) {
    for (int i = rank * kThreads + threadIdx.x; i < args.k; i += ranks * kThreads) out[i] = i < visible ? i : -1;
    return;
  }

  const int pages = (visible + kPageTokens - 1) / kPageTokens;
  const int pages_per_cta = (pages + ranks - 1) / ranks;
  const int first_page = min(rank * pages_per_cta, pages);
  const int page_count = min(pages_per_cta, pages - first_page);
  const int first_position = first_page * kPageTokens;
  const int32_t* page_ids = args.rows.pages(row) + first_page;

  const auto load_page = [&](int stage, int page) {
    ptx::mbarrier_arrive_expect_tx(&full[stage], kKeyTileBytes + kScaleTileBytes);
    ptx::tma_load_3d(key_tiles + stage * kKeyTileBytes, &key_map, 0, 0, page, &full[stage]);
    ptx::bulk_load(
        scale_tiles + stage * kScaleTileBytes, args.cache.page(page) + kScalesOffset, kScaleTileBytes, &full[stage]);
  };
  if (threadIdx.x < stages) {
    ptx::mbarrier_init(&full[threadIdx.x], 1);
    ptx::mbarrier_init_fence();
    if (threadIdx.x < page_count) load_page(threadIdx.x, page_ids[threadIdx.x]);
  }
  const int32_t* heads = args.heads == nullptr ? nullptr : args.heads + row * args.heads_stride;
  store_query<kHeads>(query, args.q + row * args.q_row_stride, args.q_head_stride, heads, args.head_count);
  float gate[Layout::kHeadsPerLane];
  load_gates<kHeads>(gate, args.gates + row * args.gates_stride, heads, args.head_count);
  ClusterTopK topk(*topk_shared);
  topk.clear();
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  const bool leads = threadIdx.x % 128 == 0;
  const int key_of_thread = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  int held = 0;  // keys in the buffer from earlier rounds
  int page = warpgroup;
  for (int round_start = 0; round_start < page_count;) {
    const int round_end = kRounds ? min(page_count, round_start + (args.capacity - held) / kPageTokens) : page_count;
    for (; page < round_end; page += kWarpgroups) {
      const int stage = page % stages;
      const int refill = page + stages;
      const int refill_page = leads && refill < page_count ? page_ids[refill] : 0;
      const auto* scales = reinterpret_cast<const float*>(scale_tiles + stage * kScaleTileBytes);
      float d[Layout::kColumns / 2];
      ptx::mbarrier_wait(&full[stage], page / stages & 1);
      start_tile<kHeads>(d, key_tiles + stage * kKeyTileBytes, query);
      const float scale[2] = {scales[key_of_thread], scales[key_of_thread + 8]};
      ptx::wgmma_wait<0>();
      ptx::pin_registers(d);
      sync_warpgroup(warpgroup);
      if (leads && refill < page_count) load_page(stage, refill_page);

      float sum[2];
      sum_heads<kHeads>(sum, d, gate);
      if (threadIdx.x % 4 == Layout::kResultLane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int offset = key_of_thread + 8 * half;
          const int position = first_position + page * kPageTokens + offset;
          const uint32_t key = position < visible ? order_key(sum[half] * scale[half]) : 0;
          const int place = held + (page - round_start) * kPageTokens + offset;
          keys[place] = key;
          if constexpr (kRounds) {
            positions[place] = position;
          } else {
            topk.count(key);
          }
        }
      }
    }
    if constexpr (kRounds) {
      const int filled = held + (round_end - round_start) * kPageTokens;
      __syncthreads();
      CtaTopK own(*reinterpret_cast<CtaTopK::Shared*>(topk_shared));
      own.clear();
      __syncthreads();
      for (int i = threadIdx.x; i < filled; i += kThreads) own.count(keys[i]);
      if (round_end < page_count) {
        const auto cut = own.find(keys, filled, args.k);
        own.emit(keys, filled, cut, [&](int place, int index) {
          kept_keys[place] = keys[index];
          kept_positions[place] = positions[index];
        });
        __syncthreads();
        held = cut.selected;
        for (int i = threadIdx.x; i < held; i += kThreads) {
          keys[i] = kept_keys[i];
          positions[i] = kept_positions[i];
        }
        __syncthreads();
      } else {
        held = filled;
      }
    }
    round_start = round_end;
  }
  const int key_count = kRounds ? held : page_count * kPageTokens;
  const auto cut = topk.find(keys, key_count, args.k);
  topk.emit(keys, key_count, cut, [&](int place, int index) {
    out[place] = kRounds ? static_cast<int32_t>(positions[index]) : first_position + index;
  });
}

// ---------------------------------------------------------------- launch

struct Shape {
  int cluster;
  int stages;
  int capacity;
  bool rounds;
  int shared_bytes;
};

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

/// How a launch uses the chip, from what the host knows. Results do not depend on it.
Shape choose_shape(int row_count, int max_visible, int k, int query_bytes, int wanted_cluster) {
  const int pages = std::max(1, (max_visible + kPageTokens - 1) / kPageTokens);
  const int processors = multiprocessors();
  const int fixed_bytes = query_bytes + static_cast<int>(sizeof(ClusterTopK::Shared)) + 16;
  const auto part_bytes = [&](int cluster) { return (pages + cluster - 1) / cluster * kPageTokens * 4; };
  int cluster = 1;
  constexpr int kFewestPages = 4;  // per CTA: less work than this costs more in cluster barriers than it saves
  while (cluster < kMaxClusterCtas && row_count * cluster * 2 <= 2 * processors &&
         pages >= 2 * cluster * kFewestPages) {
    cluster *= 2;
  }
  while (cluster < kMaxClusterCtas && fixed_bytes + part_bytes(cluster) + 3 * kStageBytes > kHalfSharedBytes) {
    cluster *= 2;
  }
  if (wanted_cluster > 0) cluster = wanted_cluster;

  Shape shape = {};
  shape.cluster = cluster;
  shape.capacity = part_bytes(cluster) / 4;
  shape.rounds = fixed_bytes + part_bytes(cluster) + 3 * kStageBytes > kMaxSharedBytes;
  if (shape.rounds) {
    constexpr int kRoundStages = 4;
    shape.stages = kRoundStages;
    const int kept_bytes = 8 * k;
    const int left = kMaxSharedBytes - fixed_bytes - kRoundStages * kStageBytes - kept_bytes;
    shape.capacity = left / 8 / kPageTokens * kPageTokens;
    STD_TORCH_CHECK(
        shape.capacity >= k + 16 * kPageTokens, "select_tokens: k = ", k, " is too large for contexts of ", max_visible,
        " tokens in this kernel; choose a k of at most 8192");
    shape.shared_bytes = fixed_bytes + kRoundStages * kStageBytes + kept_bytes + 8 * shape.capacity;
  } else {
    const int used = fixed_bytes + part_bytes(cluster);
    const bool shares = row_count * cluster > processors && used + 3 * kStageBytes <= kHalfSharedBytes;
    const int stages = ((shares ? kHalfSharedBytes : kMaxSharedBytes) - used) / kStageBytes;
    shape.stages = std::min({stages, kMaxStages, std::max(2, (pages + cluster - 1) / cluster)});
    shape.shared_bytes = used + shape.stages * kStageBytes;
  }
  return shape;
}

template <int kHeads, bool kRounds>
void launch_shape(const CUtensorMap& map, const SelectArguments& args, const Shape& shape, cudaStream_t stream) {
  const auto kernel = decode_select_kernel<kHeads, kRounds>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), "select_tokens");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "select_tokens");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.rows.count * shape.cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, map, args), "select_tokens");
}

template <int kHeads>
void launch(SelectArguments args, int max_visible, int cluster, cudaStream_t stream) {
  const Shape shape = choose_shape(args.rows.count, max_visible, args.k, HeadLayout<kHeads>::kQueryBytes, cluster);
  args.stages = shape.stages;
  args.capacity = shape.capacity;
  const CUtensorMap map = key_page_map(args.cache);
  shape.rounds ? launch_shape<kHeads, true>(map, args, shape, stream)
               : launch_shape<kHeads, false>(map, args, shape, stream);
}

void decode_select(
    Tensor q, Tensor gates, std::optional<Tensor> heads, Tensor index_cache, Tensor block_table, Tensor request,
    Tensor visible, int64_t max_visible, int64_t k, Tensor out, int64_t visible_from, int64_t visible_to,
    int64_t cluster) {
  SelectArguments args = {};
  args.cache = index_cache_of(index_cache, false);
  args.rows = rows_of(block_table, request, visible);
  args.head_count = check_queries(q, gates, args.rows);
  if (heads.has_value()) {
    check_tensor(*heads, "heads", ScalarType::Int, 2);
    STD_TORCH_CHECK(
        heads->size(0) == args.rows.count && heads->size(1) >= 1 && heads->size(1) <= args.head_count,
        "heads must be [", args.rows.count, ", h] with h from 1 to ", args.head_count);
    args.heads = static_cast<const int32_t*>(heads->data_ptr());
    args.heads_stride = heads->stride(0);
    args.head_count = static_cast<int>(heads->size(1));
  }
  check_tensor(out, "out", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      out.size(0) == args.rows.count && k >= 1 && out.size(1) >= k, "out must be [", args.rows.count, ", at least k = ",
      k, "]");
  if (args.rows.count == 0) return;
  args.q = static_cast<const uint8_t*>(q.data_ptr());
  args.q_row_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.gates = static_cast<const float*>(gates.data_ptr());
  args.gates_stride = gates.stride(0);
  args.k = static_cast<int>(k);
  args.visible_from = static_cast<int>(visible_from);
  args.visible_to = static_cast<int>(std::min<int64_t>(visible_to, INT32_MAX));
  args.out = static_cast<int32_t*>(out.data_ptr());
  args.out_stride = out.stride(0);
  const auto launch_heads = args.head_count <= 8    ? launch<8>
                            : args.head_count <= 16 ? launch<16>
                            : args.head_count <= 32 ? launch<32>
                                                    : launch<64>;
  launch_heads(args, static_cast<int>(max_visible), static_cast<int>(cluster), current_stream(q));
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def(
      "decode_select(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, int max_visible, int k, Tensor(a!) out, int visible_from, int visible_to, int cluster) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("decode_select", TORCH_BOX(&misa::decode_select));
}
