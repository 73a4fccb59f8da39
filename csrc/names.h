// The namespace of the operators, and the name of the Python module of the CPU's library. A Hugging Face kernel, of
// which several versions share a process, has one unique name for both, which its build gives (hf_kernel.py).
#pragma once

#ifdef TORCH_EXTENSION_NAME
#define SEQKERNELS_NAMESPACE TORCH_EXTENSION_NAME
#define SEQKERNELS_MODULE TORCH_EXTENSION_NAME
#else
#define SEQKERNELS_NAMESPACE seqkernels
#define SEQKERNELS_MODULE _C
#endif

// torch's macros paste the name, so that it must be expanded before.
#define SEQKERNELS_FRAGMENT_OF(space, m) STABLE_TORCH_LIBRARY_FRAGMENT(space, m)
#define SEQKERNELS_IMPL_OF(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
#define SEQKERNELS_FRAGMENT(m) SEQKERNELS_FRAGMENT_OF(SEQKERNELS_NAMESPACE, m)
#define SEQKERNELS_IMPL(key, m) SEQKERNELS_IMPL_OF(SEQKERNELS_NAMESPACE, key, m)
