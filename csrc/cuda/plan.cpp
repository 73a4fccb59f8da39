#include "plan.h"

#include <algorithm>
#include <sstream>

namespace seqkernels {

namespace {

template <class... Args>
std::string text(const Args&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

std::string capability(int target) { return text(target / 10, ".", target % 10); }

Variant variant_of(const LayerFacts& layer, const Gpu& gpu, bool backward) {
  return variant_of(arch_of(gpu.target), layer.cell, math_of(layer.scalar, layer.tf32), backward,
                    layer.hidden % 2 == 0 && !layer.by_odd());
}

int width_of_single_cta(const LayerFacts& layer) {
  return single_cta_width(math_of(layer.scalar, layer.tf32), layer.by_odd() ? as_odd(layer.hidden) : layer.hidden);
}

// The smallest tile with which the tiles of all directions run at once: with more sequences a step reads and writes
// more, and lasts longer.
int tile_of(const LayerFacts& layer, int at_once) {
  const int max = static_cast<int>(std::clamp<int64_t>(layer.sequences, 1, kMaxTile));
  for (int tile = 1; tile < max; tile++)
    if (layer.directions * ((layer.sequences + tile - 1) / tile) <= at_once) return tile;
  return max;
}

// ---- single CTA

std::string reason_against_single_cta(const LayerFacts& layer, const Gpu& gpu) {
  if (!has_path(Path::single_cta, gpu.target))
    return text("a single CTA needs compute capability ", capability(min_target(Path::single_cta)), ", the GPU has ",
                capability(gpu.target));
  if (layer.has_projection) return "no single CTA kernel takes a projection";
  if (layer.layer_norm && !has_norm_single_cta(layer.cell, layer.scalar))
    return text("no single CTA kernel with layer norm for the cell ", name_of(layer.cell), " in ",
                name_of(layer.scalar));
  if (layer.masked && !layer.layer_norm && !has_masked_single_cta(layer.cell, layer.scalar))
    return text("no single CTA kernel with masks for the cell ", name_of(layer.cell), " in ", name_of(layer.scalar));
  if (layer.scalar == Scalar::float64 || !width_of_single_cta(layer))
    return text("no single CTA kernel for ", layer.hidden, " hidden units in ", name_of(layer.scalar));
  return "";
}

Candidate single_cta(const LayerFacts& layer, const Gpu& gpu, bool backward) {
  Candidate found;
  found.plan.path = Path::single_cta;
  found.reason = reason_against_single_cta(layer, gpu);
  if (!found.reason.empty()) return found;
  const Variant variant = variant_of(layer, gpu, backward);
  const int width = width_of_single_cta(layer);
  const SingleCtaLayout layout = single_cta_layout(variant, width, layer.masked, layer.layer_norm);
  if (!resident_row(Path::single_cta, variant, width)) {
    found.reason = text("no single CTA kernel for the cell ", name_of(layer.cell));
    return found;
  }
  if (!layout.fits(gpu.shared_memory)) {
    found.reason =
        text("a block needs ", layout.least_bytes(), " bytes of shared memory, and may have ", gpu.shared_memory);
    return found;
  }
  const int shared = layout.shared_groups(gpu.shared_memory);
  found.plan.tile = tile_of(layer, gpu.multiprocessors);
  found.blocks = found.cluster = 1;
  found.width = layout.width;
  found.threads = layout.threads;
  found.at_once = gpu.multiprocessors;
  found.registers = int64_t{layout.resident} * layout.group_bytes;
  found.shared_weights = int64_t{shared} * layout.group_bytes;
  found.l2 = int64_t{layout.groups - layout.resident - shared} * layout.group_bytes;
  found.shared_memory = layout.bytes(gpu.shared_memory);
  return found;
}

// ---- slices: clusters, and the clusters of the persistent grid

std::string reason_against_slices(Path path, const LayerFacts& layer, const Gpu& gpu) {
  if (!has_path(Path::cluster, gpu.target))
    return text("clusters need compute capability ", capability(min_target(path)), ", the GPU has ",
                capability(gpu.target));
  if (!has_path(path, gpu.target))
    return text("the ", name_of(path), " is for compute capability ", capability(min_target(path)), ", the GPU has ",
                capability(gpu.target));
  if (layer.has_projection) return "no kernel for several blocks takes a projection";
  if (layer.layer_norm) return "no kernel for several blocks has layer norm";
  if (layer.masked) return "no kernel for several blocks has masks";
  if (layer.scalar == Scalar::float64) return "no kernel for several blocks takes float64";
  return "";
}

// Fills in the sizes of a block of this shape. Returns why it does not fit, or "".
std::string lay_out(Candidate& found, const LayerFacts& layer, const Gpu& gpu, const SliceShape& shape, bool backward) {
  const SliceLayout layout = slice_layout(variant_of(layer, gpu, backward), shape, layer.hidden);
  found.blocks = shape.blocks;
  found.cluster = shape.cluster;
  found.width = shape.units;
  found.threads = layout.threads;
  found.registers = int64_t{std::min(layout.fragments, layout.resident)} * layout.threads * kFragmentBytes;
  found.shared_weights = layout.shared_weights();
  found.shared_memory = layout.bytes;
  if (!layout.resident) return text("no kernel for several blocks and the cell ", name_of(layer.cell));
  if (layout.bytes <= gpu.shared_memory) return "";
  return text("the weights do not fit: a block needs ", layout.bytes, " bytes of shared memory, and may have ",
              gpu.shared_memory);
}

Candidate cluster(const LayerFacts& layer, const Gpu& gpu, int units, bool backward) {
  Candidate found;
  found.plan.path = Path::cluster;
  found.plan.units = units;
  found.reason = reason_against_slices(found.plan.path, layer, gpu);
  if (!found.reason.empty()) return found;
  const SliceShape shape = cluster_shape(layer.hidden, units);
  if (shape.blocks < kMinCluster || shape.blocks > kMaxCluster) {
    found.reason = text("a cluster has ", kMinCluster, " to ", kMaxCluster, " blocks, and ", layer.hidden,
                        " hidden units, ", units, " a block, make ", shape.blocks);
    return found;
  }
  found.reason = lay_out(found, layer, gpu, shape, backward);
  found.at_once = gpu.clusters[shape.cluster - 1];
  if (found.reason.empty() && !found.at_once)
    found.reason = text("the GPU runs no cluster of ", shape.blocks, " blocks");
  if (found.reason.empty()) found.plan.tile = tile_of(layer, found.at_once);
  return found;
}

Candidate persistent_grid(const LayerFacts& layer, const Gpu& gpu, int clusters_of, bool backward) {
  Candidate found;
  found.plan.path = Path::persistent_grid;
  found.plan.units = clusters_of * kGridUnits;
  found.reason = reason_against_slices(found.plan.path, layer, gpu);
  if (!found.reason.empty()) return found;
  const SliceShape shape = grid_shape(layer.hidden, clusters_of);
  if (!shape.blocks) {
    found.reason = "a layer without hidden units has no blocks";
    return found;
  }
  found.reason = lay_out(found, layer, gpu, shape, backward);
  const int groups = grid_groups_at_once(shape, gpu.clusters[shape.cluster - 1]);
  // The same number for both directions; if there is not one group for each, one direction after the other.
  found.at_once = groups < layer.directions ? groups : groups - groups % layer.directions;
  if (found.reason.empty() && !found.at_once)
    found.reason =
        text("the GPU does not run ", shape.blocks, " blocks in clusters of ", shape.cluster, " at the same time");
  if (found.reason.empty()) found.plan.tile = tile_of(layer, found.at_once);
  return found;
}

}  // namespace

const char* name_of(Path path) {
  switch (path) {
    case Path::single_cta: return "single CTA";
    case Path::cluster: return "cluster";
    case Path::persistent_grid: return "persistent grid";
    default: return "stepwise";
  }
}

std::vector<Candidate> candidates(const LayerFacts& layer, const Gpu& gpu, bool backward) {
  std::vector<Candidate> all{Candidate{}, single_cta(layer, gpu, backward)};
  for (const int units : kClusterUnits) all.push_back(cluster(layer, gpu, units, backward));
  for (const int clusters_of : kGridClusters) all.push_back(persistent_grid(layer, gpu, clusters_of, backward));
  return all;
}

std::string reason_against(const Plan& plan, const LayerFacts& layer, const Gpu& gpu, bool backward) {
  if (plan.path == Path::stepwise) return "";
  if (plan.tile < 1 || plan.tile > kMaxTile)
    return text("a block takes 1 to ", kMaxTile, " sequences, got ", plan.tile);
  // Only the candidate of the plan is computed, as this runs in every call.
  if (plan.path == Path::single_cta && plan.units == 0) return single_cta(layer, gpu, backward).reason;
  for (const int units : kClusterUnits)
    if (plan.path == Path::cluster && plan.units == units) return cluster(layer, gpu, units, backward).reason;
  for (const int clusters_of : kGridClusters)
    if (plan.path == Path::persistent_grid && plan.units == clusters_of * kGridUnits)
      return persistent_grid(layer, gpu, clusters_of, backward).reason;
  return text("no kernel for a ", name_of(plan.path), " with ", plan.units, " units");
}

}  // namespace seqkernels
