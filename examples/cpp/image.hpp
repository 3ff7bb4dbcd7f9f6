// Preprocessing and postprocessing of classify.cpp: reads an image, normalizes it, and ranks the classes.
// Uses only the standard library, so that it can be tested without a GPU.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// Returns the content of a file. Throws std::runtime_error if it cannot be read.
inline std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream bytes;
    if (!(bytes << file.rdbuf())) fail("cannot read " + path + ": it is empty or does not exist");
    return bytes.str();
}

// Pixels from 0 to 255 in the layout (height, width, channels).
struct Image {
    std::int64_t height, width, channels;
    std::vector<std::uint8_t> pixels;
};

// Reads a binary 8-bit PPM (P6, three channels) or PGM (P5, one). Throws std::runtime_error for any other file.
inline Image read_image(const std::string& path) {
    const std::string bytes = read_file(path);
    std::istringstream in(bytes);
    const auto number = [&in] {
        std::int64_t value = -1;
        while (std::isspace(in.peek()) || in.peek() == '#') {
            if (in.get() == '#') in.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
        }
        in >> value;
        return value;
    };
    const std::string kind = bytes.substr(0, 2);
    in.ignore(2);
    const std::int64_t width = number(), height = number(), max_value = number();
    in.get();  // the whitespace before the pixels
    const std::int64_t channels = kind == "P6" ? 3 : 1, max_side = 1 << 15;
    if ((kind != "P6" && kind != "P5") || !in || max_value != 255 || width < 1 || height < 1 || width > max_side ||
        height > max_side) {
        fail(path + " is not a binary 8-bit PPM or PGM image");
    }
    const auto start = bytes.begin() + in.tellg();
    if (bytes.end() - start < height * width * channels) fail(path + " is truncated");
    return {height, width, channels, std::vector<std::uint8_t>(start, start + height * width * channels)};
}

// Part of the engine's record as plain text: a line of means, a line of standard deviations, and a line per class.
struct Labels {
    std::vector<float> mean, deviation;
    std::vector<std::string> classes;
};

// Throws std::runtime_error if the two lines of numbers are missing.
inline Labels read_labels(const std::string& path) {
    std::istringstream in(read_file(path));
    std::string line;
    Labels labels;
    for (std::vector<float>* numbers : {&labels.mean, &labels.deviation}) {
        std::getline(in, line);
        std::istringstream words(line);
        for (float value; words >> value;) numbers->push_back(value);
    }
    if (labels.mean.empty() || labels.mean.size() != labels.deviation.size()) {
        fail(path + " must begin with a line of means and a line of standard deviations");
    }
    while (std::getline(in, line)) labels.classes.push_back(line);
    return labels;
}

// Converts (height, width, channels) from 0 to 255 to (channels, height, width), as (value / 255 - mean) / deviation.
// Throws std::runtime_error if the labels have another number of channels.
inline std::vector<float> normalize(const Image& image, const Labels& labels) {
    if (static_cast<std::int64_t>(labels.mean.size()) != image.channels) {
        fail("the labels have " + std::to_string(labels.mean.size()) + " mean(s), the image " +
             std::to_string(image.channels) + " channel(s)");
    }
    const std::int64_t area = image.height * image.width;
    std::vector<float> planes(image.pixels.size());
    for (std::int64_t c = 0; c < image.channels; ++c) {
        for (std::int64_t i = 0; i < area; ++i) {
            const float value = image.pixels[i * image.channels + c] / 255.0f;
            planes[c * area + i] = (value - labels.mean[c]) / labels.deviation[c];
        }
    }
    return planes;
}

// Returns (index, probability) of the most probable classes, in descending order, with a softmax over all logits.
inline std::vector<std::pair<std::size_t, float>> top(const std::vector<float>& logits, std::size_t count) {
    const float max_logit = *std::max_element(logits.begin(), logits.end());
    std::vector<std::pair<std::size_t, float>> ranked;
    float total = 0;
    for (const float logit : logits) {
        ranked.emplace_back(ranked.size(), std::exp(logit - max_logit));
        total += ranked.back().second;
    }
    for (auto& entry : ranked) entry.second /= total;
    std::stable_sort(ranked.begin(), ranked.end(), [](auto& a, auto& b) { return a.second > b.second; });
    ranked.resize(std::min(count, ranked.size()));
    return ranked;
}
