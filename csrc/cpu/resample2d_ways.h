// The ways in which resample2d goes on the CPU. Each makes the rows `begin` to `end` - 1 of y, counted over all images.
#pragma once
#include "cpu/resample2d_images.h"

namespace gdd_fast::cpu::resampling {

// of contiguous images: one number a pixel, pixels side by side
void make_planes(const Images<float>& m, bool up, int64_t begin, int64_t end);
void make_planes(const Images<double>& m, bool up, int64_t begin, int64_t end);
void make_planes(const Images<at::BFloat16>& m, bool up, int64_t begin, int64_t end);
void make_planes(const Images<at::Half>& m, bool up, int64_t begin, int64_t end);

// of any images
void make_pixels(const Images<float>& m, bool up, int64_t begin, int64_t end);
void make_pixels(const Images<double>& m, bool up, int64_t begin, int64_t end);
void make_pixels(const Images<at::BFloat16>& m, bool up, int64_t begin, int64_t end);
void make_pixels(const Images<at::Half>& m, bool up, int64_t begin, int64_t end);

// of any images, going up with 2 or 4 taps, two rows at a time: `begin` and `end` count pairs, of which each
// image has `row_pairs`. Where the padding is odd, the first pair of an image has only its second row.
void make_pixel_pairs(const Images<float>& m, int64_t begin, int64_t end);
void make_pixel_pairs(const Images<double>& m, int64_t begin, int64_t end);
void make_pixel_pairs(const Images<at::BFloat16>& m, int64_t begin, int64_t end);
void make_pixel_pairs(const Images<at::Half>& m, int64_t begin, int64_t end);

inline int64_t row_pairs(int64_t out_height, int padding) { return (out_height + padding % 2 + 1) / 2; }

}  // namespace gdd_fast::cpu::resampling
