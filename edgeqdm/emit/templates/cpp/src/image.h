// Samples to pixels, images to one sheet, and the sheet to a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "files.h"
#include "table.h"

namespace edgeqdm {

struct PixelShape {
  std::uint32_t channels;
  std::uint32_t height;
  std::uint32_t width;

  std::size_t size() const noexcept { return std::size_t{channels} * height * width; }
};

PixelShape pixel_shape(const Table& table) noexcept;

// Pixels uint8 [B, H, W, channels] of samples float32 [B, C, H, W] in [-1, 1].
void decode(const Table& table, const float* samples, std::size_t n_images, std::uint8_t* pixels);

// An image [H, W, channels].
struct Image {
  std::uint64_t height;
  std::uint64_t width;
  std::uint32_t channels;
  Bytes pixels;
};

// Images side by side, `columns` to a row, 1 pixel apart.
Image sheet(const std::uint8_t* pixels, PixelShape shape, std::size_t n_images,
            std::uint32_t columns);

// A PNG file; other than 1 or 3 channels show the first as grey. Nothing is compressed: deflate's
// stored blocks need no library. Throws Error, OUTPUT, for an image beyond what PNG can hold.
Bytes png_of(const Image& image);

// Throws Error, INPUT, where a sheet of these images could be no PNG file, whatever its ending.
void check_sheet(PixelShape shape, std::uint64_t n_images, std::uint32_t columns);

// Throws Error, INPUT, where the path ends in .pgm and the images are in colour or the other way.
void check_ending(std::uint32_t channels, const std::string& path);

// PGM or PPM where the path ends in .pgm (grey) or .ppm (colour), else PNG. Throws Error.
Bytes encode(const Image& image, const std::string& path);

}  // namespace edgeqdm
