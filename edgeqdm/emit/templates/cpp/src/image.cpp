#include "image.h"

#include <algorithm>
#include <cmath>

#include "crc32.h"
#include "error.h"

namespace edgeqdm {
namespace {

constexpr std::size_t max_stored = 65535;  // bytes of one stored block
constexpr std::uint32_t adler_modulus = 65521;
constexpr std::uint64_t max_png = 0x7FFFFFFF;  // of a side, and bytes of a chunk

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

// Whether images of so many channels are shown in grey.
bool is_grey(std::uint32_t channels) noexcept { return channels != 3; }

Image shown(const Image& image) {
  if (image.channels == 1 || !is_grey(image.channels)) return image;
  Image grey{image.height, image.width, 1, {}};
  for (std::size_t k = 0; k < image.pixels.size(); k += image.channels) {
    grey.pixels.push_back(image.pixels[k]);
  }
  return grey;
}

struct SheetLayout {
  std::uint64_t across;  // images in a row
  std::uint64_t height, width;
};

SheetLayout layout_of(PixelShape shape, std::uint64_t n_images, std::uint32_t columns) noexcept {
  const auto across = std::max<std::uint64_t>(1, std::min<std::uint64_t>(columns, n_images));
  const std::uint64_t rows = (n_images + across - 1) / across;
  return {across, rows * (std::uint64_t{shape.height} + 1) - 1,
          across * (std::uint64_t{shape.width} + 1) - 1};
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
  const SheetLayout layout = layout_of(shape, n_images, columns);
  const auto across = static_cast<std::size_t>(layout.across);
  Image image{layout.height, layout.width, shape.channels, {}};
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
  if (image.width > max_png || image.height > max_png || stream.size() > max_png) {
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

void check_sheet(PixelShape shape, std::uint64_t n_images, std::uint32_t columns) {
  const SheetLayout layout = layout_of(shape, n_images, columns);
  const std::uint64_t line = 1 + layout.width * (is_grey(shape.channels) ? 1 : 3);
  if (line <= max_png / layout.height) return;
  throw Error(EDGEQDM_INPUT, "a sheet of " + std::to_string(n_images) +
                                 " images is larger than 2 GiB - draw fewer images at once");
}

void check_ending(std::uint32_t channels, const std::string& path) {
  if (ends_with(path, ".pgm") && !is_grey(channels)) {
    throw Error(EDGEQDM_INPUT, "these images are in colour: name the file .ppm or .png");
  }
  if (ends_with(path, ".ppm") && is_grey(channels)) {
    throw Error(EDGEQDM_INPUT, "these images are grey: name the file .pgm or .png");
  }
}

Bytes encode(const Image& image, const std::string& path) {
  check_ending(image.channels, path);
  const bool netpbm = ends_with(path, ".pgm") || ends_with(path, ".ppm");
  return netpbm ? netpbm_of(shown(image)) : png_of(image);
}

}  // namespace edgeqdm
