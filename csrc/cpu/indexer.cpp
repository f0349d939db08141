// Routing, selection and re-ranking over the paged cache of index keys.

#include <cmath>

#include "ops.h"
#include "simd.h"
#include "tensors.h"

namespace misa {
namespace {

constexpr int32_t kNoToken = -1;
constexpr int kMaxHeads = 256;
constexpr int kHeadsPerItem = 16;  // of the router

// Transient scores of one batch of rows: kept in the last-level cache, unless contexts are so long that too few
// rows would share the widened keys.
constexpr int64_t kScoreBytes = 8 << 20, kMaxScoreBytes = 64 << 20, kRowsSharingKeys = 16;

// From this many rows on, keys are widened a chunk at a time.
constexpr int64_t kRowsSharingChunk = 4;

const uint8_t kZeroKey[kDim] = {};

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Row numbers in order of their requests; rows of one request keep their order.
void group_by_request(const Rows& rows, std::vector<int64_t>& members) {
  std::stable_sort(members.begin(), members.end(),
                   [&](int64_t a, int64_t b) { return rows.request[a] < rows.request[b]; });
}

// Widened queries and gates of the heads that score a row: [members][heads][kDim] and [members][heads].
struct ScoringHeads {
  int heads;
  Buffer<float> q, gates;

  ScoringHeads(const View3<const uint8_t>& q8, const View2<const float>& gate, const std::optional<Tensor>& routed,
               const int64_t* members, int64_t count)
      : heads((int)(routed ? routed->size(1) : q8.size1)), q(count * heads * kDim), gates(count * heads) {
    parallel_items(count, [&](int64_t i) {
      for (int j = 0; j < heads; ++j) {
        const int64_t head = routed ? View2<const int32_t>(*routed).at(members[i], j) : j;
        require(head >= 0 && head < q8.size1, "routed head", head, "is not a head of q");
        simd().widen_fp8(q8.at(members[i], head), kDim, q.get() + (i * heads + j) * kDim);
        gates[i * heads + j] = gate.at(members[i], head);
      }
    });
  }
};

int panels_of(int64_t keys) { return (int)((keys + simd().panel_keys - 1) / simd().panel_keys); }

// Keys of up to one chunk, widened for the inner loops.
struct KeyChunk {
  Buffer<float> panels{(int64_t)kChunkKeys * kDim}, scales{kChunkKeys};
  const uint8_t* keys[kChunkKeys];

  // The chunk's keys from number `i` on are the `count` keys of a page from `offset` on.
  void take(int64_t i, const uint8_t* page, int64_t offset, int64_t count) {
    const float* from = (const float*)(page + kScalesOffset) + offset;
    const uint8_t** __restrict key = keys + i;
    float* __restrict scale = scales.get() + i;
    for (int64_t j = 0; j < count; ++j) key[j] = page + (offset + j) * kDim;
    for (int64_t j = 0; j < count; ++j) scale[j] = from[j] * kKeyRescale;
  }

  // Widens the first `count` keys; what is left of the last panel is zero.
  void widen(int count) {
    const int panel_count = panels_of(count);
    for (int i = count; i < panel_count * simd().panel_keys; ++i) {
      keys[i] = kZeroKey;
      scales[i] = 0.0f;
    }
    simd().load_keys(keys, panel_count, panels.get());
  }
};

void select_all(int32_t* out, int64_t column, int64_t count, int64_t k) {
  for (int64_t i = 0; i < k; ++i) out[i * column] = i < count ? (int32_t)i : kNoToken;
}

// Scratch of one thread that selects: select_largest's, and the positions it writes.
struct Selection {
  Buffer<int32_t> scratch, positions;
};

}  // namespace

void select_tokens(const Tensor& q, const Tensor& gates, const std::optional<Tensor>& heads, const Tensor& index_cache,
                   const Tensor& block_table, const Tensor& request, const Tensor& visible, int64_t k,
                   const Tensor& out, int64_t visible_from, int64_t visible_to) {
  const View3<const uint8_t> q8(q);
  const View2<const float> gate(gates);
  const View2<const uint8_t> cache(index_cache);
  const Rows rows(block_table, request, visible);
  const View2<int32_t> selected(out);

  std::vector<int64_t> members;
  for (int64_t m = 0; m < rows.visible.size; ++m) {
    const int64_t count = rows.visible[m];
    if (count < visible_from || count >= visible_to) continue;
    if (count <= k)
      select_all(selected[m], selected.column, count, k);
    else
      members.push_back(m);
  }
  group_by_request(rows, members);

  for (size_t begin = 0; begin < members.size();) {
    // a batch: as many rows as the score memory holds
    std::vector<int64_t> score_offset;
    int64_t scores_total = 0;
    size_t end = begin;
    for (; end < members.size(); ++end) {
      const int64_t width = round_up(rows.visible[members[end]], kChunkKeys);
      const int64_t bytes = (scores_total + width) * (int64_t)sizeof(float);
      if (end > begin && bytes > ((int64_t)(end - begin) < kRowsSharingKeys ? kMaxScoreBytes : kScoreBytes)) break;
      score_offset.push_back(scores_total);
      scores_total += width;
    }
    const int64_t count = (int64_t)(end - begin);
    const ScoringHeads scoring(q8, gate, heads, members.data() + begin, count);
    const Buffer<float> scores(scores_total);

    // an item: one chunk of keys and the batch's rows of one request
    struct Group {
      int64_t first, last, first_item;
      std::vector<int64_t> pages;
      int64_t tokens;
    };
    std::vector<Group> groups;
    std::vector<int64_t> group_of_item;
    for (int64_t i = 0; i < count;) {
      Group group{i, i, (int64_t)group_of_item.size(), {}, 0};
      const int32_t id = rows.request[members[begin + i]];
      for (; i < count && rows.request[members[begin + i]] == id; ++i)
        group.tokens = std::max<int64_t>(group.tokens, rows.visible[members[begin + i]]);
      group.last = i;
      group.pages = rows.pages(id, group.tokens, cache.rows);
      for (int64_t chunk = 0; chunk * kChunkKeys < group.tokens; ++chunk) group_of_item.push_back(groups.size());
      groups.push_back(std::move(group));
    }
    parallel_items((int64_t)group_of_item.size(), [] { return KeyChunk(); }, [&](int64_t item, KeyChunk& chunk) {
      const Group& group = groups[group_of_item[item]];
      const int64_t first = (item - group.first_item) * kChunkKeys;
      // Few rows read a widened key once or twice: then each panel is scored while it is in the first-level cache.
      const int64_t tile = group.last - group.first < kRowsSharingChunk ? simd().panel_keys : kChunkKeys;
      const int64_t last = std::min<int64_t>(first + kChunkKeys, group.tokens);
      for (int64_t start = first; start < last; start += tile) {
        const int64_t loaded = std::min(tile, last - start);
        for (int64_t i = 0, run; i < loaded; i += run) {
          const int64_t token = start + i, offset = token % kPageTokens;
          run = std::min(kPageTokens - offset, loaded - i);
          chunk.take(i, cache[group.pages[token / kPageTokens]], offset, run);
        }
        chunk.widen((int)loaded);
        for (int64_t i = group.first; i < group.last; ++i) {
          const int64_t needed = std::min<int64_t>(loaded, rows.visible[members[begin + i]] - start);
          if (needed <= 0) continue;
          simd().score_keys(scoring.q.get() + i * scoring.heads * kDim, scoring.gates.get() + i * scoring.heads,
                            scoring.heads, chunk.panels.get(), chunk.scales.get(), panels_of(needed),
                            scores.get() + score_offset[i] + start);
        }
      }
    });
    int64_t widest = 0;
    for (const Group& group : groups) widest = std::max(widest, group.tokens);
    parallel_items(count, [&] { return Selection{Buffer<int32_t>(widest), Buffer<int32_t>(k)}; },
                   [&](int64_t i, const Selection& s) {
                     const int64_t m = members[begin + i];
                     simd().select_largest(scores.get() + score_offset[i], rows.visible[m], (int)k, s.scratch.get(),
                                           s.positions.get());
                     for (int64_t r = 0; r < k; ++r) selected.at(m, r) = s.positions[r];
                   });
    begin = end;
  }
}

void rerank_tokens(const Tensor& q, const Tensor& gates, const Tensor& candidates, const Tensor& index_cache,
                   const Tensor& block_table, const Tensor& request, const Tensor& visible, int64_t k,
                   const Tensor& out, int64_t visible_from, int64_t visible_to) {
  const View3<const uint8_t> q8(q);
  const View2<const float> gate(gates);
  const View2<const int32_t> candidate(candidates);
  const View2<const uint8_t> cache(index_cache);
  const Rows rows(block_table, request, visible);
  const View2<int32_t> selected(out);

  std::vector<int64_t> members;
  for (int64_t m = 0; m < rows.visible.size; ++m)
    if (rows.visible[m] >= std::max<int64_t>(visible_from, 1) && rows.visible[m] < visible_to) members.push_back(m);
  group_by_request(rows, members);

  const int64_t width = round_up(candidate.columns, kChunkKeys);
  const int64_t batch = std::max<int64_t>(1, kScoreBytes / (width * (int64_t)sizeof(float)));
  for (int64_t begin = 0; begin < (int64_t)members.size(); begin += batch) {
    const int64_t count = std::min<int64_t>(batch, members.size() - begin);
    const ScoringHeads scoring(q8, gate, std::nullopt, members.data() + begin, count);
    const Buffer<float> scores(count * width);
    std::vector<std::vector<int32_t>> tokens(count);
    std::vector<std::vector<int64_t>> pages(count);
    parallel_items(count, [&](int64_t i) {
      const int64_t m = members[begin + i];
      for (int64_t c = 0; c < candidate.columns; ++c) {
        const int32_t token = candidate.at(m, c);
        if (token < 0) continue;
        require(token < rows.visible[m], "candidate", token, "is not a visible token of its row");
        tokens[i].push_back(token);
      }
      if (!std::is_sorted(tokens[i].begin(), tokens[i].end())) std::sort(tokens[i].begin(), tokens[i].end());
      pages[i] = rows.pages(rows.request[m], rows.visible[m], cache.rows);
    });
    const int64_t chunks = width / kChunkKeys;
    parallel_items(count * chunks, [] { return KeyChunk(); }, [&](int64_t item, KeyChunk& chunk) {
      const int64_t i = item / chunks, first = item % chunks * kChunkKeys;
      const int64_t left = (int64_t)tokens[i].size() - first;
      if (left <= 0 || (int64_t)tokens[i].size() <= k) return;
      const int needed = (int)std::min<int64_t>(kChunkKeys, left);
      for (int c = 0; c < needed; ++c) {
        const int32_t token = tokens[i][first + c];
        chunk.take(c, cache[pages[i][token / kPageTokens]], token % kPageTokens, 1);
      }
      chunk.widen(needed);
      simd().score_keys(scoring.q.get() + i * scoring.heads * kDim, scoring.gates.get() + i * scoring.heads,
                        scoring.heads, chunk.panels.get(), chunk.scales.get(), panels_of(needed),
                        scores.get() + i * width + first);
    });
    parallel_items(count, [&] { return Selection{Buffer<int32_t>(candidate.columns), Buffer<int32_t>(k)}; },
                   [&](int64_t i, const Selection& s) {
                     const int64_t m = members[begin + i], available = (int64_t)tokens[i].size();
                     if (available > k)
                       simd().select_largest(scores.get() + i * width, (int)available, (int)k, s.scratch.get(),
                                             s.positions.get());
                     else
                       select_all(s.positions.get(), 1, available, k);
                     for (int64_t r = 0; r < k; ++r)
                       selected.at(m, r) = s.positions[r] < 0 ? kNoToken : tokens[i][s.positions[r]];
                   });
  }
}

namespace {

// The rows that see a complete pool block; every other row gets the first heads.
std::vector<int64_t> rows_with_blocks(const Rows& rows, int64_t pool_block, const View2<int32_t>& routed) {
  const int h = (int)routed.columns;
  std::vector<int64_t> members;
  for (int64_t m = 0; m < rows.visible.size; ++m) {
    if (rows.visible[m] >= pool_block)
      members.push_back(m);
    else
      select_all(routed[m], routed.column, h, h);
  }
  return members;
}

// The h heads with the largest score, ascending; of equal scores the lower head wins and NaN counts as largest.
void top_heads(const float* score, int heads, int h, const View2<int32_t>& out, int64_t row) {
  bool chosen[kMaxHeads] = {};
  for (int r = 0; r < h; ++r) {
    int best = -1;
    for (int j = 0; j < heads; ++j) {
      if (chosen[j]) continue;
      if (best < 0 || (std::isnan(score[j]) ? !std::isnan(score[best]) : score[j] > score[best])) best = j;
    }
    chosen[best] = true;
  }
  for (int j = 0, r = 0; j < heads; ++j)
    if (chosen[j]) out.at(row, r++) = j;
}

}  // namespace

void route_heads(const Tensor& q, const Tensor& gates, const Tensor& index_cache, const Tensor& block_table,
                 const Tensor& request, const Tensor& visible, int64_t pool_block, const Tensor& heads) {
  const View3<const uint8_t> q8(q);
  const View2<const float> gate(gates);
  const View2<const uint8_t> cache(index_cache);
  const Rows rows(block_table, request, visible);
  const View2<int32_t> routed(heads);
  const int h = (int)routed.columns, all_heads = (int)q8.size1;
  require(all_heads <= kMaxHeads, "head count", all_heads, "is more than the 256 that the router takes");

  std::vector<int64_t> members = rows_with_blocks(rows, pool_block, routed);
  group_by_request(rows, members);

  const int panel_keys = simd().panel_keys;
  const int64_t panel_floats = (int64_t)panel_keys * kDim;
  // one pool block per page of a long context is the largest case: 8 MiB at a million tokens
  constexpr int64_t kMaxPooledFloats = (16 << 20) / sizeof(float);
  for (size_t begin = 0; begin < members.size();) {
    // a batch: whole requests whose pooled keys fit the memory bound together, at least one
    struct Group {
      std::vector<int64_t> pages;
      int64_t first_panel;
    };
    std::vector<Group> groups;
    std::vector<int64_t> group_of_panel, group_of_row;
    size_t end = begin;
    while (end < members.size()) {
      const int32_t id = rows.request[members[end]];
      size_t last = end;
      int64_t tokens = 0;
      for (; last < members.size() && rows.request[members[last]] == id; ++last)
        tokens = std::max<int64_t>(tokens, rows.visible[members[last]]);
      const int64_t blocks = tokens / pool_block, panels = (blocks + panel_keys - 1) / panel_keys;
      const int64_t panel_total = (int64_t)group_of_panel.size() + panels;
      if (end > begin && panel_total * panel_floats > kMaxPooledFloats) break;
      group_of_row.insert(group_of_row.end(), last - end, (int64_t)groups.size());
      const int64_t first_panel = (int64_t)group_of_panel.size();
      group_of_panel.insert(group_of_panel.end(), panels, (int64_t)groups.size());
      groups.push_back({rows.pages(id, blocks * pool_block, cache.rows), first_panel});
      end = last;
    }

    const Buffer<float> panels((int64_t)group_of_panel.size() * panel_floats);
    parallel_items((int64_t)group_of_panel.size(), [&](int64_t item) {
      const Group& group = groups[group_of_panel[item]];
      const int64_t pages_per_block = pool_block / kPageTokens;
      const int64_t blocks = (int64_t)group.pages.size() / pages_per_block;
      const int64_t first = (item - group.first_panel) * panel_keys;
      const int64_t count = std::min<int64_t>(panel_keys, blocks - first);
      std::vector<const float*> means(count * pages_per_block);
      for (size_t p = 0; p < means.size(); ++p)
        means[p] = (const float*)(cache[group.pages[first * pages_per_block + p]] + kMeanOffset);
      float vectors[kMaxPanelKeys * kDim];
      for (int64_t i = 0; i < count; ++i)
        simd().mean_vectors(&means[i * pages_per_block], (int)pages_per_block, vectors + i * kDim);
      std::fill(vectors + count * kDim, vectors + panel_keys * kDim, 0.0f);
      simd().transpose_vectors(vectors, panels.get() + item * panel_floats);
    });

    const int64_t count = (int64_t)(end - begin), parts = (all_heads + kHeadsPerItem - 1) / kHeadsPerItem;
    const Buffer<float> score(count * all_heads);
    parallel_items(count * parts, [&](int64_t item) {
      const int64_t i = item / parts, m = members[begin + i];
      const int first = (int)(item % parts) * kHeadsPerItem, some = std::min(kHeadsPerItem, all_heads - first);
      float widened[kHeadsPerItem * kDim];
      for (int j = 0; j < some; ++j) simd().widen_fp8(q8.at(m, first + j), kDim, widened + j * kDim);
      float* sums = score.get() + i * all_heads + first;
      simd().sum_relu(widened, some, panels.get() + groups[group_of_row[i]].first_panel * panel_floats,
                      (int)(rows.visible[m] / pool_block), sums);
      for (int j = 0; j < some; ++j) sums[j] *= std::fabs(gate.at(m, first + j));
    });
    for (int64_t i = 0; i < count; ++i) top_heads(score.get() + i * all_heads, all_heads, h, routed, members[begin + i]);
    begin = end;
  }
}

void route_heads_by_signs(const Tensor& q, const Tensor& gates, const Tensor& index_cache, const Tensor& block_table,
                          const Tensor& request, const Tensor& visible, int64_t pool_block, const Tensor& heads) {
  const View3<const uint8_t> q8(q);
  const View2<const float> gate(gates);
  const View2<const uint8_t> cache(index_cache);
  const Rows rows(block_table, request, visible);
  const View2<int32_t> routed(heads);
  const int h = (int)routed.columns, all_heads = (int)q8.size1;
  require(all_heads <= kMaxHeads, "head count", all_heads, "is more than the 256 that the router takes");

  std::vector<int64_t> members = rows_with_blocks(rows, pool_block, routed);
  const auto blocks_of = [&](int64_t m) { return rows.visible[m] / pool_block; };
  std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) {
    return rows.request[a] != rows.request[b] ? rows.request[a] < rows.request[b] : blocks_of(a) < blocks_of(b);
  });

  // The score is linear in the pages' means: a row needs the sums over its pages, which are those of the row before
  // it, of the same request, and the pages that it sees more. Always added from page 0 on, hence the same bits in
  // every batch.
  const int64_t count = (int64_t)members.size();
  const int64_t pages_per_block = pool_block / kPageTokens;
  std::vector<int64_t> first_of_request, line_of_row(count);
  int64_t lines = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool starts = i == 0 || rows.request[members[i]] != rows.request[members[i - 1]];
    if (starts) first_of_request.push_back(i);
    lines += starts || blocks_of(members[i]) != blocks_of(members[i - 1]);
    line_of_row[i] = lines - 1;
  }
  first_of_request.push_back(count);
  const Buffer<float> sums(lines * 2 * kDim);
  parallel_items((int64_t)first_of_request.size() - 1, [&](int64_t item) {
    const int64_t first = first_of_request[item], last = first_of_request[item + 1];
    const int64_t tokens = blocks_of(members[last - 1]) * pool_block;
    const std::vector<int64_t> pages = rows.pages(rows.request[members[first]], tokens, cache.rows);
    std::vector<const uint16_t*> means(pages.size());
    for (size_t p = 0; p < pages.size(); ++p) means[p] = (const uint16_t*)(cache[pages[p]] + kMeanOffset);
    float total[2 * kDim] = {};
    int64_t added = 0;
    for (int64_t i = first; i < last; ++i) {
      if (i > first && line_of_row[i] == line_of_row[i - 1]) continue;
      const int64_t end = blocks_of(members[i]) * pages_per_block;
      simd().add_halves(means.data() + added, (int)(end - added), total);
      added = end;
      std::copy(total, total + 2 * kDim, sums.get() + line_of_row[i] * 2 * kDim);
    }
  });
  const int64_t parts = (all_heads + kHeadsPerItem - 1) / kHeadsPerItem;
  const Buffer<float> score(count * all_heads);
  parallel_items(count * parts, [&](int64_t item) {
    const int64_t i = item / parts, m = members[i];
    const int first = (int)(item % parts) * kHeadsPerItem, some = std::min(kHeadsPerItem, all_heads - first);
    float widened[kHeadsPerItem * kDim];
    for (int j = 0; j < some; ++j) simd().widen_fp8(q8.at(m, first + j), kDim, widened + j * kDim);
    float* own = score.get() + i * all_heads + first;
    simd().dot_signed(widened, some, sums.get() + line_of_row[i] * 2 * kDim, own);
    for (int j = 0; j < some; ++j) own[j] *= std::fabs(gate.at(m, first + j));
  });
  for (int64_t i = 0; i < count; ++i) top_heads(score.get() + i * all_heads, all_heads, h, routed, members[i]);
}

}  // namespace misa
