#include "dispatch.h"

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
  const Kernels* kernels;
  bool (*runs_here)();
};

// Best first; the last runs everywhere. The tests name every flag that setup.py compiles the variant with.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
    {&avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {&baseline::kernels, [] { return true; }},
};

const Kernels* first_that_runs() {
  for (const Candidate& candidate : kCandidates)
    if (candidate.runs_here()) return candidate.kernels;
  return &baseline::kernels;
}

const Kernels* in_use = first_that_runs();

}  // namespace

const Kernels& kernels() { return *in_use; }

const char* built_kernels() {
#if defined(__x86_64__)
  return "avx512 avx2 baseline";
#else
  return "baseline";
#endif
}

bool force_kernels(const char* name) {
  for (const Candidate& candidate : kCandidates)
    if (!strcmp(candidate.kernels->name, name) && candidate.runs_here()) {
      in_use = candidate.kernels;
      return true;
    }
  return false;
}

}  // namespace seqkernels
