// The router: S[t, j] = |w[t, j]| * sum over complete pool blocks b of relu(q[t, j] . kbar[b]), and its h best heads.
// Rows of one request share its pooled means where they are many; few rows have a cluster each. Both sum as
// pooled_scores.cuh says.
#include <cooperative_groups.h>

#include <algorithm>

#include "common/ptx.cuh"
#include "pooled_scores.cuh"
#include "torch_op.h"

namespace cg = cooperative_groups;

namespace misa {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileBlocks = 64;      // pool blocks per shared-memory tile of the pooled kernel
constexpr int kFewTiles = 4;         // with more, 64 heads are worth scoring from one load of each
constexpr int kPagesInFlight = 8;  // of a warp of the pooling kernel
constexpr int kGroupPages = 8;     // pages that a warp of the direct kernel fetches at a time
constexpr int kRingGroups = 3;
constexpr int64_t kMaxPooledBytes = 48 << 20;
constexpr int kRingBytesOfWarp = kRingGroups * kGroupPages * kMeanBytes;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kHalfSharedBytes = 113 * 1024;  // two CTAs on a multiprocessor, 1 KiB each reserved by the system

// ---------------------------------------------------------------- pool block means

/// A warp pools blocks [first, last) of a request: sink(block, mean) for each, ascending. The mean of a block adds
/// its page means in order of position.
template <typename Sink>
__device__ __forceinline__ void pool_blocks(
    const IndexCache& cache, const int32_t* pages, int first, int last, int pages_per_block, Sink sink) {
  const int lane = threadIdx.x % 32;
  const int end = last * pages_per_block;
  const float divisor = static_cast<float>(pages_per_block);
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  int in_block = 0, block = first;
  for (int base = first * pages_per_block; base < end; base += 32) {
    const int page_of_lane = base + lane < end ? pages[base + lane] : 0;
    for (int offset = 0; offset < 32 && base + offset < end; offset += kPagesInFlight) {
      float4 means[kPagesInFlight];
#pragma unroll
      for (int i = 0; i < kPagesInFlight; ++i) {
        const int page = __shfl_sync(~0u, page_of_lane, offset + i);
        if (base + offset + i < end) means[i] = reinterpret_cast<const float4*>(cache.mean(page))[lane];
      }
#pragma unroll
      for (int i = 0; i < kPagesInFlight; ++i) {
        if (base + offset + i < end) {
          sum.x += means[i].x;
          sum.y += means[i].y;
          sum.z += means[i].z;
          sum.w += means[i].w;
          if (++in_block == pages_per_block) {
            sink(block++, float4{sum.x / divisor, sum.y / divisor, sum.z / divisor, sum.w / divisor});
            sum = {0.0f, 0.0f, 0.0f, 0.0f};
            in_block = 0;
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------- many rows per request: pool first, then score

struct RouteArguments {
  const uint8_t* q;
  int64_t q_row_stride, q_head_stride;
  const float* gates;
  int64_t gates_stride;
  IndexCache cache;
  Rows rows;
  int heads, active_heads, pool_block, segment_blocks;
  char* pooled;          // [R, max_blocks] rows of 128 fp16
  float* pooled_scales;  // [R, max_blocks]
  int max_blocks;
  int32_t* out;
};

__global__ void __launch_bounds__(kThreads) pool_kernel(RouteArguments args, int blocks_per_warp) {
  ptx::let_next_kernel_start();
  const int request = blockIdx.y;
  int visible = 0;  // the most keys any row of this request sees: nothing past it may be read
  for (int row = threadIdx.x; row < args.rows.count; row += kThreads) {
    if (args.rows.request[row] == request) visible = max(visible, args.rows.visible[row]);
  }
  visible = __reduce_max_sync(~0u, visible);
  __shared__ int warp_visible[kWarps];
  if (threadIdx.x % 32 == 0) warp_visible[threadIdx.x / 32] = visible;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) visible = max(visible, warp_visible[warp]);

  const int blocks = min(visible / args.pool_block, args.max_blocks);
  const int first = (blockIdx.x * kWarps + threadIdx.x / 32) * blocks_per_warp;
  const int64_t row_base = static_cast<int64_t>(request) * args.max_blocks;
  pool_blocks(
      args.cache, args.rows.block_table + request * args.rows.table_stride, first,
      min(first + blocks_per_warp, blocks), args.pool_block / kPageTokens, [&](int block, float4 mean) {
        const float scale =
            store_mean(args.pooled + (row_base + block) * kMeanRowBytes, block, mean, threadIdx.x % 32);
        if (threadIdx.x % 32 == 0) args.pooled_scales[row_base + block] = scale;
      });
}

/// One warp per row; the CTA's rows share the tiles of pooled means of their request. A row's heads are scored in kParts
/// parts of kFragments * 16, each from all tiles: with fewer of them at a time two CTAs share a multiprocessor.
template <int kFragments, int kParts>
__global__ void __launch_bounds__(kThreads, kParts) route_pooled_kernel(const __grid_constant__ RouteArguments args) {
  __shared__ __align__(128) char tiles[2][kTileBlocks * kMeanRowBytes];
  __shared__ __align__(16) float scales[2][kTileBlocks];
  __shared__ float scores[kWarps][kMaxHeads];
  __shared__ int row_request[kWarps], row_blocks[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x * kWarps + warp;
  const bool exists = row < args.rows.count;

  const int blocks = exists ? args.rows.visible[row] / args.pool_block : 0;
  if (lane == 0) {
    row_blocks[warp] = blocks;
    row_request[warp] = blocks > 0 ? args.rows.request[row] : -1;
  }
  __syncthreads();

#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    const int first_head = part * 16 * kFragments;
    QueryFragment query[kFragments];
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      const uint8_t* from = args.q + (exists ? row : 0) * args.q_row_stride;
      convert_query(query[f], load_query(from, args.q_head_stride, first_head + 16 * f, args.heads));
    }
    if (part == 0) ptx::wait_for_previous_kernel();  // the pooled means are complete from here on

    float total[kFragments][2] = {}, sum[kFragments][2] = {};
    uint32_t done = 0;  // rows whose request has been scored
    for (int leader = 0; leader < kWarps; ++leader) {
      if (done >> leader & 1 || row_blocks[leader] == 0) continue;
      const int request = row_request[leader];
      int most_blocks = 0;
      for (int other = leader; other < kWarps; ++other) {
        if (row_request[other] == request) {
          most_blocks = max(most_blocks, row_blocks[other]);
          done |= 1u << other;
        }
      }
      const int my_blocks = row_request[warp] == request ? blocks : 0;
      const int64_t row_base = static_cast<int64_t>(request) * args.max_blocks;
      const int tile_count = (most_blocks + kTileBlocks - 1) / kTileBlocks;
      const auto fetch = [&](int tile) {
        const int first = tile * kTileBlocks, stage = tile % 2;
        const int count = min(kTileBlocks, most_blocks - first);
        for (int chunk = threadIdx.x; chunk < count * (kMeanRowBytes / 16); chunk += kThreads) {
          ptx::cp_async<16>(tiles[stage] + chunk * 16, args.pooled + (row_base + first) * kMeanRowBytes + chunk * 16);
        }
        for (int i = threadIdx.x; i < count; i += kThreads) scales[stage][i] = args.pooled_scales[row_base + first + i];
      };
      fetch(0);
      ptx::cp_async_commit();
      for (int tile = 0; tile < tile_count; ++tile) {
        if (tile + 1 < tile_count) fetch(tile + 1);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        __syncthreads();
        const int first_block = tile * kTileBlocks;
        for (int column = 0; column < kTileBlocks && first_block + column < my_blocks; column += kColumns) {
          score_columns(sum, query, tiles[tile % 2], scales[tile % 2], column, my_blocks - first_block - column);
          const int next = first_block + column + kColumns;
          if (next % args.segment_blocks == 0 || next >= my_blocks) {
            float segment[kFragments][2];
            take_segment(segment, sum);
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
              total[f][0] += segment[f][0];
              total[f][1] += segment[f][1];
            }
          }
        }
        __syncthreads();
      }
    }

#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = first_head + 16 * f + 8 * half + lane / 4;
        if (exists && lane % 4 == 0 && head < args.heads) {
          scores[warp][head] = fabsf(args.gates[row * args.gates_stride + head]) * total[f][half];
        }
      }
    }
  }
  __syncwarp();
  if (exists) {
    if (blocks == 0) {
      // no score was summed, and gates of a padding row may be NaN
      for (int i = lane; i < args.active_heads; i += 32) args.out[row * args.active_heads + i] = i;
    } else {
      write_top_heads(scores[warp], args.heads, args.active_heads, args.out + row * args.active_heads);
    }
  }
}

// ---------------------------------------------------------------- few rows per request: one cluster per row

template <int kFragments>
__global__ void __launch_bounds__(kThreads, 2) route_direct_kernel(const __grid_constant__ RouteArguments args) {
  extern __shared__ __align__(128) char shared[];
  const int segment_blocks = args.segment_blocks;
  char* ring = shared;
  char* tile = ring + kWarps * kRingBytesOfWarp;
  auto* scales = reinterpret_cast<float*>(tile + segment_blocks * kMeanRowBytes);
  float* partial = scales + segment_blocks;  // [segments, 16 * kFragments], filled in the first CTA by all
  __shared__ float scores[kMaxHeads];
  constexpr int kHeads = 16 * kFragments;

  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_start();  // all that ran before this kernel is complete: the next one may rely on it
  auto cluster = cg::this_cluster();
  const int ranks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int row = blockIdx.x / ranks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t* out = args.out + row * args.active_heads;
  const int32_t* pages = args.rows.pages(row);
  const int blocks = args.rows.visible[row] / args.pool_block;
  if (blocks == 0) {
    if (rank == 0 && threadIdx.x < args.active_heads) out[threadIdx.x] = threadIdx.x;
    return;
  }
  if (ranks > 1) ptx::cluster_arrive();  // the first CTA has started: its shared memory may be written
  const int segments = (blocks + segment_blocks - 1) / segment_blocks;
  const int pages_per_block = args.pool_block / kPageTokens;
  const int blocks_per_warp = segment_blocks / kWarps;

  // A warp pools its blocks of one segment of the CTA after the other, fetched in groups of pages without a break at
  // the end of a segment. Each lane fetches and reads its own 16 bytes of a mean, so the ring needs no barrier.
  const int warp_pages = blocks_per_warp * pages_per_block;
  const int groups = (warp_pages + kGroupPages - 1) / kGroupPages;  // of a segment
  struct Group {
    int first_page, count;
  };
  const auto group_at = [&](int number) {
    const int in_segment = number % groups * kGroupPages;
    const int segment = rank + number / groups * ranks;
    const int first_page = segment * segment_blocks * pages_per_block + warp * warp_pages + in_segment;
    return Group{first_page, min(kGroupPages, min(warp_pages - in_segment, blocks * pages_per_block - first_page))};
  };
  const auto load_ids = [&](int number) {  // of four groups
    const Group group = group_at(number + lane / kGroupPages);
    const int i = lane % kGroupPages;
    return i < group.count ? pages[group.first_page + i] : -1;
  };
  char* my_ring = ring + warp * kRingBytesOfWarp + lane * 16;
  const auto slot_of = [&](int group, int i) { return (group % kRingGroups * kGroupPages + i) * kMeanBytes; };
  const auto fetch = [&](int group, int ids, int group_of_ids) {
#pragma unroll
    for (int i = 0; i < kGroupPages; ++i) {
      const int id = __shfl_sync(~0u, ids, group_of_ids * kGroupPages + i);
      if (id >= 0) ptx::cp_async<16>(my_ring + slot_of(group, i), args.cache.mean(id) + 4 * lane);
    }
    ptx::cp_async_commit();
  };
  int ids = load_ids(0);
#pragma unroll
  for (int group = 0; group < kRingGroups - 1; ++group) fetch(group, ids, group);
  ids = load_ids(kRingGroups - 1);

  const bool scores_heads = warp < kFragments;
  const QueryBytes query_bytes = load_query(
      args.q + row * args.q_row_stride, args.q_head_stride, 16 * warp, scores_heads ? args.heads : 0);
  float* all_partials = ranks > 1 ? cluster.map_shared_rank(partial, 0) : partial;
  // loaded here, for at the end nothing else would be under way
  const float gate = threadIdx.x < args.heads ? args.gates[row * args.gates_stride + threadIdx.x] : 0.0f;
  const float divisor = static_cast<float>(pages_per_block);
  bool first_started = ranks == 1;
  int group = 0;
  for (int segment = rank; segment < segments; segment += ranks) {
    const int count = min(segment_blocks, blocks - segment * segment_blocks);
    float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
    int in_block = 0, index = warp * blocks_per_warp;
    for (int end = group + groups; group < end; ++group) {
      fetch(group + kRingGroups - 1, ids, 0);
      ids = load_ids(group + kRingGroups);
      ptx::cp_async_wait<kRingGroups - 1>();
      const int count_in_group = group_at(group).count;
      for (int i = 0; i < count_in_group; ++i) {
        const float4 mean = *reinterpret_cast<const float4*>(my_ring + slot_of(group, i));
        sum = {sum.x + mean.x, sum.y + mean.y, sum.z + mean.z, sum.w + mean.w};
        if (++in_block < pages_per_block) continue;
        const float scale = store_mean(
            tile + index * kMeanRowBytes, index,
            float4{sum.x / divisor, sum.y / divisor, sum.z / divisor, sum.w / divisor}, lane);
        if (lane == 0) scales[index] = scale;
        sum = {0.0f, 0.0f, 0.0f, 0.0f};
        in_block = 0;
        ++index;
      }
    }
    __syncthreads();
    if (!first_started) ptx::cluster_wait();
    first_started = true;
    if (scores_heads) {
      QueryFragment query[1];
      convert_query(query[0], query_bytes);
      float sum[1][2] = {}, result[1][2];
      for (int column = 0; column < count; column += kColumns) {
        score_columns(sum, query, tile, scales, column, count - column);
      }
      take_segment(result, sum);
      if (lane % 4 == 0) {
        all_partials[segment * kHeads + 16 * warp + lane / 4] = result[0][0];
        all_partials[segment * kHeads + 16 * warp + lane / 4 + 8] = result[0][1];
      }
    }
    __syncthreads();
  }
  if (ranks > 1) {
    if (!first_started) ptx::cluster_wait();
    ptx::cluster_arrive();
    if (rank > 0) return;
    ptx::cluster_wait();
  }
  if (threadIdx.x < args.heads) {
    float total = 0.0f;
#pragma unroll 8
    for (int segment = 0; segment < segments; ++segment) total += partial[segment * kHeads + threadIdx.x];
    scores[threadIdx.x] = fabsf(gate) * total;
  }
  __syncthreads();
  if (warp == 0) write_top_heads(scores, args.heads, args.active_heads, out);
}

// ---------------------------------------------------------------- launch

template <int kFragments, int kParts>
void launch_pooled(const RouteArguments& args, int requests, cudaStream_t stream) {
  const int pages_per_block = args.pool_block / kPageTokens;
  const int blocks_per_warp = std::max(1, kPagesInFlight / pages_per_block);
  const dim3 grid((args.max_blocks + kWarps * blocks_per_warp - 1) / (kWarps * blocks_per_warp), requests);
  if (grid.x > 0) launch_simple("route_heads, pooling", pool_kernel, grid, kThreads, stream, args, blocks_per_warp);
  const dim3 blocks((args.rows.count + kWarps - 1) / kWarps);
  launch_overlapping("route_heads", route_pooled_kernel<kFragments, kParts>, blocks, kThreads, stream, args);
}

template <int kFragments>
void launch_direct(const RouteArguments& args, cudaStream_t stream) {
  const int segments = std::max(1, (args.max_blocks + args.segment_blocks - 1) / args.segment_blocks);
  const int shared_bytes = kWarps * kRingBytesOfWarp + args.segment_blocks * (kMeanRowBytes + 4) +
                           segments * 16 * kFragments * static_cast<int>(sizeof(float));
  STD_TORCH_CHECK(
      shared_bytes <= kMaxSharedBytes, "route_heads: contexts of ", args.max_blocks, " blocks of ", args.pool_block,
      " tokens are too long for this kernel; choose a larger pool_block");
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  // all rows at once, where possible two CTAs to a multiprocessor: one loads while the other scores. Large clusters
  // need their multiprocessors in one GPC, so they do not get the whole chip.
  const int at_once = shared_bytes <= kHalfSharedBytes ? 2 * processors : processors;
  const auto fits = [&](int ranks) { return args.rows.count * ranks <= (ranks <= 4 ? at_once : processors); };
  int ranks = 1;
  while (ranks < 8 && 2 * ranks <= segments && fits(2 * ranks)) ranks *= 2;
  check_cuda(
      cudaFuncSetAttribute(
          route_direct_kernel<kFragments>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "route_heads");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(args.rows.count * ranks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = ranks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = ranks > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, route_direct_kernel<kFragments>, args), "route_heads");
}

/// Bytes of `workspace` with which route_heads pools once for all rows; 0: it runs without.
int64_t route_heads_workspace(int64_t row_count, int64_t requests, int64_t max_visible, int64_t pool_block) {
  const int64_t blocks = max_visible / pool_block;
  const int64_t bytes = requests * blocks * (kMeanRowBytes + static_cast<int64_t>(sizeof(float)));
  return row_count < 8 * requests || row_count < 64 || bytes > kMaxPooledBytes ? 0 : bytes;
}

void route_heads(
    Tensor q, Tensor gates, Tensor index_cache, Tensor block_table, Tensor request, Tensor visible,
    int64_t max_visible, int64_t pool_block, Tensor workspace, Tensor out) {
  RouteArguments args = {};
  args.cache = index_cache_of(index_cache, true);
  args.rows = rows_of(block_table, request, visible);
  args.heads = check_queries(q, gates, args.rows);
  check_tensor(out, "out", ScalarType::Int, 2);
  STD_TORCH_CHECK(
      out.size(0) == args.rows.count && out.is_contiguous() && out.size(1) >= 1 && out.size(1) <= args.heads,
      "out must be contiguous [", args.rows.count, ", h] with h from 1 to ", args.heads);
  STD_TORCH_CHECK(
      pool_block >= kPageTokens && pool_block % kPageTokens == 0, "pool_block must be a multiple of ", kPageTokens,
      ", it is ", pool_block);
  if (args.rows.count == 0) return;
  args.q = static_cast<const uint8_t*>(q.data_ptr());
  args.q_row_stride = q.stride(0);
  args.q_head_stride = q.stride(1);
  args.gates = static_cast<const float*>(gates.data_ptr());
  args.gates_stride = gates.stride(0);
  args.active_heads = static_cast<int>(out.size(1));
  args.pool_block = static_cast<int>(pool_block);
  args.segment_blocks = segment_blocks_of(args.pool_block);
  args.max_blocks = static_cast<int>(max_visible / pool_block);
  args.out = static_cast<int32_t*>(out.data_ptr());

  const cudaStream_t stream = current_stream(q);
  const int requests = static_cast<int>(block_table.size(0));
  const int64_t bytes = route_heads_workspace(args.rows.count, requests, max_visible, pool_block);
  const bool pools = bytes > 0 && workspace.numel() >= bytes;
  if (pools) {
    args.pooled = static_cast<char*>(workspace.data_ptr());
    args.pooled_scales = reinterpret_cast<float*>(
        args.pooled + static_cast<int64_t>(requests) * args.max_blocks * kMeanRowBytes);
  }
  if (args.heads <= 16) {
    pools ? launch_pooled<1, 1>(args, requests, stream) : launch_direct<1>(args, stream);
  } else if (args.heads <= 32) {
    pools ? launch_pooled<2, 1>(args, requests, stream) : launch_direct<2>(args, stream);
  } else if (!pools) {
    launch_direct<4>(args, stream);
  } else if (args.max_blocks <= kFewTiles * kTileBlocks) {
    launch_pooled<2, 2>(args, requests, stream);
  } else {
    launch_pooled<4, 1>(args, requests, stream);
  }
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("route_heads_workspace(int rows, int requests, int max_visible, int pool_block) -> int");
  m.def(
      "route_heads(Tensor q, Tensor gates, Tensor index_cache, Tensor block_table, Tensor request, Tensor visible, "
      "int max_visible, int pool_block, Tensor(a!) workspace, Tensor(b!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CompositeExplicitAutograd, m) {
  m.impl("route_heads_workspace", TORCH_BOX(&misa::route_heads_workspace));
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("route_heads", TORCH_BOX(&misa::route_heads));
}
