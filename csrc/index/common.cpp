#include "common.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace megapoly {
namespace {

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: the CRC of byte b followed by k zero bytes, so that eight bytes are folded in at a time.
Tables make_tables() noexcept {
    Tables tables{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
        tables[0][byte] = crc;
    }
    for (std::size_t k = 1; k < tables.size(); ++k)
        for (std::size_t byte = 0; byte < 256; ++byte)
            tables[k][byte] = (tables[k - 1][byte] >> 8) ^ tables[0][tables[k - 1][byte] & 0xFFU];
    return tables;
}

const Tables kTables = make_tables();

[[noreturn]] void fail(const std::string& path, const char* what) {
    throw DataError(path + ": cannot be " + what + " (" + std::strerror(errno) + ")");
}

void write_all(int descriptor, const std::string& path, const unsigned char* data, std::size_t size) {
    while (size > 0) {
        const ssize_t count = ::write(descriptor, data, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail(path, "written");
        data += count;
        size -= static_cast<std::size_t>(count);
    }
}

}  // namespace

std::uint32_t crc32(const void* data, std::size_t size) noexcept {
    const auto* at = static_cast<const unsigned char*>(data);
    std::uint32_t crc = ~std::uint32_t{0};
    for (; size >= 8; size -= 8, at += 8) {
        std::uint32_t low, high;
        std::memcpy(&low, at, 4);
        std::memcpy(&high, at + 4, 4);
        low ^= crc;
        crc = kTables[7][low & 0xFFU] ^ kTables[6][(low >> 8) & 0xFFU] ^ kTables[5][(low >> 16) & 0xFFU] ^
              kTables[4][low >> 24] ^ kTables[3][high & 0xFFU] ^ kTables[2][(high >> 8) & 0xFFU] ^
              kTables[1][(high >> 16) & 0xFFU] ^ kTables[0][high >> 24];
    }
    for (; size > 0; --size, ++at) crc = (crc >> 8) ^ kTables[0][(crc ^ *at) & 0xFFU];
    return ~crc;
}

OutputFile::OutputFile(const std::string& path)
    : path_(path), descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) fail(path_, "created");
    buffer_.reserve(kBlock);
}

OutputFile::~OutputFile() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::write(const void* data, std::size_t size) {
    if (descriptor_ < 0) throw DataError(path_ + ": is finished already");
    const auto* at = static_cast<const unsigned char*>(data);
    while (size > 0) {
        const std::size_t part = std::min(size, kBlock - buffer_.size());
        buffer_.insert(buffer_.end(), at, at + part);
        at += part;
        size -= part;
        if (buffer_.size() == kBlock) flush();
    }
}

// The buffer is one block, so that every flush but the last ends one.
void OutputFile::flush() {
    if (buffer_.empty()) return;
    block_crcs_.push_back(crc32(buffer_.data(), buffer_.size()));
    write_all(descriptor_, path_, buffer_.data(), buffer_.size());
    buffer_.clear();
}

void OutputFile::finish() {
    flush();
    if (::fsync(descriptor_) != 0) fail(path_, "brought to the disk");
    const int descriptor = descriptor_;
    descriptor_ = -1;
    if (::close(descriptor) != 0) fail(path_, "closed");
}

Spool::Spool(const std::string& path) : path_(path) {
    std::string name = path + ".XXXXXX";
    descriptor_ = ::mkstemp(name.data());
    if (descriptor_ < 0 || ::unlink(name.c_str()) != 0) fail(path_, "created");
    buffer_.reserve(kBlock);
}

Spool::~Spool() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

void Spool::append(const void* data, std::size_t size) {
    const auto* at = static_cast<const unsigned char*>(data);
    while (size > 0) {
        const std::size_t part = std::min(size, kBlock - buffer_.size());
        buffer_.insert(buffer_.end(), at, at + part);
        at += part;
        size -= part;
        if (buffer_.size() == kBlock) flush();
    }
}

void Spool::flush() {
    write_all(descriptor_, path_, buffer_.data(), buffer_.size());
    buffer_.clear();
}

void Spool::read(const std::function<void(const unsigned char*, std::size_t)>& visit) {
    flush();
    std::vector<unsigned char> part(kBlock);
    off_t offset = 0;
    std::size_t held = 0;
    for (;;) {
        const ssize_t count = ::pread(descriptor_, part.data() + held, kBlock - held, offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) fail(path_, "read");
        offset += count;
        held += static_cast<std::size_t>(count);
        if (count > 0 && held < kBlock) continue;
        if (held > 0) visit(part.data(), held);
        if (count == 0) return;
        held = 0;
    }
}

}  // namespace megapoly
