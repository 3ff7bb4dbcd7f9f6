// Classifies one image with a TensorRT engine: classify ENGINE LABELS IMAGE.ppm [--unverified]
//
// Prints the five most probable classes. First, the engine must give its golden answers, at its smallest and its largest
// batch; --unverified makes a wrong answer a warning. The engine's input is either float32 (B, C, H, W), which this program
// normalizes, or uint8 (B, H, W, C), a camera frame that the engine normalizes itself. The source compiles with
// TensorRT 10 and 11 and with TensorRT for RTX; it uses only what their C++ interfaces have in common.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <memory>
#include <mutex>

#include "golden.hpp"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::TensorIOMode;

constexpr const char* kInput = "images";
constexpr const char* kOutput = "logits";

// Stores the first error, which is printed when a call fails. Any thread may log.
class Logger : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (severity <= Severity::kERROR && reason_.empty()) reason_ = message;
    }
    std::string reason() const { return reason_.empty() ? "no reason given" : reason_; }

private:
    std::mutex mutex_;
    std::string reason_;
};

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) fail(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename T>
std::unique_ptr<T> own(T* object, const char* what, const Logger& logger) {
    if (!object) fail(std::string(what) + ": " + logger.reason());
    return std::unique_ptr<T>(object);
}

// Memory on the GPU, freed by the destructor.
class DeviceBuffer {
public:
    explicit DeviceBuffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "cannot allocate on the GPU"); }
    ~DeviceBuffer() { cudaFree(data_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    void* data() const { return data_; }

private:
    void* data_ = nullptr;
};

std::string text(const Dims& shape) {
    std::string sizes;
    for (int i = 0; i < shape.nbDims; ++i) sizes += (i ? ", " : "") + std::to_string(shape.d[i]);
    return "(" + sizes + ")";
}

// Returns the shape of a batch of such images as the engine's input. -1 in the engine's shape is any size.
Dims input_shape(const nvinfer1::ICudaEngine& engine, const Image& image, std::int64_t batch, bool is_frame) {
    const Dims taken = engine.getTensorShape(kInput);
    const Dims given = is_frame ? Dims{4, {batch, image.height, image.width, image.channels}}
                                : Dims{4, {batch, image.channels, image.height, image.width}};
    bool fits = taken.nbDims == 4;
    for (int i = 0; fits && i < 4; ++i) fits = taken.d[i] == -1 || taken.d[i] == given.d[i];
    if (!fits) {
        fail("the engine takes " + text(taken) + (is_frame ? " (B, H, W, C)" : " (B, C, H, W)") + " (-1: any size), " +
             "but the image is " + text(given) + ": resize it, or build another engine");
    }
    return given;
}

// Returns the logits (batch, classes) of images of one size. Throws std::runtime_error if the engine, the images and the
// normalization do not match.
std::vector<float> infer(nvinfer1::ICudaEngine& engine, const std::vector<Image>& images, const Labels& normalization,
                         const Logger& logger) {
    const DataType type = engine.getTensorDataType(kInput);
    const bool is_frame = type == DataType::kUINT8;
    if (engine.getTensorIOMode(kInput) != TensorIOMode::kINPUT || (type != DataType::kFLOAT && !is_frame) ||
        engine.getTensorIOMode(kOutput) != TensorIOMode::kOUTPUT ||
        engine.getTensorDataType(kOutput) != DataType::kFLOAT) {
        fail("the engine must have an input `images`, float32 or uint8, and an output `logits`, float32");
    }
    const auto context = own(engine.createExecutionContext(), "cannot create an execution context", logger);
    const std::int64_t batch = static_cast<std::int64_t>(images.size());
    if (!context->setInputShape(kInput, input_shape(engine, images[0], batch, is_frame))) {
        fail("the engine rejects the image's shape: " + logger.reason());
    }
    const Dims output = context->getTensorShape(kOutput);
    if (output.nbDims != 2) fail("the engine's output is " + text(output) + ", not (batch, classes)");
    std::vector<float> planes;
    std::vector<std::uint8_t> frames;
    for (const Image& image : images) {
        if (is_frame) {
            frames.insert(frames.end(), image.pixels.begin(), image.pixels.end());
        } else {
            const std::vector<float> normalized = normalize(image, normalization);
            planes.insert(planes.end(), normalized.begin(), normalized.end());
        }
    }
    const void* source = is_frame ? static_cast<const void*>(frames.data()) : planes.data();
    const std::size_t bytes = is_frame ? frames.size() : planes.size() * sizeof(float);
    std::vector<float> logits(static_cast<std::size_t>(batch * output.d[1]));

    const DeviceBuffer inputs(bytes), results(logits.size() * sizeof(float));
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "cannot create a stream");
    const std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> owner(stream, cudaStreamDestroy);
    check(cudaMemcpyAsync(inputs.data(), source, bytes, cudaMemcpyHostToDevice, stream), "cannot copy the image");
    if (!context->setTensorAddress(kInput, inputs.data()) || !context->setTensorAddress(kOutput, results.data()) ||
        !context->enqueueV3(stream)) {
        fail("cannot run the engine: " + logger.reason());
    }
    check(cudaMemcpyAsync(logits.data(), results.data(), logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream),
          "cannot copy the logits");
    check(cudaStreamSynchronize(stream), "the engine failed");
    return logits;
}

// Throws std::runtime_error if the engine computes other logits than the golden answers in its folder.
void verify(nvinfer1::ICudaEngine& engine, const std::string& golden_path, const Logger& logger) {
    if (!std::ifstream(golden_path)) {
        std::fprintf(stderr, "warning: not verified: there is no %s\n", golden_path.c_str());
        return;
    }
    const Golden golden = read_golden(golden_path);
    for (const auto limit : {nvinfer1::OptProfileSelector::kMIN, nvinfer1::OptProfileSelector::kMAX}) {
        const std::int64_t batch = engine.getProfileShape(kInput, 0, limit).d[0];
        std::vector<Image> images;
        for (std::int64_t i = 0; i < batch; ++i) {
            images.push_back(golden.images[static_cast<std::size_t>(i) % golden.images.size()]);
        }
        check_logits(golden, infer(engine, images, golden.labels, logger), images.size());
    }
}

void classify(const std::string& engine_path, const char* labels_path, const char* image_path, bool unverified) {
    const std::string plan = read_file(engine_path);
    const Labels labels = read_labels(labels_path);
    const Image image = read_image(image_path);
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "no usable NVIDIA GPU");
    if (getInferLibVersion() != NV_TENSORRT_VERSION) {
        fail("built for TensorRT " + std::to_string(NV_TENSORRT_VERSION) + ", but the library here is " +
             std::to_string(getInferLibVersion()) + ": build this program again");
    }
    Logger logger;
    const auto runtime = own(nvinfer1::createInferRuntime(logger), "cannot start TensorRT", logger);
    const auto engine = own(runtime->deserializeCudaEngine(plan.data(), plan.size()), "cannot load the engine", logger);
    try {
        verify(*engine, engine_path.substr(0, engine_path.find_last_of('/') + 1) + "golden.safetensors", logger);
    } catch (const std::exception& error) {
        if (!unverified) throw;
        std::fprintf(stderr, "warning: --unverified: %s\n", error.what());
    }
    const std::vector<float> logits = infer(*engine, {image}, labels, logger);
    if (logits.size() != labels.classes.size()) {
        fail("the engine has " + std::to_string(logits.size()) + " classes, but there are " +
             std::to_string(labels.classes.size()) + " labels: use the labels of this network");
    }
    for (const auto& [index, probability] : top(logits, 5)) {
        std::printf("%6.2f%%  %s\n", 100 * probability, labels.classes[index].c_str());
    }
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const bool unverified = count == 5 && std::string(arguments[4]) == "--unverified";
        if (count != 4 && !unverified) fail("usage: classify ENGINE LABELS IMAGE.ppm [--unverified]");
        classify(arguments[1], arguments[2], arguments[3], unverified);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
