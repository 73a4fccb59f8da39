#include "isa.h"

#include <cstring>

#if defined(SEQKERNELS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace seqkernels {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
extern const QuantizedKernels quantized_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace avx512
namespace avx2 {
extern const Kernels kernels;
extern const QuantizedKernels quantized_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace avx2
#endif
namespace baseline {
extern const Kernels kernels;
extern const QuantizedKernels quantized_kernels;
extern const LayerNormKernels layer_norm_kernels;
}  // namespace baseline

namespace {

// What is compiled for one instruction set.
struct Compiled {
  const Kernels& kernels;
  const QuantizedKernels& quantized_kernels;
  const LayerNormKernels& layer_norm_kernels;
};
#if defined(__x86_64__)
const Compiled kAvx512{avx512::kernels, avx512::quantized_kernels, avx512::layer_norm_kernels};
const Compiled kAvx2{avx2::kernels, avx2::quantized_kernels, avx2::layer_norm_kernels};
#endif
const Compiled kBaseline{baseline::kernels, baseline::quantized_kernels, baseline::layer_norm_kernels};

struct Candidate {
  const char* name;
  const Compiled* compiled;
  bool (*runs_here)();
  bool bfloat16_products = false, bfloat16_tiles = false;
  bool int8_products = false, int8_tiles = false;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#if defined(SEQKERNELS_AMX)
// Linux lends the tiles' registers to processes that ask, once for all threads; other kernels, and some sandboxes,
// refuse. Without that, the first instruction of theirs would end the process.
bool may_use_tiles() {
  constexpr int kRequest = 0x1023, kAllowed = 0x1022;  // ARCH_REQ_XCOMP_PERM and ARCH_GET_XCOMP_PERM of asm/prctl.h
  constexpr unsigned long kTileData = 18;
  unsigned long allowed = 0;
  return !syscall(SYS_arch_prctl, kRequest, kTileData) && !syscall(SYS_arch_prctl, kAllowed, &allowed) &&
         (allowed >> kTileData & 1);
}
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBfloat16 | kTile | kInt8;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  static const bool may = may_use_tiles();
  return may;
}
#endif
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

// Best first. The last runs everywhere. runs_here asks for every flag that setup.py compiles a variant with.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
#if defined(SEQKERNELS_AMX)
    {.name = "amx",
     .compiled = &kAvx512,
     .runs_here = has_amx,
     .bfloat16_products = true,
     .bfloat16_tiles = true,
     .int8_products = true,
     .int8_tiles = true},
#endif
    {.name = "avx512_bf16",
     .compiled = &kAvx512,
     .runs_here = has_avx512_bf16,
     .bfloat16_products = true,
     .int8_products = true},
    {.name = "avx512_vnni", .compiled = &kAvx512, .runs_here = has_avx512_vnni, .int8_products = true},
    {.name = "avx512", .compiled = &kAvx512, .runs_here = has_avx512},
    {.name = "avx2", .compiled = &kAvx2, .runs_here = has_avx2},
#endif
    {.name = "baseline", .compiled = &kBaseline, .runs_here = [] { return true; }},
};

// Intel's VDPBF16PS takes twice as long as the two float32 FMAs that do as much.
bool multiplies_pairs_slowly(const Candidate& candidate) {
  bool intel = false;
#if defined(__x86_64__)
  intel = __builtin_cpu_is("intel");
#endif
  return intel && candidate.bfloat16_products && !candidate.bfloat16_tiles;
}

const Candidate* best() {
  const Candidate* candidate = kCandidates;
  while (!candidate->runs_here() || multiplies_pairs_slowly(*candidate)) candidate++;
  return candidate;
}

const Candidate* in_use = best();

}  // namespace

const Kernels& kernels() { return in_use->compiled->kernels; }
const QuantizedKernels& quantized_kernels() { return in_use->compiled->quantized_kernels; }
const LayerNormKernels& layer_norm_kernels() { return in_use->compiled->layer_norm_kernels; }
bool bfloat16_products() { return in_use->bfloat16_products; }
bool bfloat16_tiles() { return in_use->bfloat16_tiles; }
bool int8_products() { return in_use->int8_products; }
bool int8_tiles() { return in_use->int8_tiles; }
const char* kernels_name() { return in_use->name; }

const char* built_kernels() {
#if defined(SEQKERNELS_AMX)
  return "amx avx512_bf16 avx512_vnni avx512 avx2 baseline";
#elif defined(__x86_64__)
  return "avx512_bf16 avx512_vnni avx512 avx2 baseline";
#else
  return "baseline";
#endif
}

bool force_kernels(const char* name) {
  for (const Candidate& candidate : kCandidates)
    if (!strcmp(candidate.name, name) && candidate.runs_here()) {
      in_use = &candidate;
      return true;
    }
  return false;
}

}  // namespace seqkernels
