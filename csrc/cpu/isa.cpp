#include "isa.h"

#include <cstring>

namespace seqkernels {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;
  bool bfloat16_products;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

// Best first. The last runs everywhere. runs_here asks for every flag that setup.py compiles a variant with.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"avx512_bf16", &avx512::kernels, true, has_avx512_bf16},
    {"avx512", &avx512::kernels, false, has_avx512},
    {"avx2", &avx2::kernels, false, has_avx2},
#endif
    {"baseline", &baseline::kernels, false, [] { return true; }},
};

const Candidate* first_that_runs() {
  const Candidate* candidate = kCandidates;
  while (!candidate->runs_here()) candidate++;
  return candidate;
}

const Candidate* in_use = first_that_runs();

}  // namespace

const Kernels& kernels() { return *in_use->kernels; }
bool bfloat16_products() { return in_use->bfloat16_products; }
const char* kernels_name() { return in_use->name; }

const char* built_kernels() {
#if defined(__x86_64__)
  return "avx512_bf16 avx512 avx2 baseline";
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
