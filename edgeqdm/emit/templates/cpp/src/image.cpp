#include "image.h"

#include <algorithm>
#include <cmath>

#include "crc32.h"
#include "error.h"

namespace edgeqdm {
namespace {

constexpr std::size_t max_stored = 65535;  // bytes of one stored block
constexpr std::uint32_t adler_modulus = 65521;

// In float32 and rounded half to even, as numpy's rint does. NaN, if there ever is one, is black.
std::uint8_t level(float sample) noexcept {
  const float clipped = std::min(std::max(-1.0f, sample), 1.0f);
  return static_cast<std::uint8_t>(std::nearbyint((clipped + 1.0f) * 127.5f));
}

void put_be32(Bytes& data, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    data.push_back(static_cast<unsigned char>(value >> shift));
  }
}

void put_chunk(Bytes& file, const char* kind, const Bytes& data) {
  put_be32(file, static_cast<std::uint32_t>(data.size()));
  const std::size_t start = file.size();
  file.insert(file.end(), kind, kind + 4);
  file.insert(file.end(), data.begin(), data.end());
  put_be32(file, crc32(0, file.data() + start, file.size() - start));
}

std::uint32_t adler32(const Bytes& data) noexcept {
  std::uint32_t low = 1, high = 0;
  for (unsigned char byte : data) {
    low = (low + byte) % adler_modulus;
    high = (high + low) % adler_modulus;
  }
  return high << 16 | low;
}

// A zlib stream of stored blocks, RFC 1950 and RFC 1951, section 3.2.4.
Bytes stored(const Bytes& data) {
  Bytes stream = {0x78, 0x01};
  stream.reserve(data.size() + data.size() / max_stored * 5 + 16);
  for (std::size_t start = 0; start < data.size(); start += max_stored) {
    const std::size_t n = std::min(max_stored, data.size() - start);
    const auto length = static_cast<unsigned>(n);
    stream.push_back(start + n == data.size() ? 1 : 0);
    for (unsigned half : {length, ~length}) {
      stream.push_back(static_cast<unsigned char>(half & 0xFF));
      stream.push_back(static_cast<unsigned char>(half >> 8 & 0xFF));
    }
    const auto first = data.begin() + static_cast<std::ptrdiff_t>(start);
    stream.insert(stream.end(), first, first + static_cast<std::ptrdiff_t>(n));
  }
  put_be32(stream, adler32(data));
  return stream;
}

Image shown(const Image& image) {
  if (image.channels == 1 || image.channels == 3) return image;
  Image grey{image.height, image.width, 1, {}};
  for (std::size_t k = 0; k < image.pixels.size(); k += image.channels) {
    grey.pixels.push_back(image.pixels[k]);
  }
  return grey;
}

bool ends_with(const std::string& path, const std::string& ending) {
  return path.size() >= ending.size() &&
         path.compare(path.size() - ending.size(), ending.size(), ending) == 0;
}

Bytes netpbm_of(const Image& image) {
  const std::string header = std::string(image.channels == 1 ? "P5" : "P6") + "\n" +
                             std::to_string(image.width) + " " + std::to_string(image.height) +
                             "\n255\n";
  Bytes file(header.begin(), header.end());
  file.insert(file.end(), image.pixels.begin(), image.pixels.end());
  return file;
}

}  // namespace

PixelShape pixel_shape(const Table& table) noexcept {
  const std::uint32_t factor = table.decoder_factor;
  return {table.channels / (factor * factor), table.height * factor, table.width * factor};
}

void decode(const Table& table, const float* samples, std::size_t n_images, std::uint8_t* pixels) {
  const PixelShape shape = pixel_shape(table);
  const std::size_t factor = table.decoder_factor;
  const std::size_t plane = std::size_t{table.height} * table.width;
  for (std::size_t b = 0; b < n_images; ++b) {
    const float* sample = samples + b * plane * table.channels;
    for (std::size_t row = 0; row < shape.height; ++row) {
      for (std::size_t column = 0; column < shape.width; ++column) {
        for (std::size_t channel = 0; channel < shape.channels; ++channel) {
          const std::size_t from =
              (channel * factor + row % factor) * factor + column % factor;
          const std::size_t at = row / factor * table.width + column / factor;
          *pixels++ = level(sample[from * plane + at]);
        }
      }
    }
  }
}

Image sheet(const std::uint8_t* pixels, PixelShape shape, std::size_t n_images,
            std::uint32_t columns) {
  const std::size_t across = std::max<std::size_t>(1, std::min<std::size_t>(columns, n_images));
  const std::size_t rows = (n_images + across - 1) / across;
  const std::size_t height = rows * (std::size_t{shape.height} + 1) - 1;
  const std::size_t width = across * (std::size_t{shape.width} + 1) - 1;
  Image image{height, width, shape.channels, {}};
  const std::size_t line = static_cast<std::size_t>(image.width) * shape.channels;
  image.pixels.assign(static_cast<std::size_t>(image.height) * line, 128);
  const std::size_t n_row = std::size_t{shape.width} * shape.channels;
  for (std::size_t k = 0; k < n_images; ++k) {
    const std::size_t top = k / across * (std::size_t{shape.height} + 1);
    const std::size_t left = k % across * (std::size_t{shape.width} + 1) * shape.channels;
    for (std::size_t row = 0; row < shape.height; ++row) {
      std::copy_n(pixels + k * shape.size() + row * n_row, n_row,
                  image.pixels.data() + (top + row) * line + left);
    }
  }
  return image;
}

Bytes png_of(const Image& original) {
  const Image image = shown(original);
  const std::size_t line = static_cast<std::size_t>(image.width) * image.channels;
  Bytes raw;
  raw.reserve(static_cast<std::size_t>(image.height) * (line + 1));
  for (std::size_t row = 0; row < image.height; ++row) {
    raw.push_back(0);  // no filter
    const auto first = image.pixels.begin() + static_cast<std::ptrdiff_t>(row * line);
    raw.insert(raw.end(), first, first + static_cast<std::ptrdiff_t>(line));
  }
  const Bytes stream = stored(raw);
  if (image.width > 0x7FFFFFFF || image.height > 0x7FFFFFFF || stream.size() > 0x7FFFFFFF) {
    throw Error(EDGEQDM_OUTPUT, "the sheet is too large for a PNG file");
  }
  Bytes header;
  put_be32(header, static_cast<std::uint32_t>(image.width));
  put_be32(header, static_cast<std::uint32_t>(image.height));
  const unsigned char colour = image.channels == 1 ? 0 : 2;
  header.insert(header.end(), {8, colour, 0, 0, 0});
  Bytes file = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
  put_chunk(file, "IHDR", header);
  put_chunk(file, "IDAT", stream);
  put_chunk(file, "IEND", {});
  return file;
}

Bytes encode(const Image& image, const std::string& path) {
  const bool pgm = ends_with(path, ".pgm"), ppm = ends_with(path, ".ppm");
  if (!pgm && !ppm) return png_of(image);
  const Image plain = shown(image);
  if (pgm != (plain.channels == 1)) {
    throw Error(EDGEQDM_INPUT, pgm ? "these images are in colour: name the file .ppm or .png"
                                   : "these images are grey: name the file .pgm or .png");
  }
  return netpbm_of(plain);
}

}  // namespace edgeqdm
