// Shared by the data engine: the error type, the token types of Megatron's format, files that are written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the indexed format is little-endian, and these files are read and written in the machine's own order"
#endif

namespace megapoly {

// Reaches Python as megapoly.errors.DataError.
struct DataError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Length of a block with a checksum of its own, in bytes.
constexpr std::size_t kBlock = std::size_t{1} << 20;

// Calls visit(T{}) with the integer type that a dtype code of the format stands for.
template <typename Visit>
auto with_token_type(int code, Visit&& visit) {
    switch (code) {
        case 1: return visit(std::uint8_t{});
        case 2: return visit(std::int8_t{});
        case 3: return visit(std::int16_t{});
        case 4: return visit(std::int32_t{});
        case 5: return visit(std::int64_t{});
        case 8: return visit(std::uint16_t{});
        default: throw DataError("dtype code " + std::to_string(code) + " does not stand for an integer type");
    }
}

// A file that is written from start to end through a large buffer, with a CRC-32 for every block of kBlock bytes.
class OutputFile {
public:
    explicit OutputFile(const std::string& path);
    ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    // Appends one trivially copyable value.
    template <typename T>
    void put(T value) {
        write(&value, sizeof(T));
    }
    void write(const void* data, std::size_t size);
    // Writes out what is buffered, brings it to the disk and closes.
    void finish();
    // After finish(): one CRC for every block, the last one for what was left.
    const std::vector<std::uint32_t>& block_crcs() const noexcept { return block_crcs_; }
    const std::string& path() const noexcept { return path_; }

private:
    void flush();

    std::string path_;
    int descriptor_;
    std::size_t written_ = 0;
    std::vector<unsigned char> buffer_;
    std::vector<std::uint32_t> block_crcs_;
};

// A file without a name in the folder of `path`, which is gone with its last descriptor, however the process ends.
class NamelessFile {
public:
    explicit NamelessFile(const std::string& path);
    ~NamelessFile();
    NamelessFile(const NamelessFile&) = delete;
    NamelessFile& operator=(const NamelessFile&) = delete;

    // Appends; messages name `path`.
    void append(const void* data, std::size_t size);
    int number() const noexcept { return descriptor_; }
    const std::string& path() const noexcept { return path_; }

private:
    std::string path_;
    int descriptor_;
};

// Bytes that wait in a file without a name, in the folder of `path`.
class Spool {
public:
    explicit Spool(const std::string& path);

    void append(const void* data, std::size_t size);
    // Calls visit(bytes, size) with everything in order, in parts of kBlock bytes but for the last.
    void read(const std::function<void(const unsigned char*, std::size_t)>& visit);

private:
    void flush();

    NamelessFile file_;
    std::vector<unsigned char> buffer_;
};

}  // namespace megapoly
