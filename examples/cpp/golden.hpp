// Golden answers: small images and the logits that PyTorch computes for them, beside every engine. An engine that
// computes other logits is wrong. Uses only the standard library, so that it can be tested without a GPU.
#pragma once

#include <cstring>

#include "image.hpp"

// The content of golden.safetensors; docs/engines.md describes it.
struct Golden {
    std::vector<Image> images;            // of the network's input size
    Labels labels;                        // mean and deviation only; none for a network that takes uint8 frames
    std::vector<std::int64_t> positions;  // which logits of an image are stored
    std::vector<float> logits;            // (images, positions)
    double tolerance;
};

// Returns the numbers that follow `key` in a text, up to the first bracket that closes.
inline std::vector<double> numbers_after(const std::string& text, const std::string& key) {
    std::vector<double> numbers;
    const std::size_t start = text.find(key);
    if (start == std::string::npos) fail("golden.safetensors has no " + key);
    const std::size_t end = text.find_first_of("]}", start);
    std::string list = text.substr(start + key.size(), end - start - key.size());
    std::replace_if(list.begin(), list.end(), [](char c) { return !std::strchr("0123456789.eE+-", c); }, ' ');
    std::istringstream words(list);
    for (double value; words >> value;) numbers.push_back(value);
    return numbers;
}

// Returns a tensor's values. `header` is the file's JSON, `data` the bytes after it.
template <typename T>
std::vector<T> read_tensor(const std::string& header, const std::string& data, const std::string& name) {
    const std::size_t entry = header.find("\"" + name + "\":{");
    if (entry == std::string::npos) fail("golden.safetensors has no " + name);
    const auto range = numbers_after(header.substr(entry), "\"data_offsets\":");
    if (range.size() != 2 || range[0] < 0 || range[0] > range[1] || range[1] > static_cast<double>(data.size())) {
        fail("golden.safetensors is damaged");
    }
    std::vector<T> values(static_cast<std::size_t>(range[1] - range[0]) / sizeof(T));
    const char* start = data.data() + static_cast<std::size_t>(range[0]);
    if (!values.empty()) std::memcpy(values.data(), start, values.size() * sizeof(T));
    return values;
}

// Enlarges an image by repeating each pixel equally often, then cropping at the end.
inline Image repeat_pixels(const Image& small, std::int64_t height, std::int64_t width) {
    const std::int64_t rows = (height + small.height - 1) / small.height;
    const std::int64_t columns = (width + small.width - 1) / small.width;
    Image large{height, width, small.channels, {}};
    for (std::int64_t y = 0; y < height; ++y) {
        for (std::int64_t x = 0; x < width; ++x) {
            const auto pixel = small.pixels.begin() + (y / rows * small.width + x / columns) * small.channels;
            large.pixels.insert(large.pixels.end(), pixel, pixel + small.channels);
        }
    }
    return large;
}

// Throws std::runtime_error if the file is damaged.
inline Golden read_golden(const std::string& path) {
    const std::string bytes = read_file(path);
    std::uint64_t length = 0;
    if (bytes.size() < sizeof(length)) fail(path + " is damaged");
    std::memcpy(&length, bytes.data(), sizeof(length));  // little-endian, as are all GPUs' hosts
    if (length > bytes.size() - sizeof(length)) fail(path + " is damaged");
    std::string header = bytes.substr(sizeof(length), length);
    const std::string data = bytes.substr(sizeof(length) + length);
    header.erase(std::remove(header.begin(), header.end(), '\\'), header.end());  // the metadata is JSON in JSON
    const std::size_t entry = header.find("\"images\":{");
    const auto shape = numbers_after(header.substr(entry == std::string::npos ? 0 : entry), "\"shape\":");
    const auto size = numbers_after(header, "\"size\":"), tolerance = numbers_after(header, "\"tensorrt\":");
    const auto pixels = read_tensor<std::uint8_t>(header, data, "images");
    Golden golden;
    golden.positions = read_tensor<std::int64_t>(header, data, "positions");
    golden.logits = read_tensor<float>(header, data, "logits");
    if (shape.size() != 4 || size.size() != 2 || tolerance.empty() || golden.positions.empty() ||
        shape[0] * shape[1] * shape[2] * shape[3] != static_cast<double>(pixels.size()) ||
        *std::min_element(shape.begin(), shape.end()) < 1 || std::min(size[0], size[1]) < 1 ||
        size[0] * size[1] > 1 << 25 ||
        golden.logits.size() != static_cast<std::size_t>(shape[0]) * golden.positions.size()) {
        fail(path + " is damaged");
    }
    golden.tolerance = tolerance[0];
    const auto mean = numbers_after(header, "\"mean\":"), deviation = numbers_after(header, "\"std\":");
    golden.labels.mean.assign(mean.begin(), mean.end());
    golden.labels.deviation.assign(deviation.begin(), deviation.end());
    const std::size_t area = pixels.size() / static_cast<std::size_t>(shape[0]);
    for (std::size_t i = 0; i < static_cast<std::size_t>(shape[0]); ++i) {
        const auto start = pixels.begin() + static_cast<std::ptrdiff_t>(i * area);
        const Image small{static_cast<std::int64_t>(shape[1]), static_cast<std::int64_t>(shape[2]),
                          static_cast<std::int64_t>(shape[3]), {start, start + static_cast<std::ptrdiff_t>(area)}};
        golden.images.push_back(
            repeat_pixels(small, static_cast<std::int64_t>(size[0]), static_cast<std::int64_t>(size[1])));
    }
    return golden;
}

// Throws std::runtime_error if logits (batch, classes) are wrong, where image i of the batch is golden image i modulo
// their number. The error of an image is its distance from PyTorch's logits, over their spread, as in
// illama/golden_answers.py.
inline void check_logits(const Golden& golden, const std::vector<float>& logits, std::size_t batch) {
    const std::size_t stored = golden.positions.size(), images = golden.images.size(), classes = logits.size() / batch;
    double spread = 0, magnitude = 0;
    for (std::size_t i = 0; i < images; ++i) {
        const float* row = golden.logits.data() + i * stored;
        const double mean = std::accumulate(row, row + stored, 0.0) / static_cast<double>(stored);
        for (std::size_t k = 0; k < stored; ++k) {
            spread += (row[k] - mean) * (row[k] - mean);
            magnitude += static_cast<double>(row[k]) * row[k];
        }
    }
    spread = std::max({std::sqrt(spread), 1e-3 * std::sqrt(magnitude), 1e-9}) / std::sqrt(static_cast<double>(images));
    double total = 0, largest = 0;
    for (std::size_t i = 0; i < batch; ++i) {
        double error = 0;
        for (std::size_t k = 0; k < stored; ++k) {
            if (golden.positions[k] < 0 || static_cast<std::size_t>(golden.positions[k]) >= classes) {
                fail("the engine has fewer logits than PyTorch");
            }
            const double difference = logits[i * classes + static_cast<std::size_t>(golden.positions[k])] -
                                      static_cast<double>(golden.logits[i % images * stored + k]);
            error += difference * difference;
        }
        error = std::sqrt(error) / spread;
        if (!std::isfinite(error)) {
            fail("the engine computes logits that are not finite, at batch " + std::to_string(batch));
        }
        largest = std::max(largest, error);
        total += error * error / static_cast<double>(batch);
    }
    if (largest > 2 * golden.tolerance || (batch >= images && std::sqrt(total) > golden.tolerance)) {
        fail("the engine computes other logits than PyTorch at batch " + std::to_string(batch) + ": the error is " +
             std::to_string(largest) + " of their spread, and " + std::to_string(golden.tolerance) +
             " is rounding; do not use it here, or give --unverified");
    }
}
