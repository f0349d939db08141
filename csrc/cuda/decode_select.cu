// Scores and top-k selection for few rows: one launch whose CTAs share the rows' pages evenly.
//
// The pages of all rows form one sequence, of which each CTA takes an equal part, whatever the rows' lengths. Pages
// arrive by the copy engine in a ring of stages, the warpgroups take them in turn, and the scores stay in shared memory
// as order-preserving integers. When they fill it, only the k best are kept and scoring goes on. A row that lies inside
// one CTA's part is selected there; the CTAs that share a row select together (row_exchange.cuh).
#include <algorithm>

#include "cluster_topk.cuh"
#include "common/ptx.cuh"
#include "common/select.cuh"
#include "key_scores.cuh"
#include "row_exchange.cuh"
#include "tensor_map.h"
#include "torch_op.h"

namespace misa {
namespace {

constexpr int kWarpgroups = 4;
constexpr int kThreads = 128 * kWarpgroups;
constexpr int kMaxRows = 1024;
constexpr int kFewestPages = 4;  // of a CTA: one for each warpgroup
constexpr int kKeyTileBytes = kPageTokens * kHeadDim;
constexpr int kScaleTileBytes = kPageTokens * 4;
constexpr int kStageBytes = kKeyTileBytes + kScaleTileBytes + 8;  // keys, scales, barrier
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kStaticSharedBytes = 1024;  // what the kernel declares itself
static_assert(kWarpgroups * kKeyTileBytes >= kListedKeys * 8, "the list lies where the stages were");

using Selection = TopK<kThreads, false>;

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
  int stages;    // a multiple of kWarpgroups, so that every stage belongs to one warpgroup
  int capacity;  // scores that a CTA holds
  int kept;      // k if some CTA may have more keys of a row than that, else 0
  Exchange exchange;
};

/// starts[r] = pages to score before row r, for 0 <= r <= M; and each row's request.
__device__ __forceinline__ void locate_rows(
    const SelectArguments& args, int* starts, int* requests, uint32_t* warp_sums) {
  constexpr int kPerThread = kMaxRows / kThreads;
  int pages[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int row = threadIdx.x * kPerThread + i;
    const int visible = row < args.rows.count ? args.rows.visible[row] : 0;
    const bool scores = visible > args.k && visible >= args.visible_from && visible < args.visible_to;
    pages[i] = scores ? (visible + kPageTokens - 1) / kPageTokens : 0;
    sum += pages[i];
    if (row < args.rows.count) requests[row] = args.rows.request[row];
  }
  uint32_t total;
  int start = block_exclusive_sum<kThreads>(sum, warp_sums, total);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int row = threadIdx.x * kPerThread + i;
    if (row < args.rows.count) starts[row] = start;
    start += pages[i];
  }
  if (threadIdx.x == 0) starts[args.rows.count] = static_cast<int>(total);
  __syncthreads();
}

/// The row that a page of the sequence belongs to.
__device__ __forceinline__ int row_of(const int* starts, int row_count, int page) {
  int low = 0, high = row_count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (starts[middle + 1] > page) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <int kHeads>
__global__ void __launch_bounds__(kThreads, 1) decode_select_kernel(
    const __grid_constant__ CUtensorMap key_map, const __grid_constant__ SelectArguments args) {
  using Layout = HeadLayout<kHeads>;
  extern __shared__ __align__(1024) char shared[];
  const int stages = args.stages, row_count = args.rows.count, k = args.k;
  char* key_tiles = shared;
  char* query = key_tiles + stages * kKeyTileBytes;
  char* scale_tiles = query + Layout::kQueryBytes;
  auto* full = reinterpret_cast<uint64_t*>(scale_tiles + stages * kScaleTileBytes);
  auto& topk_shared = *reinterpret_cast<Selection::Shared*>(full + stages);
  auto* starts = reinterpret_cast<int*>(&topk_shared + 1);
  int* requests = starts + row_count + 1;
  auto* positions = reinterpret_cast<uint32_t*>(requests + row_count);  // of the keys kept from earlier rounds
  uint32_t* next_keys = positions + args.kept;
  uint32_t* next_positions = next_keys + args.kept;
  uint32_t* keys = next_positions + args.kept;
  __shared__ RowPart parts[2];
  __shared__ uint32_t warp_sums[kThreads / 32];

  locate_rows(args, starts, requests, warp_sums);
  const int total = starts[row_count];
  const int share = max((total + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x), kFewestPages);
  const int begin = min(static_cast<int>(blockIdx.x) * share, total);
  const int page_count = min(share, total - begin);

  const auto page_id = [&](int row, int page) {
    return args.rows.block_table[requests[row] * args.rows.table_stride + begin + page - starts[row]];
  };
  const auto load_page = [&](int stage, int id) {
    ptx::mbarrier_arrive_expect_tx(&full[stage], kKeyTileBytes + kScaleTileBytes);
    ptx::tma_load_3d(key_tiles + stage * kKeyTileBytes, &key_map, 0, 0, id, &full[stage]);
    ptx::bulk_load(
        scale_tiles + stage * kScaleTileBytes, args.cache.page(id) + kScalesOffset, kScaleTileBytes, &full[stage]);
  };
  if (threadIdx.x < stages) {
    const int page = threadIdx.x;
    ptx::mbarrier_init(&full[page], 1);
    ptx::mbarrier_init_fence();
    if (page < page_count) load_page(page, page_id(row_of(starts, row_count, begin + page), page));
  }
  for (int row = blockIdx.x; row < row_count; row += gridDim.x) {
    const int visible = args.rows.visible[row];
    if (visible > k || visible < args.visible_from || visible >= args.visible_to) continue;
    for (int i = threadIdx.x; i < k; i += kThreads) args.out[row * args.out_stride + i] = i < visible ? i : -1;
  }
  if (page_count <= 0) return;

  Selection selection(topk_shared);
  RowExchange<kThreads> exchange(args.exchange, topk_shared);
  if (threadIdx.x < 2) parts[threadIdx.x].active = false;
  const int warpgroup = threadIdx.x / 128;
  const bool leads = threadIdx.x % 128 == 0;
  const int key_of_thread = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  // pages are numbered from this CTA's first; a warpgroup takes every kWarpgroups-th
  int page = warpgroup;
  int row = row_of(starts, row_count, begin), refill_row = row;
  for (int first = 0; first < page_count; ++row) {
    const int last = min(page_count, starts[row + 1] - begin);
    if (last <= first) continue;
    const int visible = args.rows.visible[row];
    const int row_start = starts[row] - begin;
    const int32_t* heads = args.heads == nullptr ? nullptr : args.heads + row * args.heads_stride;
    store_query<kHeads>(query, args.q + row * args.q_row_stride, args.q_head_stride, heads, args.head_count);
    float gate[Layout::kHeadsPerLane];
    load_gates<kHeads>(gate, args.gates + row * args.gates_stride, heads, args.head_count);
    selection.clear();
    __syncthreads();

    const bool fits = (last - first) * kPageTokens <= args.capacity;
    int held = 0;  // keys kept from earlier rounds
    int filled, later_offset;
    const auto position_of_key = [&](int i) {
      return i < held ? positions[i] : static_cast<uint32_t>(i + later_offset);
    };
    /// Reduces the keys to the k best, in order of position.
    const auto keep_best = [&](uint32_t* best_keys, uint32_t* best_positions) {
      const auto cut = selection.find(keys, filled, k);
      selection.emit(keys, filled, cut, [&](int place, int i) {
        best_keys[place] = keys[i];
        best_positions[place] = position_of_key(i);
      });
      __syncthreads();
      return static_cast<int>(cut.selected);
    };
    for (int round_first = first;;) {
      const int round_last = min(last, round_first + (args.capacity - held) / kPageTokens);
      for (; page < round_last; page += kWarpgroups) {
        const int stage = page % stages;
        const int refill = page + stages;
        int refill_id = 0;
        if (leads && refill < page_count) {
          while (starts[refill_row + 1] - begin <= refill) ++refill_row;
          refill_id = page_id(refill_row, refill);
        }
        const auto* scales = reinterpret_cast<const float*>(scale_tiles + stage * kScaleTileBytes);
        float d[Layout::kColumns / 2];
        ptx::mbarrier_wait(&full[stage], page / stages & 1);
        start_tile<kHeads>(d, key_tiles + stage * kKeyTileBytes, query);
        const float scale[2] = {scales[key_of_thread], scales[key_of_thread + 8]};
        ptx::wgmma_wait<0>();
        ptx::pin_registers(d);
        sync_warpgroup(warpgroup);
        if (leads && refill < page_count) load_page(stage, refill_id);

        float sum[2];
        sum_heads<kHeads>(sum, d, gate);
        if (threadIdx.x % 4 == Layout::kResultLane) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int offset = key_of_thread + 8 * half;
            const int position = (page - row_start) * kPageTokens + offset;
            const uint32_t key = position < visible ? order_key(sum[half] * scale[half]) : 0;
            keys[held + (page - round_first) * kPageTokens + offset] = key;
            if (fits) selection.count(key);
          }
        }
      }
      filled = held + (round_last - round_first) * kPageTokens;
      later_offset = (round_first - row_start) * kPageTokens - held;
      __syncthreads();
      if (!fits) {
        selection.clear();
        __syncthreads();
        for (int i = threadIdx.x; i < filled; i += kThreads) selection.count(keys[i]);
        __syncthreads();
      }
      if (round_last == last) break;
      held = keep_best(next_keys, next_positions);
      for (int i = threadIdx.x; i < held; i += kThreads) {
        keys[i] = next_keys[i];
        positions[i] = next_positions[i];
      }
      __syncthreads();
      round_first = round_last;
    }

    int32_t* out = args.out + row * args.out_stride;
    const bool is_first_rank = row_start >= 0, is_last_rank = starts[row + 1] - begin <= page_count;
    if (is_first_rank && is_last_rank) {
      const auto cut = selection.find(keys, filled, k);
      selection.emit(keys, filled, cut, [&](int place, int i) {
        out[place] = static_cast<int32_t>(position_of_key(i));
      });
    } else {
      // the shared memory is needed for further rows: the exchange reads what is kept of this one from global memory
      const bool spills = last < page_count;
      RowPart& part = parts[!spills];
      if (threadIdx.x == 0) {
        part.first_position = (first - row_start) * kPageTokens;
        part.first_cta = starts[row] / share;
        part.ranks = (starts[row + 1] - 1) / share - part.first_cta + 1;
        part.slot = row_count <= static_cast<int>(gridDim.x) ? row : part.first_cta;
        part.is_later_part = is_first_rank;
        part.out = out;
        part.level = 0;
        part.active = true;
        part.lists = false;
        part.prefix = 0;
        part.shift = Selection::kFirstShift;
        part.remaining = k;
        part.keys = keys;
        part.positions = positions;
        part.count = filled;
        part.listed_positions = held;
        part.later_offset = later_offset;
      }
      __syncthreads();
      exchange.enter(part);
      if (spills) {
        uint32_t* kept_keys = args.exchange.kept_keys + static_cast<int64_t>(blockIdx.x) * k;
        uint32_t* kept_positions = args.exchange.kept_positions + static_cast<int64_t>(blockIdx.x) * k;
        const int kept = keep_best(kept_keys, kept_positions);
        if (threadIdx.x == 0) {
          part.keys = kept_keys;
          part.positions = kept_positions;
          part.count = part.listed_positions = kept;
        }
      }
    }
    first = last;
  }
  __syncthreads();
  while (parts[0].active || parts[1].active) {
    for (RowPart& part : parts) {
      if (part.active) exchange.advance(part, reinterpret_cast<uint64_t*>(key_tiles));
    }
  }
}

// ---------------------------------------------------------------- launch

int64_t align(int64_t bytes) { return (bytes + 15) / 16 * 16; }

/// Where the exchange lies in the workspace, and how long that is.
struct Workspace {
  int64_t rows, lists, rank_counts, kept, bytes;

  Workspace(int64_t row_count, int64_t k, int64_t ctas) {
    const int64_t slots = std::min(row_count, ctas);
    rows = 0;
    lists = align(rows + slots * static_cast<int64_t>(sizeof(RowShared)));
    rank_counts = align(lists + slots * kListedKeys * 8);
    kept = align(rank_counts + ctas * 16);
    bytes = align(kept + ctas * k * 8);
  }
};

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
  return count;
}

template <int kHeads>
void launch(SelectArguments args, int max_visible, cudaStream_t stream) {
  const int row_pages = (max_visible + kPageTokens - 1) / kPageTokens;
  const int64_t most_pages = static_cast<int64_t>(args.rows.count) * row_pages;
  const int64_t useful_ctas = std::max<int64_t>(args.rows.count, (most_pages + kFewestPages - 1) / kFewestPages);
  const int ctas = static_cast<int>(std::min<int64_t>(multiprocessors(), useful_ctas));
  const int64_t most_keys =  // of one row in one CTA
      std::min<int64_t>(row_pages, std::max<int64_t>(kFewestPages, (most_pages + ctas - 1) / ctas)) * kPageTokens;

  const int fixed_bytes = HeadLayout<kHeads>::kQueryBytes + static_cast<int>(sizeof(Selection::Shared)) +
                          (2 * args.rows.count + 1) * 4 + kStaticSharedBytes;
  const auto capacity_with = [&](int stages, int kept) {
    return (kMaxSharedBytes - fixed_bytes - stages * kStageBytes - 3 * kept * 4) / 4 / kPageTokens * kPageTokens;
  };
  // as many stages as cover the latency of memory, unless the scores need the room
  constexpr int kMostStages = 3 * kWarpgroups, kGoodStages = 2 * kWarpgroups;
  args.stages = capacity_with(kMostStages, 0) >= most_keys ? kMostStages : kGoodStages;
  args.kept = capacity_with(args.stages, 0) >= most_keys ? 0 : args.k;
  if (args.kept > 0) {
    const int wanted = 2 * args.k + 64 * kPageTokens;
    args.stages = kMostStages;
    while (args.stages > kWarpgroups && capacity_with(args.stages, args.k) < wanted) args.stages -= kWarpgroups;
  }
  args.capacity = capacity_with(args.stages, args.kept);
  STD_TORCH_CHECK(
      args.kept == 0 || args.capacity >= args.k + 32 * kPageTokens, "select_tokens: k = ", args.k,
      " is too large for this kernel, choose at most 8192");

  const auto kernel = decode_select_kernel<kHeads>;
  const int shared_bytes = kMaxSharedBytes - kStaticSharedBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "select_tokens");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;  // its CTAs wait for one another
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, key_page_map(args.cache), args), "select_tokens");
}

int64_t decode_workspace_bytes(int64_t row_count, int64_t k) {
  return Workspace(row_count, k, multiprocessors()).bytes;
}

void decode_select(
    Tensor q, Tensor gates, std::optional<Tensor> heads, Tensor index_cache, Tensor block_table, Tensor request,
    Tensor visible, int64_t max_visible, int64_t k, Tensor out, int64_t visible_from, int64_t visible_to,
    Tensor workspace) {
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
  STD_TORCH_CHECK(
      args.rows.count <= kMaxRows, "decode_select takes at most ", kMaxRows, " rows, not ", args.rows.count,
      ": use prefill_select");
  if (args.rows.count == 0) return;
  const Workspace layout(args.rows.count, k, multiprocessors());
  check_tensor(workspace, "workspace", ScalarType::Byte, 1);
  STD_TORCH_CHECK(
      workspace.size(0) >= layout.bytes && reinterpret_cast<uintptr_t>(workspace.data_ptr()) % 16 == 0,
      "workspace: ", layout.bytes, " bytes at a multiple of 16 are needed, it has ", workspace.size(0));
  auto* base = static_cast<uint8_t*>(workspace.data_ptr());
  args.exchange.rows = reinterpret_cast<RowShared*>(base + layout.rows);
  args.exchange.lists = reinterpret_cast<uint64_t (*)[kListedKeys]>(base + layout.lists);
  args.exchange.rank_counts = reinterpret_cast<uint32_t (*)[2][2]>(base + layout.rank_counts);
  args.exchange.kept_keys = reinterpret_cast<uint32_t*>(base + layout.kept);
  args.exchange.kept_positions = args.exchange.kept_keys + multiprocessors() * k;
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
  const cudaStream_t stream = current_stream(q);
  if (max_visible > k) check_cuda(cudaMemsetAsync(args.exchange.rows, 0, layout.lists, stream), "select_tokens");
  const auto launch_heads = args.head_count <= 8    ? launch<8>
                            : args.head_count <= 16 ? launch<16>
                            : args.head_count <= 32 ? launch<32>
                                                    : launch<64>;
  launch_heads(args, static_cast<int>(max_visible), stream);
}

}  // namespace
}  // namespace misa

STABLE_TORCH_LIBRARY_FRAGMENT(misa_vllm, m) {
  m.def("decode_workspace_bytes(int rows, int k) -> int");
  m.def(
      "decode_select(Tensor q, Tensor gates, Tensor? heads, Tensor index_cache, Tensor block_table, Tensor request, "
      "Tensor visible, int max_visible, int k, Tensor(a!) out, int visible_from, int visible_to, "
      "Tensor(b!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CompositeExplicitAutograd, m) {
  m.impl("decode_workspace_bytes", TORCH_BOX(&misa::decode_workspace_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(misa_vllm, CUDA, m) {
  m.impl("decode_select", TORCH_BOX(&misa::decode_select));
}
