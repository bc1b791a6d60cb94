// Readers of the two tensor files a package or its user brings: safetensors and .npy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "files.h"

namespace edgeqdm {

// A tensor in host byte order, row-major. One of the two holds its values.
struct Tensor {
  std::vector<std::uint64_t> shape;
  std::vector<float> floats;
  std::vector<std::int64_t> integers;
};

// Tensors of a safetensors file, F32 and I64. Throws Error, VERIFY.
std::map<std::string, Tensor> parse_safetensors(const Bytes& data);

// A .npy file, versions 1 to 3, of float16, float32 or float64, finite in float32; `name` is the
// file in messages. Throws Error, INPUT.
Tensor parse_npy(const Bytes& data, const std::string& name);

// The bytes of a float32 .npy file.
Bytes npy_of(const float* values, const std::vector<std::uint64_t>& shape);

}  // namespace edgeqdm
