// A program without Python that runs a package of AOTInductor: run_package LIBRARY PACKAGE INPUT OUTPUT T B I.
// LIBRARY is seqkernels' _C, INPUT and OUTPUT are files of float32: the input [T, B, I], and all outputs one by one.
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

int main(int, char** arguments) {
  if (!dlopen(arguments[1], RTLD_NOW)) {  // registers the operators
    std::cerr << dlerror() << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader package(arguments[2]);
  at::Tensor x = at::empty({std::stol(arguments[5]), std::stol(arguments[6]), std::stol(arguments[7])}, at::kFloat);
  std::ifstream(arguments[3], std::ios::binary).read(static_cast<char*>(x.data_ptr()), x.nbytes());
  std::ofstream output(arguments[4], std::ios::binary);
  for (const at::Tensor& result : package.run({x})) {
    const at::Tensor whole = result.contiguous();
    output.write(static_cast<const char*>(whole.data_ptr()), whole.nbytes());
  }
}
